//! `Get` and `Have` in place of `HashChain`, `Follow` and `Pieces`, for a peer of another MAJOR.
//!
//! A hash chain then costs the transfer of the whole blob, and the pieces are fetched once more.
//! Only a blob without a provider of our MAJOR costs that.

use async_trait::async_trait;
use bytes::Bytes;

use super::BlobRequest;
use super::pieces::PieceStream;
use crate::model::PieceRequest;
use crate::oci::{HashChain, HashChainBuilder, PieceLayout};
use crate::ports::{BlobSink, FetchError, PieceMapUpdates, PieceSink, StateSink, StoreError};
use crate::transfer::Shared;
use crate::wire::Request;

/// Computes the hash chain of a blob that passes through.
struct HashChainSink<'a> {
    builder: HashChainBuilder,
    on_states: StateSink<'a>,
    /// States that `on_states` got.
    reported: usize,
    /// States that `on_states` gets before the blob is verified.
    max_reported: usize,
}

#[async_trait]
impl BlobSink for HashChainSink<'_> {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.builder.update(chunk));
        let known = self.builder.states().len().min(self.max_reported);
        if known > self.reported {
            (self.on_states)(&self.builder.states()[self.reported..known]);
            self.reported = known;
        }
        Ok(())
    }
}

impl Shared {
    /// Computes the hash chain of the peer's blob from all of its bytes, which verifies the chain.
    pub(super) async fn hash_chain_by_get(
        &self,
        wanted: BlobRequest,
        layout: PieceLayout,
        on_states: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        let max_reported = layout.piece_count().saturating_sub(2);
        let mut sink = HashChainSink { builder: HashChainBuilder::new(layout), on_states, reported: 0, max_reported };
        self.fetch(wanted, &mut sink).await?;
        let HashChainSink { builder, on_states, reported, .. } = sink;
        let chain = builder.finish().ok_or_else(|| wanted.protocol_error("sends too few bytes".into()))?;
        on_states(&chain.states()[reported..]);
        Ok(chain)
    }

    /// Requires that the peer has the whole blob: `Have` does not report pieces.
    pub(super) async fn follow_by_have(
        &self,
        wanted: BlobRequest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError> {
        let request = Request::Have(wanted.digest);
        let (answer, recv, connection) = self.request(wanted.peer, wanted.digest, &request).await?;
        match wanted.check_answer(&answer)? {
            true => Ok(self.follow_whole_blob(wanted, layout, recv, connection)),
            false => Err(wanted.protocol_error(format!("answers {answer:?} to Have"))),
        }
    }

    /// Fetches the requested pieces in the order of the request, as one range of the blob each.
    pub(super) async fn fetch_pieces_by_get(
        &self,
        request: &PieceRequest,
        sink: &mut dyn PieceSink,
    ) -> Result<(), FetchError> {
        let wanted = BlobRequest { peer: request.peer, digest: request.digest, size: request.layout.size() };
        let outbound = self.outbound_if_limited(request.peer, wanted.size);
        let _permits = self.acquire_fetch_permits(outbound.as_deref()).await;
        for piece in request.pieces.iter().take(usize::from(request.limit)) {
            self.fetch_piece_by_get(
                &PieceRequest { pieces: vec![*piece], limit: 1, ..request.clone() },
                wanted,
                *piece,
                sink,
            )
            .await?;
        }
        Ok(())
    }

    async fn fetch_piece_by_get(
        &self,
        piece_request: &PieceRequest,
        wanted: BlobRequest,
        piece: u32,
        sink: &mut dyn PieceSink,
    ) -> Result<(), FetchError> {
        let (offset, length) =
            (piece_request.layout.offset(piece as usize), piece_request.layout.piece_length(piece as usize));
        let request = Request::Get { digest: wanted.digest, offset, length };
        // Held so that the connection counts as used.
        let (answer, mut recv, _connection) = self.request(wanted.peer, wanted.digest, &request).await?;
        if !wanted.check_answer(&answer)? {
            return Err(wanted.protocol_error(format!("answers {answer:?} to Get")));
        }
        sink.begin(piece);
        self.receive_pieces(PieceStream::of_one_piece(piece_request, wanted, piece), &mut recv, sink).await
    }
}
