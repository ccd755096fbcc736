//! The peers that this agent found good by itself: what it takes their expired tokens for in an outage, and what need not be asked again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::credential::token::Claims;
use crate::decide::pod_keys::PodKeys;
use crate::model::{NodeName, PeerId};

/// As many as the door lets in: a cluster of 16 384 nodes, and as many again that came back with another
/// key.
pub(super) const MOST: usize = 32_768;

/// A refusal by the API server is asked for again after this; until then, and while nobody answers, it stands.
const AGAIN: Duration = Duration::from_secs(60);

pub(super) struct Verdicts {
    table: Mutex<Table>,
    /// How long one is of use after its end.
    grace: Duration,
    changed: AtomicBool,
}

#[derive(Default)]
struct Table {
    verdicts: HashMap<PeerId, Verdict>,
    /// The keys of each pod. One pod's tokens for key after key do not fill the table.
    pods: PodKeys,
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Verdict {
    pub(super) pod_uid: String,
    pub(super) node: Option<NodeName>,
    /// When the token ends, since 1970; of several the last.
    pub(super) until: Duration,
    review: Review,
}

/// What the API server itself said about a peer's pod.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Review {
    NotAsked,
    Passed,
    Refused(Instant),
}

/// Whether the API server is to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// It was, and said yes.
    No,
    /// It was not.
    Yes,
    /// It said no, a while ago.
    Again,
    /// It said no.
    Refused,
}

impl Verdicts {
    pub(super) fn new(kept: impl IntoIterator<Item = (PeerId, Verdict)>, grace: Duration) -> Self {
        let mut table = Table::default();
        kept.into_iter().take(MOST).for_each(|(peer, verdict)| table.insert(peer, verdict));
        Self { table: Mutex::new(table), grace, changed: AtomicBool::new(false) }
    }

    /// Whether the API server has to be asked about a good token.
    pub(super) fn to_ask(&self, peer: PeerId, claims: &Claims) -> Ask {
        match self.of(peer, claims).map(|verdict| verdict.review) {
            None | Some(Review::NotAsked) => Ask::Yes,
            Some(Review::Passed) => Ask::No,
            Some(Review::Refused(at)) if at.elapsed() < AGAIN => Ask::Refused,
            Some(Review::Refused(_)) => Ask::Again,
        }
    }

    /// Remembers a good token. What the API server said about the same pod stays.
    pub(super) fn remember(&self, peer: PeerId, claims: &Claims, now: Duration) {
        let mut table = self.lock();
        if let Some(known) = table.verdicts.get_mut(&peer).filter(|known| known.pod_uid == claims.pod_uid) {
            known.until = known.until.max(claims.expires);
            return;
        }
        // One that another member relayed may be older than what is known.
        if table.verdicts.get(&peer).is_some_and(|known| known.until > claims.expires) {
            return;
        }
        if table.verdicts.len() >= MOST && !table.verdicts.contains_key(&peer) {
            table.retain(|verdict| verdict.until.saturating_add(self.grace) >= now);
            if table.verdicts.len() >= MOST {
                return;
            }
        }
        table.insert(peer, Verdict::of(claims));
        self.changed.store(true, Ordering::Relaxed);
    }

    /// Remembers what the API server said. A no goes before whatever was known of the peer.
    pub(super) fn reviewed(&self, peer: PeerId, claims: &Claims, passed: bool) {
        let mut table = self.lock();
        let review = if passed { Review::Passed } else { Review::Refused(Instant::now()) };
        match table.verdicts.get_mut(&peer) {
            Some(known) if known.pod_uid == claims.pod_uid => known.review = review,
            Some(_) if !passed => table.insert(peer, Verdict { review, ..Verdict::of(claims) }),
            _ => {}
        }
    }

    /// Whether this peer was good in this pod, and the API server never said no.
    pub(super) fn was_good(&self, peer: PeerId, claims: &Claims) -> bool {
        self.of(peer, claims).is_some_and(|verdict| !matches!(verdict.review, Review::Refused(_)))
    }

    /// How many peers are known: about as many as the cluster has other agents.
    pub(super) fn count(&self) -> usize {
        self.lock().verdicts.len()
    }

    /// Those that are of use after a restart, and whether there are others than last time. What the API server refused is left out.
    pub(super) fn to_keep(&self, now: Duration) -> Vec<(PeerId, Verdict)> {
        let mut table = self.lock();
        table.retain(|verdict| verdict.until.saturating_add(self.grace) >= now);
        let good = table.verdicts.iter().filter(|(_, verdict)| !matches!(verdict.review, Review::Refused(_)));
        good.map(|(peer, verdict)| (*peer, verdict.clone())).collect()
    }

    /// Whether a peer has become known since this was asked last.
    pub(super) fn have_changed(&self) -> bool {
        self.changed.swap(false, Ordering::Relaxed)
    }

