//! The pods of this node and what is said about them.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;

use crate::model::{PodRef, PodView};

/// What the watch of this node's pods yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodEvent {
    /// A pod as it is now; new, changed or listed again.
    Seen(PodView),
    /// A pod that no longer exists.
    Gone(PodRef),
    /// Every pod that exists has been seen at least once; pods that were known before and are not in this list are gone.
    Synced(Vec<PodRef>),
}

/// What the agent asks of Kubernetes besides the watch.
#[async_trait]
pub trait Cluster: Send + Sync + 'static {
    /// The namespace's annotations, at most some seconds old.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn namespace_annotations(&self, k8s_namespace: &str) -> Result<Arc<BTreeMap<String, String>>, ClusterError>;

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
}

/// An Event on a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReport {
    /// What happened; becomes the Event's reason.
    pub kind: ReportKind,
    /// A sentence for people: what, from whom, what to do. At most 1024 bytes are kept (Kubernetes' limit for notes).
    pub note: String,
}

/// The reasons of our Events. They are part of what users may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReportKind {
    /// The image is here now and the pod can start.
    Salvaged,
    /// It was tried and did not work; it will be tried again.
    Failed,
    /// Nothing that we do would help, or may be done; says why and what would.
    NotActionable,
    /// No peer holds the image under this name; we wait for one.
    NoProvider,
}

impl ReportKind {
    /// The Event's reason.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Salvaged => "ImageSalvaged",
            Self::Failed => "ImageSalvageFailed",
            Self::NotActionable => "ImageNotActionable",
            Self::NoProvider => "ImageNoProvider",
        }
    }

    /// Whether `kubectl` shows it as a warning.
    pub fn is_warning(self) -> bool {
        !matches!(self, Self::Salvaged)
    }
}

/// Why Kubernetes did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The API server cannot be reached or is overloaded; later may work.
    #[error("the API server cannot be reached: {0}")]
    Unavailable(String),
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
        matches!(self, Self::Unavailable(_))
    }
}
