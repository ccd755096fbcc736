//! What peers did wrong lately, and what follows for the order in which they are asked.
//!
//! Nobody is excluded: one bad sector is no reason to lose what only this peer holds, and nothing that a peer sends is believed
//! unverified. Not here: whether a peer is admitted, and who holds what.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::model::PeerId;

/// What a peer did, or what happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It sent wrong content or broke the protocol.
    Lied,
    /// It serves as many as it can.
    Busy,
    /// There is no way to it, or it does not let us in.
    Unreachable,
    /// It stopped sending.
    Stalled,
    /// It cannot read its own content.
    StoreFailed,
}

impl Fault {
    /// The kind, for the metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Lied => "lied",
            Self::Busy => "busy",
            Self::Unreachable => "unreachable",
            Self::Stalled => "stalled",
            Self::StoreFailed => "store_failed",
        }
    }

    fn grudge(self) -> Grudge {
        match self {
            Self::Lied => Grudge::Lies,
            Self::Busy => Grudge::Business,
            Self::Unreachable | Self::Stalled | Self::StoreFailed => Grudge::Trouble,
        }
    }

    /// First wait, and the longest that it doubles to.
    fn waits(self) -> (Duration, Duration) {
        match self.grudge() {
            // A bad sector stays bad and a liar lies on; a replaced disk is noticed within two hours.
            Grudge::Lies => (Duration::from_secs(600), Duration::from_secs(7200)),
            // A blob of a few MiB takes a moment; whoever waits for a place is to get it soon after it is free.
            Grudge::Business => (Duration::from_millis(100), Duration::from_millis(1500)),
            // As the queue's own waits after a failure.
            Grudge::Trouble => (Duration::from_secs(1), Duration::from_secs(300)),
        }
    }
}

/// Faults that are remembered together, because one kind of wait follows from them.
#[derive(Debug, Clone, Copy)]
enum Grudge {
    Lies,
    Business,
    Trouble,
}

/// How a peer compares with others; the least is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Nothing is known against it.
    Good,
    /// Something went wrong; by when it may be better.
    Troubled(Instant),
    /// It lied. What it sends costs a whole blob before that is known.
    Lying,
}

/// The faults of all peers.
#[derive(Debug, Default)]
pub struct Trust {
    records: HashMap<PeerId, [Count; 3]>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    times: u32,
    until: Option<Instant>,
}

/// Peers with faults that are remembered; as many as are known at most (5000 nodes, each of which may have lost its key once). Beyond
/// it those go whose time is up first.
const MAX_RECORDS: usize = 10_000;

/// How long after a wait its faults still make the next one longer.
const REMEMBERED: Duration = Duration::from_secs(3600);

impl Trust {
    /// Something went wrong with a peer. Answers until when it is held against it. `jitter` in 0..1 spreads the waits of many askers.
    pub fn fault(&mut self, peer: PeerId, fault: Fault, now: Instant, jitter: f64) -> Instant {
        if !self.records.contains_key(&peer) {
            self.make_room(now);
        }
        let count = &mut self.records.entry(peer).or_default()[fault.grudge() as usize];
        count.expire(now);
        let (first, longest) = fault.waits();
        let wait = first.saturating_mul(1 << count.times.min(16)).min(longest);
        let until = now + wait.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
        *count = Count { times: count.times.saturating_add(1), until: Some(until) };
        until
    }

    /// A peer served a blob: it is there and has time. That it lied is not forgotten: a disk with one bad sector serves all the others.
    pub fn served(&mut self, peer: PeerId) {
        if let Some(record) = self.records.get_mut(&peer) {
            record[Grudge::Business as usize] = Count::default();
            record[Grudge::Trouble as usize] = Count::default();
            if record.iter().all(|count| count.until.is_none()) {
                self.records.remove(&peer);
            }
        }
    }

    /// How the peer compares now.
    pub fn standing(&self, peer: PeerId, now: Instant) -> Standing {
        if self.held(peer, Grudge::Lies, now).is_some() {
            return Standing::Lying;
        }
        self.held(peer, Grudge::Trouble, now).map_or(Standing::Good, Standing::Troubled)
    }

    /// Before when there is no use in asking a peer: it was busy.
    pub fn not_before(&self, peer: PeerId, now: Instant) -> Option<Instant> {
        self.held(peer, Grudge::Business, now)
    }

    fn held(&self, peer: PeerId, grudge: Grudge, now: Instant) -> Option<Instant> {
        self.records.get(&peer)?[grudge as usize].until.filter(|until| *until > now)
    }

