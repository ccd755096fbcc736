//! Static pods have two UIDs.
//!
//! The kubelet makes a static pod from a file, under a UID of its own; what the API server shows is a mirror, with the API server's.
//! Kubelets write their Events about the former, and `kubectl describe` shows on a mirror only Events about the former.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard};

use crate::model::PodRef;
use crate::ports::PodEvent;

/// Marks a mirror; its value is the UID of the static pod.
pub(super) const MIRROR: &str = "kubernetes.io/config.mirror";

/// Static pods of one node: a control plane has five. The kubelet deletes mirrors that others made up.
const MOST: usize = 256;

/// From a mirror's UID to the kubelet's, for the pods that the watch has shown.
#[derive(Default)]
pub(super) struct Mirrors(Mutex<HashMap<String, String>>);

impl Mirrors {
    pub(super) fn follow(&self, event: &PodEvent) {
        let mut mirrors = self.lock();
        match event {
            PodEvent::Seen(view) => {
                if let Some(uid) = view.annotations.get(MIRROR).filter(|_| mirrors.len() < MOST) {
                    mirrors.insert(view.pod.uid.clone(), uid.clone());
                }
            }
            PodEvent::Gone(pod) => {
                mirrors.remove(&pod.uid);
            }
            PodEvent::Synced(pods) => {
                let listed: HashSet<_> = pods.iter().map(|pod| &pod.uid).collect();
                mirrors.retain(|uid, _| listed.contains(uid));
            }
        }
    }

    /// The UID that the kubelet knows the pod by.
    pub(super) fn kubelets_uid(&self, pod: &PodRef) -> String {
        self.lock().get(&pod.uid).unwrap_or(&pod.uid).clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().expect("nothing panics while holding it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::project::project;
    use serde_json::json;

    fn mirror(uid: &str) -> PodEvent {
        let metadata = json!({ "name": "etcd", "namespace": "kube-system", "uid": uid, "annotations": { MIRROR: format!("{uid}-hash") } });
        let pod = json!({ "metadata": metadata, "spec": { "containers": [] } });
        PodEvent::Seen(Box::new(project(serde_json::from_value(pod).unwrap()).unwrap()))
    }

    fn pod(uid: &str) -> PodRef {
        PodRef { k8s_namespace: "kube-system".into(), name: "etcd".into(), uid: uid.into() }
    }

    #[test]
    fn a_mirror_is_known_while_it_exists() {
        let mirrors = Mirrors::default();
        assert_eq!(mirrors.kubelets_uid(&pod("a")), "a");
        mirrors.follow(&mirror("a"));
        mirrors.follow(&mirror("b"));
        assert_eq!(mirrors.kubelets_uid(&pod("a")), "a-hash");
        mirrors.follow(&PodEvent::Gone(pod("a")));
        assert_eq!(mirrors.kubelets_uid(&pod("a")), "a");
        mirrors.follow(&PodEvent::Synced(vec![pod("b")]));
        assert_eq!(mirrors.kubelets_uid(&pod("b")), "b-hash");
        // Deleted while nobody watched.
        mirrors.follow(&PodEvent::Synced(Vec::new()));
        assert_eq!(mirrors.kubelets_uid(&pod("b")), "b");
    }

    #[test]
    fn no_more_mirrors_are_remembered_than_a_node_has() {
        let mirrors = Mirrors::default();
        for i in 0..MOST + 10 {
            mirrors.follow(&mirror(&i.to_string()));
        }
        assert_eq!(mirrors.lock().len(), MOST);
    }
}
