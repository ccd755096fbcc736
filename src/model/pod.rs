//! The fields of a pod that decisions are made from, projected once where the pod is read.

use std::collections::BTreeMap;
use std::fmt;

/// One pod, told apart from an earlier one of the same name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodRef {
    /// Its Kubernetes namespace.
    pub k8s_namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID: a pod that was deleted and made again is another pod.
    pub uid: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.k8s_namespace, self.name)
    }
}

/// A pod of this node, as far as we look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodView {
    /// Which pod.
    pub pod: PodRef,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Init, ordinary and ephemeral containers, in the order of the spec.
    pub containers: Vec<ContainerView>,
    /// Images that are mounted as volumes.
    pub image_volumes: Vec<ImageVolume>,
    /// What made the pod and will make it again; `None` for a pod that somebody made by hand.
    pub owner: Option<Owner>,
    /// The kubelet made it from a file of its own, and the API server only shows a mirror of it.
    pub is_static: bool,
    /// `spec.priority`, which the API server fills in from the pod's PriorityClass.
    pub priority: i32,
    /// Names of the Secrets in the pod's namespace that its images are pulled with.
    pub pull_secrets: Vec<String>,
    /// The pod is being deleted, or has ended: nothing that we do would help it.
    pub is_ending: bool,
}

/// A volume whose content is an image (`spec.volumes[].image`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageVolume {
    /// Its name, unique among the pod's volumes.
    pub name: String,
    /// The image as the spec names it.
    pub image: String,
    /// When the kubelet pulls.
    pub pull_policy: PullPolicy,
}

/// The controller of an object: the one owner whose reference says `controller: true`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Such as `apps/v1`.
    pub api_version: String,
    /// Such as `ReplicaSet`.
    pub kind: String,
    /// Its name, in the namespace of what it owns.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// One container of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerView {
    /// Its name, unique in the pod.
    pub name: String,
    /// Which list of the spec it stands in.
    pub kind: ContainerKind,
    /// The image as the *spec* names it (the status may hold a resolved one).
    pub image: String,
    /// When the kubelet pulls.
    pub pull_policy: PullPolicy,
    /// Why it waits, when it does. Without a reason where the kubelet has not said anything about it yet.
    pub waiting: Option<WaitingState>,
}

/// Which list of the pod's spec a container stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerKind {
    /// `initContainers`, restartable ones (sidecars) too.
    Init,
    /// `containers`.
    Ordinary,
    /// `ephemeralContainers`.
    Ephemeral,
}

/// `imagePullPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// Pulls whether or not the image is there, so that an import does not help.
    Always,
    /// Looks whether the image is there first.
    IfNotPresent,
    /// Only looks whether the image is there.
    Never,
}

/// `state.waiting` of a container's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitingState {
    /// A word such as `ErrImagePull`.
    pub reason: String,
    /// What the kubelet said about it; older kubelets leave the cause out while backing off.
    pub message: String,
}
