//! Liveness, as in SWIM: silent neighbors, suspicion, confirmation by a second witness, refutation.

use super::fault::GossipFault;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::connections::PingOutcome;
use super::membership_table::Liveness;
use super::peer_score::{INTRODUCTION_LIMIT, SUSPICION_LIMIT};
use super::{CredentialVerifier, GRAFT_DELAY, GossipVerdict, MeshConnectionId, Output, Protocol};
use crate::decide::inventory::Inventory;
use crate::model::{Gossip, LeaveNotice, PeerId, Refutation, Suspicion};

/// Lifetime of a suspicion without confirmation.
const SUSPICION_LIFE: Duration = Duration::from_secs(10);

/// Shortest interval of refutations. One refutation answers all suspicions of the interval.
const REFUTE_INTERVAL: Duration = Duration::from_millis(500);

/// Members that probe one suspect.
const MAX_PROBERS: usize = 3;

/// Witnesses that confirm a death in all of the mesh, where there are so many members.
const WITNESSES: usize = 2;

impl<N: CredentialVerifier> Protocol<N> {
    /// The peer answered a ping over this connection.
    pub fn record_ping_answer(
        &mut self,
        connection: MeshConnectionId,
        peer: PeerId,
        inventory: &mut Inventory,
        now: Instant,
    ) {
        let is_first = self.membership.neighbors().next().is_none();
        let me = self.local.peer;
        let Some(member) = self.membership.get_mut(peer) else { return };
        if member.connections.record_answer(connection) == PingOutcome::Repeated {
            return;
        }
        // Nothing is published: the member itself refutes its death.
        if member.record_answer(me, now) {
            self.membership.update_bucket(peer);
            self.chosen_is_stale = true;
        }
        self.mark_up_if_valid(peer, inventory, now);
        self.compare_with(peer);
        if is_first {
            // This agent was cut off or just started, so earlier failed dials show nothing.
            self.membership.members.values_mut().for_each(|member| member.connections.reset_back_off());
            if self.introduction.is_some() {
                self.introduce_at = Some(now + GRAFT_DELAY);
            }
        }
    }

    /// A connection closed, by either side.
    pub fn connection_closed(&mut self, connection: MeshConnectionId, peer: PeerId, now: Instant) {
        let jitter = self.jitter();
        let Some(member) = self.membership.get_mut(peer) else { return };
        if member.connections.remove(connection, now, jitter) && !member.is_dead() {
            // A dead process refuses the dial at once; a successful dial shows a live process.
            self.dial_if_allowed(peer, now);
        }
    }

    /// A fetch could not reach the peer. Unless the peer has just answered a ping, nothing is
    /// fetched from the peer until its next sign of life.
    pub fn suspect_provider(&mut self, peer: PeerId, inventory: &mut Inventory, now: Instant) {
        if self.member(peer).is_some_and(|member| member.is_up && !member.connections.has_answered_recently()) {
            self.suspect(peer, "a fetch failed to connect", inventory, now);
        }
    }

    /// A neighbor sent a message that cannot be decoded, is forged, or exceeds a limit.
    pub fn record_fault(&mut self, from: PeerId, fault: GossipFault, now: Instant) {
        let Some(member) = self.membership.get_mut(from) else { return };
        let banned = member.score.record_fault(fault, now);
        self.push_output(Output::Fault { peer: from, fault, banned });
        if banned.is_some() {
            self.ban(from);
        }
    }

    /// Ends the peer's connections. The next tick hides the peer's items.
    fn ban(&mut self, peer: PeerId) {
        let Some(member) = self.membership.get_mut(peer) else { return };
        member.connections.take_all();
        member.admitted_until = None;
        self.push_output(Output::Deny(peer));
        self.recently_banned.push(peer);
        self.chosen_is_stale = true;
    }

    pub(super) fn check_neighbors(&mut self, inventory: &mut Inventory, now: Instant) {
        for peer in std::mem::take(&mut self.recently_banned) {
            self.mark_down(peer, "banned", inventory);
        }
        let mut silent = Vec::new();
        let mut expired = Vec::new();
        self.membership.retain_watched(|peer, member| {
            if member.connections.tick(now) {
                silent.push(peer);
            }
            if member.suspected_since.is_some_and(|at| now.duration_since(at) > SUSPICION_LIFE) && !member.is_dead() {
                expired.push(peer);
            }
        });
        for peer in silent {
            self.suspect(peer, "does not answer", inventory, now);
        }
        for peer in expired {
            let me = self.local.peer;
            if let Some(member) = self.membership.get_mut(peer) {
                member.suspected_since = None;
                // This agent's own suspicion stands until the member answers this agent.
                member.suspected_by.retain(|witness| *witness == me);
            }
            // In a cluster that fell apart, the first probers may be gone too. By now the dead
            // among them are known, so other members probe.
            self.probe_if_low_rank(peer, now);
        }
    }

