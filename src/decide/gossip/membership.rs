//! Membership: admission by handshake, the members that are up, and expiry.

use std::time::{Duration, Instant};

use rand::seq::IteratorRandom;

use super::membership_table::{Liveness, Member};
use super::{CredentialRejection, CredentialVerifier, MeshConnectionId, Output, Protocol};
use crate::decide::inventory::Inventory;
use crate::model::{Peer, PeerId};

/// How long a member stays while its credential can be neither verified nor rejected.
const UNDECIDED_GRACE: Duration = Duration::from_secs(60);

/// How long a dead member stays in the table, so its introduction and items need not be sent again:
/// longer than a node's restart.
const RETENTION: Duration = Duration::from_secs(600);

/// How long a member that answers here may take to refute its death elsewhere. A comparison with
/// any neighbor shows the member its death.
const REFUTATION_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the side with the larger key waits for the other side's dial, to have one connection
/// and not two.
const DIAL_DELAY: Duration = Duration::from_secs(1);

/// After so many failed dials in a row, another member is chosen as a neighbor, and nothing is
/// fetched from the peer.
pub(super) const MAX_FAILED_DIALS: u32 = 3;

/// Most members without an introduction. An honest member introduces itself within seconds.
const MAX_UNINTRODUCED: usize = 256;

/// Longest validity of a credential. A credential without an end would overflow an [`Instant`].
pub(super) const LONGEST_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);

impl<N: CredentialVerifier> Protocol<N> {
    /// The driver admitted this peer in a handshake, begun by either side. For `life`, the peer may
    /// connect.
    pub fn admit(&mut self, peer: Peer, lifetime: Duration, inventory: &mut Inventory, now: Instant) {
        let id = peer.id;
        if id == self.local.peer {
            return;
        }
        if self.membership.get(id).is_none() && self.membership.is_full() {
            self.over_limit += 1;
            return;
        }
        if self.membership.get(id).is_none() {
            self.evict_unintroduced(inventory, now);
        }
        let mine = self.local.peer;
        let member = self.membership.members.entry(id).or_insert_with(|| Member::new(peer.clone()));
        if member.score.is_banned(now) {
            member.connections.end_handshake();
            return;
        }
        let was_trying = member.connections.is_dialing();
        member.connections.end_handshake();
        member.connections.allow_dial_from(if was_trying || mine < id { now } else { now + DIAL_DELAY });
        if member.introduction.is_none() {
            member.peer = peer;
        }
        member.record_answer(mine, now);
        let was_admitted = member.is_admitted(now);
        member.admitted_until = Some(now + lifetime.min(LONGEST_LIFE));
        if !was_admitted {
            self.push_output(Output::Allow(id));
        }
        self.membership.update_bucket(id);
        self.mark_up_if_valid(id, inventory, now);
        self.chosen_is_stale = true;
        self.maintain_neighbors(now);
    }

    /// A handshake or a dial failed. The member is suspected if the dial was to decide about a lost
    /// connection, or was the last of `MAX_FAILED_DIALS`.
    pub fn dial_failed(&mut self, peer: PeerId, inventory: &mut Inventory, now: Instant) {
        let jitter = self.jitter();
        let Some(member) = self.membership.get_mut(peer) else { return };
        let was_suspected = member.connections.record_failed_dial(now, jitter);
        if was_suspected || (member.is_up && member.connections.failed_dials() >= MAX_FAILED_DIALS) {
            self.suspect(peer, "a dial failed", inventory, now);
        }
        self.chosen_is_stale = true;
    }

    /// The peer answered, and one side rejected the other.
    pub fn rejected_by_peer(&mut self, peer: PeerId, now: Instant) {
        let jitter = self.jitter();
        if let Some(member) = self.membership.get_mut(peer) {
            member.connections.record_rejection(now, jitter);
        }
        self.chosen_is_stale = true;
    }

    /// The driver withdraws the peer's admission. A banned member stays in the table until the ban
    /// ends; the ban has withdrawn its admission already.
    pub fn remove_peer(&mut self, peer: PeerId, inventory: &mut Inventory, now: Instant) {
        let Some(is_banned) = self.membership.get(peer).map(|member| member.score.is_banned(now)) else { return };
        self.mark_down(peer, "admission withdrawn", inventory);
        if !is_banned {
            self.remove_member(peer, inventory, now);
        }
    }

    /// A connection with an allowed peer is open, dialed by either side.
    pub fn connection_opened(&mut self, connection: MeshConnectionId, peer: PeerId, now: Instant) {
        match self.membership.get_mut(peer) {
            Some(member) if member.is_admitted(now) => {
                member.connections.insert(connection);
                self.membership.watch(peer);
            }
            _ => self.push_output(Output::Close(connection, peer)),
        }
    }

    /// Evicts a random member without an introduction when they are too many. An attacker with
    /// credentials for many keys would fill the table.
    fn evict_unintroduced(&mut self, inventory: &mut Inventory, now: Instant) {
        let is_unintroduced = |member: &&Member| member.introduction.is_none();
        let unintroduced = self.membership.members.values().filter(is_unintroduced);
        if unintroduced.clone().count() >= MAX_UNINTRODUCED
            && let Some(peer) = unintroduced.map(|member| member.peer.id).choose(&mut self.rng)
        {
            self.remove_member(peer, inventory, now);
        }
    }

