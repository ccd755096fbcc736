//! The owners of a pod, and their owners: an opt-in on a Deployment counts for its pods.
//!
//! Each owner is read by name, without an informer. With an informer every node would watch every
//! workload of the cluster, for the few workloads whose pods fail on the node.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::ReplicationController;
use kube::api::{ApiResource, DynamicObject};
use kube::{Api, Client};

use super::metadata::metadata;
use super::pod_view::{bounded_pairs, controlling_owner};
use super::response_cache::ResponseCache;
use crate::api_server::error::{ApiError, is_object_name};
use crate::model::{Annotations, Owner};
use crate::ports::ClusterError;

/// Time until a changed annotation counts, longer than for a namespace. An opt-in in a Deployment's
/// template starts a rollout, whose new ReplicaSet is not in the cache.
const CACHE_TTL: Duration = Duration::from_secs(30);

/// Most owners in the cache: two for each of the node's 110 pods, rounded up.
const MAX_OWNERS: usize = 512;

/// Most owners above a pod. Kubernetes' own kinds have two levels (CronJob and Job, Deployment and
/// ReplicaSet). Users can write owner references, which may form a circle.
const MAX_DEPTH: usize = 4;

pub(super) struct Owners {
    client: Client,
    /// By namespace and reference with the UID, so that a new object of the same name is read anew.
    cache: ResponseCache<(String, Owner), Arc<OwnerMetadata>>,
}

struct OwnerMetadata {
    annotations: Arc<Annotations>,
    owner: Option<Owner>,
}

impl Owners {
    pub(super) fn new(client: Client) -> Self {
        Self { client, cache: ResponseCache::new(CACHE_TTL, MAX_OWNERS) }
    }

    /// The annotations of the owner and of the owners above, the nearest first.
    pub(super) async fn ancestor_annotations(
        &self,
        k8s_namespace: &str,
        owner: &Owner,
    ) -> Result<Vec<Arc<Annotations>>, ClusterError> {
        let mut annotations = Vec::new();
        let mut next = Some(owner.clone());
        while let Some(owner) = next.take().filter(|_| annotations.len() < MAX_DEPTH) {
            let Some(resource) = api_resource(&owner) else { break };
            let fetch = self.fetch_owner(k8s_namespace, &owner, &resource);
            match self.cache.get((k8s_namespace.to_owned(), owner.clone()), fetch).await {
                Ok(found) => {
                    annotations.push(found.annotations.clone());
                    next.clone_from(&found.owner);
                }
                Err(ApiError::NotFound(_)) => break,
                Err(failure) => {
                    return Err(failure.into_cluster_error(&format!("{} {k8s_namespace}/{}", owner.kind, owner.name)));
                }
            }
        }
        Ok(annotations)
    }

    async fn fetch_owner(
        &self,
        k8s_namespace: &str,
        owner: &Owner,
        resource: &ApiResource,
    ) -> Result<Arc<OwnerMetadata>, ApiError> {
        let owners = Api::<DynamicObject>::namespaced_with(self.client.clone(), k8s_namespace, resource);
        let found = metadata(&owners, &owner.name, Some(&owner.uid)).await?;
        let owner = controlling_owner(found.owner_references.unwrap_or_default());
        Ok(Arc::new(OwnerMetadata {
            annotations: Arc::new(bounded_pairs(found.annotations.unwrap_or_default())),
            owner,
        }))
    }
}

/// The API resource of the owner; `None` for a kind that makes no pods, and for an invalid object
/// name.
///
/// The version of the group does not matter: the API server converts objects between versions.
fn api_resource(owner: &Owner) -> Option<ApiResource> {
    let group = owner.api_version.split_once('/').map_or("", |(group, _)| group);
    let resource = match (group, owner.kind.as_str()) {
        ("apps", "DaemonSet") => ApiResource::erase::<DaemonSet>(&()),
        ("apps", "Deployment") => ApiResource::erase::<Deployment>(&()),
        ("apps", "ReplicaSet") => ApiResource::erase::<ReplicaSet>(&()),
        ("apps", "StatefulSet") => ApiResource::erase::<StatefulSet>(&()),
        ("batch", "CronJob") => ApiResource::erase::<CronJob>(&()),
        ("batch", "Job") => ApiResource::erase::<Job>(&()),
        ("", "ReplicationController") => ApiResource::erase::<ReplicationController>(&()),
        _ => return None,
    };
    is_object_name(&owner.name).then_some(resource)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_owners_of_kinds_that_create_pods_are_fetched() {
        let path = |api_version: &str, kind: &str, name: &str| {
            let [api_version, kind, name] = [api_version, kind, name].map(str::to_owned);
            let found = api_resource(&Owner { api_version, kind, name, uid: "u".to_owned() })?;
            Some(format!("{} {}", found.api_version, found.plural))
        };
        for (api_version, kind, found) in [
            ("apps/v1", "ReplicaSet", Some("apps/v1 replicasets")),
            ("apps/v1", "Deployment", Some("apps/v1 deployments")),
            ("apps/v1", "StatefulSet", Some("apps/v1 statefulsets")),
            ("apps/v1", "DaemonSet", Some("apps/v1 daemonsets")),
            ("batch/v1", "Job", Some("batch/v1 jobs")),
            ("batch/v1beta1", "CronJob", Some("batch/v1 cronjobs")),
            ("v1", "ReplicationController", Some("v1 replicationcontrollers")),
            ("v1", "Node", None),
            ("v1", "Secret", None),
            ("v1", "Deployment", None),
            ("argoproj.io/v1alpha1", "ReplicaSet", None),
            ("apps", "ReplicaSet", None),
            ("", "", None),
        ] {
            assert_eq!(path(api_version, kind, "web").as_deref(), found, "{api_version} {kind}");
        }
        assert_eq!(path("apps/v1", "ReplicaSet", "../secrets/token"), None, "a name with a slash is invalid");
    }
}
