//! Why an image was not recovered: whether to try again, what to count, what to tell.

use crate::decide::disk::OverLimit;
use crate::decide::recovery_queue::RecoveryEnd;
use crate::decide::transport_choice::TooLarge;
use crate::metrics::RecoveryOutcome;
use crate::model::PeerId;
use crate::oci::{Digest, DocumentError, MAX_INDEX_DEPTH, Platform, Reference};
use crate::ports::{FetchError, PodReportKind, StoreError};

/// Why an image was not recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// No peer that is connected holds it under this repository.
    #[error("no peer holds {reference} under that registry and repository")]
    NoProvider {
        /// What was looked for.
        reference: Reference,
    },
    /// Peers hold the image, each of them for another platform than this node's.
    #[error(
        "the peers that hold {reference} hold it for other platforms: none of them has {digest}, which runs on {platform}"
    )]
    OtherPlatforms {
        /// The image.
        reference: Reference,
        /// This node. Boxed, because the other fields are large, and every result has room for them.
        platform: Box<Platform>,
        /// The document of this platform that none of them has.
        digest: Digest,
    },
    /// Peers know the tag with different contents.
    #[error(
        "peers disagree on {reference}: {}; name the image by its digest, or wait until the peers agree",
        format_digest_counts(digests)
    )]
    TagDisagreement {
        /// The tag.
        reference: Reference,
        /// Each digest, and how many peers say so.
        digests: Vec<(Digest, usize)>,
    },
    /// The image is known, but parts of it are on no node any more.
    #[error(
        "{} of the blobs of {reference} are on no node (first {}): the nodes that run it discarded its layers, pulled them lazily or lost them; \
         `lighterman status` on such a node says which",
        blobs.len(),
        blobs.first().map(ToString::to_string).unwrap_or_default()
    )]
    BlobsWithoutProvider {
        /// The image.
        reference: Reference,
        /// What nobody holds.
        blobs: Vec<Digest>,
    },
    /// A layer that is missing here must not be distributed.
    #[error(
        "{reference} has a layer that its licence forbids to distribute ({layer}), so peers do not give it on; it has to be pulled from \
         where the manifest says"
    )]
    NotDistributable {
        /// The image.
        reference: Reference,
        /// The layer.
        layer: Digest,
    },
    /// Nothing may be brought into this node's store.
    #[error("nothing is imported on this node: {reason}")]
    ImportsRefused {
        /// Why, and what to set.
        reason: String,
    },
    /// A manifest or index that cannot be used.
    #[error("{digest}: {source}")]
    Document {
        /// Which one.
        digest: Digest,
        /// What is wrong with it.
        source: DocumentError,
    },
    /// More indexes inside each other than are followed.
    #[error("{digest} is an index inside {MAX_INDEX_DEPTH} others, and no more of them are followed")]
    NestedIndex {
        /// The innermost one that was read.
        digest: Digest,
    },
    /// The image is not for machines like this.
    #[error("the index {digest} has no manifest for {platform}")]
    NoPlatform {
        /// The index.
        digest: Digest,
        /// This node.
        platform: Platform,
    },
    /// A setting forbids it.
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    /// UDP is blocked, and the image is too large for TCP.
    #[error("{reference} has to come over UDP, which is blocked: {source}")]
    NeedsUdp {
        /// The image.
        reference: Reference,
        /// The blob or image that is too large. Boxed, so that results stay small.
        source: Box<TooLarge>,
    },
    /// The blobs are here and a layer cannot be unpacked.
    #[error("the image's blobs are here, and its layers cannot be unpacked: {0}")]
    NoRoomToUnpack(#[source] OverLimit),
    /// Every provider of a blob failed, or there is none.
    #[error("{digest} could not be fetched: {}", attempts.last().map_or("no peer holds it".to_owned(), ToString::to_string))]
    Fetch {
        /// The blob.
        digest: Digest,
        /// What happened at each provider, the latest last.
        attempts: Vec<FetchError>,
    },
    /// Our own content store.
    #[error("{doing}: {source}")]
    Store {
        /// What was being done.
        doing: &'static str,
        /// What the store said.
        source: StoreError,
    },
    /// Nobody waits for it any more, or the agent stops.
    #[error("abandoned")]
    Abandoned,
}

impl RecoverError {
    /// Names what was being done when the store failed.
    pub(in crate::agent) fn store(doing: &'static str) -> impl FnOnce(StoreError) -> Self {
        move |source| Self::Store { doing, source }
    }

