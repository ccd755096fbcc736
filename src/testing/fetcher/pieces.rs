//! Pieces from peers in memory: of stored blobs and of partial blobs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::{Behaviour, MemoryFetcher};
use crate::model::{PeerId, PieceMapUpdate, PieceRequest};
use crate::oci::{Digest, HashChain, HashChainBuilder, HashState, PieceLayout, VerifyError};
use crate::ports::{
    BlobReader, ContentStore, FetchError, PartialBlob, PieceError, PieceMapUpdates, PieceSink, StateSink, StoreError,
};

/// Bytes of one read.
const CHUNK: usize = 1 << 16;

/// Source of a peer's bytes.
enum PeerBlob {
    Whole(Box<dyn BlobReader>),
    Partial(Arc<dyn PartialBlob>),
}

impl PeerBlob {
    async fn read_at(&mut self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        match self {
            Self::Whole(reader) => reader.read_at(offset, limit).await,
            Self::Partial(partial) => partial.read_at(offset, limit).await,
        }
    }

    fn has(&self, piece: u32) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Partial(partial) => partial.piece_map().get(piece as usize),
        }
    }
}

impl MemoryFetcher {
    /// Opens the blob at a peer. [`Behaviour::Hangs`] hangs here.
    async fn open(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
    ) -> Result<(PeerBlob, Behaviour), FetchError> {
        let (store, behaviour) = self.peer(peer)?;
        if behaviour == Behaviour::Hangs {
            std::future::pending::<()>().await;
        }
        let store: Arc<dyn ContentStore> = store;
        let reader = match store.open(digest).await {
            Ok(reader) => reader,
            Err(StoreError::Absent(_)) => {
                let partial = self.partial(peer, digest).ok_or(FetchError::Absent { peer, digest })?;
                return Ok((PeerBlob::Partial(partial), behaviour));
            }
            Err(_) => return Err(FetchError::StoreFailed { peer }),
        };
        let actual_size = reader.size();
        if actual_size != layout.size() {
            let source = VerifyError::Size { expected: digest, expected_size: layout.size(), actual_size };
            return Err(FetchError::Corrupt { peer, source });
        }
        Ok((PeerBlob::Whole(reader), behaviour))
    }
}

/// Inverts bytes that the peer corrupts, in a piece or for a hash chain.
fn sent_bytes(is_wrong: bool, bytes: Bytes) -> Bytes {
    if is_wrong { bytes.iter().map(|byte| !byte).collect() } else { bytes }
}

fn is_wrong(behaviour: Behaviour, layout: PieceLayout, piece: u32) -> bool {
    match behaviour {
        Behaviour::Corrupts => true,
        Behaviour::CorruptsPiece(corrupt) => piece == corrupt,
        Behaviour::DiskCorrupted => layout.piece_count() > 1,
        _ => false,
    }
}

/// Pause of [`Behaviour::DripsChain`] before each state.
const DRIP_INTERVAL: Duration = Duration::from_secs(10);

/// Time to hash 36 GB.
const SLOW_CHAIN_DELAY: Duration = Duration::from_secs(20);

/// States that [`Behaviour::SendsChainSlowly`] sends at once.
const PREFIX_STATES: usize = 2;

