//! Serves pieces: of the requested pieces that are present, the ones that were sent least.

use std::collections::HashSet;
use std::mem::take;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::join;
use quinn::SendStream;
use tokio::time::{Instant, timeout};

use super::{ResponseStream, ServeError, store_timeout};
use crate::decide::byte_bucket::CHUNK;
use crate::model::{MAX_REQUEST_PIECES, PeerId};
use crate::oci::{Digest, PieceLayout};
use crate::ports::{BlobReader, PartialBlob, StoreError};
use crate::transfer::Shared;
use crate::transfer::tuning::{READ_BYTES, UPLOAD_STALL};
use crate::transfer::upload_queue::{NoUploadSlot, Upload};
use crate::wire::Answer;

enum PieceSource {
    Whole(Box<dyn BlobReader>),
    Partial(Arc<dyn PartialBlob>),
}

impl PieceSource {
    fn size(&self) -> u64 {
        match self {
            Self::Whole(reader) => reader.size(),
            Self::Partial(partial) => partial.hash_chain().layout().size(),
        }
    }

    /// Reads exactly `length` bytes.
    async fn read(&mut self, offset: u64, length: usize) -> Result<Bytes, StoreError> {
        let read = match self {
            Self::Whole(reader) => reader.read_at(offset, length).await?,
            Self::Partial(partial) => partial.read_at(offset, length).await?,
        };
        if read.len() == length {
            return Ok(read);
        }
        Err(StoreError::Other(format!("read {} bytes at {offset} where {length} are left", read.len())))
    }
}

pub(super) struct RequestedPieces {
    pub(super) digest: Digest,
    pub(super) pieces: Vec<u32>,
    pub(super) limit: u8,
}

impl RequestedPieces {
    /// Rejects requests that no honest agent sends, whatever its view of the blob.
    fn check(&self) -> Result<(), ServeError> {
        let (pieces, limit) = (&self.pieces, self.limit);
        let distinct = pieces.iter().collect::<HashSet<_>>().len();
        if pieces.is_empty() || pieces.len() > MAX_REQUEST_PIECES || limit == 0 || distinct < pieces.len() {
            let reason = format!("{limit} of {} pieces, {distinct} of them different", pieces.len());
            return Err(ServeError::Malformed(reason));
        }
        Ok(())
    }
}

/// A segment of a piece, read and sent at once. The piece number precedes the first segment.
#[derive(Clone, Copy)]
struct PieceSegment {
    piece: Option<u32>,
    offset: u64,
    length: usize,
}

/// All segments of these pieces, in order. An empty piece has one segment of no bytes.
fn segments(layout: PieceLayout, pieces: &[u32]) -> impl Iterator<Item = PieceSegment> {
    pieces.iter().flat_map(move |piece| {
        let (from, length) = (layout.offset(*piece as usize), layout.piece_length(*piece as usize));
        (0..length.max(1)).step_by(READ_BYTES).map(move |at| PieceSegment {
            piece: Some(*piece).filter(|_| at == 0),
            offset: from + at,
            length: usize::try_from(length - at).unwrap_or(READ_BYTES).min(READ_BYTES),
        })
    })
}

impl Shared {
    /// Answers at once, and sends when the upload gets a slot. The pieces are picked at that time,
    /// by the send counts of that time.
    pub(super) async fn serve_pieces(
        &self,
        peer: PeerId,
        requested: RequestedPieces,
        stream: &mut ResponseStream,
    ) -> Result<(), ServeError> {
        requested.check()?;
        let digest = requested.digest;
        let source = match self.open_source(digest).await {
            Ok(source) => source,
            Err(StoreError::Absent(_)) => return self.answer_and_finish(stream, &Answer::Absent).await,
            Err(error) => return self.answer_store_failure(stream, error).await,
        };
        let size = source.size();
        let layout = PieceLayout::for_size(size);
        if requested.pieces.iter().any(|piece| *piece as usize >= layout.piece_count()) {
            return self.answer_and_finish(stream, &Answer::Invalid { size }).await;
        }
        let Ok(mut upload) = self.uploads.enqueue(peer, digest, layout.piece_count()) else {
            return self.answer_and_finish(stream, &Answer::Busy).await;
        };
        let answer = match source {
            PieceSource::Whole(_) => Answer::Blob { size },
            PieceSource::Partial(_) => Answer::Partial { size },
        };
        // Must be quick: the upload may have a slot already.
        let answered = timeout(UPLOAD_STALL, self.answer(stream, &answer)).await;
        answered.map_err(|_| ServeError::TooSlow)??;
        let acquire = async {
            upload.wait_for_slot().await?;
            // A small blob needs no permit, as in `Shared::serve_get`.
            Ok::<_, NoUploadSlot>(if size > CHUNK { Some(self.upload_limiter.acquire_permit().await) } else { None })
        };
        let _permit = tokio::select! {
            biased;
            permit = acquire => permit?,
            _ = stream.send.stopped() => return Err(ServeError::Left("before the upload got a slot".into())),
        };
        let pieces = self.pick_pieces(&requested, &source);
        self.send_segments(source, segments(layout, &pieces), &mut upload, &mut stream.send).await?;
        // The connection has all bytes. The upload keeps its slot a moment longer while they are
        // sent.
        upload.wait_or_park(self.finish(stream)).await?
    }

