//! Events that the agent writes on pods.

/// An Event on a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReport {
    /// Kind of the Event; its reason follows from the kind.
    pub kind: PodReportKind,
    /// Sentence for people: image, provider, remedy. Kubernetes' limit for notes is 1024 bytes, and
    /// the rest is cut.
    pub note: String,
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
