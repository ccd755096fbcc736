//! Records of each container's causes and Events. A reason that flips between `ErrImagePull` and
//! `ImagePullBackOff` is one failure, an Event is written once, and a cause outlives the message
//! that named the cause.

use std::collections::{HashMap, HashSet};

use super::cause::Cause;
use crate::model::PodRef;

/// Records per pod UID, container and image, dropped with the pod.
#[derive(Debug, Default)]
pub struct ContainerRecords {
    /// Bounded by the pods of this node (110 by default) and their containers.
    pods: HashMap<String, HashMap<ContainerImage, ContainerRecord>>,
}

/// A container with an image of its spec.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ContainerImage {
    container: String,
    image: String,
}

#[derive(Debug, Default)]
struct ContainerRecord {
    cause: Option<Cause>,
    reported: HashSet<&'static str>,
}

impl ContainerRecords {
    /// Records the cause of the latest message, and returns the cause that counts.
    ///
    /// A message about the kubelet or the node has nothing about the registry, so an earlier cause
    /// about the registry stays. A denial is such a cause. A denial holds for the pod, its image
    /// and its pull secrets, which a pod cannot change, until a later pull fails for another
    /// reason.
    pub fn record_cause(&mut self, pod: &PodRef, container: &str, image: &str, cause: Option<Cause>) -> Option<Cause> {
        let entry = self.record_mut(pod, container, image);
        let is_unrelated_to_registry = matches!(
            cause,
            Some(Cause::KubeletLimit | Cause::Local | Cause::NotUnderstood | Cause::KnownOutage | Cause::Stalled)
        );
        let keeps = match entry.cause {
            Some(Cause::Denied) => is_unrelated_to_registry,
            Some(_) => cause == Some(Cause::KubeletLimit),
            None => false,
        };
        if !keeps {
            entry.cause = cause.or(entry.cause);
        }
        entry.cause
    }

    /// Whether the registry denied the image to any container of the pod.
    pub fn is_denied(&self, pod: &PodRef, image: &str) -> bool {
        let entries = self.pods.get(&pod.uid).into_iter().flatten();
        entries.filter(|(key, _)| key.image == image).any(|(_, entry)| entry.cause == Some(Cause::Denied))
    }

    /// Whether this is the first report of `what` about the container and its image.
    pub fn mark_reported(&mut self, pod: &PodRef, container: &str, image: &str, what: &'static str) -> bool {
        self.record_mut(pod, container, image).reported.insert(what)
    }

    /// For a container that got its image, or has another image now: a later failure is a new one.
    pub fn remove_container(&mut self, pod: &PodRef, container: &str) {
        if let Some(entries) = self.pods.get_mut(&pod.uid) {
            entries.retain(|key, _| key.container != container);
        }
    }

    /// Drops the records of a pod that is gone.
    pub fn remove_pod(&mut self, pod: &PodRef) {
        self.pods.remove(&pod.uid);
    }

    /// Drops every pod whose UID does not exist.
    pub fn retain_pods(&mut self, exists: impl Fn(&str) -> bool) {
        self.pods.retain(|uid, _| exists(uid));
    }

    fn record_mut(&mut self, pod: &PodRef, container: &str, image: &str) -> &mut ContainerRecord {
        let key = ContainerImage { container: container.to_owned(), image: image.to_owned() };
        self.pods.entry(pod.uid.clone()).or_default().entry(key).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str) -> PodRef {
        PodRef { k8s_namespace: "default".into(), name: "p".into(), uid: uid.into() }
    }

    #[test]
    fn a_failure_is_reported_once_until_its_container_is_removed() {
        let mut records = ContainerRecords::default();
        assert!(records.mark_reported(&pod("1"), "c", "a:1", "recover"));
        assert!(!records.mark_reported(&pod("1"), "c", "a:1", "recover"));
        assert!(records.mark_reported(&pod("1"), "d", "a:1", "recover"), "another container of the pod");
        assert!(records.mark_reported(&pod("1"), "c", "a:2", "recover"), "another image of the container");
        assert!(records.mark_reported(&pod("2"), "c", "a:1", "recover"), "another pod of the same name");
        records.remove_container(&pod("1"), "c");
        assert!(records.mark_reported(&pod("1"), "c", "a:1", "recover"), "the container ran in between");
        records.remove_pod(&pod("2"));
        assert!(records.mark_reported(&pod("2"), "c", "a:1", "recover"));
    }

    #[test]
    fn a_denial_lasts_until_a_later_pull_fails_for_another_registry_fault() {
        let mut records = ContainerRecords::default();
        let mut record = |cause| records.record_cause(&pod("1"), "c", "a:1", cause);
        assert_eq!(record(None), None);
        assert_eq!(record(Some(Cause::NotFound)), Some(Cause::NotFound));
        assert_eq!(record(None), Some(Cause::NotFound), "a message without a cause keeps the cause");
        assert_eq!(record(Some(Cause::Denied)), Some(Cause::Denied));
        for cause in [None, Some(Cause::KubeletLimit), Some(Cause::Local), Some(Cause::NotUnderstood)] {
            assert_eq!(record(cause), Some(Cause::Denied), "{cause:?} says nothing of the registry");
        }
        assert_eq!(record(Some(Cause::NotFound)), Some(Cause::NotFound));
        assert_eq!(
            record(Some(Cause::KubeletLimit)),
            Some(Cause::NotFound),
            "the kubelet's limit changes nothing at the registry"
        );
        assert_eq!(record(Some(Cause::Local)), Some(Cause::Local));
    }
}