    /// What the queue makes of it.
    pub fn queue_end(&self) -> RecoveryEnd {
        match self {
            Self::NoProvider { .. }
            | Self::OtherPlatforms { .. }
            | Self::BlobsWithoutProvider { .. }
            | Self::TagDisagreement { .. } => RecoveryEnd::NoProvider,
            Self::Fetch { attempts, .. } if attempts.is_empty() => RecoveryEnd::NoProvider,
            Self::Abandoned => RecoveryEnd::Abandoned,
            // An Event that sounds final is final: these are not tried again until a setting changes.
            Self::ImportsRefused { .. }
            | Self::NotDistributable { .. }
            | Self::Document { .. }
            | Self::NestedIndex { .. }
            | Self::NoPlatform { .. }
            | Self::OverLimit(OverLimit::Size { .. }) => RecoveryEnd::Final,
            Self::OverLimit(OverLimit::Disk { .. })
            | Self::NoRoomToUnpack(_)
            | Self::NeedsUdp { .. }
            | Self::Fetch { .. }
            | Self::Store { .. } => RecoveryEnd::Failed,
        }
    }

    /// Whether what has come already is worth keeping for the next attempt.
    pub(in crate::agent) fn is_content_reusable(&self) -> bool {
        matches!(self, Self::Fetch { .. } | Self::Store { .. } | Self::NoRoomToUnpack(_))
    }

    /// The peers that failed, for people: at most five, none twice in a row.
    pub fn failed_peers(&self) -> Vec<PeerId> {
        let Self::Fetch { attempts, .. } = self else { return Vec::new() };
        let mut peers: Vec<_> = attempts.iter().filter_map(FetchError::peer).collect();
        peers.dedup();
        peers.truncate(5);
        peers
    }

    /// The blobs that no node holds, where that is what is wrong.
    pub(in crate::agent) fn unprovided_blobs(&self) -> Vec<Digest> {
        match self {
            Self::BlobsWithoutProvider { blobs, .. } => blobs.clone(),
            Self::OtherPlatforms { digest, .. } => vec![*digest],
            Self::Fetch { digest, attempts } if attempts.is_empty() => vec![*digest],
            _ => Vec::new(),
        }
    }

    /// What is counted.
    pub fn outcome(&self) -> RecoveryOutcome {
        match self {
            Self::NoProvider { .. } | Self::OtherPlatforms { .. } => RecoveryOutcome::NoProvider,
            Self::BlobsWithoutProvider { .. } => RecoveryOutcome::BlobsWithoutProvider,
            Self::ImportsRefused { .. } => RecoveryOutcome::ImportsRefused,
            Self::NotDistributable { .. } => RecoveryOutcome::Unusable,
            Self::TagDisagreement { .. }
            | Self::Document { .. }
            | Self::NestedIndex { .. }
            | Self::NoPlatform { .. } => RecoveryOutcome::Unusable,
            Self::OverLimit(_) | Self::NoRoomToUnpack(_) => RecoveryOutcome::OverLimit,
            Self::NeedsUdp { .. } | Self::Fetch { .. } => RecoveryOutcome::FetchFailed,
            Self::Store { .. } => RecoveryOutcome::StoreFailed,
            Self::Abandoned => RecoveryOutcome::Abandoned,
        }
    }

    /// The Event that tells the pod's owner.
    pub fn report_kind(&self) -> PodReportKind {
        match self {
            Self::NoProvider { .. } | Self::OtherPlatforms { .. } | Self::BlobsWithoutProvider { .. } => {
                PodReportKind::NoProvider
            }
            Self::Fetch { attempts, .. } if attempts.is_empty() => PodReportKind::NoProvider,
            Self::ImportsRefused { .. }
            | Self::NotDistributable { .. }
            | Self::TagDisagreement { .. }
            | Self::NoPlatform { .. }
            | Self::OverLimit(OverLimit::Size { .. }) => PodReportKind::NotRecoverable,
            // A document does not change under its digest.
            Self::Document { .. } | Self::NestedIndex { .. } => PodReportKind::NotRecoverable,
            // Tried again, as soon as the disk has room.
            Self::OverLimit(OverLimit::Disk { .. }) | Self::NoRoomToUnpack(_) => PodReportKind::Failed,
            Self::NeedsUdp { .. } | Self::Fetch { .. } | Self::Store { .. } | Self::Abandoned => PodReportKind::Failed,
        }
    }
}

/// Contents and on how many nodes, the first four.
pub(in crate::agent) fn format_digest_counts(meanings: &[(Digest, usize)]) -> String {
    let each: Vec<_> = meanings.iter().take(4).map(|(digest, peers)| format!("{digest} on {peers}")).collect();
    each.join(", ")
}
