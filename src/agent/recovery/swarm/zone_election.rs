//! Whether this node may fetch one image from other zones. [`ZoneLeader`] decides by the downloads
//! of the zone's other nodes, and by a Lease that names the zone leader. A node without a zone
//! fetches from all peers.

use std::collections::BTreeSet;
use std::time::Instant;

use super::{Swarm, now};
use crate::decide::claim::{ZoneLeader, zone_claim};
use crate::model::{NodeName, PeerId, Zone};
use crate::oci::Digest;
use crate::ports::ClaimError;

pub(in crate::agent) struct ZoneElection {
    own_peer: PeerId,
    node: NodeName,
    zone: Zone,
    claim: Digest,
    leader: ZoneLeader,
    /// A task reads or writes the Lease.
    is_claiming: bool,
}

impl ZoneElection {
    /// Starts the election for the image `root`.
    pub(in crate::agent) fn new(
        own_peer: PeerId,
        node: NodeName,
        zone: Zone,
        image_digest: Digest,
        now: Instant,
    ) -> Self {
        let claim = zone_claim(image_digest, &zone);
        Self { own_peer, node, leader: ZoneLeader::new(own_peer, claim, now), zone, claim, is_claiming: false }
    }

    /// Whether the zone is this node's zone.
    pub(super) fn is_own_zone(&self, zone: Option<&Zone>) -> bool {
        zone == Some(&self.zone)
    }

    pub(super) fn leader(&mut self) -> &mut ZoneLeader {
        &mut self.leader
    }

    /// The claim to try now, if an attempt is due. Marks the attempt as running.
    pub(super) fn begin_claim(&mut self, now: Instant) -> Option<Digest> {
        let is_due = !self.is_claiming && self.leader.claim_due().is_some_and(|at| at <= now);
        self.is_claiming |= is_due;
        is_due.then_some(self.claim)
    }

    /// When the election can change without an event.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let claim_at = self.leader.claim_due().filter(|_| !self.is_claiming);
        self.leader.wake_at().into_iter().chain(claim_at).min()
    }

    /// Records the result of an attempt. `peer_of` maps a node to its peer.
    pub(super) fn record_claim(
        &mut self,
        result: Result<Option<NodeName>, ClaimError>,
        peer_of: impl Fn(&NodeName) -> Option<PeerId>,
        now: Instant,
    ) {
        self.is_claiming = false;
        match result {
            Ok(holder) => {
                let peer = holder.and_then(|node| if node == self.node { Some(self.own_peer) } else { peer_of(&node) });
                self.leader.record_claim_holder(peer, now);
            }
            // Another node has just taken the Lease, or the API server is unavailable. The ranks go
            // on deciding.
            Err(ClaimError::Lost | ClaimError::Unavailable(_)) => self.leader.record_claim_attempt(now),
        }
    }
}

impl Swarm<'_> {
    /// Updates whether other zones may get requests, and starts a due claim.
    pub(super) fn update_zone_leader(&mut self) {
        let (Some(election), now) = (&mut self.zone_election, now()) else { return };
        let may_fetch_cross_zone = election.leader().update_is_leading(now);
        self.shared.picker().set_cross_zone(may_fetch_cross_zone);
        if let Some(claim) = election.begin_claim(now) {
            self.spawn_claim(claim);
        }
    }

    /// Gives the election the nodes of this zone that download the image.
    pub(super) fn update_zone_peers(&mut self) {
        let Some(election) = &mut self.zone_election else { return };
        let providers = self.active.keys().flat_map(|digest| self.blob_fetcher.inventory.all_providers(*digest));
        let zone_providers =
            providers.filter(|provider| !provider.whole && election.is_own_zone(provider.zone.as_ref()));
        let zone_peers: Vec<_> =
            zone_providers.map(|provider| provider.peer).collect::<BTreeSet<_>>().into_iter().collect();
        election.leader().set_fetching(&zone_peers, now());
    }
}
