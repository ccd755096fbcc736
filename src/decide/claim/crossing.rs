//! Who brings an image into a zone: one node fetches it from other zones, the rest of its zone takes the pieces from that one while it
//! downloads.
//!
//! Members of a zone that are known to be fetching are ranked by rendezvous hash. Everybody begins as if it were the first, because a lone
//! fetcher must not wait; who learns of a better one stops. Progress is the truth: when nothing comes from its own zone for a while, the next rank
//! begins again, whatever any Lease says. Without an API server the ranks alone decide.

use std::time::{Duration, Instant};

use crate::decide::plan::rendezvous;
use crate::model::{PeerId, Zone};
use crate::oci::Digest;

/// After so long without anything from its own zone the second rank begins again, and each further one later by [`PER_RANK`]. A pause of three
/// seconds has another reason than a queue or a lost packet.
const STALLED: Duration = Duration::from_secs(3);
const PER_RANK: Duration = Duration::from_secs(1);

/// As many try. The others wait until something is badly wrong: the first three are known to be fetching and bring nothing.
const MAX_TRIES: usize = 3;
const BADLY_WRONG: Duration = Duration::from_secs(30);

/// How long a node crosses before it claims to: until everybody has heard who else began when it did. Then one in each zone writes.
const SETTLED: Duration = Duration::from_secs(3);

/// How often a claim is renewed: it holds for 15 s, and an API server's answer may take some.
pub const RENEW: Duration = Duration::from_secs(10);

/// What the Lease is named after that says who brings this image into this zone.
pub fn zone_claim(digest: Digest, zone: &Zone) -> Digest {
    Digest::of(&[digest.as_bytes().as_slice(), zone.as_str().as_bytes()].concat())
}

/// Whether this node crosses zones for one image.
#[derive(Debug)]
pub struct Crossing {
    me: PeerId,
    claim: Digest,
    /// Those of its zone, but this node, that are fetching the image.
    fetching: Vec<PeerId>,
    /// How many of them rank before this node.
    before: usize,
    /// Whom the Lease names, if that is not this node.
    holder: Option<PeerId>,
    is_holder: bool,
    /// When something came from its own zone, or it began.
    moved: Instant,
    /// Since when it crosses.
    since: Option<Instant>,
    /// When it last tried to write the Lease.
    tried: Option<Instant>,
}

impl Crossing {
    /// This node begins to fetch, and crosses until it learns of a better one. `claim` is [`zone_claim`].
    pub fn new(me: PeerId, claim: Digest, now: Instant) -> Self {
        Self {
            me,
            claim,
            fetching: Vec::new(),
            before: 0,
            holder: None,
            is_holder: false,
            moved: now,
            since: Some(now),
            tried: None,
        }
    }

    /// Who of its own zone is known to be fetching the image now; takes the place of what was known.
    pub fn learn(&mut self, fetching: &[PeerId], now: Instant) {
        let mine = rendezvous(&[self.me], self.claim);
        self.fetching = fetching.iter().copied().filter(|peer| *peer != self.me).collect();
        self.before = self.fetching.iter().filter(|peer| rendezvous(&[**peer], self.claim) < mine).count();
        self.look(now);
    }

    /// Something came from its own zone.
    pub fn came(&mut self, now: Instant) {
        self.moved = self.moved.max(now);
        self.look(now);
    }

    /// What the Lease says, read or written: who holds it, as far as it is a peer that is known.
    pub fn claimed(&mut self, holder: Option<PeerId>, now: Instant) {
        self.is_holder = holder == Some(self.me);
        self.holder = holder.filter(|peer| *peer != self.me);
        self.tried(now);
        self.look(now);
    }

    /// The API server did not answer; it is tried again later.
    pub fn tried(&mut self, now: Instant) {
        self.tried = Some(now);
    }

    /// Whether peers of other zones may be asked.
    pub fn may_cross(&mut self, now: Instant) -> bool {
        self.look(now);
        self.since.is_some()
    }

