//! Records of the peers that got requests: rate, regularity, back-off and exclusion.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::rate_estimate::RateEstimate;
use crate::model::PeerId;
use crate::util::backoff::Backoff;

/// Requests in flight at one verified peer: initially, and at most. With two, the second is served
/// while the first one's answer arrives; four of at least 50 ms each cover the round trip between
/// any two nodes.
const FIRST_DEPTH: u8 = 2;
const MAX_DEPTH: u8 = 4;

/// Silence of a peer before a hedged request: first and at least, and at most. Between these limits
/// the peer's own pace decides. A silence below a second is usual in a swarm: a provider serves
/// eight peers in turns, and more wait before us.
const MIN_SILENCE_LIMIT: Duration = Duration::from_secs(1);
const MAX_SILENCE_LIMIT: Duration = Duration::from_secs(2);

/// Remembered gaps between arrivals. The second largest of 32 is their 95th percentile.
const GAPS: usize = 32;
/// Fewer gaps than these do not set a peer's silence limit.
const MIN_GAPS: usize = 8;

/// Back-off of a busy or failing peer.
const BACKOFF: Backoff = Backoff { first: Duration::from_millis(100), longest: Duration::from_millis(1600) };

/// Index of a peer in one picker.
pub(super) type PeerIndex = usize;

/// All peers that ever got a request, were followed or excluded: at most the members of the mesh.
#[derive(Debug, Default)]
pub(super) struct PeerRecords {
    all: Vec<PeerRecord>,
    numbers: HashMap<PeerId, PeerIndex>,
}

#[derive(Debug)]
pub(super) struct PeerRecord {
    pub(super) id: PeerId,
    pub(super) rate: RateEstimate,
    /// Requests in flight, and their limit.
    pub(super) in_flight: u8,
    depth: u8,
    /// A piece of any blob matched its hash chain. Before that, the depth stays at one.
    pub(super) is_verified: bool,
    /// Bytes still to come from the requests in flight.
    pub(super) bytes_in_flight: u64,
    /// The last arrival of bytes, or the last request to the idle peer.
    pub(super) last_progress: Option<Instant>,
    /// Milliseconds between two arrivals of bytes during requests.
    gaps: [u16; GAPS],
    gaps_seen: usize,
    silence_limit: Duration,
    /// No request before this instant.
    back_off_until: Option<Instant>,
    /// Failures since the last reset of the back-off.
    failures: u32,
    /// No request and no selection before this instant.
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

    /// Median of the measured rates; stands in for the rate of an unmeasured peer.
    pub(super) fn usual_rate(&self, now: Instant) -> Option<f64> {
        let mut rates: Vec<_> = self.all.iter().filter_map(|peer| peer.rate.now(now)).collect();
        let middle = rates.len() / 2;
        (!rates.is_empty()).then(|| *rates.select_nth_unstable_by(middle, f64::total_cmp).1)
    }

    pub(super) fn next_exclusion_end(&self, now: Instant) -> Option<Instant> {
        self.all.iter().filter_map(|peer| peer.excluded_until).filter(|until| *until > now).min()
    }

    /// The next end of a back-off or an exclusion.
    pub(super) fn wake_at(&self, now: Instant) -> Option<Instant> {
        let deadlines = self.all.iter().flat_map(|peer| [peer.back_off_until, peer.excluded_until]);
        deadlines.flatten().filter(|until| *until > now).min()
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
            failures: 0,
            excluded_until: None,
        }
    }

    /// Whether the peer may get one more request.
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

    /// `bytes` is the part of the request that did not come.
    pub(super) fn record_end(&mut self, bytes: u64, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.bytes_in_flight = self.bytes_in_flight.saturating_sub(bytes);
        if self.in_flight == 0 {
            self.rate.end(now);
        }
    }

    /// For a peer that answered every request before the next one came, and could serve more.
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
        // Only every `MIN_GAPS` arrivals: the selection costs more than the rest of this function.
        if self.gaps_seen.is_multiple_of(MIN_GAPS) {
            let mut gaps = self.gaps;
            let seen = &mut gaps[..self.gaps_seen.min(GAPS)];
            let percentile_index = seen.len() * 95 / 100;
            let gap = *seen.select_nth_unstable(percentile_index).1;
            self.silence_limit = Duration::from_millis(u64::from(gap)).clamp(MIN_SILENCE_LIMIT, MAX_SILENCE_LIMIT);
        }
    }

    pub(super) fn reset_back_off(&mut self) {
        self.failures = 0;
    }

    pub(super) fn mark_verified(&mut self) {
        if !std::mem::replace(&mut self.is_verified, true) {
            self.depth = self.depth.max(FIRST_DEPTH);
        }
    }

    /// For a busy peer, or a request without a result.
    pub(super) fn start_back_off(&mut self, now: Instant) {
        self.back_off_until = Some(now + BACKOFF.wait(self.failures));
        self.failures = self.failures.saturating_add(1);
    }

    /// Silence after which another provider gets the request too.
    pub(super) fn silence_limit(&self) -> Duration {
        self.silence_limit
    }
}
