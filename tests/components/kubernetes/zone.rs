//! The zone of the agent's own node.

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use lighterman::ports::{Cluster, ClusterError};
use serde_json::json;

use super::apiserver::{Place, make, within};

#[tokio::test]
async fn the_own_nodes_label_names_the_zone() {
    within(async {
        for (label, zone) in [(Some("eu-central-1a"), Some("eu-central-1a")), (Some(""), None), (None, None)] {
            let place = Place::new().await;
            let agent = place.agent().await;
            let labels = label.map(|label| json!({ "topology.kubernetes.io/zone": label }));
            let node = json!({ "metadata": { "name": place.name, "labels": labels } });
            make::<Node>(&Api::all(place.admin.clone()), node).await;
            let found = agent.zone().await.unwrap();
            assert_eq!(found.as_ref().map(|zone| zone.as_str()), zone, "{label:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_node_that_is_not_there_yet_is_asked_for_again() {
    within(async {
        let agent = Place::new().await.agent().await;
        assert!(matches!(agent.zone().await, Err(ClusterError::Gone(_))));
    })
    .await;
}
