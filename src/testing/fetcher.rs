//! Peers in memory: what a fetcher gets from their stores, and what it gets from peers that misbehave.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use crate::model::PeerId;
use crate::oci::{BlobProof, Digest, Hasher};
use crate::ports::{
    BlobSink, ContentStore, FetchError, Fetcher, NoPartialBlobs, PartialBlob, PartialBlobs, StoreError,
};

mod pieces;

/// How a peer behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Sends what its store holds.
    Honest,
    /// Sends as many bytes, but others.
    Corrupts,
    /// Refuses so many requests before it serves.
    BusyFor(u32),
    /// Cannot be reached.
    Unreachable,
    /// Takes the request and never sends a byte.
    Hangs,
    /// Sends what its store holds, but a list of states in which one is wrong: the one after this piece.
    ForgesChain(u32),
    /// Sends other bytes for this piece of every blob, and true lists.
    CorruptsPiece(u32),
    /// Sends so many pieces, and from then on nothing.
    HangsAfter(u32),
    /// Its files of blobs of several pieces were written over: it sends other bytes of them, and finds that out when it makes their lists.
    DiskCorrupted,
    /// Sends what its store holds; of a list the first states at once, and the rest after twenty seconds.
    SendsChainSlowly,
    /// Sends what its store holds; of a list a state every ten seconds.
    DripsChain,
}

/// A peer that is played.
struct FakePeer {
    store: Arc<dyn ContentStore>,
    partials: Arc<dyn PartialBlobs>,
    behaviour: Behaviour,
}

/// Fetches from stores in memory.
#[derive(Default)]
pub struct MemoryFetcher {
    peers: Mutex<HashMap<PeerId, FakePeer>>,
    requests: Mutex<Vec<PeerId>>,
    served: Mutex<Vec<(PeerId, Digest)>>,
    chain_requests: AtomicUsize,
    corrupt_pieces: AtomicUsize,
}

impl MemoryFetcher {
    /// Adds a peer, or changes it.
    pub fn put_peer(&self, peer: PeerId, store: Arc<dyn ContentStore>, behaviour: Behaviour) {
        self.insert_peer(peer, FakePeer { store, partials: Arc::new(NoPartialBlobs), behaviour });
    }

    /// Adds an honest peer that is fetching blobs itself.
    pub fn put_fetching_peer(&self, peer: PeerId, store: Arc<dyn ContentStore>, partials: Arc<dyn PartialBlobs>) {
        self.insert_peer(peer, FakePeer { store, partials, behaviour: Behaviour::Honest });
    }

    fn insert_peer(&self, peer: PeerId, played: FakePeer) {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, played);
    }

    /// How many times a peer was asked for a blob's bytes.
    pub fn request_count(&self, peer: PeerId) -> usize {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|&&asked| asked == peer).count()
    }

    /// Every blob that was sent rightly, and by whom, in order.
    pub fn served(&self) -> Vec<(PeerId, Digest)> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the peer has of a blob that it is fetching.
    fn partial(&self, peer: PeerId, digest: Digest) -> Option<Arc<dyn PartialBlob>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).get(&peer)?.partials.partial(digest)
    }

    /// Counts a piece against what a peer sends before it hangs.
    fn record_piece(&self, peer: PeerId) -> bool {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        match peers.get_mut(&peer).map(|played| &mut played.behaviour) {
            Some(Behaviour::HangsAfter(0)) => false,
            Some(Behaviour::HangsAfter(left)) => {
                *left -= 1;
                true
            }
            _ => true,
        }
    }

    /// How many times anybody was asked for a list of states.
    pub fn chain_request_count(&self) -> usize {
        self.chain_requests.load(Ordering::Relaxed)
    }

    /// How many pieces were sent with other bytes.
    pub fn corrupt_piece_count(&self) -> usize {
        self.corrupt_pieces.load(Ordering::Relaxed)
    }

    fn record_request(&self, peer: PeerId) {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
    }

    fn record_served(&self, peer: PeerId, digest: Digest) {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).push((peer, digest));
    }

    fn peer(&self, peer: PeerId) -> Result<(Arc<dyn ContentStore>, Behaviour), FetchError> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
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
}
