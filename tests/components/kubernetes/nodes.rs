//! Zone of the agent's node, creation time of any node, and the API server's clock.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use lighterman::ports::{ClusterError, Nodes};
use serde_json::json;

use super::apiserver::{KubeNamespace, create, with_deadline};

#[tokio::test]
async fn the_own_nodes_label_names_the_zone() {
    with_deadline(async {
        for (label, zone) in [(Some("eu-central-1a"), Some("eu-central-1a")), (Some(""), None), (None, None)] {
            let kube = KubeNamespace::new().await;
            let agent = kube.agent().await;
            let labels = label.map(|label| json!({ "topology.kubernetes.io/zone": label }));
            let node = json!({ "metadata": { "name": kube.name, "labels": labels } });
            create::<Node>(&Api::all(kube.admin.clone()), node).await;
            let found = agent.zone().await.unwrap();
            assert_eq!(found.as_ref().map(|zone| zone.as_str()), zone, "{label:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn an_absent_node_has_no_zone_yet() {
    with_deadline(async {
        let agent = KubeNamespace::new().await.agent().await;
        assert!(matches!(agent.zone().await, Err(ClusterError::Gone(_))));
    })
    .await;
}

#[tokio::test]
async fn the_creation_time_of_a_node_is_the_api_servers_and_the_same_for_every_agent() {
    with_deadline(async {
        let (kube, other) = (KubeNamespace::new().await, KubeNamespace::new().await);
        let node = json!({ "metadata": { "name": kube.name } });
        create::<Node>(&Api::all(kube.admin.clone()), node).await;
        let name = kube.name.parse().unwrap();
        let created = kube.agent().await.node_created(&name).await.unwrap();
        let age = SystemTime::now().duration_since(created).unwrap_or_default();
        assert!(age < Duration::from_secs(600), "{age:?}");
        assert_eq!(other.agent().await.node_created(&name).await.unwrap(), created);
        let absent = other.agent().await.node_created(&other.name.parse().unwrap()).await;
        assert!(matches!(absent, Err(ClusterError::Gone(_))), "{absent:?}");
    })
    .await;
}

#[tokio::test]
async fn the_api_servers_clock_is_the_clock_of_its_machine() {
    with_deadline(async {
        let sample = KubeNamespace::new().await.agent().await.clock().await.unwrap();
        assert_eq!(sample.certain_seconds(), Some(0.0), "{sample:?}");
        assert!(sample.date.as_secs() > 1_700_000_000, "{sample:?}");
    })
    .await;
}
