//! Records of each container's causes and reports. A reason that flips between `ErrImagePull` and
//! `ImagePullBackOff` is one failure, a report is made once, and a cause outlives the message that
//! named the cause.

use std::collections::{HashMap, HashSet};
use std::mem::Discriminant;

use super::cause::Cause;
use super::pull_failure::{IgnoreReason, NotRecoverable};
use crate::model::{PodRef, PodReportKind, RecoveryOutcome};

/// The part of a pod that a record is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// The pod as a whole.
    Pod,
    /// An image of the pod's spec, for all containers and volumes.
    Image(String),
    /// The image of the pod's sandbox, which the spec does not name.
    Sandbox(String),
    /// A container with an image of the spec.
    Container {
        /// The container's name.
        name: String,
        /// The container's image, or the image of a volume that the container waits for.
        image: String,
    },
}

/// The content of a report. Each topic is reported once about a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Topic {
    /// A recovery of the image is wanted.
    Recovery,
    /// The image is not recovered, without an Event.
    Ignored(IgnoreReason),
    /// The image is not recovered, for this kind of reason.
    NotRecoverable(Discriminant<NotRecoverable>),
    /// A recovery ended with this outcome.
    Outcome(RecoveryOutcome),
    /// The pod was nudged for the image.
    Nudge,
    /// An Event that follows neither from a verdict nor from an outcome.
    Event(PodReportKind),
}

/// Records per pod UID and subject, dropped with the pod.
#[derive(Debug, Default)]
pub struct ContainerRecords {
    /// Bounded by the pods of this node (110 by default) and their containers.
    pods: HashMap<String, HashMap<Subject, SubjectRecord>>,
}

#[derive(Debug, Default)]
struct SubjectRecord {
    cause: Option<Cause>,
    reported: HashSet<Topic>,
}

impl Subject {
    /// The container with this image.
    pub fn container(name: &str, image: &str) -> Self {
        Self::Container { name: name.to_owned(), image: image.to_owned() }
    }

    /// The container's name, if the subject is a container.
    pub fn container_name(&self) -> Option<&str> {
        match self {
            Self::Container { name, .. } => Some(name),
            Self::Pod | Self::Image(_) | Self::Sandbox(_) => None,
        }
    }

    /// The image that the subject needs, if the subject is not the pod as a whole.
    pub fn image(&self) -> Option<&str> {
        match self {
            Self::Image(image) | Self::Sandbox(image) | Self::Container { image, .. } => Some(image),
            Self::Pod => None,
        }
    }
}

impl From<&NotRecoverable> for Topic {
    fn from(reason: &NotRecoverable) -> Self {
        Self::NotRecoverable(std::mem::discriminant(reason))
    }
}

impl ContainerRecords {
    /// Records the cause of the latest message, and returns the cause that counts.
    ///
    /// A message about the kubelet or the node has nothing about the registry, so an earlier cause
    /// about the registry stays. A denial is such a cause. A denial holds for the pod, its image
    /// and its pull secrets, which a pod cannot change, until a later pull fails for another
    /// reason.
    pub fn record_cause(&mut self, pod: &PodRef, subject: &Subject, cause: Option<Cause>) -> Option<Cause> {
        let entry = self.record_mut(pod, subject);
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

    /// Whether the registry denied the image to any part of the pod.
    pub fn is_denied(&self, pod: &PodRef, image: &str) -> bool {
        let entries = self.pods.get(&pod.uid).into_iter().flatten();
        entries
            .filter(|(subject, _)| subject.image() == Some(image))
            .any(|(_, entry)| entry.cause == Some(Cause::Denied))
    }

    /// Whether this is the first report of the topic about the subject.
    pub fn mark_reported(&mut self, pod: &PodRef, subject: &Subject, topic: Topic) -> bool {
        self.record_mut(pod, subject).reported.insert(topic)
    }

    /// For a container that got its image, or has another image now: a later failure is a new one.
    pub fn remove_container(&mut self, pod: &PodRef, container: &str) {
        if let Some(entries) = self.pods.get_mut(&pod.uid) {
            entries.retain(|subject, _| subject.container_name() != Some(container));
        }
    }

    /// For a pod that waits no more: a later failure of the pod as a whole, of its sandbox or of a
    /// volume is a new one.
    pub fn retain_containers(&mut self, pod: &PodRef) {
        if let Some(entries) = self.pods.get_mut(&pod.uid) {
            entries.retain(|subject, _| subject.container_name().is_some());
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

    fn record_mut(&mut self, pod: &PodRef, subject: &Subject) -> &mut SubjectRecord {
        self.pods.entry(pod.uid.clone()).or_default().entry(subject.clone()).or_default()
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
        assert!(records.mark_reported(&pod("1"), &Subject::container("c", "a:1"), Topic::Recovery));
        assert!(!records.mark_reported(&pod("1"), &Subject::container("c", "a:1"), Topic::Recovery));
        assert!(
            records.mark_reported(&pod("1"), &Subject::container("d", "a:1"), Topic::Recovery),
            "another container of the pod"
        );
        assert!(
            records.mark_reported(&pod("1"), &Subject::container("c", "a:2"), Topic::Recovery),
            "another image of the container"
        );
        assert!(
            records.mark_reported(&pod("2"), &Subject::container("c", "a:1"), Topic::Recovery),
            "another pod of the same name"
        );
        records.remove_container(&pod("1"), "c");
        assert!(
            records.mark_reported(&pod("1"), &Subject::container("c", "a:1"), Topic::Recovery),
            "the container ran in between"
        );
        records.remove_pod(&pod("2"));
        assert!(records.mark_reported(&pod("2"), &Subject::container("c", "a:1"), Topic::Recovery));
    }

    #[test]
    fn a_pod_that_waits_no_more_keeps_only_the_reports_of_its_containers() {
        let mut records = ContainerRecords::default();
        let image = String::from("a:1");
        let others = [Subject::Pod, Subject::Image(image.clone()), Subject::Sandbox(image)];
        let container = Subject::container("c", "a:1");
        for subject in others.iter().chain([&container]) {
            assert!(records.mark_reported(&pod("1"), subject, Topic::Nudge), "{subject:?}");
        }
        records.retain_containers(&pod("1"));
        assert!(others.iter().all(|subject| records.mark_reported(&pod("1"), subject, Topic::Nudge)));
        assert!(!records.mark_reported(&pod("1"), &container, Topic::Nudge));
    }

    #[test]
    fn a_reason_is_reported_once_whatever_the_message_says() {
        let mut records = ContainerRecords::default();
        let subject = Subject::container("c", "a:1");
        let mut mark = |reason: NotRecoverable| records.mark_reported(&pod("1"), &subject, Topic::from(&reason));
        assert!(mark(NotRecoverable::Local("no space".into())));
        assert!(!mark(NotRecoverable::Local("no inode".into())));
        assert!(mark(NotRecoverable::NotUnderstood("no space".into())));
    }

    #[test]
    fn a_denial_lasts_until_a_later_pull_fails_for_another_registry_fault() {
        let mut records = ContainerRecords::default();
        let mut record = |cause| records.record_cause(&pod("1"), &Subject::container("c", "a:1"), cause);
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
