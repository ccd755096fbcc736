//! Fetches over the mesh's TCP connection, in ranges. The transport while UDP is blocked.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::decide::transport_choice::{MAX_RANGES, MAX_RANGES_OF_A_PEER, ranges};
use crate::mesh::{Mesh, RangeError, RangeResponse, RangeServer};
use crate::metrics::Metrics;
use crate::model::{PeerId, PieceMapUpdate, PieceRequest};
use crate::oci::{BlobProof, Digest, HashChain, HashState, Hasher, PieceLayout, VerifyError};
use crate::ports::{BlobSink, FetchError, Fetcher, PieceError, PieceMapUpdates, PieceSink, StateSink};
use crate::transfer::Transfer;
use crate::wire::{Answer, Request};

/// Serves ranges over the mesh as [`Transfer`] serves them over QUIC.
pub struct MeshRangeServer(pub Transfer);

#[async_trait]
impl RangeServer for MeshRangeServer {
    async fn serve(&self, peer: PeerId, request: Request) -> RangeResponse {
        let (answer, bytes) = self.0.answer_range(peer, request).await;
        RangeResponse { answer, bytes }
    }
}

/// Fetches ranges over the mesh.
pub struct MeshRangeFetcher {
    mesh: Mesh,
    /// Counts and limits received bytes, over either transport.
    transfer: Transfer,
    metrics: Metrics,
    /// Permits for requests at all peers together.
    permits: Semaphore,
    /// Permits for requests at one peer, for peers with requests.
    peer_permits: Mutex<HashMap<PeerId, Arc<Semaphore>>>,
}

/// Bytes of one state of a hash chain.
const STATE_BYTES: usize = 32;

/// The peer and the blob of a request over the mesh.
#[derive(Clone, Copy)]
struct RangeTarget {
    peer: PeerId,
    digest: Digest,
    size: u64,
}

impl MeshRangeFetcher {
    /// Fetches over `mesh`, within the download limit of `transfer`.
    pub fn new(mesh: Mesh, transfer: Transfer, metrics: Metrics) -> Self {
        let (permits, peer_permits) = (Semaphore::new(MAX_RANGES), Mutex::default());
        Self { mesh, transfer, metrics, permits, peer_permits }
    }

    fn permits_of_peer(&self, peer: PeerId) -> Arc<Semaphore> {
        let mut peers = self.peer_permits.lock();
        peers.retain(|_, in_use| Arc::strong_count(in_use) > 1);
        Arc::clone(peers.entry(peer).or_insert_with(|| Arc::new(Semaphore::new(MAX_RANGES_OF_A_PEER))))
    }

    /// Sends one request as soon as both permits are free.
    async fn send_request(&self, peer: PeerId, request: Request) -> Result<RangeResponse, FetchError> {
        let peer_permits = self.permits_of_peer(peer);
        // Neither semaphore is ever closed.
        let (_peer_permit, _permit) = (peer_permits.acquire().await.ok(), self.permits.acquire().await.ok());
        self.mesh.request_range(peer, request).await.map_err(|error| match error {
            RangeError::NotConnected | RangeError::NoAnswer(_) => {
                FetchError::Unreachable { peer, silent: false, reason: error.to_string() }
            }
            RangeError::Malformed(_) => FetchError::Protocol { peer, reason: error.to_string() },
        })
    }

    /// Requests bytes of a blob. Checks the blob's size and the number of bytes in the answer.
    async fn request_bytes(&self, target: RangeTarget, request: Request, expected: u64) -> Result<Bytes, FetchError> {
        let RangeTarget { peer, digest, size } = target;
        let RangeResponse { answer, bytes } = self.send_request(peer, request).await?;
        match answer {
            Answer::Blob { size: actual } if actual == size => {}
            Answer::Blob { size: actual } | Answer::Partial { size: actual } | Answer::Invalid { size: actual }
                if actual != size =>
            {
                let source = VerifyError::Size { expected: digest, expected_size: size, actual_size: actual };
                return Err(FetchError::Corrupt { peer, source });
            }
            Answer::Absent => return Err(FetchError::Absent { peer, digest }),
            Answer::Busy => return Err(FetchError::Busy { peer }),
            Answer::Failed => return Err(FetchError::StoreFailed { peer }),
            other => return Err(FetchError::Protocol { peer, reason: format!("answers {other:?} over the mesh") }),
        }
        let length = bytes.len() as u64;
        if length != expected {
            let reason = format!("sends {length} bytes over the mesh where {expected} were requested");
            return Err(FetchError::Protocol { peer, reason });
        }
        Ok(bytes)
    }

