//! Recent faults of peers, and the order of requests that follows from these faults.
//!
//! No peer is excluded: a bad sector is no reason to lose blobs that only this peer has, and all
//! content is verified. Not here: whether a peer is admitted, and which peers have a blob.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::model::PeerId;
use crate::util::backoff::Backoff;

/// A fault of a peer, or a failure on the way to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerFault {
    /// The peer sent wrong content or broke the protocol.
    Lied,
    /// The peer serves as many requests as it can.
    Busy,
    /// The peer cannot be reached, or rejects this agent.
    Unreachable,
    /// The peer stopped sending.
    Stalled,
    /// The peer cannot read its own content.
    StoreFailed,
}

impl PeerFault {
    /// The label in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Lied => "lied",
            Self::Busy => "busy",
            Self::Unreachable => "unreachable",
            Self::Stalled => "stalled",
            Self::StoreFailed => "store_failed",
        }
    }

    fn ban_kind(self) -> BanKind {
        match self {
            Self::Lied => BanKind::Lying,
            Self::Busy => BanKind::Busy,
            Self::Unreachable | Self::Stalled | Self::StoreFailed => BanKind::Troubled,
        }
    }

    fn backoff(self) -> Backoff {
        let (first, longest) = match self.ban_kind() {
            // A bad sector stays bad, and a lying peer lies on. A replaced disk is noticed within
            // two hours.
            BanKind::Lying => (Duration::from_secs(600), Duration::from_secs(7200)),
            // A blob of a few MiB takes a moment, and a free upload slot has to be used soon.
            BanKind::Busy => (Duration::from_millis(100), Duration::from_millis(1500)),
            // As the recovery queue's waits after a failure.
            BanKind::Troubled => (Duration::from_secs(1), Duration::from_secs(300)),
        };
        Backoff { first, longest }
    }
}

/// Faults that share one kind of wait.
#[derive(Debug, Clone, Copy)]
enum BanKind {
    Lying,
    Busy,
    Troubled,
}

/// The rank of a peer among others; the least is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// The peer has no fault.
    Good,
    /// The peer had a failure; the time says when the failure may be over.
    Troubled(Instant),
    /// The peer sent wrong content. A whole blob is downloaded before the next lie shows.
    Lying,
}

/// The faults of all peers.
#[derive(Debug, Default)]
pub struct PeerFaults {
    counts: HashMap<PeerId, [FaultCount; 3]>,
}

#[derive(Debug, Clone, Copy, Default)]
struct FaultCount {
    times: u32,
    until: Option<Instant>,
}

/// Most peers with faults. A cluster has 5000 nodes, each of which may have lost its key once.
/// Beyond this number, the records that end first are evicted.
const MAX_PEERS: usize = 10_000;

/// Time after a wait in which the earlier faults still lengthen the next wait.
const FAULT_LIFE: Duration = Duration::from_secs(3600);

impl PeerFaults {
    /// Records a fault, and returns the end of its wait. `jitter` in 0..1 spreads the waits of many
    /// agents.
    pub fn record_fault(&mut self, peer: PeerId, fault: PeerFault, now: Instant, jitter: f64) -> Instant {
        if !self.counts.contains_key(&peer) {
            self.evict_expired(now);
        }
        let count = &mut self.counts.entry(peer).or_default()[fault.ban_kind() as usize];
        count.expire(now);
        let until = now + fault.backoff().jittered_wait(count.times, jitter);
        *count = FaultCount { times: count.times.saturating_add(1), until: Some(until) };
        until
    }

    /// Clears all faults of a peer that served a blob, except a lie: a disk with one bad sector
    /// serves all other blobs.
    pub fn record_success(&mut self, peer: PeerId) {
        if let Some(record) = self.counts.get_mut(&peer) {
            record[BanKind::Busy as usize] = FaultCount::default();
            record[BanKind::Troubled as usize] = FaultCount::default();
            if record.iter().all(|count| count.until.is_none()) {
                self.counts.remove(&peer);
            }
        }
    }

    /// The peer's rank now.
    pub fn standing(&self, peer: PeerId, now: Instant) -> Standing {
        if self.ban_end(peer, BanKind::Lying, now).is_some() {
            return Standing::Lying;
        }
        self.ban_end(peer, BanKind::Troubled, now).map_or(Standing::Good, Standing::Troubled)
    }

    /// The end of a busy peer's wait. A request before then is useless.
    pub fn busy_until(&self, peer: PeerId, now: Instant) -> Option<Instant> {
        self.ban_end(peer, BanKind::Busy, now)
    }

    fn ban_end(&self, peer: PeerId, kind: BanKind, now: Instant) -> Option<Instant> {
        self.counts.get(&peer)?[kind as usize].until.filter(|until| *until > now)
    }

