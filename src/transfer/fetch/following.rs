//! What a peer tells of its pieces.

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{BoxStream, unfold};
use quinn::RecvStream;
use tokio::time::{Instant, sleep_until};

use super::Wanted;
use crate::model::{Availability, MAX_NEWS};
use crate::oci::Cut;
use crate::ports::{FetchError, Following};
use crate::transfer::Shared;
use crate::transfer::peers::Line;
use crate::transfer::tuning::NEWS_LEAST;
use crate::wire::{self, Request, Versions, WireError};

impl Shared {
    pub(super) async fn follow(&self, wanted: Wanted, cut: Cut) -> Result<Box<dyn Following>, FetchError> {
        let request = Request::Follow(wanted.digest);
        let (answer, recv, line) = self.ask(wanted.peer, wanted.digest, &request).await?;
        let stage = if wanted.granted(&answer)? { Stage::Whole } else { Stage::First };
        Ok(self.listen(wanted, cut, recv, line, stage))
    }

    /// Of a peer that has all of the blob.
    pub(super) fn listen_to_whole(&self, wanted: Wanted, cut: Cut, recv: RecvStream, line: Line) -> Box<dyn Following> {
        self.listen(wanted, cut, recv, line, Stage::Whole)
    }

    fn listen(&self, wanted: Wanted, cut: Cut, recv: RecvStream, line: Line, stage: Stage) -> Box<dyn Following> {
        let listener = Listener { wanted, cut, recv, line, stage, next_at: Instant::now(), versions: self.versions };
        // A word that was read in part is kept in here when whoever waited for it waits no more.
        let words = unfold(listener, |mut listener| async move { Some((listener.word().await, listener)) });
        Box::new(Words(words.boxed()))
    }
}

struct Words(BoxStream<'static, Result<Availability, FetchError>>);

#[async_trait]
impl Following for Words {
    async fn next(&mut self) -> Result<Availability, FetchError> {
        self.0.next().await.expect("it has no end")
    }
}

struct Listener {
    wanted: Wanted,
    cut: Cut,
    recv: RecvStream,
    /// Held so that the connection counts as used.
    line: Line,
    stage: Stage,
    /// When the next word is read.
    next_at: Instant,
    versions: Versions,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// Nothing was said yet.
    First,
    /// News come.
    News,
    /// It has all, which is to be said.
    Whole,
    /// Nothing more will be said.
    Said,
}

impl Listener {
    /// Waits without a limit: the connection's own says when the peer is gone.
    async fn word(&mut self) -> Result<Availability, FetchError> {
        match self.stage {
            Stage::Whole => {
                self.stage = Stage::Said;
                Ok(Availability::Whole)
            }
            Stage::Said => Err(self.wanted.lost(&self.line.closed().await)),
            Stage::First | Stage::News => self.read().await,
        }
    }

    async fn read(&mut self) -> Result<Availability, FetchError> {
        let word = loop {
            sleep_until(self.next_at).await;
            self.next_at = Instant::now() + NEWS_LEAST;
            match wire::read_in::<Availability>(&mut self.recv, self.versions).await {
                Ok(word) => break word,
                // Of a later release, and as if it had not been said.
                Err(WireError::Unknown { .. }) => {}
                Err(error) => return Err(self.wanted.no_answer(&self.line, error)),
            }
        };
        if !self.makes_sense(&word) {
            return Err(self.wanted.protocol(format!("tells of pieces of {} that there are not", self.wanted.digest)));
        }
        self.stage = if word == Availability::Whole { Stage::Said } else { Stage::News };
        Ok(word)
    }

    /// The whole set once and at first, then what was added, all of it within the blob.
    fn makes_sense(&self, word: &Availability) -> bool {
        let pieces = self.cut.pieces();
        match word {
            Availability::These(bits) => {
                let fits = bits.0.len() <= pieces.div_ceil(8) && bits.ones().all(|piece| piece < pieces);
                self.stage == Stage::First && fits
            }
            Availability::Also(news) => {
                let fits = (1..=MAX_NEWS).contains(&news.len()) && news.iter().all(|piece| (*piece as usize) < pieces);
                self.stage == Stage::News && fits
            }
            Availability::Whole => true,
        }
    }
}
