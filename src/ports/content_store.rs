//! Content that a node keeps: blobs by digest, image records that name them, pins that hold them.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::StagedBlob;
use crate::decide::disk::Disks;
use crate::oci::{BlobProof, Descriptor, Digest, Repository};

/// A content store: containerd's, an OCI layout on disk, or one in memory.
#[async_trait]
pub trait ContentStore: Send + Sync + 'static {
    /// The blob, if all of it is there.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] and [`StoreError::Other`]; an absent blob is `None`.
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError>;

    /// Every blob that is wholly there. Half-written ones are not.
    ///
    /// # Errors
    /// As [`ContentStore::blob`].
    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError>;

    /// Opens a blob for reading.
    ///
    /// # Errors
    /// [`StoreError::Absent`] when it is not there.
    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError>;

    /// Starts writing a blob that `pin` will hold. Whatever an earlier, interrupted attempt left is thrown away.
    ///
    /// # Errors
    /// [`StoreError::AlreadyThere`] when the whole blob exists already (it is then held by the pin, but its
    /// [`Remembered`] may be missing: see [`ContentStore::remember`]).
    async fn create(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Box<dyn BlobWriter>, StoreError>;

    /// Begins a blob whose pieces come in any order, and which `pin` will hold; what an earlier, interrupted attempt left is there again.
    ///
    /// # Errors
    /// As [`ContentStore::create`]: a blob has one writer at a time, of either kind.
    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError>;

    /// Adds to what is remembered about a blob that is there; nothing that was remembered is lost.
    ///
    /// # Errors
    /// [`StoreError::Absent`] when the blob is not there.
    async fn add_metadata(&self, digest: Digest, remembered: &BlobMetadata) -> Result<(), StoreError>;

    /// Removes a blob, so that it can be written again; what refers to it stays, and what it kept alive is held by `pin` from now on.
    /// Only for bytes that were seen to be wrong, and only with the right ones at hand or nothing to lose. Whoever has it open may read on.
    ///
    /// # Errors
    /// [`StoreError::Other`] when its bytes cannot be removed; they must then not be taken for the blob. What is not there is no error.
    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError>;

    /// Every image record.
    ///
    /// # Errors
    /// As [`ContentStore::blob`].
    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError>;

    /// Writes an image record, replacing one of that name, and returns when the runtime has taken notice of it:
    /// a pod started afterwards finds the image.
    ///
    /// # Errors
    /// [`StoreError::Absent`] when the target is not there.
    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError>;

    /// Removes the image record of exactly this name if it points at `target`, and returns when the runtime has taken notice of it. What it
    /// named is left to the collector. For a record whose content nobody has any more: as long as it is there, pods are told that the
    /// image is, and it is never pulled.
    ///
    /// # Errors
    /// As [`ContentStore::blob`]. A record that is gone, or that points elsewhere, is no error.
    async fn remove_image(&self, name: &str, target: Digest) -> Result<(), StoreError>;

    /// What the runtime of this store has unpacked under this chain ID, which is
    /// [`crate::oci::StackedLayer::chain_id`] of an image's topmost layer.
    ///
    /// # Errors
    /// As [`ContentStore::blob`].
    async fn snapshots(&self, chain_id: Digest) -> Result<Snapshots, StoreError>;

    /// Holds content against collection until released, or for `life` at most, so that a killed agent leaks nothing.
    ///
    /// # Errors
    /// As [`ContentStore::blob`].
    async fn pin(&self, life: Duration) -> Result<Pin, StoreError>;

    /// Holds the pin's content for `life` from now on: what it holds already, what is being written
    /// under it, and what comes. A killed agent leaks nothing after `life`, as with
    /// [`ContentStore::pin`].
    ///
    /// # Errors
    /// As [`ContentStore::blob`], and [`StoreError::Other`] when the pin has ended. The pin then
    /// holds its content until its former end at least.
    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError>;

    /// Lets go. What no image record reaches any more is collected sooner or later.
    ///
    /// # Errors
    /// As [`ContentStore::blob`]. Releasing a pin that is gone is no error.
    async fn release(&self, pin: Pin) -> Result<(), StoreError>;

    /// A counter that moves whenever blobs or records may have changed. It moves too often rather than too seldom, yet
    /// some stores (containerd's collector is one) take content away silently, so list again at intervals as well.
    fn changes(&self) -> watch::Receiver<u64>;

    /// The file systems that content is kept on and unpacked to, as far as they have a meaning and
    /// can be seen.
    ///
    /// # Errors
    /// As [`ContentStore::blob`].
    async fn disks(&self) -> Result<Disks, StoreError>;
}

