//! Fetches by QUIC, and reports silent peers to the mesh. A suspected peer provides no image until
//! its next sign of life.

use std::sync::Arc;

use async_trait::async_trait;

use crate::agent::peers::udp_state::UdpState;
use crate::mesh::Mesh;
use crate::model::{PeerId, PieceRequest};
use crate::oci::{BlobProof, Digest, HashChain, PieceLayout};
use crate::ports::{BlobSink, FetchError, Fetcher, PieceFetcher, PieceMapUpdates, PieceSink, StateSink};
use crate::transfer::Transfer;

/// Fetches, and suspects the peers that send nothing.
pub struct SuspectingFetcher {
    /// Fetches by QUIC.
    pub transfer: Transfer,
    /// Receives the suspicions.
    pub mesh: Mesh,
    /// While UDP is blocked, silence over UDP is no evidence against a peer.
    pub udp: UdpState,
}

impl SuspectingFetcher {
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
impl PieceFetcher for SuspectingFetcher {
    async fn fetch_hash_chain(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
        on_states: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        self.suspect_if_silent(self.transfer.fetch_hash_chain(peer, digest, layout, on_states).await).await
    }

    async fn follow(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError> {
        self.suspect_if_silent(self.transfer.follow(peer, digest, layout).await).await
    }

    async fn fetch_pieces(&self, request: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        self.suspect_if_silent(self.transfer.fetch_pieces(request, sink).await).await
    }

    fn keep_hash_chain(&self, chain: Arc<HashChain>) {
        self.transfer.keep_hash_chain(chain);
    }
}

#[async_trait]
impl Fetcher for SuspectingFetcher {
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, FetchError> {
        self.suspect_if_silent(self.transfer.fetch(peer, digest, size, sink).await).await
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        self.suspect_if_silent(self.transfer.size_of(peer, digest).await).await
    }
}