    /// Suspects a silent member: fetches nothing from the member, and publishes the suspicion.
    pub(super) fn suspect(&mut self, peer: PeerId, reason: &'static str, inventory: &mut Inventory, now: Instant) {
        let me = self.local.peer;
        let jitter = self.jitter();
        let Some(member) = self.membership.get_mut(peer) else { return };
        let connections = member.connections.take_all();
        let _ = member.connections.record_failed_dial(now, jitter);
        let (epoch, incarnation) = (member.epoch(), member.incarnation());
        let is_new = member.introduction.is_some() && !member.is_dead() && member.suspected_by.insert(me);
        if is_new {
            member.suspected_since.get_or_insert(now);
        }
        self.outputs.extend(connections.into_iter().map(|connection| Output::Close(connection, peer)));
        self.membership.watch(peer);
        self.mark_down(peer, reason, inventory);
        if is_new {
            let mut suspicion = Suspicion { suspect: peer, epoch, incarnation, witness: me, signature: [0; 64].into() };
            suspicion.signature = self.verifier.sign(&suspicion.signed_bytes());
            self.push_output(Output::Publish(Gossip::Suspicion(suspicion)));
            self.confirm_dead_if_witnessed(peer, inventory, now);
        }
        self.chosen_is_stale = true;
    }

    pub(super) fn receive_suspicion(
        &mut self,
        suspicion: Suspicion,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let Suspicion { suspect, epoch, incarnation, witness, .. } = suspicion;
        if witness == self.local.peer || witness == suspect {
            return GossipVerdict::Ignore("own");
        }
        let is_known = |peer| {
            self.member(peer).is_some_and(|member| member.has_valid_credential(now) && !member.score.is_banned(now))
        };
        if !is_known(witness) {
            return GossipVerdict::Ignore("unknown_author");
        }
        let is_me = suspect == self.local.peer;
        let current = match self.member(suspect) {
            _ if is_me => (self.log.epoch(), self.incarnation),
            Some(member) => (member.epoch(), member.incarnation()),
            None => return GossipVerdict::Ignore("unknown_peer"),
        };
        // A smaller incarnation is refuted. Only the suspect makes larger ones, so its refutation
        // has not arrived here yet. A later comparison finds what is ignored now.
        if (epoch, incarnation) != current {
            return GossipVerdict::Ignore("refuted");
        }
        if self.member(suspect).is_some_and(|member| member.is_dead() || member.suspected_by.contains(&witness)) {
            return GossipVerdict::Ignore("known");
        }
        if !self.verifier.is_signed(witness, &suspicion.signed_bytes(), &suspicion.signature) {
            return GossipVerdict::Reject(GossipFault::Forged);
        }
        // Only new suspicions count, else a peer that repeats old ones would use up the witness's
        // rate.
        let is_within = self
            .membership
            .get_mut(witness)
            .is_some_and(|member| member.score.suspicions.try_take(1, SUSPICION_LIMIT, now));
        if !is_within {
            return GossipVerdict::Ignore("too_many");
        }
        if is_me {
            self.refute(now);
            return GossipVerdict::Accept;
        }
        let Some(member) = self.membership.get_mut(suspect) else { return GossipVerdict::Ignore("unknown_peer") };
        member.suspected_by.insert(witness);
        member.suspected_since.get_or_insert(now);
        self.membership.watch(suspect);
        self.confirm_dead_if_witnessed(suspect, inventory, now);
        self.probe_if_low_rank(suspect, now);
        GossipVerdict::Accept
    }

    /// The [`MAX_PROBERS`] members of lowest rank dial the suspect, unless they are connected.
    /// Without these dials, a suspect with a single neighbor never has a second witness.
    fn probe_if_low_rank(&mut self, suspect: PeerId, now: Instant) {
        let rank = |peer: PeerId| super::neighbor_choice::rank(suspect, peer);
        let mine = rank(self.local.peer);
        let better_ranked =
            self.membership.members.values().filter(|member| member.is_up && rank(member.peer.id) < mine);
        if better_ranked.take(MAX_PROBERS).count() < MAX_PROBERS {
            self.probe_suspect(suspect, now);
        }
    }

    /// Dials a suspected member without a connection. A failed dial makes this agent a witness.
    pub(super) fn probe_suspect(&mut self, peer: PeerId, now: Instant) {
        if self.may_dial_more()
            && let Some(member) = self.membership.get_mut(peer)
            && !member.is_dead()
            && member.connections.mark_suspected()
        {
            self.dial_if_allowed(peer, now);
        }
    }

