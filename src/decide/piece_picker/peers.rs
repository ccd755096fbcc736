//! What is known of the peers that are asked: how fast they are, how regular, and when they are left alone.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::rate_estimate::RateEstimate;
use crate::model::PeerId;

/// Asks under way at one peer that has brought something: first, and at most. Two, so that the next is there when one is answered; four of 50 ms and more cover any
/// way between two nodes.
const FIRST_DEPTH: u8 = 2;
const MAX_DEPTH: u8 = 4;

/// How long a peer may be silent at first and at least, and at most; between them its own pace decides. Less than a second is usual in a swarm:
/// who is asked serves eight others in turns, and more wait before us.
const MIN_SILENCE_LIMIT: Duration = Duration::from_secs(1);
const MAX_SILENCE_LIMIT: Duration = Duration::from_secs(2);

/// Gaps that are remembered; the second largest of so many is their 95th percentile.
const GAPS: usize = 32;
/// With fewer nothing is said about a peer's pace.
const MIN_GAPS: usize = 8;

/// How long a peer is left alone that has no time: first, and at most.
const MIN_BACK_OFF: Duration = Duration::from_millis(100);
const MAX_BACK_OFF: Duration = Duration::from_millis(1600);

/// Stands for a peer in one pool.
pub(super) type PeerIndex = usize;

/// All peers that were ever asked, followed or forgotten: no more than the mesh has members.
#[derive(Debug, Default)]
pub(super) struct PeerRecords {
    all: Vec<PeerRecord>,
    numbers: HashMap<PeerId, PeerIndex>,
}

#[derive(Debug)]
pub(super) struct PeerRecord {
    pub(super) id: PeerId,
    pub(super) rate: RateEstimate,
    /// Asks under way, and how many there may be.
    pub(super) in_flight: u8,
    depth: u8,
    /// A piece of it fitted, of whichever blob. Before that it is asked for one at a time.
    pub(super) is_verified: bool,
    /// Bytes that are still to come of them.
    pub(super) bytes_in_flight: u64,
    /// When it brought something last, or was asked while it had nothing to do.
    pub(super) last_progress: Option<Instant>,
    /// Milliseconds between two moments at which bytes came while something was asked.
    gaps: [u16; GAPS],
    gaps_seen: usize,
    silence_limit: Duration,
    /// Nothing is asked before.
    back_off_until: Option<Instant>,
    back_off: Duration,
    /// Nothing is asked and nothing followed before.
    excluded_until: Option<Instant>,
}

impl PeerRecords {
    pub(super) fn index_or_insert(&mut self, id: PeerId) -> PeerIndex {
        let next = self.all.len();
        let number = *self.numbers.entry(id).or_insert(next);
        if number == next {
            self.all.push(PeerRecord::new(id));
        }
        number
    }

    pub(super) fn index_of(&self, id: PeerId) -> Option<PeerIndex> {
        self.numbers.get(&id).copied()
    }

    pub(super) fn get(&self, number: PeerIndex) -> &PeerRecord {
        &self.all[number]
    }

    pub(super) fn get_mut(&mut self, number: PeerIndex) -> &mut PeerRecord {
        &mut self.all[number]
    }

    pub(super) fn is_excluded(&self, id: PeerId, now: Instant) -> bool {
        self.index_of(id).is_some_and(|number| self.all[number].is_excluded(now))
    }

    /// The middle one of the rates that are known; what a peer whose rate is not is taken for.
    pub(super) fn usual_rate(&self, now: Instant) -> Option<f64> {
        let mut rates: Vec<_> = self.all.iter().filter_map(|peer| peer.rate.now(now)).collect();
        let middle = rates.len() / 2;
        (!rates.is_empty()).then(|| *rates.select_nth_unstable_by(middle, f64::total_cmp).1)
    }

    /// When the next one that was forgotten is known again.
    pub(super) fn next_exclusion_end(&self, now: Instant) -> Option<Instant> {
        self.all.iter().filter_map(|peer| peer.excluded_until).filter(|until| *until > now).min()
    }

