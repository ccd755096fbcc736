//! Content of a node: blobs by digest, image records that name blobs, and pins that hold blobs.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::StagedBlob;
use crate::decide::disk_floor::Disks;
use crate::oci::{BlobProof, Descriptor, Digest, Document, MAX_DOCUMENT_BYTES, Repository};

/// A content store: containerd's, an OCI layout on disk, or one in memory.
pub trait ContentStore: Blobs + ImageRecords + Pins + StoreDisks {}

impl<S: Blobs + ImageRecords + Pins + StoreDisks> ContentStore for S {}

/// The blobs of a content store.
#[async_trait]
pub trait Blobs: Send + Sync + 'static {
    /// The blob, if the store has all of its bytes.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] and [`StoreError::Other`]; an absent blob is `None`.
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError>;

    /// Every complete blob. Blobs that are being written are not listed.
    ///
    /// # Errors
    /// As [`Blobs::blob`].
    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError>;

    /// Opens a blob for reading.
    ///
    /// # Errors
    /// [`StoreError::Absent`] for an absent blob.
    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError>;

    /// Writes a blob of at most [`MAX_DOCUMENT_BYTES`], which `pin` holds from then on. An existing
    /// blob stays, and only the metadata is added. A canceled call leaves the whole blob or no
    /// blob.
    ///
    /// # Errors
    /// [`StoreError::Other`] when the proof is for other bytes, see [`verify_document`], and
    /// [`StoreError::Busy`]: a blob has one writer at a time.
    async fn put(&self, bytes: Bytes, proof: BlobProof, metadata: &BlobMetadata, pin: &Pin) -> Result<(), StoreError>;

    /// Starts a blob whose pieces arrive in any order, and which `pin` will hold. The blob resumes
    /// with the pieces of an earlier, interrupted attempt.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] when the complete blob exists. The pin then holds the blob,
    /// but [`BlobMetadata`] may be missing: see [`Blobs::add_metadata`]. [`StoreError::Busy`] as
    /// for [`Blobs::put`].
    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError>;

    /// Adds metadata to a blob of the store; earlier metadata stays.
    ///
    /// # Errors
    /// [`StoreError::Absent`] for an absent blob.
    async fn add_metadata(&self, digest: Digest, metadata: &BlobMetadata) -> Result<(), StoreError>;

    /// Removes a blob, so that it can be written again. References to the blob stay, and `pin`
    /// holds the blob's children from now on. Only for bytes with a wrong hash, and only when the
    /// right bytes are at hand or nothing is lost. Open readers may read on.
    ///
    /// # Errors
    /// [`StoreError::Other`] when the bytes cannot be removed; callers must not use them then. An
    /// absent blob is no error.
    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError>;

    /// Counter that moves whenever blobs or records may have changed. Extra moves are possible.
    /// Some stores remove content silently (containerd's collector for one), so list at intervals
    /// as well.
    fn changes(&self) -> watch::Receiver<u64>;
}

/// The image records of a content store, and the images' layers outside the content store.
#[async_trait]
pub trait ImageRecords: Send + Sync + 'static {
    /// Every image record.
    ///
    /// # Errors
    /// As [`Blobs::blob`].
    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError>;

    /// Writes an image record, replaces a record of that name, and returns when the runtime has
    /// processed the change: a pod started afterwards finds the image.
    ///
    /// # Errors
    /// [`StoreError::Absent`] for an absent target.
    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError>;

    /// Removes the image record of exactly this name if its target is `target`, and returns when
    /// the runtime has processed the change. The collector removes the content. Only for records
    /// whose content no node has: while the record exists, pods see the image as present, and the
    /// kubelet never pulls.
    ///
    /// # Errors
    /// As [`Blobs::blob`]. A missing record, or a record with another target, is no error.
    async fn remove_image(&self, name: &str, target: Digest) -> Result<(), StoreError>;

    /// Snapshots that the runtime of this store unpacked under this chain ID, which is
    /// [`crate::oci::StackedLayer::chain_id`] of an image's topmost layer.
    ///
    /// # Errors
    /// As [`Blobs::blob`].
    async fn snapshots(&self, chain_id: Digest) -> Result<Snapshots, StoreError>;
}

/// Protection of content from the collector of a content store.
#[async_trait]
pub trait Pins: Send + Sync + 'static {
    /// Protects content from the collector until released, but for `life` at most: a killed agent
    /// leaks nothing.
    ///
    /// # Errors
    /// As [`Blobs::blob`].
    async fn pin(&self, life: Duration) -> Result<Pin, StoreError>;

    /// Extends the pin to `life` from now on, for present content, open writers and later content.
    /// A killed agent leaks nothing after `life`, as with [`Pins::pin`].
    ///
    /// # Errors
    /// As [`Blobs::blob`], and [`StoreError::Other`] when the pin has ended. After other errors the
    /// pin holds its content until its former end at least.
    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError>;

    /// Releases the pin. The collector removes content without an image record sooner or later.
    ///
    /// # Errors
    /// As [`Blobs::blob`]. A pin that is gone is no error.
    async fn release(&self, pin: Pin) -> Result<(), StoreError>;
}

