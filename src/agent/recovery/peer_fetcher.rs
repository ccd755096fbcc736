//! Fetches over the open transport: QUIC, or ranges over the mesh's TCP connection while UDP is
//! blocked. [`crate::decide::transport_choice`] chooses for each request, so QUIC is used again as
//! soon as a probe over UDP is answered. Silent peers are reported to the mesh: a suspected peer
//! provides no image until its next sign of life.

use std::sync::Arc;

use async_trait::async_trait;

use super::mesh_range_fetcher::MeshRangeFetcher;
use crate::agent::peers::udp_state::UdpState;
use crate::decide::transport_choice::{PathState, Transport, choose_transport};
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::model::{PeerId, PieceRequest};
use crate::oci::{BlobProof, Digest, HashChain, PieceLayout};
use crate::ports::{BlobSink, FetchError, Fetcher, PieceMapUpdates, PieceSink, StateSink};
use crate::transfer::Transfer;

/// Fetches over either transport, and suspects the peers that send nothing.
pub struct PeerFetcher {
    transfer: Transfer,
    ranges: MeshRangeFetcher,
    mesh: Mesh,
    /// While UDP is blocked, silence over UDP is no evidence against a peer.
    udp: UdpState,
}

impl PeerFetcher {
    /// Fetches by `transfer`, and over `mesh` while UDP is blocked.
    pub fn new(transfer: Transfer, mesh: Mesh, udp: UdpState, metrics: Metrics) -> Self {
        let ranges = MeshRangeFetcher::new(mesh.clone(), transfer.clone(), metrics);
        Self { transfer, ranges, mesh, udp }
    }

    /// The transport for a blob of this size, in bytes.
    fn transport(&self, peer: PeerId, size: u64) -> &dyn Fetcher {
        let (quic_open, neighbor) = (self.transfer.is_connected(peer), self.mesh.is_connected(peer));
        match choose_transport(size, PathState { udp_blocked: self.udp.is_blocked(), quic_open, neighbor }) {
            Transport::Quic => &self.transfer,
            Transport::Mesh => &self.ranges,
        }
    }

    async fn suspect_if_silent<T>(&self, fetched: Result<T, FetchError>) -> Result<T, FetchError> {
        // A peer that answers anything is alive: busy, or without admission for this agent.
        if let Err(FetchError::Unreachable { peer, silent: true, .. }) = &fetched
            && !self.udp.is_blocked()
        {
            self.mesh.suspect(*peer).await;
        }
        fetched
    }
}

#[async_trait]
impl Fetcher for PeerFetcher {
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, FetchError> {
        self.suspect_if_silent(self.transport(peer, size).fetch(peer, digest, size, sink).await).await
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        // The answer is small, whatever the blob's size.
        self.suspect_if_silent(self.transport(peer, 0).size_of(peer, digest).await).await
    }

    async fn fetch_hash_chain(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
        on_states: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        let transport = self.transport(peer, layout.size());
        self.suspect_if_silent(transport.fetch_hash_chain(peer, digest, layout, on_states).await).await
    }

    async fn follow(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError> {
        self.suspect_if_silent(self.transport(peer, layout.size()).follow(peer, digest, layout).await).await
    }

    async fn fetch_pieces(&self, request: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let transport = self.transport(request.peer, request.layout.size());
        self.suspect_if_silent(transport.fetch_pieces(request, sink).await).await
    }

    fn keep_hash_chain(&self, chain: Arc<HashChain>) {
        self.transfer.keep_hash_chain(chain);
    }
}