/// Reads one blob; stays valid while the blob exists.
#[async_trait]
pub trait BlobReader: Send {
    /// The blob's size in bytes.
    fn size(&self) -> u64;

    /// Reads at most `most` bytes at `offset`; empty only at the end, or when `most` is 0.
    ///
    /// # Errors
    /// [`StoreError::Absent`] when the blob was collected meanwhile.
    async fn read_at(&mut self, offset: u64, most: usize) -> Result<Bytes, StoreError>;
}

/// Where fetched bytes go, in order.
///
/// Called once per batch of chunks rather than once per chunk: at a gigabyte a second the calls themselves would count.
#[async_trait]
pub trait BlobSink: Send {
    /// Appends the chunks, one after the other.
    ///
    /// # Errors
    /// Any [`StoreError`]; the blob must then be abandoned.
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError>;
}

/// A blob being written. Dropped without [`BlobWriter::commit`], nothing of it can be read, ever.
#[async_trait]
pub trait BlobWriter: BlobSink {
    /// Makes the blob readable, with what is to be remembered about it. Only bytes that were proved get here: the
    /// proof must be for this writer's blob.
    ///
    /// # Errors
    /// [`StoreError::Other`] when the proof is for another blob or the bytes written are not as many as it says.
    async fn commit(self: Box<Self>, proof: BlobProof, remembered: &BlobMetadata) -> Result<(), StoreError>;
}

/// A blob that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its address.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// The repositories that it is remembered to have come from, in ascending order; who may fetch it asks for one of them.
    pub sources: Vec<Repository>,
    /// It is remembered to keep other blobs alive: it is a manifest or an index.
    pub has_children: bool,
}

/// What is kept about a blob beside its bytes, so that the collector leaves its children and so that it can be pushed later.
/// containerd calls these labels.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlobMetadata {
    /// Where the blob came from first.
    pub source: Option<Repository>,
    /// The blobs that stay as long as this one does.
    pub children: Vec<Child>,
}

/// A blob that another one keeps alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    /// Which blob.
    pub digest: Digest,
    /// As what.
    pub kind: ChildKind,
}

/// What a child is to its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildKind {
    /// A manifest in an index.
    Manifest,
    /// A manifest's configuration.
    Config,
    /// A manifest's layer.
    Layer,
}

/// Whether images may be brought into a content store by others than its runtime.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ImportPermission {
    /// It has not been found out yet.
    #[default]
    Unknown,
    /// They may.
    Allowed,
    /// They may not; says why, and what to set.
    Refused(String),
}

/// A name that points at an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// The exact name; a normalised reference where a runtime wrote it, anything where a person did.
    pub name: String,
    /// The index or manifest.
    pub target: Descriptor,
}

/// An image's layers outside the content store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshots {
    /// The snapshotters that have all layers; as many at most as the runtime has.
    pub snapshotters: Vec<String>,
    /// Whether the runtime drops layers once they are unpacked; `None` where the runtime does not
    /// tell.
    pub discards_layers: Option<bool>,
}

/// Holds content while it is worked on. (containerd calls this a lease; here that word is Kubernetes's.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin(pub String);

/// Why a content store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached: not started, restarting, gone. The same call may succeed later.
    #[error("the content store cannot be reached: {0}")]
    Unavailable(String),
    /// The blob is not there, or no longer.
    #[error("{0} is not in the content store")]
    Absent(Digest),
    /// All of the blob is there already.
    #[error("{0} is in the content store already")]
    AlreadyExists(Digest),
    /// Somebody else is writing this blob right now.
    #[error("{0} is being written by somebody else")]
    Busy(Digest),
    /// No room.
    #[error("no space left for {0}")]
    Full(Digest),
    /// Anything else, as the store put it.
    #[error("{0}")]
    Other(String),
}

impl StoreError {
    /// Whether the same call may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Busy(_))
    }
}
