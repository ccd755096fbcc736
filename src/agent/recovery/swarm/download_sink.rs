//! Hashes the pieces of one request as their bytes arrive, and writes the bytes.
//!
//! A piece may be in flight in two requests. The request that begins first writes its bytes as they
//! arrive. The bytes of the other request wait in memory, and are written if the whole piece
//! matches. A present piece is never written again. A request that finds bytes of another request
//! in the slot stops writing, so the hashed bytes are exactly the bytes on the disk.

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

/// The piece that is arriving.
struct CurrentPiece {
    piece: u32,
    /// Offset of the next byte in the blob.
    at: u64,
    hasher: Option<PieceHasher>,
    slot: Arc<PieceSlot>,
    mode: WriteMode,
}

/// Destination of the bytes.
enum WriteMode {
    /// The staging file, as the bytes arrive.
    Write,
    /// Memory, because another task writes the piece. The bytes are copied: a received chunk may be
    /// a small part of a large buffer.
    Buffer(Vec<u8>, OwnedSemaphorePermit),
    /// Dropped: the piece is here, another task was faster, or too many pieces wait already.
    Discard,
}

impl DownloadSink {
    pub(super) fn new(
        shared: Arc<SwarmShared>,
        download: Arc<BlobDownload>,
        request: PieceRequestId,
        peer: PeerId,
    ) -> Self {
        Self { shared, download, request, peer, current: None }
    }

    /// Releases the slot of a piece that did not arrive completely.
    fn abandon_piece(&mut self) {
        if let Some(CurrentPiece { piece, slot, .. }) = self.current.take() {
            self.download.release_slot(piece, slot);
        }
    }

    /// Result of a complete piece; `None` when the piece of another request counts.
    async fn finish_piece(
        &self,
        piece: u32,
        hasher: Option<PieceHasher>,
        mode: WriteMode,
        guard: &mut Option<OwnedMutexGuard<LastWriter>>,
    ) -> Result<Option<ReceivedPiece>, StoreError> {
        let is_last_writer = guard.as_ref().is_some_and(|last| last.is_none_or(|id| id == self.request));
        match mode {
            WriteMode::Write if is_last_writer => Ok(Some(self.download.record_received(piece, hasher, self.peer))),
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
        let (slot, slot_state) = self.download.acquire_slot(piece);
        let at = self.download.bounds(piece).0;
        let mode = match slot_state {
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
            WriteMode::Buffer(buffer, _) => chunks.iter().for_each(|chunk| buffer.extend_from_slice(chunk)),
            WriteMode::Write => {
                let last = Arc::clone(&current.slot).lock_owned().await;
                if last.is_none_or(|id| id == self.request) && !self.download.is_present(current.piece) {
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
        let received = self.finish_piece(piece, hasher, mode, &mut guard).await;
        // The lock ends here, so no other task writes between the last byte and the record of the
        // piece.
        drop(guard);
        self.download.release_slot(piece, slot);
        if received? == Some(ReceivedPiece::Invalid) {
            return Err(PieceError::Mismatch);
        }
        if self.download.is_present(piece) {
            let mut picker = self.shared.picker();
            picker.complete_piece(self.request, piece, super::now());
            if self.download.has_valid_piece_from(self.peer) {
                picker.record_verified_piece(self.peer, self.download.blob().digest);
            }
            // A canceled request may have brought the piece all the same.
            picker.mark_piece_present(self.download.blob().digest, piece);
            drop(picker);
            self.shared.piece_received.notify_one();
        }
        Ok(())
    }
}

/// Writes the chunks, and keeps the slot's lock until the write ends. A pending write continues in
/// a task of its own, even if the request is canceled.
async fn write_chunks(
    download: &BlobDownload,
    at: u64,
    chunks: Vec<Bytes>,
    mut last: OwnedMutexGuard<LastWriter>,
    request: PieceRequestId,
) -> Result<OwnedMutexGuard<LastWriter>, StoreError> {
    *last = Some(request);
    let staged = Arc::clone(download.staged());
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
