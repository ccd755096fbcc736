//! The connections of this agent: dials of chosen members, probes of dead ones, and thinning.

use std::time::{Duration, Instant};

use rand::seq::IteratorRandom;

use super::membership::MAX_FAILED_DIALS;
use super::membership_table::Member;
use super::{CredentialVerifier, Output, Protocol, neighbor_choice};
use crate::model::{PeerId, SyncRequest};

/// Interval of dials to a dead member. After a partition, each side has the other side as dead.
const DEAD_PROBE_INTERVAL: Duration = Duration::from_secs(10);

/// Handshakes and dials in flight.
const MAX_DIALS: usize = 16;

impl<N: CredentialVerifier> Protocol<N> {
    /// Dials the chosen members, probes a dead member, and closes excess connections.
    pub(super) fn maintain_neighbors(&mut self, now: Instant) {
        if std::mem::take(&mut self.chosen_is_stale) {
            self.choose_neighbors(now);
        }
        let me = self.local.peer;
        let mut dials = self.membership.watched().filter(|member| member.connections.is_dialing()).count();
        // A member that this agent suspects counts again only after its answer to this agent.
        let is_suspected = |member: &&Member| {
            !member.is_dead() && member.suspected_by.contains(&me) && member.has_valid_credential(now)
        };
        let suspected = self.membership.watched().filter(is_suspected).map(|member| member.peer.id);
        for peer in self.chosen_neighbors.iter().copied().chain(suspected).collect::<Vec<_>>() {
            if dials >= MAX_DIALS {
                break;
            }
            dials += usize::from(self.dial_if_allowed(peer, now));
        }
        if self.dead_probe_at <= now {
            self.dead_probe_at = now + DEAD_PROBE_INTERVAL.mul_f64(0.8 + 0.2 * self.jitter());
            let is_probeable = |member: &&Member| {
                member.is_dead() && member.has_valid_credential(now) && member.connections.may_dial(now)
            };
            let count = self.membership.members.values().filter(is_probeable).count();
            if count > 0 {
                let nth = (self.jitter() * count as f64) as usize;
                let chosen =
                    self.membership.members.values().filter(is_probeable).nth(nth).map(|member| member.peer.id);
                chosen.map(|peer| self.dial_if_allowed(peer, now));
            }
            self.thin_out();
        }
    }

    pub(super) fn may_dial_more(&self) -> bool {
        self.membership.watched().filter(|member| member.connections.is_dialing()).count() < MAX_DIALS
    }

    /// Starts a dial, or the handshake before the first dial, if permitted now. True when started.
    pub(super) fn dial_if_allowed(&mut self, peer: PeerId, now: Instant) -> bool {
        let Some(member) = self.membership.get_mut(peer) else { return false };
        if !member.connections.may_dial(now) || member.score.is_banned(now) {
            return false;
        }
        member.connections.begin_dial(now);
        let output = match member.is_admitted(now) {
            true => Output::Dial(member.peer.clone()),
            false => Output::Handshake(member.peer.clone()),
        };
        self.push_output(output);
        self.membership.watch(peer);
        true
    }

    fn choose_neighbors(&mut self, now: Instant) {
        let zone = self.presence.as_ref().and_then(|presence| presence.zone.as_ref());
        let is_candidate = |member: &&Member| {
            !member.is_dead()
                && !member.score.is_banned(now)
                && member.connections.failed_dials() < MAX_FAILED_DIALS
                && (member.has_valid_credential(now) || member.is_admitted(now))
        };
        let members = self.membership.members.iter();
        let candidates =
            members.filter(|(_, member)| is_candidate(member)).map(|(peer, member)| (*peer, member.peer.zone.as_ref()));
        self.chosen_neighbors = neighbor_choice::choose(self.salt, zone, candidates);
    }

    /// Closes excess connections, which the first agents of a cluster have. Members that this agent
    /// did not choose get a notice of the close, and have met other members by now.
    fn thin_out(&mut self) {
        let neighbors: Vec<_> = self.membership.neighbors().map(|member| member.peer.id).collect();
        if neighbors.len() <= neighbor_choice::MAX_NEIGHBORS {
            return;
        }
        let excess = neighbors.len() - neighbor_choice::NEIGHBORS_AFTER_THINNING;
        let unchosen = neighbors.into_iter().filter(|peer| !self.chosen_neighbors.contains(peer));
        for peer in unchosen.choose_multiple(&mut self.rng, excess) {
            self.send_request(peer, SyncRequest::Disconnect);
        }
    }
}