    fn make_room(&mut self, now: Instant) {
        if self.records.len() < MAX_RECORDS {
            return;
        }
        self.records.retain(|_, record| {
            record.iter_mut().for_each(|count| count.expire(now));
            record.iter().any(|count| count.until.is_some())
        });
        if self.records.len() >= MAX_RECORDS {
            let last = |record: &[Count; 3]| record.iter().filter_map(|count| count.until).max();
            let first = self.records.iter().min_by_key(|(_, record)| last(record)).map(|(peer, _)| *peer);
            first.and_then(|first| self.records.remove(&first));
        }
    }
}

impl Count {
    fn expire(&mut self, now: Instant) {
        if self.until.is_some_and(|until| now.saturating_duration_since(until) >= REMEMBERED) {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u16) -> PeerId {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        PeerId::from_public_key(key)
    }

    #[test]
    fn waits_double_up_to_a_bound_of_their_kind() {
        for (fault, milliseconds) in [
            (Fault::Busy, [100, 200, 400, 800, 1500, 1500]),
            (Fault::Unreachable, [1000, 2000, 4000, 8000, 16_000, 32_000]),
            (Fault::Lied, [600_000, 1_200_000, 2_400_000, 4_800_000, 7_200_000, 7_200_000]),
        ] {
            let (mut trust, now) = (Trust::default(), Instant::now());
            let waits = milliseconds.map(|_| (trust.fault(peer(1), fault, now, 1.0) - now).as_millis());
            assert_eq!(waits, milliseconds, "{fault:?}");
            let mut fresh = Trust::default();
            assert_eq!(fresh.fault(peer(1), fault, now, 0.0) - now, Duration::from_millis(milliseconds[0] as u64) / 2);
        }
    }

    #[test]
    fn the_good_come_before_the_troubled_and_liars_last_until_their_time_is_up() {
        let (mut trust, now) = (Trust::default(), Instant::now());
        let until = trust.fault(peer(1), Fault::Lied, now, 1.0);
        trust.fault(peer(2), Fault::Stalled, now, 1.0);
        trust.fault(peer(2), Fault::Unreachable, now, 1.0);
        trust.fault(peer(3), Fault::StoreFailed, now, 1.0);
        trust.fault(peer(4), Fault::Busy, now, 1.0);
        let order = |trust: &Trust, now| {
            let mut peers = [1, 2, 3, 4, 5];
            peers.sort_by_key(|number| trust.standing(peer(*number), now));
            peers
        };
        assert_eq!(order(&trust, now), [4, 5, 3, 2, 1], "to be busy is no shame");
        assert_eq!(order(&trust, until), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn who_is_busy_is_not_asked_before_its_time() {
        let (mut trust, now) = (Trust::default(), Instant::now());
        let until = trust.fault(peer(1), Fault::Busy, now, 1.0);
        assert_eq!(trust.not_before(peer(1), now), Some(until));
        assert_eq!(trust.not_before(peer(1), until), None);
        trust.fault(peer(2), Fault::Lied, now, 1.0);
        assert_eq!(trust.not_before(peer(2), now), None, "nobody else may hold it");
    }

    #[test]
    fn to_serve_makes_up_for_everything_but_a_lie() {
        let (mut trust, now) = (Trust::default(), Instant::now());
        for fault in [Fault::Busy, Fault::Unreachable] {
            trust.fault(peer(1), fault, now, 1.0);
        }
        trust.served(peer(1));
        assert_eq!((trust.standing(peer(1), now), trust.not_before(peer(1), now)), (Standing::Good, None));
        assert!(trust.records.is_empty());
        trust.fault(peer(1), Fault::Lied, now, 1.0);
        trust.served(peer(1));
        assert_eq!(trust.standing(peer(1), now), Standing::Lying);
    }

    #[test]
    fn an_old_fault_makes_no_new_one_worse() {
        let (mut trust, now) = (Trust::default(), Instant::now());
        let until = trust.fault(peer(1), Fault::Unreachable, now, 1.0);
        let soon = until + REMEMBERED / 2;
        assert_eq!(trust.fault(peer(1), Fault::Unreachable, soon, 1.0) - soon, Duration::from_secs(2));
        let late = soon + 2 * REMEMBERED;
        assert_eq!(trust.fault(peer(1), Fault::Unreachable, late, 1.0) - late, Duration::from_secs(1));
    }

    #[test]
    fn records_are_bounded_and_those_whose_time_is_up_first_go() {
        let (mut trust, now) = (Trust::default(), Instant::now());
        trust.fault(peer(0), Fault::Lied, now, 1.0);
        for number in 1..=MAX_RECORDS as u16 {
            trust.fault(peer(number), Fault::Unreachable, now + Duration::from_millis(number.into()), 1.0);
        }
        assert_eq!(trust.records.len(), MAX_RECORDS);
        assert_eq!(trust.standing(peer(0), now), Standing::Lying);
        assert!(!trust.records.contains_key(&peer(1)));
    }
}
