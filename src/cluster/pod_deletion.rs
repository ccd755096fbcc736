//! The deletion of one pod, so that the pod's owner creates a new pod. The chart gives the right
//! only with `deletePods`.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client};

use crate::api_server::error::{ApiError, REQUEST_TIMEOUT, call};
use crate::model::PodRef;
use crate::ports::ClusterError;

/// Deletes the pod with this UID, with the pod's own grace period.
pub(super) async fn delete_pod(client: &Client, pod: &PodRef) -> Result<(), ClusterError> {
    let pods = Api::<Pod>::namespaced(client.clone(), &pod.k8s_namespace);
    let preconditions = Preconditions { uid: Some(pod.uid.clone()), resource_version: None };
    match call(REQUEST_TIMEOUT, pods.delete(&pod.name, &DeleteParams::default().preconditions(preconditions))).await {
        Ok(_) => Ok(()),
        // The precondition failed: a new pod has the name.
        Err(ApiError::Conflict(_)) => Err(ClusterError::Gone(format!("pod {pod}"))),
        Err(failure) => Err(failure.into_cluster_error(&format!("pod {pod}"))),
    }
}