    fn evict_expired(&mut self, now: Instant) {
        if self.counts.len() < MAX_PEERS {
            return;
        }
        self.counts.retain(|_, record| {
            record.iter_mut().for_each(|count| count.expire(now));
            record.iter().any(|count| count.until.is_some())
        });
        if self.counts.len() >= MAX_PEERS {
            let last = |record: &[FaultCount; 3]| record.iter().filter_map(|count| count.until).max();
            let first = self.counts.iter().min_by_key(|(_, record)| last(record)).map(|(peer, _)| *peer);
            first.and_then(|first| self.counts.remove(&first));
        }
    }
}

impl FaultCount {
    fn expire(&mut self, now: Instant) {
        if self.until.is_some_and(|until| now.saturating_duration_since(until) >= FAULT_LIFE) {
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
            (PeerFault::Busy, [100, 200, 400, 800, 1500, 1500]),
            (PeerFault::Unreachable, [1000, 2000, 4000, 8000, 16_000, 32_000]),
            (PeerFault::Lied, [600_000, 1_200_000, 2_400_000, 4_800_000, 7_200_000, 7_200_000]),
        ] {
            let (mut faults, now) = (PeerFaults::default(), Instant::now());
            let waits = milliseconds.map(|_| (faults.record_fault(peer(1), fault, now, 1.0) - now).as_millis());
            assert_eq!(waits, milliseconds, "{fault:?}");
            let mut fresh = PeerFaults::default();
            assert_eq!(
                fresh.record_fault(peer(1), fault, now, 0.0) - now,
                Duration::from_millis(milliseconds[0] as u64) / 2
            );
        }
    }

    #[test]
    fn good_peers_come_before_troubled_peers_and_lying_peers_come_last_until_their_ban_ends() {
        let (mut faults, now) = (PeerFaults::default(), Instant::now());
        let until = faults.record_fault(peer(1), PeerFault::Lied, now, 1.0);
        faults.record_fault(peer(2), PeerFault::Stalled, now, 1.0);
        faults.record_fault(peer(2), PeerFault::Unreachable, now, 1.0);
        faults.record_fault(peer(3), PeerFault::StoreFailed, now, 1.0);
        faults.record_fault(peer(4), PeerFault::Busy, now, 1.0);
        let order = |faults: &PeerFaults, now| {
            let mut peers = [1, 2, 3, 4, 5];
            peers.sort_by_key(|number| faults.standing(peer(*number), now));
            peers
        };
        assert_eq!(order(&faults, now), [4, 5, 3, 2, 1], "a busy peer keeps its rank");
        assert_eq!(order(&faults, until), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_busy_peer_gets_no_request_before_its_wait_ends() {
        let (mut faults, now) = (PeerFaults::default(), Instant::now());
        let until = faults.record_fault(peer(1), PeerFault::Busy, now, 1.0);
        assert_eq!(faults.busy_until(peer(1), now), Some(until));
        assert_eq!(faults.busy_until(peer(1), until), None);
        faults.record_fault(peer(2), PeerFault::Lied, now, 1.0);
        assert_eq!(faults.busy_until(peer(2), now), None, "a lying peer may be the only provider");
    }

    #[test]
    fn a_served_blob_clears_all_faults_but_a_lie() {
        let (mut faults, now) = (PeerFaults::default(), Instant::now());
        for fault in [PeerFault::Busy, PeerFault::Unreachable] {
            faults.record_fault(peer(1), fault, now, 1.0);
        }
        faults.record_success(peer(1));
        assert_eq!((faults.standing(peer(1), now), faults.busy_until(peer(1), now)), (Standing::Good, None));
        assert!(faults.counts.is_empty());
        faults.record_fault(peer(1), PeerFault::Lied, now, 1.0);
        faults.record_success(peer(1));
        assert_eq!(faults.standing(peer(1), now), Standing::Lying);
    }

    #[test]
    fn an_old_fault_does_not_lengthen_a_new_wait() {
        let (mut faults, now) = (PeerFaults::default(), Instant::now());
        let until = faults.record_fault(peer(1), PeerFault::Unreachable, now, 1.0);
        let soon = until + FAULT_LIFE / 2;
        assert_eq!(faults.record_fault(peer(1), PeerFault::Unreachable, soon, 1.0) - soon, Duration::from_secs(2));
        let late = soon + 2 * FAULT_LIFE;
        assert_eq!(faults.record_fault(peer(1), PeerFault::Unreachable, late, 1.0) - late, Duration::from_secs(1));
    }

    #[test]
    fn records_are_bounded_and_the_record_that_ends_first_is_evicted() {
        let (mut faults, now) = (PeerFaults::default(), Instant::now());
        faults.record_fault(peer(0), PeerFault::Lied, now, 1.0);
        for number in 1..=MAX_PEERS as u16 {
            faults.record_fault(peer(number), PeerFault::Unreachable, now + Duration::from_millis(number.into()), 1.0);
        }
        assert_eq!(faults.counts.len(), MAX_PEERS);
        assert_eq!(faults.standing(peer(0), now), Standing::Lying);
        assert!(!faults.counts.contains_key(&peer(1)));
    }
}
