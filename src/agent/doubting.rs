//! Fetching as the recoveries know it, and a word to the mesh about whom it could not reach: nothing is fetched from there until the
//! peer is heard of again, whichever image it was wanted for.

use std::sync::Arc;

use async_trait::async_trait;

use super::udp_watch::UdpState;
use crate::mesh::Mesh;
use crate::model::{Order, PeerId};
use crate::oci::{Chain, Cut, Digest, Verified};
use crate::ports::{BlobSink, FetchError, Fetcher, Following, Heard, PieceFetcher, PieceSink};
use crate::transfer::Transfer;

/// Fetches, and tells on those who are out of reach.
pub struct Doubting {
    /// Who fetches.
    pub transfer: Transfer,
    /// Who is told.
    pub mesh: Mesh,
    /// While UDP is blocked, silence over UDP says nothing about a peer.
    pub udp: UdpState,
}

impl Doubting {
    async fn told<T>(&self, fetched: Result<T, FetchError>) -> Result<T, FetchError> {
        // Whoever answers anything lives, and is busy, or will not have us.
        if let Err(FetchError::Unreachable { peer, silent: true, .. }) = &fetched
            && !self.udp.is_blocked()
        {
            self.mesh.doubt(*peer).await;
        }
        fetched
    }
}

#[async_trait]
impl PieceFetcher for Doubting {
    async fn chain(&self, peer: PeerId, digest: Digest, cut: Cut, heard: Heard<'_>) -> Result<Chain, FetchError> {
        self.told(self.transfer.chain(peer, digest, cut, heard).await).await
    }

    async fn follow(&self, peer: PeerId, digest: Digest, cut: Cut) -> Result<Box<dyn Following>, FetchError> {
        self.told(self.transfer.follow(peer, digest, cut).await).await
    }

    async fn pieces(&self, order: &Order, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        self.told(self.transfer.pieces(order, sink).await).await
    }

    fn keep(&self, chain: Arc<Chain>) {
        self.transfer.keep(chain);
    }
}

#[async_trait]
impl Fetcher for Doubting {
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<Verified, FetchError> {
        self.told(self.transfer.fetch(peer, digest, size, sink).await).await
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        self.told(self.transfer.size_of(peer, digest).await).await
    }
}
