//! Results of a recovery, for Events, metrics, webhook messages and the command line.

use std::collections::BTreeMap;
use std::time::Duration;

use super::peer::PeerId;
use crate::oci::Digest;

/// A recovered image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredImage {
    /// Digest of the index or manifest.
    pub digest: Digest,
    /// Bytes that peers sent.
    pub bytes: u64,
    /// Number of fetched blobs, documents included.
    pub fetched: usize,
    /// Number of blobs that were here before.
    pub present: usize,
    /// Bytes by sending peer.
    pub providers: BTreeMap<PeerId, u64>,
    /// Duration of the recovery. At the end the runtime has the image.
    pub took: Duration,
    /// Text for the Event when a tag was resolved without its registry.
    pub tag_note: Option<String>,
}

/// A resolved reference and its providers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedImage {
    /// Digest of the index or manifest.
    pub digest: Digest,
    /// Peers that have the image under the requested repository.
    pub providers: Vec<PeerId>,
    /// Text for the Event when a tag was resolved without its registry.
    pub tag_note: Option<String>,
}

/// The outcome of a recovery; the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecoveryOutcome {
    /// The recovery brought the image to this node.
    Recovered,
    /// The image was complete on this node, so the agent only nudged the pod.
    AlreadyHere,
    /// No peer has the image.
    NoProvider,
    /// No peer has some of the missing blobs.
    BlobsWithoutProvider,
    /// The runtime permits no imports.
    ImportsRefused,
    /// A dry run decides and fetches nothing.
    DryRun,
    /// Fetches from all providers failed.
    FetchFailed,
    /// The content store of this node failed.
    StoreFailed,
    /// A manifest is invalid, or no manifest is for this platform.
    Unusable,
    /// The image exceeds a limit.
    OverLimit,
    /// No pod waited for the image any more.
    Abandoned,
}

impl RecoveryOutcome {
    /// The value of the metric's label `outcome`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Recovered => "recovered",
            Self::AlreadyHere => "already_here",
            Self::NoProvider => "no_provider",
            Self::BlobsWithoutProvider => "not_held",
            Self::ImportsRefused => "closed",
            Self::DryRun => "dry_run",
            Self::FetchFailed => "fetch_failed",
            Self::StoreFailed => "store_failed",
            Self::Unusable => "unusable",
            Self::OverLimit => "over_limit",
            Self::Abandoned => "abandoned",
        }
    }
}
