//! Peers in memory: what a fetcher gets from their stores, and what it gets from peers that misbehave.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use crate::model::PeerId;
use crate::oci::{Digest, Hasher, Verified};
use crate::ports::{BlobSink, ContentStore, FetchError, Fetcher, StoreError};

/// How a peer behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Sends what its store holds.
    Honest,
    /// Sends as many bytes, but others.
    Lies,
    /// Refuses so many requests before it serves.
    BusyFor(u32),
    /// Cannot be reached.
    Gone,
    /// Takes the request and never sends a byte.
    Hangs,
}

/// A peer that is played.
struct Played {
    store: Arc<dyn ContentStore>,
    behaviour: Behaviour,
}

/// Fetches from stores in memory.
#[derive(Default)]
pub struct MemoryFetcher {
    peers: Mutex<HashMap<PeerId, Played>>,
    asked: Mutex<Vec<PeerId>>,
    served: Mutex<Vec<(PeerId, Digest)>>,
}

impl MemoryFetcher {
    /// Adds a peer, or changes it.
    pub fn put_peer(&self, peer: PeerId, store: Arc<dyn ContentStore>, behaviour: Behaviour) {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, Played { store, behaviour });
    }

    /// How many times a peer was asked for a blob's bytes.
    pub fn times_asked(&self, peer: PeerId) -> usize {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|&&asked| asked == peer).count()
    }

    /// Every blob that was sent rightly, and by whom, in order.
    pub fn served(&self) -> Vec<(PeerId, Digest)> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn peer(&self, peer: PeerId) -> Result<(Arc<dyn ContentStore>, Behaviour), FetchError> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let unreachable = FetchError::Unreachable { peer, silent: true, reason: "connection refused".into() };
        let Some(Played { store, behaviour }) = peers.get_mut(&peer) else { return Err(unreachable) };
        match behaviour {
            Behaviour::Gone => return Err(unreachable),
            Behaviour::BusyFor(0) => *behaviour = Behaviour::Honest,
            Behaviour::BusyFor(times) => {
                *times -= 1;
                return Err(FetchError::Busy { peer });
            }
            Behaviour::Honest | Behaviour::Lies | Behaviour::Hangs => {}
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
    ) -> Result<Verified, FetchError> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
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
            if behaviour == Behaviour::Lies {
                bytes = Bytes::from(bytes.iter().map(|byte| !byte).collect::<Vec<_>>());
            }
            hasher.update(&bytes);
            sink.append(&[bytes]).await?;
        }
        let proof = hasher.verify(digest, size).map_err(|source| FetchError::Corrupt { peer, source })?;
        self.served.lock().unwrap_or_else(PoisonError::into_inner).push((peer, digest));
        Ok(proof)
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        let (store, _) = self.peer(peer)?;
        Ok(store.blob(digest).await?.map(|blob| blob.size))
    }
}