    /// Marks the member dead if there are enough witnesses. A member that answers this agent is
    /// alive.
    fn confirm_dead_if_witnessed(&mut self, peer: PeerId, inventory: &mut Inventory, now: Instant) {
        let others = self.membership.members.values().filter(|member| member.is_up && member.peer.id != peer).count();
        let Some(member) = self.member(peer) else { return };
        // Two keys of one pod are one witness.
        let pod = |witness: &PeerId| self.member(*witness).and_then(|member| member.pod.as_deref());
        let pods: BTreeSet<_> = member.suspected_by.iter().filter_map(pod).collect();
        let without_pod = member.suspected_by.iter().filter(|witness| pod(witness).is_none()).count();
        if pods.len() + without_pod < WITNESSES.min(others + 1) || member.connections.has_answered_recently() {
            return;
        }
        self.mark_dead(peer, "two neighbors got no answer", inventory, now);
    }

    pub(super) fn mark_dead(&mut self, peer: PeerId, reason: &'static str, inventory: &mut Inventory, now: Instant) {
        let Some(member) = self.membership.get_mut(peer) else { return };
        member.liveness = Liveness::Dead(now);
        member.suspected_since = None;
        let connections = member.connections.take_all();
        self.outputs.extend(connections.into_iter().map(|connection| Output::Close(connection, peer)));
        self.mark_down(peer, reason, inventory);
        self.membership.update_bucket(peer);
        self.chosen_is_stale = true;
    }

    /// Refutes the suspicion or the death of this agent's present incarnation, at most once in
    /// [`REFUTE_INTERVAL`].
    pub(super) fn refute(&mut self, now: Instant) {
        if self.refuted_at.is_some_and(|at| now.duration_since(at) < REFUTE_INTERVAL) {
            self.refute_at.get_or_insert(now + REFUTE_INTERVAL);
            return;
        }
        self.refuted_at = Some(now);
        self.incarnation += 1;
        let refutation = self.own_refutation();
        self.push_output(Output::Publish(Gossip::Refutation(refutation)));
    }

    /// Repeats a refutation: connections that were just ending may have lost the last one.
    pub(super) fn refute_if_due(&mut self, now: Instant) {
        if self.refute_at.is_some_and(|at| at <= now) {
            self.refute_at = None;
            self.refute(now);
        }
    }

    pub(super) fn own_refutation(&self) -> Refutation {
        let (peer, epoch) = (self.local.peer, self.log.epoch());
        let mut refutation = Refutation { peer, epoch, incarnation: self.incarnation, signature: [0; 64].into() };
        refutation.signature = self.verifier.sign(&refutation.signed_bytes());
        refutation
    }

    pub(super) fn receive_refutation(
        &mut self,
        refutation: Refutation,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let Refutation { peer, epoch, incarnation, .. } = refutation;
        let Some(member) = self.member(peer) else { return GossipVerdict::Ignore("unknown_author") };
        if member.epoch() != epoch || incarnation <= member.incarnation() {
            return GossipVerdict::Ignore("known");
        }
        if !self.verifier.is_signed(peer, &refutation.signed_bytes(), &refutation.signature) {
            return GossipVerdict::Reject(GossipFault::Forged);
        }
        let Some(member) = self.membership.get_mut(peer) else { return GossipVerdict::Ignore("unknown_author") };
        // Only refutations without a suspicion count against the limit. If all counted, suspicions
        // would be cheaper than refutations.
        let is_answer = !member.suspected_by.is_empty() || member.liveness != Liveness::Alive;
        if !is_answer && !member.score.refutations.try_take(1, INTRODUCTION_LIMIT, now) {
            return GossipVerdict::Ignore("too_many");
        }
        member.refutation = Some(refutation);
        member.liveness = Liveness::Alive;
        member.suspected_by.clear();
        member.suspected_since = None;
        member.connections.record_refutation(now);
        member.connections.allow_dial_from(now);
        self.chosen_is_stale = true;
        self.mark_up_if_valid(peer, inventory, now);
        self.membership.update_bucket(peer);
        GossipVerdict::Accept
    }

    pub(super) fn receive_leave(
        &mut self,
        notice: LeaveNotice,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let LeaveNotice { peer, epoch, .. } = notice;
        let Some(member) = self.member(peer) else { return GossipVerdict::Ignore("unknown_author") };
        if member.epoch() != epoch || member.is_dead() {
            return GossipVerdict::Ignore("known");
        }
        if !self.verifier.is_signed(peer, &notice.signed_bytes(), &notice.signature) {
            return GossipVerdict::Reject(GossipFault::Forged);
        }
        self.mark_dead(peer, "left", inventory, now);
        GossipVerdict::Accept
    }
}