/// The disks of a content store.
#[async_trait]
pub trait StoreDisks: Send + Sync + 'static {
    /// File systems of the content and of the snapshots, as far as the store has them and the agent
    /// can see them.
    ///
    /// # Errors
    /// As [`Blobs::blob`].
    async fn disks(&self) -> Result<Disks, StoreError>;
}

/// Verifies the arguments of [`Blobs::put`].
///
/// # Errors
/// [`StoreError::Other`] for more than [`MAX_DOCUMENT_BYTES`], and when the proof is for other
/// bytes.
pub fn verify_document(bytes: &[u8], proof: BlobProof) -> Result<(), StoreError> {
    let (size, digest) = (bytes.len() as u64, Digest::of(bytes));
    if size > MAX_DOCUMENT_BYTES {
        return Err(StoreError::Other(format!("{size} bytes of {digest} are over the limit of {MAX_DOCUMENT_BYTES}")));
    }
    if (proof.digest(), proof.size()) != (digest, size) {
        let (proved, length) = (proof.digest(), proof.size());
        return Err(StoreError::Other(format!(
            "the proof is for {length} bytes of {proved}, written were {size} of {digest}"
        )));
    }
    Ok(())
}

/// Reads one blob; stays valid while the blob exists.
#[async_trait]
pub trait BlobReader: Send {
    /// The blob's size in bytes.
    fn size(&self) -> u64;

    /// Reads at most `most` bytes at `offset`; empty only at the end, or when `most` is 0.
    ///
    /// # Errors
    /// [`StoreError::Absent`] when the collector removed the blob meanwhile.
    async fn read_at(&mut self, offset: u64, limit: usize) -> Result<Bytes, StoreError>;
}

/// A complete blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Digest.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Recorded repositories of the blob, in ascending order. A request for the blob names one of
    /// them.
    pub sources: Vec<Repository>,
    /// Metadata names children: the blob is a manifest or an index.
    pub has_children: bool,
}

/// Metadata of a blob: the collector keeps the children, and the blob can be pushed later.
/// containerd stores metadata as labels.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlobMetadata {
    /// Repository that the blob came from first.
    pub source: Option<Repository>,
    /// Blobs that stay as long as this blob.
    pub children: Vec<Child>,
}

/// A blob that its parent keeps alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    /// Digest of the child.
    pub digest: Digest,
    /// Role of the child.
    pub kind: ChildKind,
}

/// Role of a child in its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildKind {
    /// A manifest in an index.
    Manifest,
    /// A manifest's configuration.
    Config,
    /// A manifest's layer.
    Layer,
}

impl ChildKind {
    /// The kind of the child at this position of an index or a manifest. Position 0 of a manifest
    /// is the config.
    pub fn of(document: &Document, position: usize) -> Self {
        match document {
            Document::Index(_) => Self::Manifest,
            Document::Manifest(_) if position == 0 => Self::Config,
            Document::Manifest(_) => Self::Layer,
        }
    }
}

/// Whether other programs than the runtime may import images into a content store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ImportPermission {
    /// The store has not answered yet.
    #[default]
    Unknown,
    /// Imports are permitted.
    Allowed,
    /// Imports are refused; the text has the reason and the setting.
    Refused(String),
}

/// A name that points at an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// Exact name: a normalized reference from a runtime, any text from a person.
    pub name: String,
    /// Index or manifest.
    pub target: Descriptor,
}

/// An image's layers outside the content store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshots {
    /// Snapshotters that have all layers; at most as many as the runtime has.
    pub snapshotters: Vec<String>,
    /// Whether the runtime discards layers after unpacking; `None` where the runtime does not say.
    pub discards_layers: Option<bool>,
}

/// Protects content from the collector while the agent works on it. A lease in containerd's words;
/// here a lease is Kubernetes's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin(pub String);

/// Reason of a failed store operation.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached: not started, restarting, gone. A retry may succeed later.
    #[error("the content store cannot be reached: {0}")]
    Unavailable(String),
    /// The store does not have the blob, or no longer.
    #[error("{0} is not in the content store")]
    Absent(Digest),
    /// The store has the complete blob already.
    #[error("{0} is in the content store already")]
    AlreadyExists(Digest),
    /// Another writer has this blob at present.
    #[error("{0} is being written by another writer")]
    Busy(Digest),
    /// The disk is full.
    #[error("no space left for {0}")]
    Full(Digest),
    /// Any other error, in the store's words.
    #[error("{0}")]
    Other(String),
}

impl StoreError {
    /// Whether the same call may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Busy(_))
    }
}
