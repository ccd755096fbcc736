//! Kubernetes: the pods of this node, their owners, and Events.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;

use crate::decide::clock_skew::ClockSample;
use crate::model::{NodeName, Owner, PodRef, PodView, Zone};

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

/// Content of a `kubernetes.io/dockerconfigjson` Secret. `Debug` omits the content, so no log has
/// it.
#[derive(Clone, PartialEq, Eq)]
pub struct PullSecret(pub Vec<u8>);

impl std::fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PullSecret(..)")
    }
}

/// Calls to Kubernetes besides the watch.
pub trait Cluster: PodReader + PodWriter + Nodes {}

impl<C: PodReader + PodWriter + Nodes> Cluster for C {}

/// Reads what concerns a pod: its namespace, owners, Events and pull secrets.
#[async_trait]
pub trait PodReader: Send + Sync + 'static {
    /// The namespace's labels and annotations, at most some seconds old.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn namespace(&self, k8s_namespace: &str) -> Result<Arc<NamespaceView>, ClusterError>;

    /// Annotations of an owner in this namespace and of the owners above, the nearest first, at
    /// most half a minute old. Only kinds that create pods are read (ReplicaSet, Deployment,
    /// StatefulSet, DaemonSet, Job, CronJob, ReplicationController). The list ends at any other
    /// kind and at a deleted owner.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn owners(&self, k8s_namespace: &str, owner: &Owner) -> Result<Vec<Arc<Annotations>>, ClusterError>;

    /// The kubelet's recent Events on the pod, the oldest first. Serves an agent that starts during
    /// a failure, and sandbox images, whose absence no pod status shows.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn kubelet_events(&self, pod: &PodRef) -> Result<Vec<KubeletEvent>, ClusterError>;

    /// A pull secret of the pod's namespace, as `kubernetes.io/dockerconfigjson` stores it. Agents
    /// lack the right unless the namespace grants it.
    ///
    /// # Errors
    /// [`ClusterError::Forbidden`] without the right, [`ClusterError::Gone`] without such a Secret.
    async fn pull_secret(&self, k8s_namespace: &str, name: &str) -> Result<PullSecret, ClusterError>;
}

/// Changes pods and writes Events on pods.
#[async_trait]
pub trait PodWriter: Send + Sync + 'static {
    /// Deletes this pod, with its UID as precondition.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when the pod is gone or another pod has its name.
    async fn delete(&self, pod: &PodRef) -> Result<(), ClusterError>;

    /// Makes the kubelet sync the pod at once, by a changed annotation. The agent's only write to
    /// pods.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when the pod was deleted meanwhile.
    async fn nudge(&self, pod: &PodRef) -> Result<(), ClusterError>;

    /// Writes a Kubernetes Event on the pod.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn report(&self, pod: &PodRef, report: &PodReport) -> Result<(), ClusterError>;
}

/// This agent's own node, other nodes, and the clock of the API server.
#[async_trait]
pub trait Nodes: Send + Sync + 'static {
    /// Zone of this agent's node, from the label `topology.kubernetes.io/zone`, if any.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn zone(&self) -> Result<Option<Zone>, ClusterError>;

    /// Writes an Event on the agent's own node, or renews the node's Event of this reason.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn report_on_node(&self, report: &NodeReport) -> Result<(), ClusterError>;

    /// Creation time of a Node object.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when no such node exists.
    async fn node_created(&self, node: &NodeName) -> Result<SystemTime, ClusterError>;

    /// Compares the API server's clock with this node's, by one small request.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn clock(&self) -> Result<ClockSample, ClusterError>;
}

/// An Event on a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReport {
    /// Kind of the Event; its reason follows from the kind.
    pub kind: PodReportKind,
    /// Sentence for people: image, provider, remedy. Kubernetes' limit for notes is 1024 bytes, and
    /// the rest is cut.
    pub note: String,
}

/// An Event on the agent's own node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeReport {
    /// Kind of the Event; its reason follows from the kind.
    pub kind: NodeReportKind,
    /// Sentence for people, cut after 1024 bytes.
    pub note: String,
}

/// Reasons of Events on a node. A node has one Event of each reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeReportKind {
    /// Most images of the node lack layers, so no other node can fetch these images from here.
    ImagesLackLayers,
    /// The node's clock is too far from the API server's.
    ClockSkew,
    /// The node had the key of another node, and has a new key.
    KeyReplaced,
}

impl NodeReportKind {
    /// The Event's reason.
    pub fn reason(self) -> &'static str {
        match self {
            Self::ImagesLackLayers => "ImagesLackLayers",
            Self::ClockSkew => "NodeClockSkewed",
            Self::KeyReplaced => "AgentKeyReplaced",
        }
    }
}

/// Reasons of the agent's Events. Users may rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PodReportKind {
    /// The image is on the node, and the pod can start.
    Recovered,
    /// The recovery failed and will be retried.
    Failed,
    /// No recovery helps or is permitted; the note has the reason and the remedy.
    NotRecoverable,
    /// No peer has the image under this reference; the recovery waits for a provider.
    NoProvider,
    /// A pull does not end; the note names the obstacle and the deadline.
    Stalled,
    /// The agent ended a stalled pull by ending containerd's connection, which the note names.
    PullEnded,
    /// The kubelet's message about a failed pull is unknown to this release; the note quotes it.
    Unclassified,
    /// The record of an image that no node can repair was removed, so the kubelet pulls the image
    /// anew.
    RecordRemoved,
    /// A dry run found providers for the image.
    DryRun,
}

impl PodReportKind {
    /// The Event's reason.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Recovered => "ImageRecovered",
            Self::Failed => "ImageRecoveryFailed",
            Self::NotRecoverable => "ImageNotRecoverable",
            Self::NoProvider => "ImageNoProvider",
            Self::Stalled => "ImagePullStalled",
            Self::PullEnded => "ImagePullEnded",
            Self::Unclassified => "ImagePullErrorUnknown",
            Self::RecordRemoved => "ImageRecordRemoved",
            Self::DryRun => "ImageRecoveryDryRun",
        }
    }

    /// Whether `kubectl` shows the Event as a warning.
    pub fn is_warning(self) -> bool {
        !matches!(self, Self::Recovered | Self::DryRun)
    }
}

/// Reason of a failed call to Kubernetes.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The API server cannot be reached or is overloaded; a later call may succeed.
    #[error("the API server cannot be reached: {0}")]
    Unavailable(String),
    /// The API server answers, but a required admission webhook does not; a later call may succeed.
    #[error("an admission webhook of the cluster does not answer, so the API server refuses: {0}")]
    Webhook(String),
    /// The object is gone.
    #[error("{0} no longer exists")]
    Gone(String),
    /// The agent lacks a right, which the text names.
    #[error("the API server refuses: {0}")]
    Forbidden(String),
    /// Any other error, in the API server's words.
    #[error("{0}")]
    Other(String),
}

impl ClusterError {
    /// Whether the same call may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Webhook(_))
    }
}
