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
    pub(super) async fn fetch_pieces(
        &self,
        piece_request: &PieceRequest,
        sink: &mut dyn PieceSink,
    ) -> Result<(), FetchError> {
        let PieceRequest { peer, digest, layout, ref pieces, limit } = *piece_request;
        debug_assert!(pieces.len() <= MAX_REQUEST_PIECES && limit > 0, "{limit} of {} pieces", pieces.len());
        let wanted = BlobRequest { peer, digest, size: layout.size() };
        let request = Request::Pieces { digest, pieces: pieces.clone(), limit };
        let outbound = self.outbound_if_limited(peer, layout.size());
        let _permits = self.acquire_fetch_permits(outbound.as_deref()).await;
        // Held so that the connection counts as used.
        let (answer, mut recv, _connection) = self.request(peer, digest, &request).await?;
        wanted.check_answer(&answer)?;
        self.receive_pieces(PieceStream::new(piece_request, wanted), &mut recv, sink).await
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
        let mut bytes_since_reset = 0;
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
            bytes_since_reset += bytes;
            if bytes_since_reset >= MIN_BYTES_PER_STALL {
                stall_timer.as_mut().reset(Instant::now() + stall);
                bytes_since_reset = 0;
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
    request: &'a PieceRequest,
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
    fn new(request: &'a PieceRequest, wanted: BlobRequest) -> Self {
        let batch = Vec::with_capacity(BATCH_CHUNKS);
        Self {
            request,
            wanted,
            missing: request.pieces.clone(),
            position: StreamPosition::Number([0; 4], 0),
            batch,
            batch_bytes: 0,
        }
    }

    /// For a stream with the bytes of one piece and no number. The request is for this piece alone.
    pub(super) fn of_one_piece(request: &'a PieceRequest, wanted: BlobRequest, piece: u32) -> Self {
        let position = StreamPosition::Piece(piece, request.layout.piece_length(piece as usize));
        Self { missing: Vec::new(), position, ..Self::new(request, wanted) }
    }

    async fn read_chunk(
        &mut self,
        shared: &Shared,
        mut chunk: Bytes,
        sink: &mut dyn PieceSink,
    ) -> Result<(), FetchError> {
        while !chunk.is_empty() {
            match &mut self.position {
                StreamPosition::Number(number, filled) => {
                    let bytes = chunk.split_to(chunk.len().min(4 - *filled));
                    number[*filled..][..bytes.len()].copy_from_slice(&bytes);
                    *filled += bytes.len();
                    if *filled == 4 {
                        let piece = u32::from_be_bytes(*number);
                        self.position = StreamPosition::Piece(piece, self.begin_piece(piece)?);
                        sink.begin(piece);
                    }
                }
                StreamPosition::Piece(_, left) => {
                    let bytes = chunk.split_to(usize::try_from(*left).unwrap_or(usize::MAX).min(chunk.len()));
                    *left -= bytes.len() as u64;
                    self.batch_bytes += bytes.len();
                    self.batch.push(bytes);
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
        let PieceRequest { pieces, limit, layout, .. } = self.request;
        let received = pieces.len() - self.missing.len();
        let Some(index) = self.missing.iter().position(|missing| *missing == piece) else {
            let how = if pieces.contains(&piece) { "twice" } else { "unrequested" };
            return Err(self.wanted.protocol_error(format!("sends piece {piece} {how}")));
        };
        if received == usize::from(*limit) {
            return Err(self.wanted.protocol_error(format!("sends more than {received} pieces")));
        }
        self.missing.swap_remove(index);
        Ok(layout.piece_length(piece as usize))
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
