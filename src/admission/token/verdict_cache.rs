//! Cache of verified peers. Admission accepts their expired tokens during an API-server outage, and
//! sends no repeated TokenReviews for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

use crate::credential::token::Claims;
use crate::decide::pod_keys::PodKeys;
use crate::model::{NodeName, PeerId};

/// As many peers as admission accepts: a cluster of 16 384 nodes, and the same number again that
/// returned with another key.
pub(super) const MAX_PEERS: usize = 32_768;

/// Time after which the API server reviews a rejected token again. The rejection stays in force
/// until the API server accepts the token.
const REJECTION_TTL: Duration = Duration::from_secs(60);

pub(super) struct VerdictCache {
    table: Mutex<VerdictTable>,
    /// A verdict is of use for this long after the token's expiry.
    grace: Duration,
    changed: AtomicBool,
}

#[derive(Default)]
struct VerdictTable {
    verdicts: HashMap<PeerId, PeerVerdict>,
    /// The keys of each pod, bounded: tokens of one pod for many keys do not fill the table.
    pods: PodKeys,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct PeerVerdict {
    pub(super) pod_uid: String,
    pub(super) node: Option<NodeName>,
    /// The latest expiry among the peer's tokens, since 1970.
    pub(super) expires: Duration,
    review: ReviewOutcome,
}

/// The result of the last TokenReview of a peer's pod.
#[derive(Debug, Clone, Copy, PartialEq)]
enum ReviewOutcome {
    NotReviewed,
    Accepted,
    Rejected(Instant),
}

/// Whether a token needs a TokenReview.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReviewStatus {
    /// The API server accepted a token of this pod.
    Accepted,
    /// No token of this pod was reviewed.
    NotReviewed,
    /// The API server rejected the token [`REJECTION_TTL`] or longer ago.
    RejectionExpired,
    /// The API server rejected the token within [`REJECTION_TTL`].
    Rejected,
}

impl VerdictCache {
    pub(super) fn new(stored: impl IntoIterator<Item = (PeerId, PeerVerdict)>, grace: Duration) -> Self {
        let mut table = VerdictTable::default();
        stored.into_iter().take(MAX_PEERS).for_each(|(peer, verdict)| table.insert(peer, verdict));
        Self { table: Mutex::new(table), grace, changed: AtomicBool::new(false) }
    }

    /// Whether a token with a valid signature needs a TokenReview.
    pub(super) fn review_status(&self, peer: PeerId, claims: &Claims) -> ReviewStatus {
        match self.matching(peer, claims).map(|verdict| verdict.review) {
            None | Some(ReviewOutcome::NotReviewed) => ReviewStatus::NotReviewed,
            Some(ReviewOutcome::Accepted) => ReviewStatus::Accepted,
            Some(ReviewOutcome::Rejected(at)) if at.elapsed() < REJECTION_TTL => ReviewStatus::Rejected,
            Some(ReviewOutcome::Rejected(_)) => ReviewStatus::RejectionExpired,
        }
    }

    /// Records a token with a valid signature. The result of an earlier review of the same pod
    /// stays.
    pub(super) fn record_verified(&self, peer: PeerId, claims: &Claims, now: Duration) {
        let mut table = self.lock();
        if let Some(verdict) = table.verdicts.get_mut(&peer).filter(|verdict| verdict.pod_uid == claims.pod_uid) {
            verdict.expires = verdict.expires.max(claims.expires);
            return;
        }
        // A token that another member relayed can be older than the recorded token.
        if table.verdicts.get(&peer).is_some_and(|verdict| verdict.expires > claims.expires) {
            return;
        }
        if table.verdicts.len() >= MAX_PEERS && !table.verdicts.contains_key(&peer) {
            table.retain(|verdict| verdict.expires.saturating_add(self.grace) >= now);
            if table.verdicts.len() >= MAX_PEERS {
                return;
            }
        }
        table.insert(peer, PeerVerdict::from_claims(claims));
        self.changed.store(true, Ordering::Relaxed);
    }

    /// Records the result of a review. A rejection replaces the verdict of another pod too.
    pub(super) fn record_review(&self, peer: PeerId, claims: &Claims, passed: bool) {
        let mut table = self.lock();
        let review = if passed { ReviewOutcome::Accepted } else { ReviewOutcome::Rejected(Instant::now()) };
        match table.verdicts.get_mut(&peer) {
            Some(verdict) if verdict.pod_uid == claims.pod_uid => verdict.review = review,
            Some(_) if !passed => table.insert(peer, PeerVerdict { review, ..PeerVerdict::from_claims(claims) }),
            _ => return,
        }
        // Else the stored verdict would admit the rejected peer after a kill and a restart.
        if !passed {
            self.changed.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a token of this peer and pod was verified, and the API server did not reject the
    /// pod.
    pub(super) fn is_verified(&self, peer: PeerId, claims: &Claims) -> bool {
        self.matching(peer, claims).is_some_and(|verdict| !matches!(verdict.review, ReviewOutcome::Rejected(_)))
    }

    /// The number of verified peers, about the number of other agents in the cluster.
    pub(super) fn count(&self) -> usize {
        self.lock().verdicts.len()
    }

    /// The verdicts that are of use after a restart, without rejected peers.
    pub(super) fn to_stored(&self, now: Duration) -> Vec<(PeerId, PeerVerdict)> {
        let mut table = self.lock();
        table.retain(|verdict| verdict.expires.saturating_add(self.grace) >= now);
        let good = table.verdicts.iter().filter(|(_, verdict)| !matches!(verdict.review, ReviewOutcome::Rejected(_)));
        good.map(|(peer, verdict)| (*peer, verdict.clone())).collect()
    }

    /// Whether a peer was added or rejected since the last call.
    pub(super) fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::Relaxed)
    }

