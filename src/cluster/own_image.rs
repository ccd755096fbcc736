//! The DaemonSet of this agent, found by the owner of the agent's own pod.

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Api;
use kube::api::GetParams;
use parking_lot::{Mutex, MutexGuard};

use super::KubeCluster;
use crate::api_server::AgentPod;
use crate::api_server::error::{ApiError, REQUEST_TIMEOUT, call, is_object_name};
use crate::decide::own_image::{MAX_IMAGES, OwnImages};
use crate::model::{ContainerKind, Owner, PodEvent, PodView};
use crate::oci::Reference;
use crate::ports::{ClusterError, OwnDaemonSet};

/// The agent's own pod, from its last event in the watch of this node's pods.
#[derive(Default)]
pub(super) struct OwnPodTracker(Mutex<Option<OwnPodSnapshot>>);

#[derive(Clone)]
struct OwnPodSnapshot {
    images: OwnImages,
    owner: Option<Owner>,
}

impl OwnPodTracker {
    pub(super) fn apply_event(&self, agent_pod: &AgentPod, event: &PodEvent) {
        if let PodEvent::Applied(view) = event
            && is_agent_pod(agent_pod, view)
        {
            *self.lock() = Some(OwnPodSnapshot::from_view(view));
        }
    }

    fn snapshot(&self) -> Option<OwnPodSnapshot> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<OwnPodSnapshot>> {
        self.0.lock()
    }
}

fn is_agent_pod(
    AgentPod { node: _, k8s_namespace, pod_name, pod_uid, service_account: _ }: &AgentPod,
    view: &PodView,
) -> bool {
    let pod = &view.pod;
    pod.k8s_namespace == *k8s_namespace && pod.name == *pod_name && pod_uid.as_ref().is_none_or(|uid| *uid == pod.uid)
}

impl OwnPodSnapshot {
    fn from_view(view: &PodView) -> Self {
        // A user adds an ephemeral container for debugging, and the next pod has no such container.
        let containers = view.containers.iter().filter(|container| container.kind != ContainerKind::Ephemeral);
        let images = containers.filter_map(|container| container.image.parse().ok()).take(MAX_IMAGES);
        let secrets = view.pull_secrets.iter().map(|name| (view.pod.k8s_namespace.clone(), name.clone()));
        let images = OwnImages { current: images.collect(), template: None, pull_secrets: secrets.collect() };
        Self { images, owner: view.owner.clone() }
    }
}

#[async_trait]
impl OwnDaemonSet for KubeCluster {
    async fn own_images(&self) -> Result<OwnImages, ClusterError> {
        let Some(OwnPodSnapshot { images, owner }) = self.own_pod.snapshot() else { return Ok(OwnImages::default()) };
        let Some(owner) = owner.filter(is_daemonset) else { return Ok(images) };
        let name = format!("DaemonSet {}/{}", self.agent_pod.k8s_namespace, owner.name);
        match self.daemonset(&owner).await {
            Ok(daemonset) => Ok(OwnImages { template: daemonset.map(template_images), ..images }),
            Err(failure) => Err(failure.into_cluster_error(&name)),
        }
    }
}

fn is_daemonset(owner: &Owner) -> bool {
    owner.kind == "DaemonSet" && owner.api_version.starts_with("apps/") && is_object_name(&owner.name)
}

impl KubeCluster {
    /// The DaemonSet, from the API server's watch cache. `None` where the owner is gone, or a new
    /// DaemonSet has the name: this pod then has no next image.
    async fn daemonset(&self, owner: &Owner) -> Result<Option<DaemonSet>, ApiError> {
        let daemonsets = Api::<DaemonSet>::namespaced(self.client.clone(), &self.agent_pod.k8s_namespace);
        match call(REQUEST_TIMEOUT, daemonsets.get_with(&owner.name, &GetParams::any())).await {
            Ok(found) => Ok(Some(found).filter(|found| found.metadata.uid.as_ref() == Some(&owner.uid))),
            Err(ApiError::NotFound(_)) => Ok(None),
            Err(failure) => Err(failure),
        }
    }
}

