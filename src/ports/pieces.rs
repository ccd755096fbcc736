//! Blobs in pieces: requested from several peers at once, stored in any order, served while
//! incomplete.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::{BlobMetadata, FetchError, StoreError};
use crate::model::{Bits, PieceMapUpdate};
use crate::oci::{BlobProof, Digest, HashChain, HashState};

/// Receives the next states of a hash chain.
pub type StateSink<'a> = &'a mut (dyn FnMut(&[HashState]) + Send);

/// Updates of a peer's piece map for one blob.
#[async_trait]
pub trait PieceMapUpdates: Send {
    /// Next update. The first has the whole map, later updates have new pieces. Waits without a
    /// limit.
    ///
    /// # Errors
    /// [`FetchError`] when the peer is gone, or stopped its download.
    async fn next(&mut self) -> Result<PieceMapUpdate, FetchError>;
}

/// Receives pieces. Called from one task; the sink's time does not count as the peer's.
#[async_trait]
pub trait PieceSink: Send {
    /// The peer chose this piece of the request; the piece's bytes follow.
    fn begin(&mut self, piece: u32);

    /// Next bytes of the piece, in batches as for [`super::BlobSink::append`].
    ///
    /// # Errors
    /// Any [`StoreError`]; the fetch ends with that error.
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError>;

    /// All bytes of the piece arrived.
    ///
    /// # Errors
    /// [`PieceError::Mismatch`] when the bytes do not fit the hash chain; the fetch then ends with
    /// [`FetchError::PieceMismatch`].
    async fn end(&mut self) -> Result<(), PieceError>;
}

/// Reason of a rejected piece.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// The bytes do not fit the hash chain.
    #[error("the piece does not fit")]
    Mismatch,
    /// This node's store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A blob whose pieces are written in any order. Before [`StagedBlob::commit`] only this handle
/// reads the blob: the store neither lists nor opens it.
///
/// A store on disk keeps staged blobs beyond the process: after a kill the next
/// [`super::Blobs::stage`] finds the pieces. A dropped blob stays for a while too. A blob
/// that is not staged again within [`STAGED_BLOB_LIFE`] is removed.
#[async_trait]
pub trait StagedBlob: Send + Sync {
    /// Ranges that were written before this process began, as far as the store can see; some of
    /// their bytes may be wrong. Sorted, not empty, not adjacent. The content is unknown: verify
    /// each piece.
    fn resumed_ranges(&self) -> Vec<Range<u64>>;

    /// Writes at an offset. Concurrent writes must not overlap.
    ///
    /// # Errors
    /// [`StoreError::Full`] and [`StoreError::Other`]. Writes beyond the blob's end, and after the
    /// start of a commit, fail too.
    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError>;

    /// Reads at most `most` bytes at `offset`; unwritten bytes are zeros. Empty only at the end, or
    /// when `most` is 0. Works during and after the commit.
    ///
    /// # Errors
    /// [`StoreError::Other`].
    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError>;

    /// Makes the blob readable and stores its metadata. The proof must be for this blob and for the
    /// bytes that were written. From the call on, writes fail. A failed commit can be repeated.
    ///
    /// # Errors
    /// [`StoreError::Other`] when the proof is for another blob.
    async fn commit(&self, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError>;

    /// Deletes the written pieces; a later attempt starts from nothing.
    async fn abandon(&self);
}

/// Life of an uncommitted staged blob: as long as a recovery's pin.
pub const STAGED_BLOB_LIFE: std::time::Duration = std::time::Duration::from_secs(3600);

/// Blobs that this node is downloading, for peers that request them.
pub trait PartialBlobs: Send + Sync + 'static {
    /// The download of the blob, if peers can be served from it. Each call returns another handle.
    /// A handle stays usable after the end of the download, which [`PartialBlob::changes`] shows.
    fn partial(&self, digest: Digest) -> Option<Arc<dyn PartialBlob>>;
}

/// A blob that this node is downloading. Every piece was verified against the hash chain.
#[async_trait]
pub trait PartialBlob: Send + Sync {
    /// Hash chain of the verified pieces.
    fn hash_chain(&self) -> Arc<HashChain>;

    /// Pieces that can be read.
    fn piece_map(&self) -> Bits;

    /// Moves when pieces arrived. The sender is dropped at the end of the download: the blob is
    /// then in the store, or the download was abandoned.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Reads at most `most` bytes at `offset`, within the pieces of the map.
    ///
    /// # Errors
    /// As [`StagedBlob::read_at`].
    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError>;
}

/// No downloads: for agents that only serve.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPartialBlobs;

impl PartialBlobs for NoPartialBlobs {
    fn partial(&self, _: Digest) -> Option<Arc<dyn PartialBlob>> {
        None
    }
}
