//! The pods of this node and what is said about them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;

use crate::decide::clock_skew::ClockSample;
use crate::model::{NodeName, Owner, PodRef, PodView, Zone};

/// What the watch of this node's pods yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodEvent {
    /// A pod as it is now; new, changed or listed again.
    Applied(Box<PodView>),
    /// A pod that no longer exists.
    Deleted(PodRef),
    /// Every pod that exists has been seen at least once; pods that were known before and are not in this list are gone.
    Synced(Vec<PodRef>),
}

/// Annotations of one object.
pub type Annotations = BTreeMap<String, String>;

/// A namespace, as far as we look at it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NamespaceView {
    /// Its labels, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Its annotations, for the opt-in.
    pub annotations: Annotations,
}

/// An Event that the kubelet wrote on a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeletEvent {
    /// A word such as `Failed` or `FailedCreatePodSandBox`.
    pub reason: String,
    /// The container that it is about, where it is about one.
    pub container: Option<String>,
    /// The sentence.
    pub message: String,
}

/// What a `kubernetes.io/dockerconfigjson` Secret holds. Not shown by `Debug`, so that it cannot get into a log.
#[derive(Clone, PartialEq, Eq)]
pub struct PullSecret(pub Vec<u8>);

impl std::fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PullSecret(..)")
    }
}

/// What the agent asks of Kubernetes besides the watch.
#[async_trait]
pub trait Cluster: Send + Sync + 'static {
    /// The namespace's labels and annotations, at most some seconds old.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn namespace(&self, k8s_namespace: &str) -> Result<Arc<NamespaceView>, ClusterError>;

    /// The annotations of an owner in this namespace and of the owners above it, the nearest first, at most half a minute old. Only kinds
    /// that make pods are asked for (ReplicaSet, Deployment, StatefulSet, DaemonSet, Job, CronJob, ReplicationController); the list ends at
    /// any other kind, and where an owner is gone.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn owners(&self, k8s_namespace: &str, owner: &Owner) -> Result<Vec<Arc<Annotations>>, ClusterError>;

    /// The zone of this agent's own node, by its label `topology.kubernetes.io/zone`; `None` where it has none.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn zone(&self) -> Result<Option<Zone>, ClusterError>;

    /// What the kubelet said about the pod of late, the oldest first. For an agent that starts in the middle of it, and for a
    /// sandbox image, whose absence shows nowhere else.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn kubelet_events(&self, pod: &PodRef) -> Result<Vec<KubeletEvent>, ClusterError>;

    /// A pull secret of the pod's namespace, as `kubernetes.io/dockerconfigjson` keeps it. Needs a right that agents do not have unless
    /// the namespace gives it to them.
    ///
    /// # Errors
    /// [`ClusterError::Forbidden`] where the right was not given, [`ClusterError::Gone`] where there is no such Secret.
    async fn pull_secret(&self, k8s_namespace: &str, name: &str) -> Result<PullSecret, ClusterError>;

    /// Deletes the pod, and only this one: with its UID as precondition.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when it is gone or another has its name.
    async fn delete(&self, pod: &PodRef) -> Result<(), ClusterError>;

    /// Makes the kubelet look at the pod at once, by a changed annotation. The only write to pods that there is.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when the pod was deleted meanwhile.
    async fn nudge(&self, pod: &PodRef) -> Result<(), ClusterError>;

    /// Says something on the pod, as a Kubernetes Event.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn report(&self, pod: &PodRef, report: &PodReport) -> Result<(), ClusterError>;

    /// Writes an Event on the agent's own node, or renews the one of this reason that is there.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn report_on_node(&self, report: &NodeReport) -> Result<(), ClusterError>;

    /// The creation time of a Node object.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] where there is no such node.
    async fn node_created(&self, node: &NodeName) -> Result<SystemTime, ClusterError>;

    /// The API server's clock beside this node's, by one small request.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn clock(&self) -> Result<ClockSample, ClusterError>;
}

/// An Event on a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReport {
    /// What happened; becomes the Event's reason.
    pub kind: PodReportKind,
    /// A sentence for people: what, from whom, what to do. At most 1024 bytes are kept (Kubernetes' limit for notes).
    pub note: String,
}

/// An Event on the agent's own node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeReport {
    /// Becomes the Event's reason.
    pub kind: NodeReportKind,
    /// A sentence for people. At most 1024 bytes are kept.
    pub note: String,
}

/// The reasons of Events on a node. A node has one Event of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeReportKind {
    /// Most images of the node lack layers, so that other nodes cannot get these images from here.
    ImagesLackLayers,
    /// The node's clock is too far from the API server's.
    ClockSkew,
    /// The node had the key of another node, and has a new one.
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

/// The reasons of our Events. They are part of what users may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PodReportKind {
    /// The image is here now and the pod can start.
    Recovered,
    /// It was tried and did not work; it will be tried again.
    Failed,
    /// Nothing that we do would help, or may be done; says why and what would.
    NotRecoverable,
    /// No peer holds the image under this name; we wait for one.
    NoProvider,
    /// A pull does not end; the note says what the pod waits for and until when.
    Stalled,
    /// A stalled pull was ended by ending containerd's connection; the note names the connection.
    PullEnded,
    /// The kubelet's words about a failed pull cannot be read; the note quotes them.
    Unclassified,
    /// The record of an image that nobody can mend was removed, so that the kubelet pulls it anew.
    RecordRemoved,
    /// A dry run found where the image could come from.
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

    /// Whether `kubectl` shows it as a warning.
    pub fn is_warning(self) -> bool {
        !matches!(self, Self::Recovered | Self::DryRun)
    }
}

/// Why Kubernetes did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The API server cannot be reached or is overloaded; later may work.
    #[error("the API server cannot be reached: {0}")]
    Unavailable(String),
    /// The API server answers, and an admission webhook of the cluster that must be asked does not; later may work.
    #[error("an admission webhook of the cluster does not answer, so the API server refuses: {0}")]
    Webhook(String),
    /// The object is gone.
    #[error("{0} no longer exists")]
    Gone(String),
    /// The agent's rights do not suffice; the text names the missing one.
    #[error("the API server refuses: {0}")]
    Forbidden(String),
    /// Anything else, as the API server put it.
    #[error("{0}")]
    Other(String),
}

impl ClusterError {
    /// Whether the same call may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Webhook(_))
    }
}
