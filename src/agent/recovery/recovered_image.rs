//! Results of a recovery, for Events, metrics, webhook messages and the command line.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::model::PeerId;
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
