//! Who does what should happen once: candidates ranked by hash, a Lease as advice.
//!
//! A claim never stands in the way of content: it is lost, stolen or unreachable without harm, because what is fetched is
//! addressed by its digest. It names the node that leads a recovery, and the one that brings an image into a zone ([`Crossing`]);
//! nobody waits for it.

mod crossing;

use std::time::{Duration, SystemTime};

use super::plan::rendezvous;
use crate::model::{LeaseSnapshot, LeaseVersion, NodeName, PeerId};
use crate::oci::Digest;

pub use crossing::{Crossing, RENEW, zone_claim};

/// How long a claim holds without renewal. Longer than a slow API server's answer, short enough that a dead holder does not
/// matter for long; also what the Lease says of itself.
pub const LIFE: Duration = Duration::from_secs(15);

/// How far apart candidates try. An API server that answers within 50 ms then sees two or three writes for one digest, one that takes a
/// second forty; at any size of the cluster, because whoever comes later reads that somebody holds it.
const STAGGER: Duration = Duration::from_millis(25);

/// What to do about a Lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// There is none: make it.
    Create,
    /// It is ours, or its holder let it expire: write it, if it is still this version.
    Update(LeaseVersion),
    /// Somebody else holds it.
    Leave,
}

/// How long a candidate waits before it looks at the Lease: by its rank among everybody, because who else wants the digest is not known.
pub fn wait_before_trying(me: PeerId, digest: Digest, others: &[PeerId]) -> Duration {
    let mine = rendezvous(&[me], digest);
    let rank = others.iter().filter(|&&other| other != me && rendezvous(&[other], digest) < mine).count();
    STAGGER.saturating_mul(u32::try_from(rank).unwrap_or(u32::MAX))
}

/// What the Lease that was read asks for. A clock that is wrong by less than [`LIFE`] only makes a second holder, which is harmless.
pub fn step(read: Option<&LeaseSnapshot>, me: &NodeName, now: SystemTime) -> Step {
    let Some(lease) = read else { return Step::Create };
    let mine = lease.holder.as_deref() == Some(me.as_str());
    let expired = lease.renewed.is_none_or(|renewed| now.duration_since(renewed).is_ok_and(|age| age > LIFE));
    if mine || lease.holder.is_none() || expired { Step::Update(lease.version.clone()) } else { Step::Leave }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: Option<&str>, age: u64, now: SystemTime) -> LeaseSnapshot {
        LeaseSnapshot {
            holder: holder.map(Into::into),
            renewed: Some(now - Duration::from_secs(age)),
            version: LeaseVersion("7".into()),
        }
    }

    #[test]
    fn a_lease_is_taken_when_it_is_free_ours_or_expired() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let me: NodeName = "n1".parse().unwrap();
        let update = Step::Update(LeaseVersion("7".into()));
        assert_eq!(step(None, &me, now), Step::Create);
        assert_eq!(step(Some(&lease(Some("n1"), 1, now)), &me, now), update);
        assert_eq!(step(Some(&lease(Some("n2"), 1, now)), &me, now), Step::Leave);
        assert_eq!(step(Some(&lease(Some("n2"), 15, now)), &me, now), Step::Leave, "to the second");
        assert_eq!(step(Some(&lease(Some("n2"), 16, now)), &me, now), update);
        assert_eq!(step(Some(&lease(None, 1, now)), &me, now), update);
        let ahead = LeaseSnapshot { renewed: Some(now + Duration::from_secs(60)), ..lease(Some("n2"), 0, now) };
        assert_eq!(step(Some(&ahead), &me, now), Step::Leave, "a clock that runs ahead");
    }

    #[test]
    fn of_a_thousand_three_try_within_50_ms_and_others_for_another_digest() {
        let peers: Vec<_> =
            (0..1000_u32).map(|n| PeerId::from_public_key(*Digest::of(&n.to_le_bytes()).as_bytes())).collect();
        let first = |digest: Digest| -> Vec<PeerId> {
            let early = |me: &&PeerId| wait_before_trying(**me, digest, &peers) <= Duration::from_millis(50);
            peers.iter().filter(early).copied().collect()
        };
        let (one, other) = (first(Digest::of(b"one")), first(Digest::of(b"other")));
        assert_eq!((one.len(), other.len()), (3, 3));
        assert_ne!(one, other);
    }
}
