//! The reasons against a recovery, and the Event text of each reason.

use crate::oci::ReferenceError;

/// Why a pod that opted in is not recovered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotRecoverable {
    /// The registry denies the image: 401 or 403.
    Denied,
    /// The kubelet pulls at every start: `imagePullPolicy: Always`.
    PullsAlways,
    /// `imagePullPolicy: Never`, which the policy excludes.
    PullsNever,
    /// The namespace's list of repositories excludes the image's.
    RepositoryNotListed,
    /// The image's name cannot be parsed.
    Unreadable(ReferenceError),
    /// The pull does not end. The registry decides the tag while no pull of the image has failed.
    Stalled,
    /// The image is here, and the kubelet contacts the registry nevertheless.
    VerifiesCredentials,
    /// A fault of this node. Holds the kubelet's message.
    Local(String),
    /// Holds the kubelet's message, which no rule here matches.
    NotUnderstood(String),
}

/// Text about a pull that does not end.
///
/// containerd 2 counts the bytes of a pull by the blob's size in its store, which is written in
/// pieces of 1 MiB, and never ends a pull without a tracked piece (seen on 2.3.7: `checkProgress`
/// with no active request).
pub const STALLED: &str = "The kubelet waits for a pull that does not end, and this node's later pulls wait behind \
     that pull. containerd ends a pull without progress after image_pull_progress_timeout (5 min by default), and the \
     pod continues; containerd 2 never ends a pull that stalls within the first MiB of a layer. agent.endStalledPulls \
     ends a silent pull sooner.";

impl NotRecoverable {
    /// The Event's text: the problem and the remedy.
    pub fn event_text(&self, image: &str) -> String {
        match self {
            Self::Denied => format!(
                "The registry denies {image} (401 or 403). Peers may have the image, but a denial is not bypassed. \
                 Check the pull secret, and the kubelet's log if a credential provider should supply one (the kubelet \
                 pulls without credentials when its provider fails). Where a registry denies images that were lost \
                 there, annotate the namespace with recover-on-denied: \"true\"."
            ),
            Self::PullsAlways => format!(
                "{image} has imagePullPolicy Always (the default for :latest), so the kubelet contacts the registry \
                 even when the image is here, and a recovery would not help. Remedies: IfNotPresent, a digest in place \
                 of the tag, or a mirror in containerd's hosts.toml that answers when the registry does not."
            ),
            Self::PullsNever => format!(
                "{image} has imagePullPolicy Never and is not on this node. The kubelet contacts no registry for this \
                 image, so no registry could deny the image. A recovery needs \"never\" in the policy's recoverOn."
            ),
            Self::RepositoryNotListed => format!(
                "{image} is not recovered: its repository is not among those that the namespace's annotation \
                 \"repositories\" lists (or the policy requires the annotation, and the namespace has none). Add the \
                 repository to the annotation."
            ),
            Self::Unreadable(error) => format!("Cannot look for {image}: {error}."),
            Self::Stalled => format!(
                "{STALLED} {image} has a tag, which its registry decides while no pull of the image has failed, so \
                 peers do not decide the tag yet. An image with a digest is recovered at once."
            ),
            Self::VerifiesCredentials => format!(
                "{image} is on this node, and the kubelet asks its registry all the same: from Kubernetes 1.35 on, the \
                 kubelet verifies the pod's credentials for an image whose pull needed a secret \
                 (imagePullCredentialsVerificationPolicy in the kubelet's configuration). The pod starts when the \
                 registry answers, or when that setting excludes the image."
            ),
            Self::Local(message) => format!(
                "The pull of {image} failed on this node, not at the registry. The kubelet retries. Repair the part of \
                 the node that its message names: {message}"
            ),
            Self::NotUnderstood(message) => format!(
                "The pull of {image} failed for an unknown cause, so the image is not recovered. Please report this \
                 message: {message}"
            ),
        }
    }

    /// The metric's label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::PullsAlways => "pulls_always",
            Self::PullsNever => "pulls_never",
            Self::RepositoryNotListed => "repository_not_listed",
            Self::Unreadable(_) => "unreadable",
            Self::Stalled => "stalled",
            Self::VerifiesCredentials => "verifies_credentials",
            Self::Local(_) => "local_fault",
            Self::NotUnderstood(_) => "not_understood",
        }
    }
}
