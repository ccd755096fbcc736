//! Pieces of a blob: a stream of some of those that were asked for, as the other end chose them.

use std::mem::take;

use bytes::Bytes;
use quinn::RecvStream;
use tokio::time::{Instant, sleep};

use super::Wanted;
use crate::model::{MAX_CHOICE, Order};
use crate::ports::{FetchError, PieceError, PieceSink};
use crate::transfer::Shared;
use crate::transfer::tuning::{BATCH_CHUNKS, FLOOR, PIECE_BATCH};
use crate::wire::Request;

impl Shared {
    /// Dropped, it stops the stream, and the other end sends no more.
    pub(super) async fn fetch_pieces(&self, order: &Order, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let Order { peer, digest, cut, ref choice, most } = *order;
        debug_assert!(choice.len() <= MAX_CHOICE && most > 0, "{most} of {} pieces", choice.len());
        let wanted = Wanted { peer, digest, size: cut.size() };
        let request = Request::Pieces { digest, choice: choice.clone(), most };
        let outbound = self.crowded(peer, cut.size());
        let _places = self.places(outbound.as_deref()).await;
        // The line is held so that the connection counts as used.
        let (answer, mut recv, _line) = self.ask(peer, digest, &request).await?;
        wanted.granted(&answer)?;
        self.unpack(Unpacking::of(order, wanted), &mut recv, sink).await
    }

    /// Takes the bytes in batches, none of which spans two pieces. The sink hashes them here and now: nothing is copied, and no other thread
    /// is asked.
    ///
    /// The first piece may wait for its turn at the other end, as long as any other bytes may take.
    pub(super) async fn unpack(
        &self,
        mut unpacking: Unpacking<'_>,
        recv: &mut RecvStream,
        sink: &mut dyn PieceSink,
    ) -> Result<(), FetchError> {
        let mut arrived = vec![Bytes::new(); BATCH_CHUNKS];
        let stall = self.limits.stall;
        let mut patience = std::pin::pin!(sleep(stall));
        let mut since_moved = 0;
        loop {
            let read = tokio::select! {
                biased;
                read = recv.read_chunks(&mut arrived) => read.map_err(|error| unpacking.wanted.cut_off(&error))?,
                () = &mut patience => return Err(unpacking.wanted.stalled(stall.as_secs())),
            };
            let Some(read) = read else { break };
            let bytes = arrived[..read].iter().map(|chunk| chunk.len() as u64).sum();
            // Not read on meanwhile, so the windows fill and slow the sender. Neither our own wait nor the sink's time is its fault.
            let began = Instant::now();
            self.down.pass(bytes).await;
            for chunk in &mut arrived[..read] {
                unpacking.take(self, take(chunk), sink).await?;
            }
            since_moved += bytes;
            if since_moved >= FLOOR {
                patience.as_mut().reset(Instant::now() + stall);
                since_moved = 0;
            } else {
                let deadline = patience.deadline() + began.elapsed();
                patience.as_mut().reset(deadline);
            }
        }
        unpacking.ended()
    }
}

/// The stream of pieces as it comes.
pub(super) struct Unpacking<'a> {
    order: &'a Order,
    wanted: Wanted,
    /// Those of the choice that have not come.
    missing: Vec<u32>,
    part: Part,
    /// What came of the piece and was not handed on, and how many bytes that is.
    batch: Vec<Bytes>,
    held: usize,
}

/// What comes next.
enum Part {
    /// A piece's number, of which so many bytes are there.
    Number([u8; 4], usize),
    /// So many more bytes of this piece.
    Piece(u32, u64),
}

impl<'a> Unpacking<'a> {
    fn of(order: &'a Order, wanted: Wanted) -> Self {
        let batch = Vec::with_capacity(BATCH_CHUNKS);
        Self { order, wanted, missing: order.choice.clone(), part: Part::Number([0; 4], 0), batch, held: 0 }
    }

    /// Of a stream that has the bytes of one piece and no number. The order is for this piece alone.
    pub(super) fn of_range(order: &'a Order, wanted: Wanted, piece: u32) -> Self {
        let part = Part::Piece(piece, order.cut.length(piece as usize));
        Self { missing: Vec::new(), part, ..Self::of(order, wanted) }
    }

    async fn take(&mut self, shared: &Shared, mut chunk: Bytes, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        while !chunk.is_empty() {
            match &mut self.part {
                Part::Number(number, known) => {
                    let part = chunk.split_to(chunk.len().min(4 - *known));
                    number[*known..][..part.len()].copy_from_slice(&part);
                    *known += part.len();
                    if *known == 4 {
                        let piece = u32::from_be_bytes(*number);
                        self.part = Part::Piece(piece, self.length_of(piece)?);
                        sink.begin(piece);
                    }
                }
                Part::Piece(_, left) => {
                    let part = chunk.split_to(usize::try_from(*left).unwrap_or(usize::MAX).min(chunk.len()));
                    *left -= part.len() as u64;
                    self.held += part.len();
                    self.batch.push(part);
                    if self.held >= PIECE_BATCH || self.batch.len() == BATCH_CHUNKS {
                        self.hand_on(shared, sink).await?;
                    }
                }
            }
            if let Part::Piece(piece, 0) = self.part {
                self.hand_on(shared, sink).await?;
                let Wanted { peer, digest, .. } = self.wanted;
                sink.end().await.map_err(|error| match error {
                    PieceError::Unfit => FetchError::Unfit { peer, digest, piece: piece as usize },
                    PieceError::Store(error) => FetchError::Sink(error),
                })?;
                self.part = Part::Number([0; 4], 0);
            }
        }
        Ok(())
    }

    /// Of a piece that was asked for, did not come before, and is not one too many.
    fn length_of(&mut self, piece: u32) -> Result<u64, FetchError> {
        let Order { choice, most, cut, .. } = self.order;
        let came = choice.len() - self.missing.len();
        let Some(place) = self.missing.iter().position(|missing| *missing == piece) else {
            let how = if choice.contains(&piece) { "twice" } else { "unasked" };
            return Err(self.wanted.protocol(format!("sends piece {piece} {how}")));
        };
        if came == usize::from(*most) {
            return Err(self.wanted.protocol(format!("sends more than {came} pieces")));
        }
        self.missing.swap_remove(place);
        Ok(cut.length(piece as usize))
    }

    async fn hand_on(&mut self, shared: &Shared, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        if !self.batch.is_empty() {
            sink.append(&self.batch).await?;
            self.batch.clear();
            shared.metrics.fetched(take(&mut self.held) as u64);
        }
        Ok(())
    }

    fn ended(self) -> Result<(), FetchError> {
        match self.part {
            Part::Number(_, 0) => Ok(()),
            Part::Number(..) => Err(self.wanted.protocol("ends within a number".into())),
            Part::Piece(piece, left) => {
                Err(self.wanted.protocol(format!("ends {left} bytes before piece {piece} does")))
            }
        }
    }
}
