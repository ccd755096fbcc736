//! What a recovery found and what the recovery brought: values that the operator's surface, Events and
//! metrics read.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::model::PeerId;
use crate::oci::Digest;

/// An image that is here now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredImage {
    /// Its index or manifest.
    pub digest: Digest,
    /// Bytes that came.
    pub bytes: u64,
    /// Blobs that came.
    pub fetched: usize,
    /// Blobs that were here before.
    pub present: usize,
    /// How many bytes each provider sent.
    pub providers: BTreeMap<PeerId, u64>,
    /// From the decision until the runtime knew the image.
    pub took: Duration,
    /// What to tell where a tag was decided without its registry.
    pub tag_note: Option<String>,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedImage {
    /// Its index or manifest.
    pub digest: Digest,
    /// The peers that hold it under the name that was asked for.
    pub providers: Vec<PeerId>,
    /// What to tell where a tag was decided without its registry.
    pub tag_note: Option<String>,
}
