//! Whether this node may fetch from other zones, for one image: [`Crossing`] decides, from what is seen of the others of its zone, and a Lease that names
//! who does it. Where no zone is known there is nothing to cross.

use std::collections::BTreeSet;
use std::time::Instant;

use super::{Swarm, now};
use crate::decide::claim::{Crossing, zone_claim};
use crate::model::{NodeName, PeerId, Zone};
use crate::oci::Digest;
use crate::ports::ClaimError;

pub(in crate::agent) struct Zones {
    me: PeerId,
    node: NodeName,
    zone: Zone,
    claim: Digest,
    crossing: Crossing,
    /// The Lease is being read or written.
    asking: bool,
}

impl Zones {
    /// `root` is the image.
    pub(in crate::agent) fn new(me: PeerId, node: NodeName, zone: Zone, root: Digest, now: Instant) -> Self {
        let claim = zone_claim(root, &zone);
        Self { me, node, crossing: Crossing::new(me, claim, now), zone, claim, asking: false }
    }

    /// Whether somebody is of this node's zone.
    pub(super) fn is_ours(&self, zone: Option<&Zone>) -> bool {
        zone == Some(&self.zone)
    }

    pub(super) fn crossing(&mut self) -> &mut Crossing {
        &mut self.crossing
    }

    /// The claim to try for now, if it is time to.
    pub(super) fn claims(&mut self, now: Instant) -> Option<Digest> {
        let is_time = !self.asking && self.crossing.claims_at().is_some_and(|at| at <= now);
        self.asking |= is_time;
        is_time.then_some(self.claim)
    }

    /// When to look again although nothing happens.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let claims_at = self.crossing.claims_at().filter(|_| !self.asking);
        self.crossing.wake_at().into_iter().chain(claims_at).min()
    }

    /// What came of trying. `peer_of` knows who runs on a node.
    pub(super) fn claimed(
        &mut self,
        result: Result<Option<NodeName>, ClaimError>,
        peer_of: impl Fn(&NodeName) -> Option<PeerId>,
        now: Instant,
    ) {
        self.asking = false;
        match result {
            Ok(holder) => {
                let peer = holder.and_then(|node| if node == self.node { Some(self.me) } else { peer_of(&node) });
                self.crossing.claimed(peer, now);
            }
            // Somebody has just taken it, or the API server is away: the ranks go on deciding.
            Err(ClaimError::Lost | ClaimError::Unavailable(_)) => self.crossing.tried(now),
        }
    }
}

impl Swarm<'_> {
    /// Whether other zones may be asked now, and whether it is time to claim that they are.
    pub(super) fn mind_zones(&mut self) {
        let (Some(zones), now) = (&mut self.zones, now()) else { return };
        let may_cross = zones.crossing().may_cross(now);
        self.shared.pool().cross(may_cross);
        if let Some(claim) = zones.claims(now) {
            self.spawn_claim(claim);
        }
    }

    /// Who else of this zone is fetching, as far as it is known.
    pub(super) fn learn_zone(&mut self) {
        let Some(zones) = &mut self.zones else { return };
        let known = self.coming.keys().flat_map(|digest| self.bring.holders.sources(*digest));
        let ours = known.filter(|source| !source.whole && zones.is_ours(source.zone.as_ref()));
        let ours: Vec<_> = ours.map(|source| source.peer).collect::<BTreeSet<_>>().into_iter().collect();
        zones.crossing().learn(&ours, now());
    }
}
