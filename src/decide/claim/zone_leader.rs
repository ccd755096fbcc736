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

/// After so long without anything from its own zone the second rank begins again, and each further one later by [`DELAY_PER_RANK`]. A pause of three
/// seconds has another reason than a queue or a lost packet.
const TAKEOVER_DELAY: Duration = Duration::from_secs(3);
const DELAY_PER_RANK: Duration = Duration::from_secs(1);

/// As many try. The others wait until something is badly wrong: the first three are known to be fetching and bring nothing.
const MAX_LEADERS: usize = 3;
const LAST_RESORT_DELAY: Duration = Duration::from_secs(30);

/// How long a node crosses before it claims to: until everybody has heard who else began when it did. Then one in each zone writes.
const CLAIM_DELAY: Duration = Duration::from_secs(3);

/// How often a claim is renewed: it holds for 15 s, and an API server's answer may take some.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(10);

/// What the Lease is named after that says who brings this image into this zone.
pub fn zone_claim(digest: Digest, zone: &Zone) -> Digest {
    Digest::of(&[digest.as_bytes().as_slice(), zone.as_str().as_bytes()].concat())
}

/// Whether this node crosses zones for one image.
#[derive(Debug)]
pub struct ZoneLeader {
    me: PeerId,
    claim: Digest,
    /// Those of its zone, but this node, that are fetching the image.
    fetching: Vec<PeerId>,
    /// How many of them rank before this node.
    better_ranked: usize,
    /// Whom the Lease names, if that is not this node.
    claim_holder: Option<PeerId>,
    is_claim_holder: bool,
    /// When something came from its own zone, or it began.
    last_progress: Instant,
    /// Since when it crosses.
    leading_since: Option<Instant>,
    /// When it last tried to write the Lease.
    last_attempt: Option<Instant>,
}

impl ZoneLeader {
    /// This node begins to fetch, and crosses until it learns of a better one. `claim` is [`zone_claim`].
    pub fn new(me: PeerId, claim: Digest, now: Instant) -> Self {
        Self {
            me,
            claim,
            fetching: Vec::new(),
            better_ranked: 0,
            claim_holder: None,
            is_claim_holder: false,
            last_progress: now,
            leading_since: Some(now),
            last_attempt: None,
        }
    }

    /// Who of its own zone is known to be fetching the image now; takes the place of what was known.
    pub fn set_fetching(&mut self, fetching: &[PeerId], now: Instant) {
        let mine = rendezvous(&[self.me], self.claim);
        self.fetching = fetching.iter().copied().filter(|peer| *peer != self.me).collect();
        self.better_ranked = self.fetching.iter().filter(|peer| rendezvous(&[**peer], self.claim) < mine).count();
        self.update(now);
    }

    /// Something came from its own zone.
    pub fn record_zone_progress(&mut self, now: Instant) {
        self.last_progress = self.last_progress.max(now);
        self.update(now);
    }

    /// What the Lease says, read or written: who holds it, as far as it is a peer that is known.
    pub fn record_claim_holder(&mut self, holder: Option<PeerId>, now: Instant) {
        self.is_claim_holder = holder == Some(self.me);
        self.claim_holder = holder.filter(|peer| *peer != self.me);
        self.record_claim_attempt(now);
        self.update(now);
    }

    /// The API server did not answer; it is tried again later.
    pub fn record_claim_attempt(&mut self, now: Instant) {
        self.last_attempt = Some(now);
    }

    /// Whether peers of other zones may be asked.
    pub fn update_is_leading(&mut self, now: Instant) -> bool {
        self.update(now);
        self.leading_since.is_some()
    }

