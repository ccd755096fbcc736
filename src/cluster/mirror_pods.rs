//! The two UIDs of static pods.
//!
//! The kubelet makes a static pod from a file, under a UID of its own. The API server has a mirror
//! of the pod, under another UID. Kubelets write their Events with the kubelet's UID, and on a
//! mirror `kubectl describe` shows only Events with the kubelet's UID.

use std::collections::{HashMap, HashSet};

use parking_lot::{Mutex, MutexGuard};

use crate::model::{PodEvent, PodRef};

/// The annotation of a mirror; the value is the kubelet's UID of the static pod.
pub(super) const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// Most static pods of a node; a control plane has five. The kubelet deletes a mirror without a
/// static pod.
const MAX_MIRROR_PODS: usize = 256;

/// Map from a mirror's UID to the kubelet's UID, for the pods in the watch.
#[derive(Default)]
pub(super) struct MirrorPods(Mutex<HashMap<String, String>>);

impl MirrorPods {
    pub(super) fn apply_event(&self, event: &PodEvent) {
        let mut mirrors = self.lock();
        match event {
            PodEvent::Applied(view) => {
                if let Some(uid) = view.annotations.get(MIRROR_ANNOTATION).filter(|_| mirrors.len() < MAX_MIRROR_PODS) {
                    mirrors.insert(view.pod.uid.clone(), uid.clone());
                }
            }
            PodEvent::Deleted(pod) => {
                mirrors.remove(&pod.uid);
            }
            PodEvent::Synced(pods) => {
                let listed: HashSet<_> = pods.iter().map(|pod| &pod.uid).collect();
                mirrors.retain(|uid, _| listed.contains(uid));
            }
        }
    }

    /// The kubelet's UID of the pod.
    pub(super) fn kubelet_uid(&self, pod: &PodRef) -> String {
        self.lock().get(&pod.uid).unwrap_or(&pod.uid).clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::pod_view::pod_view;
    use serde_json::json;

    fn mirror(uid: &str) -> PodEvent {
        let metadata = json!({ "name": "etcd", "namespace": "kube-system", "uid": uid, "annotations": { MIRROR_ANNOTATION: format!("{uid}-hash") } });
        let pod = json!({ "metadata": metadata, "spec": { "containers": [] } });
        PodEvent::Applied(Box::new(pod_view(serde_json::from_value(pod).unwrap()).unwrap()))
    }

    fn pod(uid: &str) -> PodRef {
        PodRef { k8s_namespace: "kube-system".into(), name: "etcd".into(), uid: uid.into() }
    }

    #[test]
    fn a_mirror_pod_is_tracked_until_its_deletion() {
        let mirrors = MirrorPods::default();
        assert_eq!(mirrors.kubelet_uid(&pod("a")), "a");
        mirrors.apply_event(&mirror("a"));
        mirrors.apply_event(&mirror("b"));
        assert_eq!(mirrors.kubelet_uid(&pod("a")), "a-hash");
        mirrors.apply_event(&PodEvent::Deleted(pod("a")));
        assert_eq!(mirrors.kubelet_uid(&pod("a")), "a");
        mirrors.apply_event(&PodEvent::Synced(vec![pod("b")]));
        assert_eq!(mirrors.kubelet_uid(&pod("b")), "b-hash");
        // The pod was deleted while the watch was interrupted.
        mirrors.apply_event(&PodEvent::Synced(Vec::new()));
        assert_eq!(mirrors.kubelet_uid(&pod("b")), "b");
    }

    #[test]
    fn the_number_of_tracked_mirror_pods_is_bounded() {
        let mirrors = MirrorPods::default();
        for i in 0..MAX_MIRROR_PODS + 10 {
            mirrors.apply_event(&mirror(&i.to_string()));
        }
        assert_eq!(mirrors.lock().len(), MAX_MIRROR_PODS);
    }
}