    fn of(&self, peer: PeerId, claims: &Claims) -> Option<Verdict> {
        self.lock().verdicts.get(&peer).filter(|known| known.pod_uid == claims.pod_uid).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nothing panics while holding it")
    }
}

impl Table {
    fn insert(&mut self, peer: PeerId, verdict: Verdict) {
        let pod = verdict.pod_uid.clone();
        if let Some(before) = self.verdicts.insert(peer, verdict).filter(|before| before.pod_uid != pod) {
            self.pods.forget(&before.pod_uid, peer);
        }
        if let Some(displaced) = self.pods.shown(&pod, peer) {
            self.verdicts.remove(&displaced);
        }
    }

    fn retain(&mut self, is_kept: impl Fn(&Verdict) -> bool) {
        let Self { verdicts, pods } = self;
        verdicts.retain(|peer, verdict| {
            let is_kept = is_kept(verdict);
            if !is_kept {
                pods.forget(&verdict.pod_uid, *peer);
            }
            is_kept
        });
    }
}

impl Verdict {
    fn of(claims: &Claims) -> Self {
        Self::new(claims.pod_uid.clone(), claims.node.clone(), claims.expires)
    }

    pub(super) fn new(pod_uid: String, node: Option<NodeName>, until: Duration) -> Self {
        Self { pod_uid, node, until, review: Review::NotAsked }
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
    fn what_is_remembered_is_bounded_and_makes_room_when_it_is_of_no_use_any_more() {
        let verdicts = Verdicts::new([], GRACE);
        let at = Duration::from_secs;
        (0..=MOST).for_each(|n| verdicts.remember(peer(n), &claims(&format!("p{n}"), 1000), at(0)));
        assert!(verdicts.have_changed() && !verdicts.have_changed());
        let last = format!("p{MOST}");
        assert!(
            verdicts.was_good(peer(0), &claims("p0", 1000)) && !verdicts.was_good(peer(MOST), &claims(&last, 1000))
        );
        verdicts.remember(peer(MOST), &claims(&last, 2000), at(1100));
        assert!(!verdicts.was_good(peer(MOST), &claims(&last, 2000)), "all are of use for the length of grace");
        verdicts.remember(peer(MOST), &claims(&last, 2000), at(1101));
        assert!(verdicts.was_good(peer(MOST), &claims(&last, 2000)));
        assert_eq!(verdicts.to_keep(at(1101)).len(), 1);
    }

    #[test]
    fn the_tokens_of_one_pod_for_key_after_key_take_the_room_of_two() {
        let verdicts = Verdicts::new([], GRACE);
        verdicts.remember(peer(0), &claims("other", 1000), Duration::ZERO);
        (1..1000).for_each(|n| verdicts.remember(peer(n), &claims("stolen", 1000), Duration::ZERO));
        assert_eq!(verdicts.count(), 3);
        assert!(verdicts.was_good(peer(0), &claims("other", 1000)));
        assert_eq!(verdicts.to_keep(Duration::from_secs(1101)).len(), 0);
        verdicts.remember(peer(1), &claims("stolen", 2000), Duration::ZERO);
        verdicts.remember(peer(2), &claims("stolen", 2000), Duration::ZERO);
        assert_eq!(verdicts.count(), 2, "verdicts that ended take no room of their pod");
    }

    #[test]
    fn a_later_pod_replaces_an_earlier_one_and_not_the_other_way_round() {
        let verdicts = Verdicts::new([], GRACE);
        for (pod, expires) in [("second", 2000), ("first", 1000), ("second", 1500)] {
            verdicts.remember(peer(1), &claims(pod, expires), Duration::ZERO);
        }
        assert!(verdicts.was_good(peer(1), &claims("second", 0)) && !verdicts.was_good(peer(1), &claims("first", 0)));
        assert_eq!(verdicts.to_keep(Duration::ZERO)[0].1.until, Duration::from_secs(2000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_no_stands_is_asked_again_after_a_minute_and_is_not_kept() {
        let (verdicts, claims) = (Verdicts::new([], GRACE), claims("p", 1000));
        assert_eq!(verdicts.to_ask(peer(1), &claims), Ask::Yes);
        verdicts.remember(peer(1), &claims, Duration::ZERO);
        assert_eq!(verdicts.to_ask(peer(1), &claims), Ask::Yes);
        verdicts.reviewed(peer(1), &claims, false);
        assert_eq!(verdicts.to_ask(peer(1), &claims), Ask::Refused);
        assert!(!verdicts.was_good(peer(1), &claims) && verdicts.to_keep(Duration::ZERO).is_empty());
        tokio::time::advance(AGAIN).await;
        assert_eq!(verdicts.to_ask(peer(1), &claims), Ask::Again);
        verdicts.reviewed(peer(1), &claims, true);
        assert_eq!(verdicts.to_ask(peer(1), &claims), Ask::No);
    }
}