    fn matching(&self, peer: PeerId, claims: &Claims) -> Option<PeerVerdict> {
        self.lock().verdicts.get(&peer).filter(|verdict| verdict.pod_uid == claims.pod_uid).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, VerdictTable> {
        self.table.lock()
    }
}

impl VerdictTable {
    fn insert(&mut self, peer: PeerId, verdict: PeerVerdict) {
        let pod = verdict.pod_uid.clone();
        if let Some(before) = self.verdicts.insert(peer, verdict).filter(|before| before.pod_uid != pod) {
            self.pods.remove(&before.pod_uid, peer);
        }
        if let Some(displaced) = self.pods.record(&pod, peer) {
            self.verdicts.remove(&displaced);
        }
    }

    fn retain(&mut self, is_kept: impl Fn(&PeerVerdict) -> bool) {
        let Self { verdicts, pods } = self;
        verdicts.retain(|peer, verdict| {
            let is_kept = is_kept(verdict);
            if !is_kept {
                pods.remove(&verdict.pod_uid, *peer);
            }
            is_kept
        });
    }
}

impl PeerVerdict {
    fn from_claims(claims: &Claims) -> Self {
        Self::new(claims.pod_uid.clone(), claims.node.clone(), claims.expires)
    }

    pub(super) fn new(pod_uid: String, node: Option<NodeName>, expires: Duration) -> Self {
        Self { pod_uid, node, expires, review: ReviewOutcome::NotReviewed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(100);

    fn peer(n: usize) -> PeerId {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&n.to_be_bytes());
        PeerId::from_public_key(key)
    }

    fn claims(pod: &str, expires: u64) -> Claims {
        let expires = Duration::from_secs(expires);
        Claims { pod_name: "agent".into(), pod_uid: pod.into(), node: None, expires }
    }

    #[test]
    fn the_verdict_cache_is_bounded_and_evicts_useless_verdicts() {
        let verdicts = VerdictCache::new([], GRACE);
        let at = Duration::from_secs;
        (0..=MAX_PEERS).for_each(|n| verdicts.record_verified(peer(n), &claims(&format!("p{n}"), 1000), at(0)));
        assert!(verdicts.take_changed() && !verdicts.take_changed());
        let last = format!("p{MAX_PEERS}");
        assert!(
            verdicts.is_verified(peer(0), &claims("p0", 1000))
                && !verdicts.is_verified(peer(MAX_PEERS), &claims(&last, 1000))
        );
        verdicts.record_verified(peer(MAX_PEERS), &claims(&last, 2000), at(1100));
        assert!(!verdicts.is_verified(peer(MAX_PEERS), &claims(&last, 2000)), "a verdict stays during grace");
        verdicts.record_verified(peer(MAX_PEERS), &claims(&last, 2000), at(1101));
        assert!(verdicts.is_verified(peer(MAX_PEERS), &claims(&last, 2000)));
        assert_eq!(verdicts.to_stored(at(1101)).len(), 1);
    }

    #[test]
    fn the_tokens_of_one_pod_for_many_keys_take_at_most_two_entries() {
        let verdicts = VerdictCache::new([], GRACE);
        verdicts.record_verified(peer(0), &claims("other", 1000), Duration::ZERO);
        (1..1000).for_each(|n| verdicts.record_verified(peer(n), &claims("stolen", 1000), Duration::ZERO));
        assert_eq!(verdicts.count(), 3);
        assert!(verdicts.is_verified(peer(0), &claims("other", 1000)));
        assert_eq!(verdicts.to_stored(Duration::from_secs(1101)).len(), 0);
        verdicts.record_verified(peer(1), &claims("stolen", 2000), Duration::ZERO);
        verdicts.record_verified(peer(2), &claims("stolen", 2000), Duration::ZERO);
        assert_eq!(verdicts.count(), 2, "an expired verdict does not count for its pod");
    }

    #[test]
    fn a_later_pod_replaces_an_earlier_pod_and_not_the_other_way_round() {
        let verdicts = VerdictCache::new([], GRACE);
        for (pod, expires) in [("second", 2000), ("first", 1000), ("second", 1500)] {
            verdicts.record_verified(peer(1), &claims(pod, expires), Duration::ZERO);
        }
        assert!(
            verdicts.is_verified(peer(1), &claims("second", 0)) && !verdicts.is_verified(peer(1), &claims("first", 0))
        );
        assert_eq!(verdicts.to_stored(Duration::ZERO)[0].1.expires, Duration::from_secs(2000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejection_expires_after_a_minute_and_is_not_stored() {
        let (verdicts, claims) = (VerdictCache::new([], GRACE), claims("p", 1000));
        assert_eq!(verdicts.review_status(peer(1), &claims), ReviewStatus::NotReviewed);
        verdicts.record_verified(peer(1), &claims, Duration::ZERO);
        assert_eq!(verdicts.review_status(peer(1), &claims), ReviewStatus::NotReviewed);
        assert!(verdicts.take_changed());
        verdicts.record_review(peer(1), &claims, false);
        assert!(verdicts.take_changed(), "the next write removes the stored verdict");
        assert_eq!(verdicts.review_status(peer(1), &claims), ReviewStatus::Rejected);
        assert!(!verdicts.is_verified(peer(1), &claims) && verdicts.to_stored(Duration::ZERO).is_empty());
        tokio::time::advance(REJECTION_TTL).await;
        assert_eq!(verdicts.review_status(peer(1), &claims), ReviewStatus::RejectionExpired);
        verdicts.record_review(peer(1), &claims, true);
        assert_eq!(verdicts.review_status(peer(1), &claims), ReviewStatus::Accepted);
    }
}