    /// When somebody can be asked again who cannot be now.
    pub(super) fn wake_at(&self, now: Instant) -> Option<Instant> {
        let untils = self.all.iter().flat_map(|peer| [peer.back_off_until, peer.excluded_until]);
        untils.flatten().filter(|until| *until > now).min()
    }
}

impl PeerRecord {
    fn new(id: PeerId) -> Self {
        Self {
            id,
            rate: RateEstimate::default(),
            in_flight: 0,
            depth: 1,
            is_verified: false,
            bytes_in_flight: 0,
            last_progress: None,
            gaps: [0; GAPS],
            gaps_seen: 0,
            silence_limit: MIN_SILENCE_LIMIT,
            back_off_until: None,
            back_off: MIN_BACK_OFF,
            excluded_until: None,
        }
    }

    /// One more can be asked of it.
    pub(super) fn is_ready(&self, now: Instant) -> bool {
        self.in_flight < self.depth && self.back_off_until.is_none_or(|until| until <= now) && !self.is_excluded(now)
    }

    pub(super) fn is_excluded(&self, now: Instant) -> bool {
        self.excluded_until.is_some_and(|until| until > now)
    }

    pub(super) fn exclude(&mut self, until: Instant) {
        self.excluded_until = Some(until);
    }

    pub(super) fn record_request(&mut self, bytes: u64, now: Instant) {
        if self.in_flight == 0 {
            self.last_progress = self.last_progress.max(Some(now));
            self.rate.begin(now);
        }
        self.in_flight += 1;
        self.bytes_in_flight += bytes;
    }

    /// An ask is over; so many of its bytes did not come.
    pub(super) fn record_end(&mut self, bytes: u64, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.bytes_in_flight = self.bytes_in_flight.saturating_sub(bytes);
        if self.in_flight == 0 {
            self.rate.end(now);
        }
    }

    /// It had answered everything before it was asked again: it could have had more to do.
    pub(super) fn increase_depth(&mut self) {
        if self.is_verified {
            self.depth = (self.depth + 1).min(MAX_DEPTH);
        }
    }

    pub(super) fn record_bytes(&mut self, bytes: u64, now: Instant) {
        self.rate.add(bytes, now);
        let gap = self.last_progress.map_or(Duration::ZERO, |moved| now.saturating_duration_since(moved));
        self.last_progress = self.last_progress.max(Some(now));
        self.gaps[self.gaps_seen % GAPS] = u16::try_from(gap.as_millis()).unwrap_or(u16::MAX);
        self.gaps_seen += 1;
        // Not at each of them: it takes longer than all the rest.
        if self.gaps_seen.is_multiple_of(MIN_GAPS) {
            let mut gaps = self.gaps;
            let seen = &mut gaps[..self.gaps_seen.min(GAPS)];
            let place = seen.len() * 95 / 100;
            let gap = *seen.select_nth_unstable(place).1;
            self.silence_limit = Duration::from_millis(u64::from(gap)).clamp(MIN_SILENCE_LIMIT, MAX_SILENCE_LIMIT);
        }
    }

    /// It kept a promise.
    pub(super) fn reset_back_off(&mut self) {
        self.back_off = MIN_BACK_OFF;
    }

    pub(super) fn mark_verified(&mut self) {
        if !std::mem::replace(&mut self.is_verified, true) {
            self.depth = self.depth.max(FIRST_DEPTH);
        }
    }

    /// It has no time, or nothing came of it.
    pub(super) fn start_back_off(&mut self, now: Instant) {
        self.back_off_until = Some(now + self.back_off);
        self.back_off = (self.back_off * 2).min(MAX_BACK_OFF);
    }

    /// How long it may be silent before others are asked as well.
    pub(super) fn silence_limit(&self) -> Duration {
        self.silence_limit
    }
}
