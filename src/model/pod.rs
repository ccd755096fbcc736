//! The fields of a pod that decisions use, projected once where the pod is read.

use std::collections::BTreeMap;
use std::fmt;

/// One pod, distinct from an earlier pod of the same name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodRef {
    /// The pod's Kubernetes namespace.
    pub k8s_namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID. A pod that was deleted and created again is another pod.
    pub uid: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.k8s_namespace, self.name)
    }
}

/// A pod of this node, with the fields that decisions use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodView {
    /// Namespace, name and UID.
    pub pod: PodRef,
    /// The pod's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Init, ordinary and ephemeral containers, in the order of the spec.
    pub containers: Vec<ContainerView>,
    /// Images that are mounted as volumes.
    pub image_volumes: Vec<ImageVolume>,
    /// The controller that created the pod and will create it again; `None` without a controller.
    pub owner: Option<Owner>,
    /// A static pod: the kubelet created the pod from a file, and the API server shows a mirror.
    pub is_static: bool,
    /// `spec.priority`, which the API server fills in from the pod's PriorityClass.
    pub priority: i32,
    /// Names of the image pull Secrets, in the pod's namespace.
    pub pull_secrets: Vec<String>,
    /// The pod is being deleted, or has ended. No recovery would help the pod.
    pub is_ending: bool,
}

/// A volume whose content is an image (`spec.volumes[].image`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageVolume {
    /// The volume's name, unique in the pod.
    pub name: String,
    /// The image, as the spec names it.
    pub image: String,
    /// When the kubelet pulls.
    pub pull_policy: PullPolicy,
}

/// The controller of an object: the owner reference with `controller: true`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Such as `apps/v1`.
    pub api_version: String,
    /// Such as `ReplicaSet`.
    pub kind: String,
    /// The controller's name, in the namespace of the owned object.
    pub name: String,
    /// The controller's UID.
    pub uid: String,
}

/// One container of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerView {
    /// The container's name, unique in the pod.
    pub name: String,
    /// The list of the spec that contains the container.
    pub kind: ContainerKind,
    /// The image, as the *spec* names it (the status may have a resolved name).
    pub image: String,
    /// When the kubelet pulls.
    pub pull_policy: PullPolicy,
    /// The waiting state, if the container waits. The reason is empty before the kubelet's first
    /// status of the container.
    pub waiting: Option<WaitingState>,
}

/// A list of containers in the pod's spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerKind {
    /// `initContainers`, restartable ones (sidecars) included.
    Init,
    /// `containers`.
    Ordinary,
    /// `ephemeralContainers`.
    Ephemeral,
}

/// `imagePullPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// The kubelet pulls even if the image is present, so an import does not help.
    Always,
    /// The kubelet pulls unless the image is present.
    IfNotPresent,
    /// The kubelet never pulls, and only uses an image that is present.
    Never,
}

/// `state.waiting` of a container's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitingState {
    /// A word such as `ErrImagePull`.
    pub reason: String,
    /// The kubelet's message. Older kubelets omit the cause during back-off.
    pub message: String,
}