    /// Opens the blob, partial or whole. A download may enter the store at any moment, so the store
    /// is read last.
    async fn open_source(&self, digest: Digest) -> Result<PieceSource, StoreError> {
        match self.partials.partial(digest) {
            Some(partial) => Ok(PieceSource::Partial(partial)),
            None => self.with_store_timeout(self.store.open(digest)).await.map(PieceSource::Whole),
        }
    }

    fn pick_pieces(
        &self,
        RequestedPieces { digest, pieces, limit }: &RequestedPieces,
        source: &PieceSource,
    ) -> Vec<u32> {
        match source {
            PieceSource::Whole(_) => self.uploads.pick_pieces(*digest, pieces, *limit, |_| true),
            PieceSource::Partial(partial) => {
                let piece_map = partial.piece_map();
                self.uploads.pick_pieces(*digest, pieces, *limit, |piece| piece_map.get(piece as usize))
            }
        }
    }

    /// Sends the segments. One read runs ahead of the write, so that disk and network work at the
    /// same time.
    async fn send_segments(
        &self,
        mut source: PieceSource,
        mut segments: impl Iterator<Item = PieceSegment>,
        upload: &mut Upload<'_>,
        send: &mut SendStream,
    ) -> Result<(), ServeError> {
        let Some(mut segment) = segments.next() else { return Ok(()) };
        let mut bytes = self.read_segment(&mut source, segment).await?;
        loop {
            let next = segments.next();
            let read_ahead = async {
                match next {
                    Some(next) => self.read_segment(&mut source, next).await.map(|bytes| Some((next, bytes))),
                    None => Ok(None),
                }
            };
            let (written, read) = join(self.write_segment(segment, bytes, upload, send), read_ahead).await;
            written?;
            match read? {
                Some(prefetched) => (segment, bytes) = prefetched,
                None => return Ok(()),
            }
        }
    }

    async fn read_segment(
        &self,
        source: &mut PieceSource,
        PieceSegment { offset, length, .. }: PieceSegment,
    ) -> Result<Bytes, StoreError> {
        timeout(self.timeouts.slow_reader, source.read(offset, length)).await.unwrap_or_else(|_| Err(store_timeout()))
    }

    async fn write_segment(
        &self,
        segment: PieceSegment,
        mut bytes: Bytes,
        upload: &mut Upload<'_>,
        send: &mut SendStream,
    ) -> Result<(), ServeError> {
        let mut number = segment.piece.map(|piece| Bytes::copy_from_slice(&piece.to_be_bytes())).unwrap_or_default();
        let mut time_left = self.timeouts.slow_reader;
        loop {
            let max_chunk = if self.upload_limiter.is_limited() { CHUNK as usize } else { READ_BYTES };
            let chunk = bytes.split_to(bytes.len().min(max_chunk));
            let length = chunk.len() as u64;
            self.upload_limiter.acquire_bytes(length).await;
            let began = Instant::now();
            let mut parts = [take(&mut number), chunk];
            let written = timeout(time_left, upload.wait_or_park(send.write_all_chunks(&mut parts)));
            written.await.map_err(|_| ServeError::TooSlow)???;
            time_left = time_left.saturating_sub(began.elapsed());
            upload.wait_for_slot().await?;
            upload.record_sent(length);
            self.metrics.served(length);
            if bytes.is_empty() {
                return Ok(());
            }
        }
    }
}
