//! Fetching by the transport that is open: QUIC, or ranges over the mesh's TCP connection while UDP
//! is blocked. [`crate::decide::way`] chooses for each request, so QUIC is used again as soon as a
//! probe of UDP is answered.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Semaphore;

use super::doubting::Doubting;
use crate::decide::way::{MAX_RANGES, MAX_RANGES_OF_A_PEER, Paths, Way, ranges, way};
use crate::mesh::{Range, RangeError, RangeServer};
use crate::metrics::Metrics;
use crate::model::{Availability, Order, PeerId};
use crate::oci::{Chain, Cut, Digest, Hasher, State, Verified, VerifyError};
use crate::ports::{BlobSink, FetchError, Fetcher, Following, Heard, PieceError, PieceFetcher, PieceSink};
use crate::transfer::Transfer;
use crate::wire::{Answer, Request};

/// Serves ranges over the mesh as the transfer serves them over QUIC.
pub struct OverMesh(pub Transfer);

#[async_trait]
impl RangeServer for OverMesh {
    async fn serve(&self, peer: PeerId, request: Request) -> Range {
        let (answer, bytes) = self.0.answer_range(peer, request).await;
        Range { answer, bytes }
    }
}

/// Both transports.
pub struct Ways {
    quic: Doubting,
    metrics: Metrics,
    /// Requests over the mesh that may be open, at all peers.
    all: Semaphore,
    /// The same at each peer; those that are in use.
    peers: Mutex<HashMap<PeerId, Arc<Semaphore>>>,
}

/// Bytes of a state in a hash chain.
const STATE: usize = 32;

/// The subject of a request over the mesh.
#[derive(Clone, Copy)]
struct Wanted {
    peer: PeerId,
    digest: Digest,
    size: u64,
}

impl Ways {
    /// Fetches by QUIC, and over the mesh of `quic` while UDP is blocked.
    pub fn new(quic: Doubting, metrics: Metrics) -> Self {
        Self { quic, metrics, all: Semaphore::new(MAX_RANGES), peers: Mutex::default() }
    }

    fn way(&self, peer: PeerId, size: u64) -> Way {
        let Doubting { transfer, mesh, udp } = &self.quic;
        let (quic_open, neighbour) = (transfer.is_connected(peer), mesh.is_connected(peer));
        way(size, Paths { udp_blocked: udp.is_blocked(), quic_open, neighbour })
    }

