//! The nudge: a changed annotation makes the kubelet sync the pod at once.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use super::call::{Failure, PATIENCE, call};
use crate::model::PodRef;
use crate::ports::ClusterError;

const ANNOTATION: &str = "lighterman.dev/nudged-at";

/// Patches the status subresource, which leaves the spec alone, so that no right to change pods is needed.
///
/// The patch names the UID. It cannot be changed, so the API server refuses the patch (422, of `metadata.uid`) when another pod has
/// the name by now.
pub(super) async fn nudge(client: &Client, pod: &PodRef) -> Result<(), ClusterError> {
    let pods = Api::<Pod>::namespaced(client.clone(), &pod.k8s_namespace);
    // To the nanosecond: a value that is there already would change nothing, and wake nobody.
    let now = format!("{:.9}", Timestamp::now());
    let patch = Patch::Merge(json!({ "metadata": { "uid": pod.uid, "annotations": { ANNOTATION: now } } }));
    match call(PATIENCE, pods.patch_status(&pod.name, &PatchParams::default(), &patch)).await {
        Ok(_) => Ok(()),
        Err(Failure::Invalid(text)) if text.contains("metadata.uid") => Err(ClusterError::Gone(format!("pod {pod}"))),
        Err(failure) => Err(failure.about(&format!("pod {pod}"))),
    }
}
