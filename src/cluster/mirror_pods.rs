//! Static pods have two UIDs.
//!
//! The kubelet makes a static pod from a file, under a UID of its own; what the API server shows is a mirror, with the API server's.
//! Kubelets write their Events about the former, and `kubectl describe` shows on a mirror only Events about the former.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard};

use crate::model::PodRef;
use crate::ports::PodEvent;

/// Marks a mirror; its value is the UID of the static pod.
pub(super) const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// Static pods of one node: a control plane has five. The kubelet deletes mirrors that others made up.
const MAX_MIRROR_PODS: usize = 256;

/// From a mirror's UID to the kubelet's, for the pods that the watch has shown.
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

    /// The UID that the kubelet knows the pod by.
    pub(super) fn kubelet_uid(&self, pod: &PodRef) -> String {
        self.lock().get(&pod.uid).unwrap_or(&pod.uid).clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().expect("nothing panics while holding it")
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
        // Deleted while nobody watched.
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