    /// When that changes though nothing happens.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.since.is_some() { None } else { self.begins_at() }
    }

    /// When the Lease is to be read, and taken or renewed if it is free or ours; nothing while this node does not cross.
    pub fn claims_at(&self) -> Option<Instant> {
        let settled = self.since? + SETTLED;
        Some(self.tried.map_or(settled, |tried| settled.max(tried + RENEW)))
    }

    fn look(&mut self, now: Instant) {
        let may = self.begins_at().is_none_or(|at| at <= now);
        self.since = if may { self.since.or(Some(now)) } else { None };
    }

    /// From when on it crosses unless something comes; nothing when it does anyway.
    fn begins_at(&self) -> Option<Instant> {
        let rank = self.rank();
        let further = |from: usize| PER_RANK.saturating_mul(u32::try_from(rank - from).unwrap_or(u32::MAX));
        match rank {
            0 => None,
            _ if rank < MAX_TRIES => Some(self.moved + STALLED + further(1)),
            _ => Some(self.moved + BADLY_WRONG + further(MAX_TRIES)),
        }
    }

    /// The one that the Lease names ranks first while it is known to be fetching.
    fn rank(&self) -> usize {
        let is_led = self.holder.is_some_and(|holder| self.fetching.contains(&holder));
        match (self.is_holder, is_led) {
            (true, _) => 0,
            (false, true) => self.before.max(1),
            (false, false) => self.before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_public_key([n; 32])
    }

    fn claim() -> Digest {
        zone_claim(Digest::of(b"image"), &"z1".to_owned().try_into().unwrap())
    }

    /// Ten peers as they rank.
    fn ranked() -> Vec<PeerId> {
        let mut peers: Vec<_> = (0..10).map(peer).collect();
        peers.sort_by_key(|peer| rendezvous(&[*peer], claim()));
        peers
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn who_fetches_alone_crosses_at_once_and_claims_it_in_time() {
        let now = Instant::now();
        let mut alone = Crossing::new(peer(1), claim(), now);
        assert!(alone.may_cross(now));
        assert_eq!((alone.wake_at(), alone.claims_at()), (None, Some(now + seconds(3))));
        alone.claimed(Some(peer(1)), now + seconds(3));
        assert_eq!(alone.claims_at(), Some(now + seconds(13)));
    }

    #[test]
    fn one_of_a_zone_crosses_and_the_next_two_when_nothing_comes() {
        let (now, ranked) = (Instant::now(), ranked());
        let crossing_after = |time: Duration| -> Vec<usize> {
            let crosses = |me: &PeerId| {
                let mut one = Crossing::new(*me, claim(), now);
                one.learn(&ranked, now);
                one.may_cross(now + time)
            };
            (0..10).filter(|rank| crosses(&ranked[*rank])).collect()
        };
        assert_eq!(crossing_after(seconds(0)), [0]);
        assert_eq!(crossing_after(Duration::from_millis(2999)), [0]);
        assert_eq!(crossing_after(seconds(3)), [0, 1]);
        assert_eq!(crossing_after(seconds(4)), [0, 1, 2]);
        assert_eq!(crossing_after(seconds(29)), [0, 1, 2]);
        assert_eq!(crossing_after(seconds(31)), [0, 1, 2, 3, 4], "no recovery waits for ever");
    }

    #[test]
    fn who_tries_stops_when_something_comes_from_its_zone() {
        let (now, ranked) = (Instant::now(), ranked());
        let mut second = Crossing::new(ranked[1], claim(), now);
        second.learn(&ranked, now);
        assert_eq!((second.may_cross(now), second.claims_at()), (false, None));
        assert_eq!(second.wake_at(), Some(now + seconds(3)));
        assert!(second.may_cross(now + seconds(3)));
        second.came(now + seconds(4));
        assert!(!second.may_cross(now + seconds(4)));
        assert_eq!(second.wake_at(), Some(now + seconds(7)));
    }

    #[test]
    fn a_rank_rises_when_a_better_one_is_gone() {
        let (now, ranked) = (Instant::now(), ranked());
        let mut third = Crossing::new(ranked[2], claim(), now);
        third.learn(&ranked, now);
        assert!(!third.may_cross(now));
        third.learn(&ranked[2..], now);
        assert!(third.may_cross(now));
    }

    #[test]
    fn whom_the_lease_names_goes_first_as_long_as_it_fetches() {
        let (now, ranked) = (Instant::now(), ranked());
        let mut first = Crossing::new(ranked[0], claim(), now);
        first.learn(&ranked, now);
        first.claimed(Some(ranked[5]), now);
        assert!(!first.may_cross(now));
        first.learn(&ranked[..5], now);
        assert!(first.may_cross(now));
        let mut sixth = Crossing::new(ranked[5], claim(), now);
        sixth.claimed(Some(ranked[5]), now);
        sixth.learn(&ranked, now);
        assert!(sixth.may_cross(now));
    }
}
