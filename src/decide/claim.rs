//! Claims on work that should happen once: candidates ranked by hash, with a Lease as advice.
//!
//! A claim never blocks content. A claim may be lost, stolen or unreachable without harm, because
//! content is addressed by its digest. Claims name the node that leads a recovery and the zone
//! leader ([`ZoneLeader`]); no recovery waits for a claim.

mod zone_leader;

use std::time::{Duration, SystemTime};

use super::plan::rendezvous;
use crate::model::{LeaseSnapshot, LeaseVersion, NodeName, PeerId};
use crate::oci::Digest;

pub use zone_leader::{RENEW_INTERVAL, ZoneLeader, zone_claim};

/// Life of a claim without renewal, also written into the Lease. Longer than the answer of a slow
/// API server, and short enough that a dead holder matters only briefly.
pub const LEASE_DURATION: Duration = Duration::from_secs(15);

/// Delay between the attempts of two ranks. An API server that answers within 50 ms gets two or
/// three writes per digest; a server that needs a second gets forty. The size of the cluster does
/// not matter, because later candidates read that the Lease is held.
const DELAY_PER_RANK: Duration = Duration::from_millis(25);

/// The next step towards a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseStep {
    /// No Lease exists: create the Lease.
    Create,
    /// The Lease is ours, or its holder let the Lease expire: update the Lease if the version is
    /// still this one.
    Update(LeaseVersion),
    /// Another node holds the Lease.
    Skip,
}

/// Wait of a candidate before reading the Lease. The rank is among all peers, because the peers
/// that want the digest are unknown.
pub fn claim_delay(me: PeerId, digest: Digest, others: &[PeerId]) -> Duration {
    let mine = rendezvous(&[me], digest);
    let rank = others.iter().filter(|&&other| other != me && rendezvous(&[other], digest) < mine).count();
    DELAY_PER_RANK.saturating_mul(u32::try_from(rank).unwrap_or(u32::MAX))
}

/// The step that follows from the Lease as read. A clock error below [`LEASE_DURATION`] only makes
/// a second holder, which is harmless.
pub fn lease_step(read: Option<&LeaseSnapshot>, me: &NodeName, now: SystemTime) -> LeaseStep {
    let Some(lease) = read else { return LeaseStep::Create };
    let mine = lease.holder.as_deref() == Some(me.as_str());
    let expired = lease.renewed.is_none_or(|renewed| now.duration_since(renewed).is_ok_and(|age| age > LEASE_DURATION));
    if mine || lease.holder.is_none() || expired { LeaseStep::Update(lease.version.clone()) } else { LeaseStep::Skip }
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
        let update = LeaseStep::Update(LeaseVersion("7".into()));
        assert_eq!(lease_step(None, &me, now), LeaseStep::Create);
        assert_eq!(lease_step(Some(&lease(Some("n1"), 1, now)), &me, now), update);
        assert_eq!(lease_step(Some(&lease(Some("n2"), 1, now)), &me, now), LeaseStep::Skip);
        assert_eq!(
            lease_step(Some(&lease(Some("n2"), 15, now)), &me, now),
            LeaseStep::Skip,
            "exactly at the end of its life"
        );
        assert_eq!(lease_step(Some(&lease(Some("n2"), 16, now)), &me, now), update);
        assert_eq!(lease_step(Some(&lease(None, 1, now)), &me, now), update);
        let ahead = LeaseSnapshot { renewed: Some(now + Duration::from_secs(60)), ..lease(Some("n2"), 0, now) };
        assert_eq!(lease_step(Some(&ahead), &me, now), LeaseStep::Skip, "the holder's clock runs ahead");
    }

    #[test]
    fn three_of_a_thousand_nodes_claim_within_50_ms_and_other_nodes_claim_another_digest() {
        let peers: Vec<_> =
            (0..1000_u32).map(|n| PeerId::from_public_key(*Digest::of(&n.to_le_bytes()).as_bytes())).collect();
        let first = |digest: Digest| -> Vec<PeerId> {
            let early = |me: &&PeerId| claim_delay(**me, digest, &peers) <= Duration::from_millis(50);
            peers.iter().filter(early).copied().collect()
        };
        let (one, other) = (first(Digest::of(b"one")), first(Digest::of(b"other")));
        assert_eq!((one.len(), other.len()), (3, 3));
        assert_ne!(one, other);
    }
}
