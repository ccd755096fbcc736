//! Where the pieces of one ask go: hashed as they come, and written.
//!
//! A piece may be asked of two. The one that began first writes as the bytes come; the other's wait in memory until they are all there, and
//! are written if they fit. What is here already is not written again. Whoever finds that somebody else wrote meanwhile writes no more: so
//! what a hasher has seen is what is on disk.

use std::sync::Arc;
use std::task::Poll;

use async_trait::async_trait;
use bytes::Bytes;
use futures::poll;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit};

use super::Shared;
use super::incoming::{Arrived, Found, Incoming, LastWriter, Place};
use crate::decide::pieces::AskId;
use crate::model::PeerId;
use crate::oci::PieceHasher;
use crate::ports::{PieceError, PieceSink, StoreError};

pub(super) struct Sink {
    shared: Arc<Shared>,
    incoming: Arc<Incoming>,
    ask: AskId,
    peer: PeerId,
    taking: Option<Taking>,
}

/// The piece that is coming.
struct Taking {
    piece: u32,
    /// Where its next byte goes.
    at: u64,
    hasher: Option<PieceHasher>,
    place: Arc<Place>,
    manner: Manner,
}

/// What is done with the bytes.
enum Manner {
    /// They are written as they come.
    Write,
    /// Somebody else writes: they wait here. A copy, because what comes from the network may be small parts of large buffers.
    Wait(Vec<u8>, OwnedSemaphorePermit),
    /// The piece is here, somebody else was faster, or too many wait already.
    Drop,
}

impl Sink {
    pub(super) fn new(shared: Arc<Shared>, incoming: Arc<Incoming>, ask: AskId, peer: PeerId) -> Self {
        Self { shared, incoming, ask, peer, taking: None }
    }

    /// Leaves the place of a piece that did not come to its end.
    fn give_up(&mut self) {
        if let Some(Taking { piece, place, .. }) = self.taking.take() {
            self.incoming.leave(piece, place);
        }
    }

    /// What the piece turned out to be; `None` where somebody else's counts.
    async fn judge(
        &self,
        piece: u32,
        hasher: Option<PieceHasher>,
        manner: Manner,
        alone: &mut Option<OwnedMutexGuard<LastWriter>>,
    ) -> Result<Option<Arrived>, StoreError> {
        let is_mine = alone.as_ref().is_some_and(|last| last.is_none_or(|ask| ask == self.ask));
        match manner {
            Manner::Write if is_mine => Ok(Some(self.incoming.arrives(piece, hasher, self.peer))),
            Manner::Write | Manner::Drop => Ok(None),
            Manner::Wait(..) if self.incoming.is_here(piece) => Ok(None),
            Manner::Wait(bytes, _permit) => {
                let hasher = self.incoming.hashed(piece, hasher, &bytes);
                if hasher.is_some() && !self.incoming.fits(hasher.as_ref()) {
                    return Ok(Some(Arrived::Unfit));
                }
                if let Some(last) = alone.take() {
                    let begin = self.incoming.bounds(piece).0;
                    *alone = Some(write(&self.incoming, begin, vec![bytes.into()], last, self.ask).await?);
                }
                Ok(Some(self.incoming.arrives(piece, hasher, self.peer)))
            }
        }
    }
}

#[async_trait]
impl PieceSink for Sink {
    fn begin(&mut self, piece: u32) {
        self.give_up();
        self.shared.pool().begins(self.ask, piece, super::now());
        let (place, found) = self.incoming.enter(piece);
        let at = self.incoming.bounds(piece).0;
        let manner = match found {
            Found::Free => Manner::Write,
            Found::Here => Manner::Drop,
            Found::Taken => match Arc::clone(&self.shared.waiting).try_acquire_owned() {
                Ok(permit) => Manner::Wait(Vec::new(), permit),
                Err(_) => Manner::Drop,
            },
        };
        self.taking = Some(Taking { piece, at, hasher: self.incoming.hasher(piece), place, manner });
    }

    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        self.shared.pool().brings(self.ask, bytes as u64, super::now());
        let Some(taking) = &mut self.taking else { return Ok(()) };
        if let Some(hasher) = &mut taking.hasher {
            chunks.iter().for_each(|chunk| hasher.update(chunk));
        }
        match &mut taking.manner {
            Manner::Drop => {}
            Manner::Wait(waiting, _) => chunks.iter().for_each(|chunk| waiting.extend_from_slice(chunk)),
            Manner::Write => {
                let last = Arc::clone(&taking.place).lock_owned().await;
                if last.is_none_or(|ask| ask == self.ask) && !self.incoming.is_here(taking.piece) {
                    drop(write(&self.incoming, taking.at, chunks.to_vec(), last, self.ask).await?);
                } else {
                    taking.manner = Manner::Drop;
                }
            }
        }
        taking.at += bytes as u64;
        Ok(())
    }

    async fn end(&mut self) -> Result<(), PieceError> {
        let Some(Taking { piece, hasher, place, manner, at: _ }) = self.taking.take() else { return Ok(()) };
        let mut alone = Some(Arc::clone(&place).lock_owned().await);
        let judged = self.judge(piece, hasher, manner, &mut alone).await;
        // Only now: nobody else may write between the bytes and the word that they are here.
        drop(alone);
        self.incoming.leave(piece, place);
        if judged? == Some(Arrived::Unfit) {
            return Err(PieceError::Unfit);
        }
        if self.incoming.is_here(piece) {
            let mut pool = self.shared.pool();
            pool.has(self.ask, piece, super::now());
            if self.incoming.is_proven(self.peer) {
                pool.fits(self.peer, self.incoming.blob().digest);
            }
            // Where the ask was taken back meanwhile, the piece came all the same.
            pool.hold(self.incoming.blob().digest, piece);
            drop(pool);
            self.shared.moved.notify_one();
        }
        Ok(())
    }
}

/// Writes, and holds the place until it is done, also when nobody waits for it any more: what was begun on another thread goes on there.
async fn write(
    incoming: &Incoming,
    at: u64,
    chunks: Vec<Bytes>,
    mut last: OwnedMutexGuard<LastWriter>,
    ask: AskId,
) -> Result<OwnedMutexGuard<LastWriter>, StoreError> {
    *last = Some(ask);
    let staged = Arc::clone(incoming.staged());
    let mut writing = Box::pin(async move {
        staged.write_at(at, &chunks).await?;
        Ok(last)
    });
    // Most writes end at once, in the page cache.
    match poll!(&mut writing) {
        Poll::Ready(written) => written,
        Poll::Pending => match tokio::spawn(writing).await {
            Ok(written) => written,
            Err(error) => Err(StoreError::Other(format!("a write panicked: {error}"))),
        },
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.give_up();
    }
}
