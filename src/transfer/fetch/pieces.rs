//! Fetches pieces: a stream of some of the requested pieces, as the provider picked them.

use std::mem::take;

use bytes::Bytes;
use quinn::RecvStream;
use tokio::time::{Instant, sleep};

use super::BlobRequest;
use crate::model::{MAX_REQUEST_PIECES, PieceRequest};
use crate::ports::{FetchError, PieceError, PieceSink};
use crate::transfer::Shared;
use crate::transfer::tuning::{BATCH_CHUNKS, MIN_BYTES_PER_STALL, PIECE_BATCH};
use crate::wire::Request;

impl Shared {
    /// Dropping the future stops the stream, and the provider sends no more.
    pub(super) async fn fetch_pieces(&self, order: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let PieceRequest { peer, digest, layout: cut, pieces: ref choice, limit: most } = *order;
        debug_assert!(choice.len() <= MAX_REQUEST_PIECES && most > 0, "{most} of {} pieces", choice.len());
        let wanted = BlobRequest { peer, digest, size: cut.size() };
        let request = Request::Pieces { digest, pieces: choice.clone(), limit: most };
        let outbound = self.outbound_if_limited(peer, cut.size());
        let _permits = self.acquire_fetch_permits(outbound.as_deref()).await;
        // Held so that the connection counts as used.
        let (answer, mut recv, _connection) = self.request(peer, digest, &request).await?;
        wanted.check_answer(&answer)?;
        self.receive_pieces(PieceStream::new(order, wanted), &mut recv, sink).await
    }

    /// Reads the bytes in batches, none of which spans two pieces. The sink hashes each batch on
    /// this task: nothing is copied, and no other thread is involved.
    ///
    /// The first piece may wait for an upload slot at the provider, as long as any other bytes may
    /// take.
    pub(super) async fn receive_pieces(
        &self,
        mut stream: PieceStream<'_>,
        recv: &mut RecvStream,
        sink: &mut dyn PieceSink,
    ) -> Result<(), FetchError> {
        let mut arrived = vec![Bytes::new(); BATCH_CHUNKS];
        let stall = self.timeouts.stall;
        let mut stall_timer = std::pin::pin!(sleep(stall));
        let mut since_moved = 0;
        loop {
            let read = tokio::select! {
                biased;
                read = recv.read_chunks(&mut arrived) => read.map_err(|error| stream.wanted.read_failed(&error))?,
                () = &mut stall_timer => return Err(stream.wanted.stalled(stall.as_secs())),
            };
            let Some(read) = read else { break };
            let bytes = arrived[..read].iter().map(|chunk| chunk.len() as u64).sum();
            // Nothing is read during the wait, so the windows fill and slow the sender. Neither our
            // own wait nor the time of the sink counts against the sender.
            let began = Instant::now();
            self.download_limiter.acquire_bytes(bytes).await;
            for chunk in &mut arrived[..read] {
                stream.read_chunk(self, take(chunk), sink).await?;
            }
            since_moved += bytes;
            if since_moved >= MIN_BYTES_PER_STALL {
                stall_timer.as_mut().reset(Instant::now() + stall);
                since_moved = 0;
            } else {
                let deadline = stall_timer.deadline() + began.elapsed();
                stall_timer.as_mut().reset(deadline);
            }
        }
        stream.finish()
    }
}

/// The position in a stream of pieces.
pub(super) struct PieceStream<'a> {
    order: &'a PieceRequest,
    wanted: BlobRequest,
    /// Requested pieces that have not arrived.
    missing: Vec<u32>,
    position: StreamPosition,
    /// Chunks of the piece that the sink has not got yet, and their bytes.
    batch: Vec<Bytes>,
    batch_bytes: usize,
}

enum StreamPosition {
    /// The number of a piece, of which so many bytes are known.
    Number([u8; 4], usize),
    /// The bytes of this piece, of which so many are missing.
    Piece(u32, u64),
}

