//! Blobs in pieces: asked of several peers at once, kept in any order, served while others of them are still to come.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::{BlobMetadata, FetchError, StoreError};
use crate::model::{Bits, PeerId, PieceMapUpdate, PieceRequest};
use crate::oci::{BlobProof, Digest, HashChain, HashState, PieceLayout};

/// Fetches pieces from peers that were admitted.
#[async_trait]
pub trait PieceFetcher: Send + Sync + 'static {
    /// The peer's list of states. One that has none yet makes it now, which takes the time to hash the blob; `heard` gets the states as they come, each
    /// once and in order.
    ///
    /// # Errors
    /// [`FetchError`]. The list is a claim.
    async fn fetch_hash_chain(
        &self,
        peer: PeerId,
        digest: Digest,
        cut: PieceLayout,
        heard: StateSink<'_>,
    ) -> Result<HashChain, FetchError>;

    /// Begins to hear which pieces the peer has.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchError::Absent`] when it has nothing of the blob.
    async fn follow(
        &self,
        peer: PeerId,
        digest: Digest,
        cut: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError>;

    /// Gives pieces to `sink` as they come. Ends when the peer has sent all that it will: up to `most`, fewer or none where it does not have them.
    ///
    /// Bounded as [`super::Fetcher::fetch`] is: a peer that sends what was not asked for, or too slowly for long, is given up.
    ///
    /// # Errors
    /// [`FetchError`]; pieces that ended before it count.
    async fn fetch_pieces(&self, order: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError>;

    /// The list of a blob that was proved and is in the store now, for those who will ask this node for it.
    fn keep_hash_chain(&self, chain: Arc<HashChain>);
}

/// Gets the next states of a list.
pub type StateSink<'a> = &'a mut (dyn FnMut(&[HashState]) + Send);

/// What a peer has of a blob, as it changes.
#[async_trait]
pub trait PieceMapUpdates: Send {
    /// The next word; the first says what there is, later ones what came. Waits as long as nothing changes.
    ///
    /// # Errors
    /// [`FetchError`] when the peer has gone, or gave up fetching.
    async fn next(&mut self) -> Result<PieceMapUpdate, FetchError>;
}

/// Where pieces go. Called from one task; its time is not counted against the peer.
#[async_trait]
pub trait PieceSink: Send {
    /// The peer has chosen this piece, one of those that were asked for; its bytes follow.
    fn begin(&mut self, piece: u32);

    /// The next bytes of the piece, in batches as [`super::BlobSink::append`] gets them.
    ///
    /// # Errors
    /// Any [`StoreError`]; the fetch ends with it.
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError>;

    /// All bytes of the piece have come.
    ///
    /// # Errors
    /// [`PieceError::Unfit`] when they are not what the list says; the fetch ends with [`FetchError::Unfit`].
    async fn end(&mut self) -> Result<(), PieceError>;
}

/// A piece was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// Its bytes do not fit the list.
    #[error("the piece does not fit")]
    Mismatch,
    /// Our own store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A blob whose pieces are written in any order. Nothing of it is in the store before [`Staged::commit`]: it can be read here, and is neither listed nor
/// opened there.
///
/// It outlives the process where the store can keep it: after a kill the next [`super::ContentStore::stage`] finds what was written, and says so. Dropped, it
/// stays for a while too; whatever is not taken up again within [`STAGED_LIFE`] is removed.
#[async_trait]
pub trait StagedBlob: Send + Sync {
    /// The parts that were written before this process began, as far as that is known; of some of their bytes it may not be true. Sorted, not empty,
    /// not touching. Nothing about their content is known: each piece has to be checked.
    fn resumed_ranges(&self) -> Vec<Range<u64>>;

    /// Writes at an offset. Ranges written at the same time do not overlap.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Other`]; also beyond the blob's end, and once it is being committed.
    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError>;

    /// Reads at most `most` bytes at `offset`: what was written, zeros where nothing was. Empty only at the end, or when `most` is 0. Goes on
    /// working while it is committed, and after.
    ///
    /// # Errors
    /// [`StoreError::Other`].
    async fn read_at(&self, offset: u64, most: usize) -> Result<Bytes, StoreError>;

    /// Makes the blob readable, with what is to be remembered about it. The proof must be for this blob, and for the very bytes that were written.
    /// Nothing can be written any more from the moment that it is called; what fails can be committed again.
    ///
    /// # Errors
    /// [`StoreError::Other`] when the proof is for another blob; as [`super::BlobWriter::commit`].
    async fn commit(&self, proof: BlobProof, remembered: &BlobMetadata) -> Result<(), StoreError>;

    /// Throws away what was written; it is not to be taken up again.
    async fn abandon(&self);
}

/// How long what was staged and not committed is kept for a later try: as long as a recovery's pin.
pub const STAGED_BLOB_LIFE: std::time::Duration = std::time::Duration::from_secs(3600);

/// The blobs that are being fetched here, for others who want them.
pub trait PartialBlobs: Send + Sync + 'static {
    /// The blob, if it is being fetched and something of it can be served. Each time another view of it: whoever holds one knows by
    /// [`Partial::changes`], not by its own view, that it is fetched no more.
    fn partial(&self, digest: Digest) -> Option<Arc<dyn PartialBlob>>;
}

/// A blob that is being fetched. Every piece in it was found to fit its list.
#[async_trait]
pub trait PartialBlob: Send + Sync {
    /// The list that its pieces fit.
    fn hash_chain(&self) -> Arc<HashChain>;

    /// The pieces that are there.
    fn piece_map(&self) -> Bits;

    /// Moves when pieces came. Its sender is gone when the blob is not fetched any more: it is in the store then, or nowhere.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Reads at most `most` bytes at `offset`, within pieces that are there.
    ///
    /// # Errors
    /// As [`Staged::read_at`].
    async fn read_at(&self, offset: u64, most: usize) -> Result<Bytes, StoreError>;
}

/// Nothing is being fetched: for agents that only serve.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPartialBlobs;

impl PartialBlobs for NoPartialBlobs {
    fn partial(&self, _: Digest) -> Option<Arc<dyn PartialBlob>> {
        None
    }
}
