//! Kubernetes' answers about pods, their namespaces and their owners.

use std::collections::BTreeMap;

use super::pod::{PodRef, PodView};

/// Event of the watch of this node's pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodEvent {
    /// A pod is new, changed or listed again.
    Applied(Box<PodView>),
    /// A pod no longer exists.
    Deleted(PodRef),
    /// Every existing pod was applied at least once. Earlier pods that are not in this list are
    /// gone.
    Synced(Vec<PodRef>),
}

/// Annotations of one object.
pub type Annotations = BTreeMap<String, String>;

/// A namespace, as far as the agent reads it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NamespaceView {
    /// Labels, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Annotations, for the opt-in.
    pub annotations: Annotations,
}

/// An Event that the kubelet wrote on a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeletEvent {
    /// Reason, such as `Failed` or `FailedCreatePodSandBox`.
    pub reason: String,
    /// Container that the Event names, if any.
    pub container: Option<String>,
    /// Message, for people.
    pub message: String,
}