    fn of_peer(&self, peer: PeerId) -> Arc<Semaphore> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|_, in_use| Arc::strong_count(in_use) > 1);
        Arc::clone(peers.entry(peer).or_insert_with(|| Arc::new(Semaphore::new(MAX_RANGES_OF_A_PEER))))
    }

    /// Sends one request when the bounds allow another.
    async fn ask(&self, peer: PeerId, request: Request) -> Result<Range, FetchError> {
        let of_peer = self.of_peer(peer);
        // Neither is ever closed.
        let (_one, _all) = (of_peer.acquire().await.ok(), self.all.acquire().await.ok());
        self.quic.mesh.range(peer, request).await.map_err(|error| match error {
            RangeError::NotConnected | RangeError::NoAnswer(_) => {
                FetchError::Unreachable { peer, silent: false, reason: error.to_string() }
            }
            RangeError::Malformed(_) => FetchError::Protocol { peer, reason: error.to_string() },
        })
    }

    /// Sends a request for bytes of a blob, and checks that the answer is about this blob.
    async fn bytes(&self, wanted: Wanted, request: Request, expected: u64) -> Result<Bytes, FetchError> {
        let Wanted { peer, digest, size } = wanted;
        let Range { answer, bytes } = self.ask(peer, request).await?;
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

    /// The bytes of one range, counted and within the download rate.
    async fn range(&self, wanted: Wanted, offset: u64, length: u64) -> Result<Bytes, FetchError> {
        let request = Request::Get { digest: wanted.digest, offset, length };
        let bytes = self.bytes(wanted, request, length).await?;
        self.quic.transfer.took(length).await;
        self.metrics.fetched_over_tcp(length);
        Ok(bytes)
    }

    async fn fetch_ranges(&self, wanted: Wanted, sink: &mut dyn BlobSink) -> Result<Verified, FetchError> {
        let Wanted { peer, digest, size } = wanted;
        let mut hasher = Hasher::default();
        for (offset, length) in ranges(0, size) {
            let bytes = self.range(wanted, offset, length).await?;
            hasher.update(&bytes);
            sink.append(&[bytes]).await?;
        }
        hasher.verify(digest, size).map_err(|source| FetchError::Corrupt { peer, source })
    }

    async fn size_over_mesh(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        match self.ask(peer, Request::Have(digest)).await?.answer {
            Answer::Blob { size } => Ok(Some(size)),
            Answer::Absent => Ok(None),
            Answer::Busy => Err(FetchError::Busy { peer }),
            Answer::Failed => Err(FetchError::StoreFailed { peer }),
            other => Err(FetchError::Protocol { peer, reason: format!("answers {other:?} to Have over the mesh") }),
        }
    }

    async fn chain_over_mesh(&self, wanted: Wanted, cut: Cut, heard: Heard<'_>) -> Result<Chain, FetchError> {
        let Wanted { peer, digest, .. } = wanted;
        let length = (cut.pieces() - 1) * STATE;
        let bytes = self.bytes(wanted, Request::Chain(digest), length as u64).await?;
        let states: Vec<_> = bytes.as_chunks::<STATE>().0.iter().map(|state| State::from_bytes(*state)).collect();
        heard(&states);
        Chain::claimed(digest, cut, states)
            .map_err(|error| FetchError::Protocol { peer, reason: format!("sends no hash chain: {error}") })
    }

    /// Requests the pieces one after the other; the recovery has several orders in flight.
    async fn pieces_over_mesh(&self, order: &Order, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let Order { peer, digest, cut, ref choice, most } = *order;
        let wanted = Wanted { peer, digest, size: cut.size() };
        for piece in choice.iter().take(most.into()) {
            let (begin, length) = (cut.offset(*piece as usize), cut.length(*piece as usize));
            let mut is_begun = false;
            for (offset, length) in ranges(begin, length) {
                let bytes = self.range(wanted, offset, length).await?;
                if !std::mem::replace(&mut is_begun, true) {
                    sink.begin(*piece);
                }
                sink.append(&[bytes]).await?;
            }
            if !is_begun {
                // The one piece of an empty blob.
                sink.begin(*piece);
            }
            sink.end().await.map_err(|error| match error {
                PieceError::Unfit => FetchError::Unfit { peer, digest, piece: *piece as usize },
                PieceError::Store(error) => FetchError::Sink(error),
            })?;
        }
        Ok(())
    }

    fn counted<T>(&self, fetched: Result<T, FetchError>) -> Result<T, FetchError> {
        fetched.inspect_err(|error| self.metrics.fetch_failed(error.label()))
    }
}

/// A provider that has the whole blob. Partial providers are not asked over the mesh.
struct Whole {
    is_told: bool,
}

#[async_trait]
impl Following for Whole {
    async fn next(&mut self) -> Result<Availability, FetchError> {
        if std::mem::replace(&mut self.is_told, true) {
            return std::future::pending().await;
        }
        Ok(Availability::Whole)
    }
}

#[async_trait]
impl PieceFetcher for Ways {
    async fn chain(&self, peer: PeerId, digest: Digest, cut: Cut, heard: Heard<'_>) -> Result<Chain, FetchError> {
        match self.way(peer, cut.size()) {
            Way::Quic => self.quic.chain(peer, digest, cut, heard).await,
            Way::Mesh => {
                let wanted = Wanted { peer, digest, size: cut.size() };
                self.counted(self.chain_over_mesh(wanted, cut, heard).await)
            }
        }
    }

    async fn follow(&self, peer: PeerId, digest: Digest, cut: Cut) -> Result<Box<dyn Following>, FetchError> {
        match self.way(peer, cut.size()) {
            Way::Quic => self.quic.follow(peer, digest, cut).await,
            Way::Mesh => {
                let wanted = Wanted { peer, digest, size: cut.size() };
                self.counted(self.bytes(wanted, Request::Have(digest), 0).await)?;
                Ok(Box::new(Whole { is_told: false }))
            }
        }
    }

    async fn pieces(&self, order: &Order, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        match self.way(order.peer, order.cut.size()) {
            Way::Quic => self.quic.pieces(order, sink).await,
            Way::Mesh => self.counted(self.pieces_over_mesh(order, sink).await),
        }
    }

    fn keep(&self, chain: Arc<Chain>) {
        self.quic.keep(chain);
    }
}

#[async_trait]
impl Fetcher for Ways {
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<Verified, FetchError> {
        match self.way(peer, size) {
            Way::Quic => self.quic.fetch(peer, digest, size, sink).await,
            Way::Mesh => self.counted(self.fetch_ranges(Wanted { peer, digest, size }, sink).await),
        }
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        // The question is small, whatever the blob is.
        match self.way(peer, 0) {
            Way::Quic => self.quic.size_of(peer, digest).await,
            Way::Mesh => self.size_over_mesh(peer, digest).await,
        }
    }
}
