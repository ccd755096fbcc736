//! Nodes: the zone of the agent's own, and the age of any.

use std::time::SystemTime;

use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};

use super::metadata::metadata;
use crate::model::{NodeName, Zone};
use crate::ports::ClusterError;

/// Kubernetes' own label for a failure domain ("Well-Known Labels"); the cloud's controller sets it, or the kubelet's flags do.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The metadata of one node by its name: no list, no watch.
pub(super) async fn zone(client: &Client, node: &NodeName) -> Result<Option<Zone>, ClusterError> {
    let found = metadata(&Api::<Node>::all(client.clone()), node.as_str(), None).await;
    let found = found.map_err(|failure| failure.into_cluster_error(&format!("node {node}")))?;
    let label = found.labels.unwrap_or_default().remove(ZONE_LABEL);
    // A label can be empty; then there is no zone.
    Ok(label.and_then(|zone| zone.try_into().ok()))
}

/// The creation time, from the metadata of one node by its name.
pub(super) async fn creation_time(client: &Client, node: &NodeName) -> Result<SystemTime, ClusterError> {
    let found = metadata(&Api::<Node>::all(client.clone()), node.as_str(), None).await;
    let found = found.map_err(|failure| failure.into_cluster_error(&format!("node {node}")))?;
    let created = found.creation_timestamp.map(|time| time.0.into());
    created.ok_or_else(|| ClusterError::Other(format!("node {node} has no creation time")))
}
