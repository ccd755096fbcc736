//! Settles a dispute: a piece does not match the hash chain, and either its sender or the chain's
//! author is at fault.
//!
//! The sender's own chain is fetched. Two different chains agree after their last difference, so
//! the piece at that difference matches only one of the chains. A peer whose bytes do not match its
//! own chain has lied. A dispute costs at most two pieces and one hash chain.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::agent::recovery::downloads::blob_download::BlobDownload;
use crate::model::{PeerId, PieceRequest};
use crate::oci::{ChainConflict, HashChain, PieceHasher};
use crate::ports::{FetchError, Fetcher, PieceError, PieceSink, StoreError};

/// Result of a dispute.
#[derive(Debug)]
pub(super) enum DisputeOutcome {
    /// The sender lied, or has a damaged disk.
    SenderAtFault,
    /// The author of the chain in use lied, or has a damaged disk. The sender's chain may be right.
    AuthorAtFault(Arc<HashChain>),
    /// Neither peer has bytes that match its own chain.
    BothAtFault,
    /// The sender did not answer, so the fault is unknown.
    NoAnswer(FetchError),
}

/// Settles whether the sender or the author is at fault.
pub(super) async fn settle_dispute(
    fetcher: &dyn Fetcher,
    download: &BlobDownload,
    author_chain: &HashChain,
    author: Option<PeerId>,
    sender: PeerId,
) -> DisputeOutcome {
    // The chain of a blob of one piece is empty and right. A sender whose piece contradicts its own
    // chain has lied.
    let Some(author) = author.filter(|author| *author != sender) else { return DisputeOutcome::SenderAtFault };
    let (digest, layout) = (author_chain.digest(), author_chain.layout());
    let sender_chain = match fetcher.fetch_hash_chain(sender, digest, layout, &mut |_| ()).await {
        Ok(chain) => Arc::new(chain),
        // The sender could not compute a chain that ends at the digest, or violated the protocol.
        Err(FetchError::StoreFailed { .. } | FetchError::Protocol { .. }) => return DisputeOutcome::SenderAtFault,
        Err(error) => return DisputeOutcome::NoAnswer(error),
    };
    let Some(conflict) = ChainConflict::between(author_chain, &sender_chain) else {
        return DisputeOutcome::SenderAtFault;
    };
    let Ok(piece) = u32::try_from(conflict.piece()) else { return DisputeOutcome::SenderAtFault };
    if download.is_verified(piece) {
        return DisputeOutcome::SenderAtFault;
    }
    match is_piece_valid(fetcher, sender, &sender_chain, piece).await {
        Ok(true) => return DisputeOutcome::AuthorAtFault(sender_chain),
        Ok(false) => {}
        Err(error) => return DisputeOutcome::NoAnswer(error),
    }
    // An author that does not answer is not accused.
    match is_piece_valid(fetcher, author, author_chain, piece).await {
        Ok(false) => DisputeOutcome::BothAtFault,
        Ok(true) | Err(_) => DisputeOutcome::SenderAtFault,
    }
}

/// Whether the peer's bytes match this chain at the piece.
///
/// # Errors
/// [`FetchError`] when the peer did not send the whole piece, so nothing is known.
async fn is_piece_valid(
    fetcher: &dyn Fetcher,
    peer: PeerId,
    chain: &HashChain,
    piece: u32,
) -> Result<bool, FetchError> {
    let digest = chain.digest();
    let request = PieceRequest { peer, digest, layout: chain.layout(), pieces: vec![piece], limit: 1 };
    let mut sink = PieceCheckSink { hash_chain: chain, hasher: None, is_valid: None };
    let fetched = fetcher.fetch_pieces(&request, &mut sink).await;
    match (sink.is_valid, fetched) {
        (Some(is_valid), _) => Ok(is_valid),
        (None, Err(error)) => Err(error),
        (None, Ok(())) => Err(FetchError::Absent { peer, digest }),
    }
}

/// Hashes one piece and drops the bytes.
struct PieceCheckSink<'a> {
    hash_chain: &'a HashChain,
    hasher: Option<PieceHasher>,
    /// `None` until the whole piece has arrived.
    is_valid: Option<bool>,
}

#[async_trait]
impl PieceSink for PieceCheckSink<'_> {
    fn begin(&mut self, piece: u32) {
        self.hasher = Some(self.hash_chain.hasher(piece as usize));
    }

    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        if let Some(hasher) = &mut self.hasher {
            chunks.iter().for_each(|chunk| hasher.update(chunk));
        }
        Ok(())
    }

    async fn end(&mut self) -> Result<(), PieceError> {
        let is_valid = self.hasher.take().is_some_and(|hasher| hasher.is_valid_for(self.hash_chain));
        self.is_valid = Some(is_valid);
        if is_valid { Ok(()) } else { Err(PieceError::Mismatch) }
    }
}