impl MemoryFetcher {
    /// [`Behaviour::Corrupts`] sends the hash chain of the corrupt bytes.
    pub(super) async fn send_hash_chain(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
        sink: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        self.chain_requests.fetch_add(1, Ordering::Relaxed);
        let (blob, behaviour) = self.open(peer, digest, layout).await?;
        let mut reader = match blob {
            PeerBlob::Whole(reader) => reader,
            PeerBlob::Partial(partial) => {
                let chain = partial.hash_chain();
                sink(chain.states());
                return Ok((*chain).clone());
            }
        };
        let mut builder = HashChainBuilder::new(layout);
        let mut at = 0;
        while at < layout.size() {
            let bytes = reader.read_at(at, CHUNK).await?;
            at += bytes.len() as u64;
            builder.update(&sent_bytes(behaviour == Behaviour::Corrupts, bytes));
        }
        if behaviour == Behaviour::DiskCorrupted && layout.piece_count() > 1 {
            return Err(FetchError::StoreFailed { peer });
        }
        let mut states = builder.states().to_vec();
        if let Behaviour::ForgesChain(piece) = behaviour
            && let Some(state) = states.get_mut(piece as usize)
        {
            *state = HashState::INITIAL;
        }
        let (first, rest) = states.split_at(states.len().min(PREFIX_STATES));
        sink(first);
        if behaviour == Behaviour::SendsChainSlowly {
            tokio::time::sleep(SLOW_CHAIN_DELAY).await;
        }
        for state in rest {
            if behaviour == Behaviour::DripsChain {
                tokio::time::sleep(DRIP_INTERVAL).await;
            }
            sink(std::slice::from_ref(state));
        }
        HashChain::unverified(digest, layout, states)
            .map_err(|error| FetchError::Protocol { peer, reason: error.to_string() })
    }

    pub(super) async fn send_piece_map(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError> {
        Ok(match self.open(peer, digest, layout).await?.0 {
            PeerBlob::Whole(_) => Box::new(WholeBlobUpdates(false)),
            PeerBlob::Partial(partial) => {
                Box::new(PartialBlobUpdates { peer, digest, changes: partial.changes(), partial, has_sent: false })
            }
        })
    }

    pub(super) async fn send_pieces(&self, request: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let PieceRequest { peer, digest, layout, .. } = *request;
        self.record_request(peer);
        let (mut blob, behaviour) = self.open(peer, digest, layout).await?;
        let pieces: Vec<_> = request.pieces.iter().copied().filter(|piece| blob.has(*piece)).collect();
        for piece in pieces.into_iter().take(request.limit.into()) {
            if !self.record_piece(peer) {
                std::future::pending::<()>().await;
            }
            let is_wrong = is_wrong(behaviour, layout, piece);
            self.corrupt_pieces.fetch_add(usize::from(is_wrong), Ordering::Relaxed);
            sink.begin(piece);
            let (mut at, end) =
                (layout.offset(piece as usize), layout.offset(piece as usize) + layout.piece_length(piece as usize));
            while at < end {
                let limit = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                let bytes = blob.read_at(at, limit).await?;
                at += bytes.len() as u64;
                sink.append(&[sent_bytes(is_wrong, bytes)]).await?;
                // Other tasks run between chunks, as on a network.
                tokio::task::yield_now().await;
            }
            sink.end().await.map_err(|error| to_fetch_error(error, peer, digest, piece))?;
            self.record_served(peer, digest);
        }
        Ok(())
    }
}

fn to_fetch_error(error: PieceError, peer: PeerId, digest: Digest, piece: u32) -> FetchError {
    match error {
        PieceError::Mismatch => FetchError::PieceMismatch { peer, digest, piece: piece as usize },
        PieceError::Store(error) => FetchError::Sink(error),
    }
}

/// Updates of a peer with the whole blob: one update, then none.
struct WholeBlobUpdates(bool);

#[async_trait]
impl PieceMapUpdates for WholeBlobUpdates {
    async fn next(&mut self) -> Result<PieceMapUpdate, FetchError> {
        if std::mem::replace(&mut self.0, true) {
            std::future::pending::<()>().await;
        }
        Ok(PieceMapUpdate::HaveAll)
    }
}

/// Updates of a peer that is downloading the blob.
struct PartialBlobUpdates {
    peer: PeerId,
    digest: Digest,
    partial: Arc<dyn PartialBlob>,
    changes: watch::Receiver<u64>,
    has_sent: bool,
}

#[async_trait]
impl PieceMapUpdates for PartialBlobUpdates {
    async fn next(&mut self) -> Result<PieceMapUpdate, FetchError> {
        let absent = |_| FetchError::Absent { peer: self.peer, digest: self.digest };
        if std::mem::replace(&mut self.has_sent, true) {
            self.changes.changed().await.map_err(absent)?;
        }
        Ok(PieceMapUpdate::Map(self.partial.piece_map()))
    }
}