    /// When that changes though nothing happens.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.leading_since.is_some() { None } else { self.leads_at() }
    }

    /// When the Lease is to be read, and taken or renewed if it is free or ours; nothing while this node does not cross.
    pub fn claim_due(&self) -> Option<Instant> {
        let settled = self.leading_since? + CLAIM_DELAY;
        Some(self.last_attempt.map_or(settled, |tried| settled.max(tried + RENEW_INTERVAL)))
    }

    fn update(&mut self, now: Instant) {
        let may = self.leads_at().is_none_or(|at| at <= now);
        self.leading_since = if may { self.leading_since.or(Some(now)) } else { None };
    }

    /// From when on it crosses unless something comes; nothing when it does anyway.
    fn leads_at(&self) -> Option<Instant> {
        let rank = self.rank();
        let further = |from: usize| DELAY_PER_RANK.saturating_mul(u32::try_from(rank - from).unwrap_or(u32::MAX));
        match rank {
            0 => None,
            _ if rank < MAX_LEADERS => Some(self.last_progress + TAKEOVER_DELAY + further(1)),
            _ => Some(self.last_progress + LAST_RESORT_DELAY + further(MAX_LEADERS)),
        }
    }

    /// The one that the Lease names ranks first while it is known to be fetching.
    fn rank(&self) -> usize {
        let is_led = self.claim_holder.is_some_and(|holder| self.fetching.contains(&holder));
        match (self.is_claim_holder, is_led) {
            (true, _) => 0,
            (false, true) => self.better_ranked.max(1),
            (false, false) => self.better_ranked,
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
    fn a_lone_fetcher_leads_at_once_and_claims_after_3_s() {
        let now = Instant::now();
        let mut alone = ZoneLeader::new(peer(1), claim(), now);
        assert!(alone.update_is_leading(now));
        assert_eq!((alone.wake_at(), alone.claim_due()), (None, Some(now + seconds(3))));
        alone.record_claim_holder(Some(peer(1)), now + seconds(3));
        assert_eq!(alone.claim_due(), Some(now + seconds(13)));
    }

    #[test]
    fn the_first_rank_leads_and_the_next_two_take_over_without_progress() {
        let (now, ranked) = (Instant::now(), ranked());
        let crossing_after = |time: Duration| -> Vec<usize> {
            let crosses = |me: &PeerId| {
                let mut one = ZoneLeader::new(*me, claim(), now);
                one.set_fetching(&ranked, now);
                one.update_is_leading(now + time)
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
    fn a_second_leader_stops_when_its_zone_makes_progress() {
        let (now, ranked) = (Instant::now(), ranked());
        let mut second = ZoneLeader::new(ranked[1], claim(), now);
        second.set_fetching(&ranked, now);
        assert_eq!((second.update_is_leading(now), second.claim_due()), (false, None));
        assert_eq!(second.wake_at(), Some(now + seconds(3)));
        assert!(second.update_is_leading(now + seconds(3)));
        second.record_zone_progress(now + seconds(4));
        assert!(!second.update_is_leading(now + seconds(4)));
        assert_eq!(second.wake_at(), Some(now + seconds(7)));
    }

    #[test]
    fn a_rank_rises_when_a_better_ranked_node_stops_fetching() {
        let (now, ranked) = (Instant::now(), ranked());
        let mut third = ZoneLeader::new(ranked[2], claim(), now);
        third.set_fetching(&ranked, now);
        assert!(!third.update_is_leading(now));
        third.set_fetching(&ranked[2..], now);
        assert!(third.update_is_leading(now));
    }

    #[test]
    fn the_claim_holder_leads_while_it_fetches() {
        let (now, ranked) = (Instant::now(), ranked());
        let mut first = ZoneLeader::new(ranked[0], claim(), now);
        first.set_fetching(&ranked, now);
        first.record_claim_holder(Some(ranked[5]), now);
        assert!(!first.update_is_leading(now));
        first.set_fetching(&ranked[..5], now);
        assert!(first.update_is_leading(now));
        let mut sixth = ZoneLeader::new(ranked[5], claim(), now);
        sixth.record_claim_holder(Some(ranked[5]), now);
        sixth.set_fetching(&ranked, now);
        assert!(sixth.update_is_leading(now));
    }
}