    /// Fetches one range, counts its bytes, and waits for the download rate limiter.
    async fn fetch_range(&self, target: RangeTarget, offset: u64, length: u64) -> Result<Bytes, FetchError> {
        let request = Request::Get { digest: target.digest, offset, length };
        let bytes = self.request_bytes(target, request, length).await?;
        self.transfer.account_received(length).await;
        self.metrics.fetched_over_tcp(length);
        Ok(bytes)
    }

    async fn fetch_blob(&self, target: RangeTarget, sink: &mut dyn BlobSink) -> Result<BlobProof, FetchError> {
        let RangeTarget { peer, digest, size } = target;
        let mut hasher = Hasher::default();
        for (offset, length) in ranges(0, size) {
            let bytes = self.fetch_range(target, offset, length).await?;
            hasher.update(&bytes);
            sink.append(&[bytes]).await?;
        }
        hasher.verify(digest, size).map_err(|source| FetchError::Corrupt { peer, source })
    }

    async fn fetch_states(
        &self,
        target: RangeTarget,
        layout: PieceLayout,
        on_states: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        let RangeTarget { peer, digest, .. } = target;
        let length = (layout.piece_count() - 1) * STATE_BYTES;
        let bytes = self.request_bytes(target, Request::HashChain(digest), length as u64).await?;
        let states: Vec<_> =
            bytes.as_chunks::<STATE_BYTES>().0.iter().map(|state| HashState::from_bytes(*state)).collect();
        on_states(&states);
        HashChain::unverified(digest, layout, states)
            .map_err(|error| FetchError::Protocol { peer, reason: format!("sends an invalid hash chain: {error}") })
    }

    /// Requests the pieces one after the other. The recovery has several requests in flight.
    async fn fetch_pieces_in_order(&self, request: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let PieceRequest { peer, digest, layout, ref pieces, limit } = *request;
        let target = RangeTarget { peer, digest, size: layout.size() };
        for piece in pieces.iter().take(limit.into()) {
            let (begin, length) = (layout.offset(*piece as usize), layout.piece_length(*piece as usize));
            let mut has_begun = false;
            for (offset, length) in ranges(begin, length) {
                let bytes = self.fetch_range(target, offset, length).await?;
                if !std::mem::replace(&mut has_begun, true) {
                    sink.begin(*piece);
                }
                sink.append(&[bytes]).await?;
            }
            if !has_begun {
                // An empty blob has one empty piece.
                sink.begin(*piece);
            }
            sink.end().await.map_err(|error| match error {
                PieceError::Mismatch => FetchError::PieceMismatch { peer, digest, piece: *piece as usize },
                PieceError::Store(error) => FetchError::Sink(error),
            })?;
        }
        Ok(())
    }

    fn count_failure<T>(&self, fetched: Result<T, FetchError>) -> Result<T, FetchError> {
        fetched.inspect_err(|error| self.metrics.fetch_failed(error.label()))
    }
}

/// The piece map of a whole provider. A partial provider serves nothing over the mesh.
struct WholeProvider {
    is_reported: bool,
}

#[async_trait]
impl PieceMapUpdates for WholeProvider {
    async fn next(&mut self) -> Result<PieceMapUpdate, FetchError> {
        if std::mem::replace(&mut self.is_reported, true) {
            return std::future::pending().await;
        }
        Ok(PieceMapUpdate::HaveAll)
    }
}

#[async_trait]
impl Fetcher for MeshRangeFetcher {
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, FetchError> {
        self.count_failure(self.fetch_blob(RangeTarget { peer, digest, size }, sink).await)
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        match self.send_request(peer, Request::Have(digest)).await?.answer {
            Answer::Blob { size } => Ok(Some(size)),
            Answer::Absent => Ok(None),
            Answer::Busy => Err(FetchError::Busy { peer }),
            Answer::Failed => Err(FetchError::StoreFailed { peer }),
            other => Err(FetchError::Protocol { peer, reason: format!("answers {other:?} to Have over the mesh") }),
        }
    }

    async fn fetch_hash_chain(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
        on_states: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        let target = RangeTarget { peer, digest, size: layout.size() };
        self.count_failure(self.fetch_states(target, layout, on_states).await)
    }

    async fn follow(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError> {
        let target = RangeTarget { peer, digest, size: layout.size() };
        self.count_failure(self.request_bytes(target, Request::Have(digest), 0).await)?;
        Ok(Box::new(WholeProvider { is_reported: false }))
    }

    async fn fetch_pieces(&self, request: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        self.count_failure(self.fetch_pieces_in_order(request, sink).await)
    }
}
