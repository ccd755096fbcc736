//! Peers in memory, honest and misbehaving.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::model::{PeerId, PieceRequest};
use crate::oci::{BlobProof, Digest, HashChain, Hasher, PieceLayout};
use crate::ports::{
    BlobSink, ContentStore, FetchError, Fetcher, NoPartialBlobs, PartialBlob, PartialBlobs, PieceMapUpdates, PieceSink,
    StateSink, StoreError,
};

mod pieces;

/// Behavior of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Sends the store's bytes.
    Honest,
    /// Sends as many bytes, but other bytes.
    Corrupts,
    /// Refuses so many requests before it serves.
    BusyFor(u32),
    /// Cannot be reached.
    Unreachable,
    /// Accepts the request and never sends a byte.
    Hangs,
    /// Sends the store's bytes, but a hash chain with one wrong state: the state after this piece.
    ForgesChain(u32),
    /// Sends other bytes for this piece of every blob, and true hash chains.
    CorruptsPiece(u32),
    /// Sends so many pieces, and nothing afterwards.
    HangsAfter(u32),
    /// The disk corrupted every blob of several pieces: the peer sends other bytes, and detects the
    /// error when it computes a hash chain.
    DiskCorrupted,
    /// Sends the store's bytes; the first states of a hash chain at once, the others after twenty
    /// seconds.
    SendsChainSlowly,
    /// Sends the store's bytes; one state of a hash chain every ten seconds.
    DripsChain,
}

/// A simulated peer.
struct FakePeer {
    store: Arc<dyn ContentStore>,
    partials: Arc<dyn PartialBlobs>,
    behaviour: Behaviour,
}

/// Fetches blobs from stores in memory.
#[derive(Default)]
pub struct MemoryFetcher {
    peers: Mutex<HashMap<PeerId, FakePeer>>,
    requests: Mutex<Vec<PeerId>>,
    served: Mutex<Vec<(PeerId, Digest)>>,
    chain_requests: AtomicUsize,
    corrupt_pieces: AtomicUsize,
}

impl MemoryFetcher {
    /// Adds or replaces a peer.
    pub fn put_peer(&self, peer: PeerId, store: Arc<dyn ContentStore>, behaviour: Behaviour) {
        self.insert_peer(peer, FakePeer { store, partials: Arc::new(NoPartialBlobs), behaviour });
    }

    /// Adds an honest peer that is downloading blobs.
    pub fn put_fetching_peer(&self, peer: PeerId, store: Arc<dyn ContentStore>, partials: Arc<dyn PartialBlobs>) {
        self.insert_peer(peer, FakePeer { store, partials, behaviour: Behaviour::Honest });
    }

    fn insert_peer(&self, peer: PeerId, fake_peer: FakePeer) {
        self.peers.lock().insert(peer, fake_peer);
    }

    /// Number of requests for a blob's bytes to this peer.
    pub fn request_count(&self, peer: PeerId) -> usize {
        self.requests.lock().iter().filter(|&&requested| requested == peer).count()
    }

    /// Every verified blob or piece with its provider, in order.
    pub fn served(&self) -> Vec<(PeerId, Digest)> {
        self.served.lock().clone()
    }

    /// The peer's download of the blob, if any.
    fn partial(&self, peer: PeerId, digest: Digest) -> Option<Arc<dyn PartialBlob>> {
        self.peers.lock().get(&peer)?.partials.partial(digest)
    }

    /// Counts a piece of a peer; `false` when the peer hangs instead of sending the piece.
    fn record_piece(&self, peer: PeerId) -> bool {
        let mut peers = self.peers.lock();
        match peers.get_mut(&peer).map(|fake_peer| &mut fake_peer.behaviour) {
            Some(Behaviour::HangsAfter(0)) => false,
            Some(Behaviour::HangsAfter(left)) => {
                *left -= 1;
                true
            }
            _ => true,
        }
    }

    /// Number of requests for a hash chain, to all peers.
    pub fn chain_request_count(&self) -> usize {
        self.chain_requests.load(Ordering::Relaxed)
    }

    /// Number of corrupt pieces that were sent.
    pub fn corrupt_piece_count(&self) -> usize {
        self.corrupt_pieces.load(Ordering::Relaxed)
    }

    fn record_request(&self, peer: PeerId) {
        self.requests.lock().push(peer);
    }

    fn record_served(&self, peer: PeerId, digest: Digest) {
        self.served.lock().push((peer, digest));
    }

    fn peer(&self, peer: PeerId) -> Result<(Arc<dyn ContentStore>, Behaviour), FetchError> {
        let mut peers = self.peers.lock();
        let unreachable = FetchError::Unreachable { peer, silent: true, reason: "connection refused".into() };
        let Some(FakePeer { store, behaviour, .. }) = peers.get_mut(&peer) else { return Err(unreachable) };
        match behaviour {
            Behaviour::Unreachable => return Err(unreachable),
            Behaviour::BusyFor(0) => *behaviour = Behaviour::Honest,
            Behaviour::BusyFor(times) => {
                *times -= 1;
                return Err(FetchError::Busy { peer });
            }
            _ => {}
        }
        Ok((Arc::clone(store), *behaviour))
    }
}

#[async_trait]
impl Fetcher for MemoryFetcher {
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, FetchError> {
        self.record_request(peer);
        let (store, behaviour) = self.peer(peer)?;
        if behaviour == Behaviour::Hangs {
            std::future::pending::<()>().await;
        }
        let mut reader = match store.open(digest).await {
            Ok(reader) => reader,
            Err(StoreError::Absent(_)) => return Err(FetchError::Absent { peer, digest }),
            Err(_) => return Err(FetchError::StoreFailed { peer }),
        };
        let mut hasher = Hasher::default();
        loop {
            let mut bytes = reader.read_at(hasher.size(), 1 << 16).await?;
            if bytes.is_empty() {
                break;
            }
            if behaviour == Behaviour::Corrupts {
                bytes = Bytes::from(bytes.iter().map(|byte| !byte).collect::<Vec<_>>());
            }
            hasher.update(&bytes);
            sink.append(&[bytes]).await?;
        }
        let proof = hasher.verify(digest, size).map_err(|source| FetchError::Corrupt { peer, source })?;
        self.record_served(peer, digest);
        Ok(proof)
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        let (store, _) = self.peer(peer)?;
        Ok(store.blob(digest).await?.map(|blob| blob.size))
    }

    async fn fetch_hash_chain(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
        sink: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        self.send_hash_chain(peer, digest, layout, sink).await
    }

    async fn follow(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError> {
        self.send_piece_map(peer, digest, layout).await
    }

    async fn fetch_pieces(&self, request: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        self.send_pieces(request, sink).await
    }
}
