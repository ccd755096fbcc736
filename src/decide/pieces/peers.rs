//! What is known of the peers that are asked: how fast they are, how regular, and when they are left alone.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::rate::Rate;
use crate::model::PeerId;

/// Asks under way at one peer that has brought something: first, and at most. Two, so that the next is there when one is answered; four of 50 ms and more cover any
/// way between two nodes.
const FIRST_DEPTH: u8 = 2;
const MAX_DEPTH: u8 = 4;

/// How long a peer may be silent at first and at least, and at most; between them its own pace decides. Less than a second is usual in a swarm:
/// who is asked serves eight others in turns, and more wait before us.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);
const MOST_PATIENCE: Duration = Duration::from_secs(2);

/// Gaps that are remembered; the second largest of so many is their 95th percentile.
const GAPS: usize = 32;
/// With fewer nothing is said about a peer's pace.
const FEW_GAPS: usize = 8;

/// How long a peer is left alone that has no time: first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MOST_PAUSE: Duration = Duration::from_millis(1600);

/// Stands for a peer in one pool.
pub(super) type Number = usize;

/// All peers that were ever asked, followed or forgotten: no more than the mesh has members.
#[derive(Debug, Default)]
pub(super) struct Peers {
    all: Vec<Peer>,
    numbers: HashMap<PeerId, Number>,
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) id: PeerId,
    pub(super) rate: Rate,
    /// Asks under way, and how many there may be.
    pub(super) asks: u8,
    depth: u8,
    /// A piece of it fitted, of whichever blob. Before that it is asked for one at a time.
    pub(super) is_known: bool,
    /// Bytes that are still to come of them.
    pub(super) bytes: u64,
    /// When it brought something last, or was asked while it had nothing to do.
    pub(super) moved: Option<Instant>,
    /// Milliseconds between two moments at which bytes came while something was asked.
    gaps: [u16; GAPS],
    gaps_seen: usize,
    patience: Duration,
    /// Nothing is asked before.
    rests_until: Option<Instant>,
    pause: Duration,
    /// Nothing is asked and nothing followed before.
    forgotten_until: Option<Instant>,
}

impl Peers {
    pub(super) fn number(&mut self, id: PeerId) -> Number {
        let next = self.all.len();
        let number = *self.numbers.entry(id).or_insert(next);
        if number == next {
            self.all.push(Peer::new(id));
        }
        number
    }

    pub(super) fn known(&self, id: PeerId) -> Option<Number> {
        self.numbers.get(&id).copied()
    }

    pub(super) fn get(&self, number: Number) -> &Peer {
        &self.all[number]
    }

    pub(super) fn get_mut(&mut self, number: Number) -> &mut Peer {
        &mut self.all[number]
    }

    pub(super) fn is_forgotten(&self, id: PeerId, now: Instant) -> bool {
        self.known(id).is_some_and(|number| self.all[number].is_forgotten(now))
    }

    /// The middle one of the rates that are known; what a peer whose rate is not is taken for.
    pub(super) fn usual_rate(&self, now: Instant) -> Option<f64> {
        let mut rates: Vec<_> = self.all.iter().filter_map(|peer| peer.rate.now(now)).collect();
        let middle = rates.len() / 2;
        (!rates.is_empty()).then(|| *rates.select_nth_unstable_by(middle, f64::total_cmp).1)
    }

    /// When the next one that was forgotten is known again.
    pub(super) fn returns_at(&self, now: Instant) -> Option<Instant> {
        self.all.iter().filter_map(|peer| peer.forgotten_until).filter(|until| *until > now).min()
    }

    /// When somebody can be asked again who cannot be now.
    pub(super) fn wake_at(&self, now: Instant) -> Option<Instant> {
        let untils = self.all.iter().flat_map(|peer| [peer.rests_until, peer.forgotten_until]);
        untils.flatten().filter(|until| *until > now).min()
    }
}

impl Peer {
    fn new(id: PeerId) -> Self {
        Self {
            id,
            rate: Rate::default(),
            asks: 0,
            depth: 1,
            is_known: false,
            bytes: 0,
            moved: None,
            gaps: [0; GAPS],
            gaps_seen: 0,
            patience: LEAST_PATIENCE,
            rests_until: None,
            pause: FIRST_PAUSE,
            forgotten_until: None,
        }
    }

    /// One more can be asked of it.
    pub(super) fn is_ready(&self, now: Instant) -> bool {
        self.asks < self.depth && self.rests_until.is_none_or(|until| until <= now) && !self.is_forgotten(now)
    }

    pub(super) fn is_forgotten(&self, now: Instant) -> bool {
        self.forgotten_until.is_some_and(|until| until > now)
    }

    pub(super) fn forget(&mut self, until: Instant) {
        self.forgotten_until = Some(until);
    }

    pub(super) fn asked(&mut self, bytes: u64, now: Instant) {
        if self.asks == 0 {
            self.moved = self.moved.max(Some(now));
            self.rate.begin(now);
        }
        self.asks += 1;
        self.bytes += bytes;
    }

    /// An ask is over; so many of its bytes did not come.
    pub(super) fn over(&mut self, bytes: u64, now: Instant) {
        self.asks = self.asks.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
        if self.asks == 0 {
            self.rate.end(now);
        }
    }

    /// It had answered everything before it was asked again: it could have had more to do.
    pub(super) fn ran_dry(&mut self) {
        if self.is_known {
            self.depth = (self.depth + 1).min(MAX_DEPTH);
        }
    }

    pub(super) fn brought(&mut self, bytes: u64, now: Instant) {
        self.rate.add(bytes, now);
        let gap = self.moved.map_or(Duration::ZERO, |moved| now.saturating_duration_since(moved));
        self.moved = self.moved.max(Some(now));
        self.gaps[self.gaps_seen % GAPS] = u16::try_from(gap.as_millis()).unwrap_or(u16::MAX);
        self.gaps_seen += 1;
        // Not at each of them: it takes longer than all the rest.
        if self.gaps_seen.is_multiple_of(FEW_GAPS) {
            let mut gaps = self.gaps;
            let seen = &mut gaps[..self.gaps_seen.min(GAPS)];
            let place = seen.len() * 95 / 100;
            let gap = *seen.select_nth_unstable(place).1;
            self.patience = Duration::from_millis(u64::from(gap)).clamp(LEAST_PATIENCE, MOST_PATIENCE);
        }
    }

    /// It kept a promise.
    pub(super) fn kept(&mut self) {
        self.pause = FIRST_PAUSE;
    }

    pub(super) fn known(&mut self) {
        if !std::mem::replace(&mut self.is_known, true) {
            self.depth = self.depth.max(FIRST_DEPTH);
        }
    }

    /// It has no time, or nothing came of it.
    pub(super) fn rests(&mut self, now: Instant) {
        self.rests_until = Some(now + self.pause);
        self.pause = (self.pause * 2).min(MOST_PAUSE);
    }

    /// How long it may be silent before others are asked as well.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }
}
