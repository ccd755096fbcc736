//! The nudge: a changed annotation makes the kubelet sync the pod at once.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use crate::api_server::error::{REQUEST_TIMEOUT, call};
use crate::model::PodRef;
use crate::ports::ClusterError;

/// The chart's policy permits agents to change this annotation and no other.
const ANNOTATION: &str = "lighterman.dev/nudged-at";

/// Patches the status subresource, which leaves the spec alone: no right to patch pods is needed.
///
/// The patch contains the UID, which is immutable. The API server answers 422 about `metadata.uid`
/// when a new pod has the name, and 403 when a right is missing or a policy denies the patch.
pub(super) async fn nudge(client: &Client, pod: &PodRef) -> Result<(), ClusterError> {
    let pods = Api::<Pod>::namespaced(client.clone(), &pod.k8s_namespace);
    // The time has nanoseconds, so that the value differs from an earlier nudge: the kubelet syncs
    // only changed pods. The policy permits a time of this form, in UTC.
    let now = format!("{:.9}", Timestamp::now());
    let patch = Patch::Merge(json!({ "metadata": { "uid": pod.uid, "annotations": { ANNOTATION: now } } }));
    let answer = call(REQUEST_TIMEOUT, pods.patch_status(&pod.name, &PatchParams::default(), &patch)).await;
    answer.map(drop).map_err(|failure| failure.into_cluster_error(&format!("pod {pod}")))
}
