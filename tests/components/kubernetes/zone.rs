//! Nodes: the zone of the agent's own, the age of any; and the API server's clock.

use std::time::{Duration, SystemTime};

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

#[tokio::test]
async fn the_creation_time_of_a_node_is_the_api_servers_and_the_same_for_every_agent() {
    within(async {
        let (place, other) = (Place::new().await, Place::new().await);
        let node = json!({ "metadata": { "name": place.name } });
        make::<Node>(&Api::all(place.admin.clone()), node).await;
        let name = place.name.parse().unwrap();
        let created = place.agent().await.node_created(&name).await.unwrap();
        let age = SystemTime::now().duration_since(created).unwrap_or_default();
        assert!(age < Duration::from_secs(600), "{age:?}");
        assert_eq!(other.agent().await.node_created(&name).await.unwrap(), created);
        let absent = other.agent().await.node_created(&other.name.parse().unwrap()).await;
        assert!(matches!(absent, Err(ClusterError::Gone(_))), "{absent:?}");
    })
    .await;
}

#[tokio::test]
async fn the_api_servers_clock_on_this_machine_is_this_machines() {
    within(async {
        let sample = Place::new().await.agent().await.clock().await.unwrap();
        assert_eq!(sample.certain_seconds(), Some(0.0), "{sample:?}");
        assert!(sample.date.as_secs() > 1_700_000_000, "{sample:?}");
    })
    .await;
}
