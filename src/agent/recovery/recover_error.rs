//! Reasons of a failed recovery. [`RecoverError::class`] gives each reason one retry, one metric,
//! one Event and one kind of failed manual pull.

#[cfg(test)]
mod tests;

use crate::control::PullFailure;
use crate::decide::disk_floor::OverLimit;
use crate::decide::recovery_queue::RecoveryEnd;
use crate::decide::transport_choice::TooLarge;
use crate::model::{PeerId, PodReportKind, RecoveryOutcome};
use crate::oci::{Digest, DocumentError, MAX_INDEX_DEPTH, Platform, Reference};
use crate::ports::{FetchError, StoreError};

/// Reason of a failed recovery.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// No peer that is up has the image under this repository.
    #[error("no peer holds {reference} under this registry and repository")]
    NoProvider {
        /// The requested image.
        reference: Reference,
    },
    /// All providers have the image for other platforms than this node's.
    #[error("the peers that hold {reference} hold the image for other platforms: no peer has {digest} for {platform}")]
    OtherPlatforms {
        /// The requested image.
        reference: Reference,
        /// This node's platform. Boxed, because every result has room for the largest error.
        platform: Box<Platform>,
        /// The document for this platform, which no provider has.
        digest: Digest,
    },
    /// Peers announce different digests for the tag, and the tag policy chooses none of them.
    #[error(
        "peers disagree on {reference}: {}; name the image by its digest, or wait until the peers agree",
        format_digest_counts(digests)
    )]
    TagDisagreement {
        /// The requested tag.
        reference: Reference,
        /// Each digest with its number of peers.
        digests: Vec<(Digest, usize)>,
    },
    /// Some blobs of the image are on no node.
    #[error(
        "{} of the blobs of {reference} are on no node (first {}): the nodes that run the image discarded its layers, \
         pulled the layers lazily or lost them; `lighterman status` on such a node shows the cause",
        blobs.len(),
        blobs.first().map(ToString::to_string).unwrap_or_default()
    )]
    BlobsWithoutProvider {
        /// The requested image.
        reference: Reference,
        /// Blobs without a provider.
        blobs: Vec<Digest>,
    },
    /// The license of a missing layer forbids distribution.
    #[error(
        "the license of {reference} forbids to distribute the layer {layer}, so no peer serves the layer; \
         pull the layer from the address in the manifest"
    )]
    NotDistributable {
        /// The requested image.
        reference: Reference,
        /// The first such layer.
        layer: Digest,
    },
    /// The runtime or a setting forbids imports into this node's store.
    #[error("nothing is imported on this node: {reason}")]
    ImportsRefused {
        /// Reason and remedy.
        reason: String,
    },
    /// A manifest or an index is unusable.
    #[error("{digest}: {source}")]
    Document {
        /// Digest of the document.
        digest: Digest,
        /// Fault of the document.
        source: DocumentError,
    },
    /// More than [`MAX_INDEX_DEPTH`] indexes inside each other.
    #[error("{digest} is an index inside {MAX_INDEX_DEPTH} other indexes, the most that are followed")]
    NestedIndex {
        /// The innermost index that was read.
        digest: Digest,
    },
    /// The index has no manifest for this node's platform.
    #[error("the index {digest} has no manifest for {platform}")]
    NoPlatform {
        /// Digest of the index.
        digest: Digest,
        /// This node's platform.
        platform: Platform,
    },
    /// The size limit or a disk floor forbids the download.
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    /// UDP is blocked, and the image is too large for TCP.
    #[error("{reference} has to come over UDP, which is blocked: {source}")]
    NeedsUdp {
        /// The requested image.
        reference: Reference,
        /// The blob or image that is too large. Boxed, so that results stay small.
        source: Box<TooLarge>,
    },
    /// The unpacked layers have no room on the disk.
    #[error("the image can be fetched, but its layers cannot be unpacked: {0}")]
    NoRoomToUnpack(#[source] OverLimit),
    /// Every provider of a blob failed, or the blob has no provider.
    #[error(
        "{digest} could not be fetched: {}",
        attempts.last().map_or("no peer holds the blob".to_owned(), ToString::to_string)
    )]
    Fetch {
        /// The requested blob.
        digest: Digest,
        /// Failures of the providers, the latest last. Empty without a provider.
        attempts: Vec<FetchError>,
    },
    /// This node's content store failed.
    #[error("{doing}: {source}")]
    Store {
        /// The failed operation.
        doing: &'static str,
        /// The store's error.
        source: StoreError,
    },
    /// The recovery was canceled: no pod waits for the image any more, or the agent stops.
    #[error("abandoned")]
    Abandoned,
}

