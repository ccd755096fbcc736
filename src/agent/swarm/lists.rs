//! Whose fault it is when a piece does not fit: the list's author's, or the peer's that sent the piece.
//!
//! Two lists that differ agree above their last difference, so the piece there can fit only one of them; whoever cannot show bytes that
//! fit its own list has lied. At most two pieces and one list are fetched to find out.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::incoming::Incoming;
use crate::model::{Order, PeerId};
use crate::oci::{Chain, Dispute, PieceHasher};
use crate::ports::{FetchError, Fetcher, PieceError, PieceSink, StoreError};

/// What was found.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The peer that sent the piece lied, or its disk does.
    Sender,
    /// The author of the list in use did. This one may be true.
    Author(Arc<Chain>),
    /// Neither can show what it says.
    Both,
    /// The sender did not answer, so nothing is known.
    NoAnswer(FetchError),
}

/// Settles who is wrong after a piece from `sender` did not fit the list of `author`.
pub(super) async fn settle(
    fetcher: &dyn Fetcher,
    incoming: &Incoming,
    ours: &Chain,
    author: Option<PeerId>,
    sender: PeerId,
) -> Verdict {
    // Of a blob in one piece the list is empty, and true; and whoever sends what its own list does not say has lied.
    let Some(author) = author.filter(|author| *author != sender) else { return Verdict::Sender };
    let (digest, cut) = (ours.digest(), ours.cut());
    let theirs = match fetcher.chain(sender, digest, cut, &mut |_| ()).await {
        Ok(chain) => Arc::new(chain),
        // What it holds does not end at the digest, or it makes no sense.
        Err(FetchError::StoreFailed { .. } | FetchError::Protocol { .. }) => return Verdict::Sender,
        Err(error) => return Verdict::NoAnswer(error),
    };
    let Some(dispute) = Dispute::between(ours, &theirs) else { return Verdict::Sender };
    let Ok(piece) = u32::try_from(dispute.piece()) else { return Verdict::Sender };
    if incoming.has(piece) {
        return Verdict::Sender;
    }
    match shows(fetcher, sender, &theirs, piece).await {
        Ok(true) => return Verdict::Author(theirs),
        Ok(false) => {}
        Err(error) => return Verdict::NoAnswer(error),
    }
    // An author that cannot be asked is not accused.
    match shows(fetcher, author, ours, piece).await {
        Ok(false) => Verdict::Both,
        Ok(true) | Err(_) => Verdict::Sender,
    }
}

/// Whether the peer's bytes fit this list at the piece.
///
/// # Errors
/// [`FetchError`] where it sent no such bytes, so that nothing is known.
async fn shows(fetcher: &dyn Fetcher, peer: PeerId, list: &Chain, piece: u32) -> Result<bool, FetchError> {
    let digest = list.digest();
    let order = Order { peer, digest, cut: list.cut(), choice: vec![piece], most: 1 };
    let mut trial = Trial { list, hasher: None, fits: None };
    let fetched = fetcher.pieces(&order, &mut trial).await;
    match (trial.fits, fetched) {
        (Some(fits), _) => Ok(fits),
        (None, Err(error)) => Err(error),
        (None, Ok(())) => Err(FetchError::Absent { peer, digest }),
    }
}

/// Hashes one piece and drops it.
struct Trial<'a> {
    list: &'a Chain,
    hasher: Option<PieceHasher>,
    /// Once all of it was there.
    fits: Option<bool>,
}

#[async_trait]
impl PieceSink for Trial<'_> {
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
        let fits = self.hasher.take().is_some_and(|hasher| hasher.fits(self.list));
        self.fits = Some(fits);
        if fits { Ok(()) } else { Err(PieceError::Unfit) }
    }
}
