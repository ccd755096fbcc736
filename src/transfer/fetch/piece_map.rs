//! Follows the piece map of a peer.

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{BoxStream, unfold};
use quinn::RecvStream;
use tokio::time::{Instant, sleep_until};

use super::BlobRequest;
use crate::model::{MAX_HAVE_PIECES, PieceMapUpdate};
use crate::oci::PieceLayout;
use crate::ports::{FetchError, PieceMapUpdates};
use crate::transfer::Shared;
use crate::transfer::peers::SharedConnection;
use crate::transfer::tuning::MIN_PIECE_MAP_INTERVAL;
use crate::wire::{self, Request, Versions, WireError};

impl Shared {
    pub(super) async fn follow(
        &self,
        wanted: BlobRequest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError> {
        let request = Request::Follow(wanted.digest);
        let (answer, recv, connection) = self.request(wanted.peer, wanted.digest, &request).await?;
        let state = if wanted.check_answer(&answer)? { FollowState::Whole } else { FollowState::Initial };
        Ok(self.follow_stream(wanted, layout, recv, connection, state))
    }

    /// Follows a peer that has the whole blob.
    pub(super) fn follow_whole_blob(
        &self,
        wanted: BlobRequest,
        layout: PieceLayout,
        recv: RecvStream,
        connection: SharedConnection,
    ) -> Box<dyn PieceMapUpdates> {
        self.follow_stream(wanted, layout, recv, connection, FollowState::Whole)
    }

    fn follow_stream(
        &self,
        wanted: BlobRequest,
        layout: PieceLayout,
        recv: RecvStream,
        connection: SharedConnection,
        state: FollowState,
    ) -> Box<dyn PieceMapUpdates> {
        let reader = PieceMapReader {
            wanted,
            layout,
            recv,
            connection,
            state,
            next_at: Instant::now(),
            versions: self.versions,
        };
        // The reader keeps a partly read update when the caller drops the future.
        let updates = unfold(reader, |mut reader| async move { Some((reader.update().await, reader)) });
        Box::new(PieceMapUpdateStream(updates.boxed()))
    }
}

struct PieceMapUpdateStream(BoxStream<'static, Result<PieceMapUpdate, FetchError>>);

#[async_trait]
impl PieceMapUpdates for PieceMapUpdateStream {
    async fn next(&mut self) -> Result<PieceMapUpdate, FetchError> {
        self.0.next().await.expect("the stream of updates has no end")
    }
}

struct PieceMapReader {
    wanted: BlobRequest,
    layout: PieceLayout,
    recv: RecvStream,
    /// Held so that the connection counts as used.
    connection: SharedConnection,
    state: FollowState,
    /// Earliest time of the next read.
    next_at: Instant,
    versions: Versions,
}

#[derive(Clone, Copy, PartialEq)]
enum FollowState {
    /// No update was read yet.
    Initial,
    /// The map was read; updates follow.
    Updates,
    /// The peer has the whole blob, and `HaveAll` is the next update.
    Whole,
    /// No more updates follow.
    Ended,
}

impl PieceMapReader {
    /// Waits without a deadline: the idle timeout of the connection detects a dead peer.
    async fn update(&mut self) -> Result<PieceMapUpdate, FetchError> {
        match self.state {
            FollowState::Whole => {
                self.state = FollowState::Ended;
                Ok(PieceMapUpdate::HaveAll)
            }
            FollowState::Ended => Err(self.wanted.connection_lost(&self.connection.closed().await)),
            FollowState::Initial | FollowState::Updates => self.read().await,
        }
    }

    async fn read(&mut self) -> Result<PieceMapUpdate, FetchError> {
        let update = loop {
            sleep_until(self.next_at).await;
            self.next_at = Instant::now() + MIN_PIECE_MAP_INTERVAL;
            match wire::read_in::<PieceMapUpdate>(&mut self.recv, self.versions).await {
                Ok(update) => break update,
                // An update of a later release is skipped.
                Err(WireError::Unknown { .. }) => {}
                Err(error) => return Err(self.wanted.answer_failed(&self.connection, error)),
            }
        };
        if !self.is_valid(&update) {
            return Err(self
                .wanted
                .protocol_error(format!("sends an invalid update of the piece map of {}", self.wanted.digest)));
        }
        self.state = if update == PieceMapUpdate::HaveAll { FollowState::Ended } else { FollowState::Updates };
        Ok(update)
    }

    /// The whole map comes once, as the first update, and then added pieces, all within the blob.
    fn is_valid(&self, update: &PieceMapUpdate) -> bool {
        let pieces = self.layout.piece_count();
        match update {
            PieceMapUpdate::Map(bits) => {
                let fits = bits.0.len() <= pieces.div_ceil(8) && bits.ones().all(|piece| piece < pieces);
                self.state == FollowState::Initial && fits
            }
            PieceMapUpdate::Have(added) => {
                let fits = (1..=MAX_HAVE_PIECES).contains(&added.len())
                    && added.iter().all(|piece| (*piece as usize) < pieces);
                self.state == FollowState::Updates && fits
            }
            PieceMapUpdate::HaveAll => true,
        }
    }
}
