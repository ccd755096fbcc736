//! Whose fault it is when a piece does not fit: the list's author's, or the peer's that sent the piece.
//!
//! Two lists that differ agree above their last difference, so the piece there can fit only one of them; whoever cannot show bytes that
//! fit its own list has lied. At most two pieces and one list are fetched to find out.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::agent::recovery::downloads::blob_download::BlobDownload;
use crate::model::{PeerId, PieceRequest};
use crate::oci::{ChainConflict, HashChain, PieceHasher};
use crate::ports::{FetchError, Fetcher, PieceError, PieceSink, StoreError};

/// What was found.
#[derive(Debug)]
pub(super) enum DisputeOutcome {
    /// The peer that sent the piece lied, or its disk does.
    SenderAtFault,
    /// The author of the list in use did. This one may be true.
    AuthorAtFault(Arc<HashChain>),
    /// Neither can show what it says.
    BothAtFault,
    /// The sender did not answer, so nothing is known.
    NoAnswer(FetchError),
}

/// Settles who is wrong after a piece from `sender` did not fit the list of `author`.
pub(super) async fn settle_dispute(
    fetcher: &dyn Fetcher,
    incoming: &BlobDownload,
    ours: &HashChain,
    author: Option<PeerId>,
    sender: PeerId,
) -> DisputeOutcome {
    // Of a blob in one piece the list is empty, and true; and whoever sends what its own list does not say has lied.
    let Some(author) = author.filter(|author| *author != sender) else { return DisputeOutcome::SenderAtFault };
    let (digest, layout) = (ours.digest(), ours.layout());
    let theirs = match fetcher.fetch_hash_chain(sender, digest, layout, &mut |_| ()).await {
        Ok(chain) => Arc::new(chain),
        // What it holds does not end at the digest, or it makes no sense.
        Err(FetchError::StoreFailed { .. } | FetchError::Protocol { .. }) => return DisputeOutcome::SenderAtFault,
        Err(error) => return DisputeOutcome::NoAnswer(error),
    };
    let Some(dispute) = ChainConflict::between(ours, &theirs) else { return DisputeOutcome::SenderAtFault };
    let Ok(piece) = u32::try_from(dispute.piece()) else { return DisputeOutcome::SenderAtFault };
    if incoming.is_verified(piece) {
        return DisputeOutcome::SenderAtFault;
    }
    match is_piece_valid(fetcher, sender, &theirs, piece).await {
        Ok(true) => return DisputeOutcome::AuthorAtFault(theirs),
        Ok(false) => {}
        Err(error) => return DisputeOutcome::NoAnswer(error),
    }
    // An author that cannot be asked is not accused.
    match is_piece_valid(fetcher, author, ours, piece).await {
        Ok(false) => DisputeOutcome::BothAtFault,
        Ok(true) | Err(_) => DisputeOutcome::SenderAtFault,
    }
}

/// Whether the peer's bytes fit this list at the piece.
///
/// # Errors
/// [`FetchError`] where it sent no such bytes, so that nothing is known.
async fn is_piece_valid(
    fetcher: &dyn Fetcher,
    peer: PeerId,
    chain: &HashChain,
    piece: u32,
) -> Result<bool, FetchError> {
    let digest = chain.digest();
    let order = PieceRequest { peer, digest, layout: chain.layout(), pieces: vec![piece], limit: 1 };
    let mut sink = PieceCheckSink { list: chain, hasher: None, is_valid: None };
    let fetched = fetcher.fetch_pieces(&order, &mut sink).await;
    match (sink.is_valid, fetched) {
        (Some(fits), _) => Ok(fits),
        (None, Err(error)) => Err(error),
        (None, Ok(())) => Err(FetchError::Absent { peer, digest }),
    }
}

/// Hashes one piece and drops it.
struct PieceCheckSink<'a> {
    list: &'a HashChain,
    hasher: Option<PieceHasher>,
    /// Once all of it was there.
    is_valid: Option<bool>,
}

#[async_trait]
impl PieceSink for PieceCheckSink<'_> {
    fn begin(&mut self, piece: u32) {
        self.hasher = Some(self.list.hasher(piece as usize));
    }

    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        if let Some(hasher) = &mut self.hasher {
            chunks.iter().for_each(|chunk| hasher.update(chunk));
        }
        Ok(())
    }

    async fn end(&mut self) -> Result<(), PieceError> {
        let fits = self.hasher.take().is_some_and(|hasher| hasher.is_valid_for(self.list));
        self.is_valid = Some(fits);
        if fits { Ok(()) } else { Err(PieceError::Mismatch) }
    }
}
