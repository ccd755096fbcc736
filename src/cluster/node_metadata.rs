//! Metadata of nodes: the zone of the agent's own node, and the creation time of any node.

use std::time::SystemTime;

use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};

use super::metadata::metadata;
use crate::model::{NodeName, Zone};
use crate::ports::ClusterError;

/// Kubernetes' label for a failure domain ("Well-Known Labels"). The cloud's controller or the
/// kubelet's flags set the label.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The zone, from the metadata of one node by name, without a list or a watch.
pub(super) async fn zone(client: &Client, node: &NodeName) -> Result<Option<Zone>, ClusterError> {
    let found = metadata(&Api::<Node>::all(client.clone()), node.as_str(), None).await;
    let found = found.map_err(|failure| failure.into_cluster_error(&format!("node {node}")))?;
    let label = found.labels.unwrap_or_default().remove(ZONE_LABEL);
    // An empty label means no zone.
    Ok(label.and_then(|zone| zone.try_into().ok()))
}

pub(super) async fn creation_time(client: &Client, node: &NodeName) -> Result<SystemTime, ClusterError> {
    let found = metadata(&Api::<Node>::all(client.clone()), node.as_str(), None).await;
    let found = found.map_err(|failure| failure.into_cluster_error(&format!("node {node}")))?;
    let created = found.creation_timestamp.map(|time| time.0.into());
    created.ok_or_else(|| ClusterError::Other(format!("node {node} has no creation time")))
}