fn template_images(daemonset: DaemonSet) -> std::collections::BTreeSet<Reference> {
    let pod = daemonset.spec.and_then(|spec| spec.template.spec).unwrap_or_default();
    let containers = pod.init_containers.into_iter().flatten().chain(pod.containers);
    let images = containers.filter_map(|container| container.image?.parse().ok());
    images.take(MAX_IMAGES).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cluster::pod_view::pod_view;

    fn pod(name: &str, uid: &str) -> PodEvent {
        let owner =
            json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "lighterman", "uid": "d", "controller": true});
        let pod = json!({
            "metadata": {"name": name, "namespace": "lighterman", "uid": uid, "ownerReferences": [owner]},
            "spec": {
                "initContainers": [{"name": "i", "image": "r.test/init:1"}],
                "containers": [{"name": "agent", "image": "r.test/lighterman:v1"}],
                "ephemeralContainers": [{"name": "debug", "image": "r.test/shell:1"}],
                "imagePullSecrets": [{"name": "key"}],
            },
        });
        PodEvent::Applied(Box::new(pod_view(serde_json::from_value(pod).unwrap()).unwrap()))
    }

    fn agent_pod(uid: Option<&str>) -> AgentPod {
        AgentPod {
            node: "n1".parse().unwrap(),
            k8s_namespace: "lighterman".into(),
            pod_name: "lighterman-abcde".into(),
            pod_uid: uid.map(str::to_owned),
            service_account: "lighterman".into(),
        }
    }

    #[test]
    fn the_agent_pods_images_and_secrets_are_read_without_ephemeral_containers() {
        let tracker = OwnPodTracker::default();
        tracker.apply_event(&agent_pod(Some("a")), &pod("lighterman-abcde", "a"));
        let OwnPodSnapshot { images, owner } = tracker.snapshot().unwrap();
        let names: Vec<_> = images.current.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["r.test/init:1", "r.test/lighterman:v1"]);
        assert_eq!(images.pull_secrets, [("lighterman".to_owned(), "key".to_owned())]);
        assert_eq!((images.template, owner.filter(is_daemonset).unwrap().name), (None, "lighterman".to_owned()));
    }

    #[test]
    fn another_pod_of_the_daemonset_is_not_the_agent_pod() {
        let tracker = OwnPodTracker::default();
        tracker.apply_event(&agent_pod(Some("a")), &pod("lighterman-other", "a"));
        tracker.apply_event(&agent_pod(Some("a")), &pod("lighterman-abcde", "b"));
        assert!(tracker.snapshot().is_none());
        tracker.apply_event(&agent_pod(None), &pod("lighterman-abcde", "b"));
        assert!(tracker.snapshot().is_some(), "without a UID the name identifies the pod");
    }

    #[test]
    fn template_images_include_init_containers_and_are_bounded() {
        let many: Vec<_> =
            (0..40).map(|n| json!({"name": format!("c{n}"), "image": format!("r.test/c:{n:02}")})).collect();
        let daemonset = |containers| {
            let pod = json!({"initContainers": [{"name": "i", "image": "r.test/init:1"}], "containers": containers});
            let spec = json!({"selector": {}, "template": {"spec": pod}});
            serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap()
        };
        let names = |daemonset| template_images(daemonset).iter().map(ToString::to_string).collect::<Vec<_>>();
        let agent = json!([{"name": "agent", "image": "r.test/lighterman:v2"}, {"name": "none"}, {"name": "bad", "image": "A B"}]);
        assert_eq!(names(daemonset(agent)), ["r.test/init:1", "r.test/lighterman:v2"]);
        assert_eq!(names(daemonset(json!(many))).len(), MAX_IMAGES);
    }
}