/// The class of a failure. [`RecoverError::class`] is the one table of these values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailureClass {
    /// The end of the recovery for the queue, which schedules the retry.
    pub queue_end: RecoveryEnd,
    /// The outcome that the metrics count.
    pub outcome: RecoveryOutcome,
    /// The kind of Event that the pod gets.
    pub report_kind: PodReportKind,
    /// The kind of failure that `lighterman pull` gets. Advice and exit code follow from the kind.
    pub pull_failure: PullFailure,
    /// Whether the retry can reuse the content that has arrived.
    pub is_content_reusable: bool,
}

impl RecoverError {
    /// Adds the failed operation to a store's error.
    pub(in crate::agent) fn store(doing: &'static str) -> impl FnOnce(StoreError) -> Self {
        move |source| Self::Store { doing, source }
    }

    /// The class of the failure.
    pub fn class(&self) -> FailureClass {
        use PodReportKind as Event;
        use PullFailure as Pull;
        use RecoveryEnd as End;
        use RecoveryOutcome as Outcome;
        let (queue_end, outcome, report_kind, pull_failure, is_content_reusable) = match self {
            Self::NoProvider { .. } | Self::OtherPlatforms { .. } => {
                (End::NoProvider, Outcome::NoProvider, Event::NoProvider, Pull::NoProvider, false)
            }
            Self::BlobsWithoutProvider { .. } => {
                (End::NoProvider, Outcome::BlobsWithoutProvider, Event::NoProvider, Pull::NoProvider, false)
            }
            // The peers may agree later, but the pod's author had better name the digest.
            Self::TagDisagreement { .. } => {
                (End::NoProvider, Outcome::Unusable, Event::NotRecoverable, Pull::Disagreement, false)
            }
            // No retry follows until a setting changes.
            Self::ImportsRefused { .. } => {
                (End::Final, Outcome::ImportsRefused, Event::NotRecoverable, Pull::Closed, false)
            }
            // A document does not change under its digest, so no retry follows.
            Self::NotDistributable { .. }
            | Self::Document { .. }
            | Self::NestedIndex { .. }
            | Self::NoPlatform { .. } => (End::Final, Outcome::Unusable, Event::NotRecoverable, Pull::Unusable, false),
            Self::OverLimit(OverLimit::Size { .. }) => {
                (End::Final, Outcome::OverLimit, Event::NotRecoverable, Pull::OverLimit, false)
            }
            // A retry follows as soon as the disk has room.
            Self::OverLimit(OverLimit::Disk { .. }) => {
                (End::Failed, Outcome::OverLimit, Event::Failed, Pull::OverLimit, false)
            }
            Self::NoRoomToUnpack(_) => (End::Failed, Outcome::OverLimit, Event::Failed, Pull::OverLimit, true),
            Self::NeedsUdp { .. } => (End::Failed, Outcome::FetchFailed, Event::Failed, Pull::FetchFailed, false),
            Self::Fetch { attempts, .. } if attempts.is_empty() => {
                (End::NoProvider, Outcome::FetchFailed, Event::NoProvider, Pull::FetchFailed, true)
            }
            Self::Fetch { .. } => (End::Failed, Outcome::FetchFailed, Event::Failed, Pull::FetchFailed, true),
            Self::Store { .. } => (End::Failed, Outcome::StoreFailed, Event::Failed, Pull::StoreFailed, true),
            Self::Abandoned => (End::Abandoned, Outcome::Abandoned, Event::Failed, Pull::Abandoned, false),
        };
        FailureClass { queue_end, outcome, report_kind, pull_failure, is_content_reusable }
    }

    /// [`FailureClass::queue_end`] of the failure.
    pub fn queue_end(&self) -> RecoveryEnd {
        self.class().queue_end
    }

    /// [`FailureClass::outcome`] of the failure.
    pub fn outcome(&self) -> RecoveryOutcome {
        self.class().outcome
    }

    /// [`FailureClass::report_kind`] of the failure.
    pub fn report_kind(&self) -> PodReportKind {
        self.class().report_kind
    }

    /// The failed peers, for Events and logs: at most five, and no peer twice in a row.
    pub fn failed_peers(&self) -> Vec<PeerId> {
        let Self::Fetch { attempts, .. } = self else { return Vec::new() };
        let mut peers: Vec<_> = attempts.iter().filter_map(FetchError::peer).collect();
        peers.dedup();
        peers.truncate(5);
        peers
    }

    /// The blobs without a provider, if these blobs are the reason.
    pub(in crate::agent) fn unprovided_blobs(&self) -> Vec<Digest> {
        match self {
            Self::BlobsWithoutProvider { blobs, .. } => blobs.clone(),
            Self::OtherPlatforms { digest, .. } => vec![*digest],
            Self::Fetch { digest, attempts } if attempts.is_empty() => vec![*digest],
            _ => Vec::new(),
        }
    }
}

/// The first four digests, each with its number of nodes.
pub(in crate::agent) fn format_digest_counts(digest_counts: &[(Digest, usize)]) -> String {
    let each: Vec<_> = digest_counts.iter().take(4).map(|(digest, peers)| format!("{digest} on {peers}")).collect();
    each.join(", ")
}
