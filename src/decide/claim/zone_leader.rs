//! Zone leader: the node of a zone that fetches an image from other zones. The rest of the zone
//! takes the pieces from the zone leader during its download.
//!
//! The members of a zone that fetch the image are ranked by rendezvous hash. Each node begins as
//! the zone leader, because a lone fetcher must not wait, and stops when a better-ranked node
//! fetches too. Progress overrides ranks: without pieces from the zone for a while, the next rank
//! leads as well, whatever the Lease says. Without an API server the ranks alone decide.

use std::time::{Duration, Instant};

use crate::decide::plan::rendezvous;
use crate::model::{PeerId, Zone};
use crate::oci::Digest;

/// Time without progress from the zone after which the second rank leads too; each later rank waits
/// [`DELAY_PER_RANK`] longer. Queues and lost packets cause pauses of less than three seconds.
const TAKEOVER_DELAY: Duration = Duration::from_secs(3);
const DELAY_PER_RANK: Duration = Duration::from_secs(1);

/// Ranks that take over after [`TAKEOVER_DELAY`]. Later ranks wait for [`LAST_RESORT_DELAY`], which
/// passes only when the first three fetch and make no progress.
const MAX_LEADERS: usize = 3;
const LAST_RESORT_DELAY: Duration = Duration::from_secs(30);

/// Delay from the start of leading to the claim. By then gossip has announced every other node that
/// began at the same time, so one node per zone writes.
const CLAIM_DELAY: Duration = Duration::from_secs(3);

/// Renewal interval of a claim: the claim lasts 15 s, and an answer of the API server takes some of
/// them.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(10);

/// Names the Lease of the zone leader for this image and zone.
pub fn zone_claim(digest: Digest, zone: &Zone) -> Digest {
    Digest::of(&[digest.as_bytes().as_slice(), zone.as_str().as_bytes()].concat())
}

/// Whether this node is the zone leader for one image.
#[derive(Debug)]
pub struct ZoneLeader {
    me: PeerId,
    claim: Digest,
    /// Other nodes of the zone that fetch the image.
    fetching: Vec<PeerId>,
    /// Nodes of `fetching` that rank before this node.
    better_ranked: usize,
    /// Holder of the Lease, if another node.
    claim_holder: Option<PeerId>,
    is_claim_holder: bool,
    /// The last progress from the zone, or the start.
    last_progress: Instant,
    /// `None` while this node does not lead.
    leading_since: Option<Instant>,
    /// The last attempt to write the Lease.
    last_attempt: Option<Instant>,
}

impl ZoneLeader {
    /// This node begins to fetch, and leads until a better-ranked node fetches too. `claim` is
    /// [`zone_claim`].
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

    /// Replaces the nodes of the zone that fetch the image.
    pub fn set_fetching(&mut self, fetching: &[PeerId], now: Instant) {
        let mine = rendezvous(&[self.me], self.claim);
        self.fetching = fetching.iter().copied().filter(|peer| *peer != self.me).collect();
        self.better_ranked = self.fetching.iter().filter(|peer| rendezvous(&[**peer], self.claim) < mine).count();
        self.update(now);
    }

    /// A piece came from the zone.
    pub fn record_zone_progress(&mut self, now: Instant) {
        self.last_progress = self.last_progress.max(now);
        self.update(now);
    }

    /// Records the Lease's holder, as read or written; `None` for an unknown peer.
    pub fn record_claim_holder(&mut self, holder: Option<PeerId>, now: Instant) {
        self.is_claim_holder = holder == Some(self.me);
        self.claim_holder = holder.filter(|peer| *peer != self.me);
        self.record_claim_attempt(now);
        self.update(now);
    }

    /// Records an attempt without an answer of the API server; the next one follows after
    /// [`RENEW_INTERVAL`].
    pub fn record_claim_attempt(&mut self, now: Instant) {
        self.last_attempt = Some(now);
    }

    /// Whether peers of other zones may get requests.
    pub fn update_is_leading(&mut self, now: Instant) -> bool {
        self.update(now);
        self.leading_since.is_some()
    }

    /// When this node begins to lead without another event.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.leading_since.is_some() { None } else { self.leads_at() }
    }

    /// When to read the Lease, and to take or renew a free or own one; `None` while not leading.
    pub fn claim_due(&self) -> Option<Instant> {
        let settled = self.leading_since? + CLAIM_DELAY;
        Some(self.last_attempt.map_or(settled, |tried| settled.max(tried + RENEW_INTERVAL)))
    }

    fn update(&mut self, now: Instant) {
        let is_leading = self.leads_at().is_none_or(|at| at <= now);
        self.leading_since = if is_leading { self.leading_since.or(Some(now)) } else { None };
    }

    /// When this node begins to lead without progress; `None` for the first rank, which always
    /// leads.
    fn leads_at(&self) -> Option<Instant> {
        let rank = self.rank();
        let further = |from: usize| DELAY_PER_RANK.saturating_mul(u32::try_from(rank - from).unwrap_or(u32::MAX));
        match rank {
            0 => None,
            _ if rank < MAX_LEADERS => Some(self.last_progress + TAKEOVER_DELAY + further(1)),
            _ => Some(self.last_progress + LAST_RESORT_DELAY + further(MAX_LEADERS)),
        }
    }

    /// The Lease's holder ranks first while fetching the image.
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

    /// Ten peers, best rank first.
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
        let leading_after = |time: Duration| -> Vec<usize> {
            let leads = |me: &PeerId| {
                let mut leader = ZoneLeader::new(*me, claim(), now);
                leader.set_fetching(&ranked, now);
                leader.update_is_leading(now + time)
            };
            (0..10).filter(|rank| leads(&ranked[*rank])).collect()
        };
        assert_eq!(leading_after(seconds(0)), [0]);
        assert_eq!(leading_after(Duration::from_millis(2999)), [0]);
        assert_eq!(leading_after(seconds(3)), [0, 1]);
        assert_eq!(leading_after(seconds(4)), [0, 1, 2]);
        assert_eq!(leading_after(seconds(29)), [0, 1, 2]);
        assert_eq!(leading_after(seconds(31)), [0, 1, 2, 3, 4], "no recovery waits forever");
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