    /// Marks the member up, unless its credential, its death, our suspicion or a ban forbids that.
    pub(super) fn mark_up_if_valid(&mut self, peer: PeerId, inventory: &mut Inventory, now: Instant) {
        let me = self.local.peer;
        let Some(member) = self.membership.get_mut(peer) else { return };
        let is_valid = member.has_valid_credential(now)
            && !member.is_dead()
            && !member.suspected_by.contains(&me)
            && !member.score.is_banned(now);
        if is_valid && !member.is_up {
            member.is_up = true;
            inventory.up(member.peer.clone());
            let output = Output::Up(member.peer.clone());
            self.push_output(output);
        }
    }

    /// Hides the member's items and reports the member down.
    pub(super) fn mark_down(&mut self, peer: PeerId, reason: &'static str, inventory: &mut Inventory) {
        let Some(member) = self.membership.get_mut(peer) else { return };
        if std::mem::take(&mut member.is_up) {
            inventory.hide(peer);
            self.push_output(Output::Down(peer, reason));
        }
    }

    /// Removes the member from the table, the inventory and the pending requests.
    pub(super) fn remove_member(&mut self, peer: PeerId, inventory: &mut Inventory, now: Instant) {
        self.push_output(Output::Deny(peer));
        self.membership.remove(peer);
        self.behind.remove(&peer);
        self.missing_introductions.remove(&peer);
        let ids: Vec<_> =
            self.in_flight.iter().filter(|(_, pending)| pending.peer == peer).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(pending) = self.in_flight.remove(&id) {
                self.reschedule(pending.request, now);
            }
        }
        self.chosen_is_stale = true;
        inventory.forget(peer);
    }

    /// Verifies expired credentials again, marks members dead that did not refute in time, marks
    /// members up after a ban, and removes members that are gone for long.
    pub(super) fn expire_members(&mut self, inventory: &mut Inventory, now: Instant) {
        let mut to_reverify = Vec::new();
        let mut removed = Vec::new();
        let mut returning = Vec::new();
        let mut contested = Vec::new();
        for (peer, member) in &self.membership.members {
            if !member.is_up {
                returning.push(*peer);
            }
            if member.introduction.is_some() && !member.has_valid_credential(now) {
                to_reverify.push(*peer);
            }
            if matches!(member.liveness, Liveness::Contested(since) if now.duration_since(since) > REFUTATION_TIMEOUT)
                && !member.connections.is_connected()
            {
                contested.push(*peer);
            }
            let is_expired = matches!(member.liveness, Liveness::Dead(since) if now.duration_since(since) > RETENTION);
            let is_unknown = member.introduction.is_none() && !member.is_admitted(now);
            // A banned member stays in the table until the ban ends.
            if (is_expired || is_unknown || !may_renew_credential(member, now)) && !member.score.is_banned(now) {
                removed.push(*peer);
            }
        }
        for peer in to_reverify {
            self.reverify_credential(peer, inventory, now);
        }
        for peer in contested {
            self.mark_dead(peer, "the death was not refuted in time", inventory, now);
        }
        // A ban may have ended.
        for peer in returning {
            self.mark_up_if_valid(peer, inventory, now);
        }
        for peer in removed {
            self.mark_down(peer, "removed from the table", inventory);
            self.remove_member(peer, inventory, now);
        }
    }

    /// Verifies an expired credential again. During an outage of the API server, the verifier may
    /// accept the credential for longer.
    fn reverify_credential(&mut self, peer: PeerId, inventory: &mut Inventory, now: Instant) {
        let Some(member) = self.membership.get_mut(peer) else { return };
        let Some(introduction) = &member.introduction else { return };
        match self.verifier.verify_credential(peer, &introduction.credential) {
            Ok(verified) => {
                member.credential_until = Some(now + verified.lifetime.min(LONGEST_LIFE));
                member.undecided_since = None;
                return self.mark_up_if_valid(peer, inventory, now);
            }
            // The verifier is fetching what the decision depends on.
            Err(CredentialRejection::Undecided)
                if now.duration_since(*member.undecided_since.get_or_insert(now)) < UNDECIDED_GRACE =>
            {
                member.credential_until = Some(now + Duration::from_secs(1));
                return;
            }
            Err(_) => member.undecided_since = None,
        }
        let connections = member.connections.take_all();
        let was_admitted = member.admitted_until.take().is_some();
        self.outputs.extend(connections.into_iter().map(|connection| Output::Close(connection, peer)));
        if was_admitted {
            self.push_output(Output::Deny(peer));
        }
        self.mark_down(peer, "the credential expired", inventory);
    }
}

/// Whether the member may still renew its credential: the agent may have been unable to get a new
/// one for a while.
fn may_renew_credential(member: &Member, now: Instant) -> bool {
    member.credential_until.is_none_or(|until| now < until + RETENTION) || member.is_admitted(now)
}