impl<'a> PieceStream<'a> {
    fn new(order: &'a PieceRequest, wanted: BlobRequest) -> Self {
        let batch = Vec::with_capacity(BATCH_CHUNKS);
        Self {
            order,
            wanted,
            missing: order.pieces.clone(),
            position: StreamPosition::Number([0; 4], 0),
            batch,
            batch_bytes: 0,
        }
    }

    /// For a stream with the bytes of one piece and no number. The request is for this piece alone.
    pub(super) fn of_one_piece(order: &'a PieceRequest, wanted: BlobRequest, piece: u32) -> Self {
        let part = StreamPosition::Piece(piece, order.layout.piece_length(piece as usize));
        Self { missing: Vec::new(), position: part, ..Self::new(order, wanted) }
    }

    async fn read_chunk(
        &mut self,
        shared: &Shared,
        mut chunk: Bytes,
        sink: &mut dyn PieceSink,
    ) -> Result<(), FetchError> {
        while !chunk.is_empty() {
            match &mut self.position {
                StreamPosition::Number(number, known) => {
                    let part = chunk.split_to(chunk.len().min(4 - *known));
                    number[*known..][..part.len()].copy_from_slice(&part);
                    *known += part.len();
                    if *known == 4 {
                        let piece = u32::from_be_bytes(*number);
                        self.position = StreamPosition::Piece(piece, self.begin_piece(piece)?);
                        sink.begin(piece);
                    }
                }
                StreamPosition::Piece(_, left) => {
                    let part = chunk.split_to(usize::try_from(*left).unwrap_or(usize::MAX).min(chunk.len()));
                    *left -= part.len() as u64;
                    self.batch_bytes += part.len();
                    self.batch.push(part);
                    if self.batch_bytes >= PIECE_BATCH || self.batch.len() == BATCH_CHUNKS {
                        self.append_batch(shared, sink).await?;
                    }
                }
            }
            if let StreamPosition::Piece(piece, 0) = self.position {
                self.append_batch(shared, sink).await?;
                let BlobRequest { peer, digest, .. } = self.wanted;
                sink.end().await.map_err(|error| match error {
                    PieceError::Mismatch => FetchError::PieceMismatch { peer, digest, piece: piece as usize },
                    PieceError::Store(error) => FetchError::Sink(error),
                })?;
                self.position = StreamPosition::Number([0; 4], 0);
            }
        }
        Ok(())
    }

    /// Checks that the piece was requested, has not arrived, and is not one too many. Returns its
    /// length.
    fn begin_piece(&mut self, piece: u32) -> Result<u64, FetchError> {
        let PieceRequest { pieces: choice, limit: most, layout: cut, .. } = self.order;
        let came = choice.len() - self.missing.len();
        let Some(place) = self.missing.iter().position(|missing| *missing == piece) else {
            let how = if choice.contains(&piece) { "twice" } else { "unrequested" };
            return Err(self.wanted.protocol_error(format!("sends piece {piece} {how}")));
        };
        if came == usize::from(*most) {
            return Err(self.wanted.protocol_error(format!("sends more than {came} pieces")));
        }
        self.missing.swap_remove(place);
        Ok(cut.piece_length(piece as usize))
    }

    async fn append_batch(&mut self, shared: &Shared, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        if !self.batch.is_empty() {
            sink.append(&self.batch).await?;
            self.batch.clear();
            shared.metrics.fetched(take(&mut self.batch_bytes) as u64);
        }
        Ok(())
    }

    fn finish(self) -> Result<(), FetchError> {
        match self.position {
            StreamPosition::Number(_, 0) => Ok(()),
            StreamPosition::Number(..) => {
                Err(self.wanted.protocol_error("the stream ends within a piece number".into()))
            }
            StreamPosition::Piece(piece, left) => {
                Err(self.wanted.protocol_error(format!("the stream ends {left} bytes before the end of piece {piece}")))
            }
        }
    }
}
