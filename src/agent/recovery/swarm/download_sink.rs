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

use super::SwarmShared;
use crate::agent::recovery::downloads::blob_download::{BlobDownload, LastWriter, PieceSlot, ReceivedPiece, SlotState};
use crate::decide::piece_picker::PieceRequestId;
use crate::model::PeerId;
use crate::oci::PieceHasher;
use crate::ports::{PieceError, PieceSink, StoreError};

pub(super) struct DownloadSink {
    shared: Arc<SwarmShared>,
    download: Arc<BlobDownload>,
    request: PieceRequestId,
    peer: PeerId,
    current: Option<CurrentPiece>,
}

/// The piece that is coming.
struct CurrentPiece {
    piece: u32,
    /// Where its next byte goes.
    at: u64,
    hasher: Option<PieceHasher>,
    slot: Arc<PieceSlot>,
    mode: WriteMode,
}

/// What is done with the bytes.
enum WriteMode {
    /// They are written as they come.
    Write,
    /// Somebody else writes: they wait here. A copy, because what comes from the network may be small parts of large buffers.
    Buffer(Vec<u8>, OwnedSemaphorePermit),
    /// The piece is here, somebody else was faster, or too many wait already.
    Discard,
}

impl DownloadSink {
    pub(super) fn new(
        shared: Arc<SwarmShared>,
        incoming: Arc<BlobDownload>,
        request: PieceRequestId,
        peer: PeerId,
    ) -> Self {
        Self { shared, download: incoming, request, peer, current: None }
    }

    /// Leaves the place of a piece that did not come to its end.
    fn abandon_piece(&mut self) {
        if let Some(CurrentPiece { piece, slot: place, .. }) = self.current.take() {
            self.download.release_slot(piece, place);
        }
    }

    /// What the piece turned out to be; `None` where somebody else's counts.
    async fn finish_piece(
        &self,
        piece: u32,
        hasher: Option<PieceHasher>,
        mode: WriteMode,
        guard: &mut Option<OwnedMutexGuard<LastWriter>>,
    ) -> Result<Option<ReceivedPiece>, StoreError> {
        let is_mine = guard.as_ref().is_some_and(|last| last.is_none_or(|ask| ask == self.request));
        match mode {
            WriteMode::Write if is_mine => Ok(Some(self.download.record_received(piece, hasher, self.peer))),
            WriteMode::Write | WriteMode::Discard => Ok(None),
            WriteMode::Buffer(..) if self.download.is_present(piece) => Ok(None),
            WriteMode::Buffer(bytes, _permit) => {
                let hasher = self.download.current_hasher(piece, hasher, &bytes);
                if hasher.is_some() && !self.download.matches_chain(hasher.as_ref()) {
                    return Ok(Some(ReceivedPiece::Invalid));
                }
                if let Some(last) = guard.take() {
                    let begin = self.download.bounds(piece).0;
                    *guard = Some(write_chunks(&self.download, begin, vec![bytes.into()], last, self.request).await?);
                }
                Ok(Some(self.download.record_received(piece, hasher, self.peer)))
            }
        }
    }
}

#[async_trait]
impl PieceSink for DownloadSink {
    fn begin(&mut self, piece: u32) {
        self.abandon_piece();
        self.shared.picker().begin_piece(self.request, piece, super::now());
        let (slot, found) = self.download.acquire_slot(piece);
        let at = self.download.bounds(piece).0;
        let mode = match found {
            SlotState::Free => WriteMode::Write,
            SlotState::Present => WriteMode::Discard,
            SlotState::Taken => match Arc::clone(&self.shared.buffer_permits).try_acquire_owned() {
                Ok(permit) => WriteMode::Buffer(Vec::new(), permit),
                Err(_) => WriteMode::Discard,
            },
        };
        self.current = Some(CurrentPiece { piece, at, hasher: self.download.hasher(piece), slot, mode });
    }

    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        self.shared.picker().record_bytes(self.request, bytes as u64, super::now());
        let Some(current) = &mut self.current else { return Ok(()) };
        if let Some(hasher) = &mut current.hasher {
            chunks.iter().for_each(|chunk| hasher.update(chunk));
        }
        match &mut current.mode {
            WriteMode::Discard => {}
            WriteMode::Buffer(waiting, _) => chunks.iter().for_each(|chunk| waiting.extend_from_slice(chunk)),
            WriteMode::Write => {
                let last = Arc::clone(&current.slot).lock_owned().await;
                if last.is_none_or(|ask| ask == self.request) && !self.download.is_present(current.piece) {
                    drop(write_chunks(&self.download, current.at, chunks.to_vec(), last, self.request).await?);
                } else {
                    current.mode = WriteMode::Discard;
                }
            }
        }
        current.at += bytes as u64;
        Ok(())
    }

    async fn end(&mut self) -> Result<(), PieceError> {
        let Some(CurrentPiece { piece, hasher, slot, mode, at: _ }) = self.current.take() else { return Ok(()) };
        let mut guard = Some(Arc::clone(&slot).lock_owned().await);
        let judged = self.finish_piece(piece, hasher, mode, &mut guard).await;
        // Only now: nobody else may write between the bytes and the word that they are here.
        drop(guard);
        self.download.release_slot(piece, slot);
        if judged? == Some(ReceivedPiece::Invalid) {
            return Err(PieceError::Mismatch);
        }
        if self.download.is_present(piece) {
            let mut pool = self.shared.picker();
            pool.complete_piece(self.request, piece, super::now());
            if self.download.has_valid_piece_from(self.peer) {
                pool.record_verified_piece(self.peer, self.download.blob().digest);
            }
            // Where the ask was taken back meanwhile, the piece came all the same.
            pool.mark_piece_present(self.download.blob().digest, piece);
            drop(pool);
            self.shared.piece_received.notify_one();
        }
        Ok(())
    }
}

/// Writes, and holds the place until it is done, also when nobody waits for it any more: what was begun on another thread goes on there.
async fn write_chunks(
    incoming: &BlobDownload,
    at: u64,
    chunks: Vec<Bytes>,
    mut last: OwnedMutexGuard<LastWriter>,
    request: PieceRequestId,
) -> Result<OwnedMutexGuard<LastWriter>, StoreError> {
    *last = Some(request);
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

impl Drop for DownloadSink {
    fn drop(&mut self) {
        self.abandon_piece();
    }
}
