//! Deleting one pod, so that its owner makes another. Needs a right that the chart gives only when asked to.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client};

use super::api_error::{ApiError, REQUEST_TIMEOUT, call};
use crate::model::PodRef;
use crate::ports::ClusterError;

/// With the grace period that the pod itself asks for.
pub(super) async fn delete_pod(client: &Client, pod: &PodRef) -> Result<(), ClusterError> {
    let pods = Api::<Pod>::namespaced(client.clone(), &pod.k8s_namespace);
    let only_this = Preconditions { uid: Some(pod.uid.clone()), resource_version: None };
    match call(REQUEST_TIMEOUT, pods.delete(&pod.name, &DeleteParams::default().preconditions(only_this))).await {
        Ok(_) => Ok(()),
        // The precondition failed: another pod has the name.
        Err(ApiError::Conflict(_)) => Err(ClusterError::Gone(format!("pod {pod}"))),
        Err(failure) => Err(failure.into_cluster_error(&format!("pod {pod}"))),
    }
}
