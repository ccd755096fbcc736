//! `Get` and `Have` in place of `Chain`, `Follow` and `Pieces`, for a peer of another MAJOR.
//!
//! A hash chain then costs the transfer of the whole blob, and the pieces come once more. Only a
//! blob without a provider of the own MAJOR costs that.

use async_trait::async_trait;
use bytes::Bytes;

use super::Wanted;
use super::pieces::Unpacking;
use crate::model::Order;
use crate::oci::{Chain, ChainBuilder, Cut};
use crate::ports::{BlobSink, FetchError, Following, Heard, PieceSink, StoreError};
use crate::transfer::Shared;
use crate::wire::Request;

/// Makes a hash chain of a blob that passes.
struct ChainSink<'a> {
    builder: ChainBuilder,
    heard: Heard<'a>,
    /// States that `heard` got.
    told: usize,
    /// States that it gets before the blob is proved.
    most: usize,
}

#[async_trait]
impl BlobSink for ChainSink<'_> {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.builder.update(chunk));
        let known = self.builder.states().len().min(self.most);
        if known > self.told {
            (self.heard)(&self.builder.states()[self.told..known]);
            self.told = known;
        }
        Ok(())
    }
}

impl Shared {
    /// Makes the hash chain of the peer's blob from all of its bytes, which proves the chain.
    pub(super) async fn list_by_ranges(&self, wanted: Wanted, cut: Cut, heard: Heard<'_>) -> Result<Chain, FetchError> {
        let most = cut.pieces().saturating_sub(2);
        let mut sink = ChainSink { builder: ChainBuilder::new(cut), heard, told: 0, most };
        self.fetch(wanted, &mut sink).await?;
        let ChainSink { builder, heard, told, .. } = sink;
        let chain = builder.finish().ok_or_else(|| wanted.protocol("sends too few bytes".into()))?;
        heard(&chain.states()[told..]);
        Ok(chain)
    }

    /// Asks whether the peer has the whole blob; `Have` knows no pieces.
    pub(super) async fn follow_by_have(&self, wanted: Wanted, cut: Cut) -> Result<Box<dyn Following>, FetchError> {
        let request = Request::Have(wanted.digest);
        let (answer, recv, line) = self.ask(wanted.peer, wanted.digest, &request).await?;
        match wanted.granted(&answer)? {
            true => Ok(self.listen_to_whole(wanted, cut, recv, line)),
            false => Err(wanted.protocol(format!("answers {answer:?} to Have"))),
        }
    }

    /// The pieces of an order, in the order of its choice: a range of the blob for each.
    pub(super) async fn fetch_ranges(&self, order: &Order, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let wanted = Wanted { peer: order.peer, digest: order.digest, size: order.cut.size() };
        let outbound = self.crowded(order.peer, wanted.size);
        let _places = self.places(outbound.as_deref()).await;
        for piece in order.choice.iter().take(usize::from(order.most)) {
            self.fetch_range(&Order { choice: vec![*piece], most: 1, ..order.clone() }, wanted, *piece, sink).await?;
        }
        Ok(())
    }

    async fn fetch_range(
        &self,
        order: &Order,
        wanted: Wanted,
        piece: u32,
        sink: &mut dyn PieceSink,
    ) -> Result<(), FetchError> {
        let (offset, length) = (order.cut.offset(piece as usize), order.cut.length(piece as usize));
        let request = Request::Get { digest: wanted.digest, offset, length };
        // The line is held so that the connection counts as used.
        let (answer, mut recv, _line) = self.ask(wanted.peer, wanted.digest, &request).await?;
        if !wanted.granted(&answer)? {
            return Err(wanted.protocol(format!("answers {answer:?} to Get")));
        }
        sink.begin(piece);
        self.unpack(Unpacking::of_range(order, wanted, piece), &mut recv, sink).await
    }
}
