//! Who lives: neighbours that fall silent, suspicion, its confirmation by a second witness, and the word of the accused.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::connections::PingOutcome;
use super::membership_table::Liveness;
use super::peer_score::{INTRODUCTION_LIMIT, SUSPICION_LIMIT};
use super::{CredentialVerifier, GRAFT_DELAY, GossipVerdict, MeshConnectionId, Output, Protocol};
use crate::decide::inventory::Inventory;
use crate::model::{Gossip, LeaveNotice, PeerId, Refutation, Suspicion};

/// A suspicion that nobody confirmed is forgotten.
const SUSPICION_LIFE: Duration = Duration::from_secs(10);

/// Between two refutations: those who accuse at the same time are answered together.
const REFUTE_INTERVAL: Duration = Duration::from_millis(500);

/// Members that look for one that was accused.
const MAX_PROBERS: usize = 3;

/// Witnesses that make a member dead everywhere, where there are as many.
const WITNESSES: usize = 2;

impl<N: CredentialVerifier> Protocol<N> {
    /// A ping was answered over a connection.
    pub fn record_ping_answer(&mut self, link: MeshConnectionId, peer: PeerId, table: &mut Inventory, now: Instant) {
        let is_first = self.roster.neighbours().next().is_none();
        let me = self.local.peer;
        let Some(member) = self.roster.get_mut(peer) else { return };
        if member.connections.record_answer(link) == PingOutcome::Repeated {
            return;
        }
        // Others learn so from itself.
        if member.record_answer(me, now) {
            self.roster.update_bucket(peer);
            self.chosen_is_stale = true;
        }
        self.mark_up_if_valid(peer, table, now);
        self.compare_with(peer);
        if is_first {
            // It was we who were cut off, or just begin: how often others could not be reached says nothing.
            self.roster.members.values_mut().for_each(|member| member.connections.reset_back_off());
            if self.introduction.is_some() {
                self.introduce_at = Some(now + GRAFT_DELAY);
            }
        }
    }

    /// A connection closed, whoever closed it.
    pub fn connection_closed(&mut self, link: MeshConnectionId, peer: PeerId, now: Instant) {
        let jitter = self.jitter();
        let Some(member) = self.roster.get_mut(peer) else { return };
        if member.connections.remove(link, now, jitter) && !member.is_dead() {
            // Refused at once if its process is gone; a dial that works shows that it lives.
            self.dial_if_allowed(peer, now);
        }
    }

    /// It could not be reached to fetch from. Unless it has just answered a ping, nothing is fetched from it until it is heard of again.
    pub fn suspect_provider(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        if self.member(peer).is_some_and(|member| member.is_up && !member.connections.has_answered_recently()) {
            self.suspect(peer, "cannot be reached to fetch from", table, now);
        }
    }

    /// A neighbour sent something that cannot be decoded, or is forged, or too much of it.
    pub fn record_fault(&mut self, from: PeerId, fault: &'static str, now: Instant) {
        let Some(member) = self.roster.get_mut(from) else { return };
        let banned = member.score.record_fault(fault, now);
        self.push_output(Output::Fault { peer: from, fault, banned });
        if banned.is_some() {
            self.ban(from);
        }
    }

    /// Its connections end, and what it said does not count while it is banned.
    fn ban(&mut self, peer: PeerId) {
        let Some(member) = self.roster.get_mut(peer) else { return };
        member.connections.take_all();
        member.admitted_until = None;
        self.push_output(Output::Deny(peer));
        self.recently_banned.push(peer);
        self.chosen_is_stale = true;
    }

    pub(super) fn check_neighbours(&mut self, table: &mut Inventory, now: Instant) {
        for peer in std::mem::take(&mut self.recently_banned) {
            self.mark_down(peer, "banned", table);
        }
        let mut silent = Vec::new();
        let mut settled = Vec::new();
        self.roster.retain_watched(|peer, member| {
            if member.connections.tick(now) {
                silent.push(peer);
            }
            if member.suspected_since.is_some_and(|at| now.duration_since(at) > SUSPICION_LIFE) && !member.is_dead() {
                settled.push(peer);
            }
        });
        for peer in silent {
            self.suspect(peer, "does not answer", table, now);
        }
        for peer in settled {
            let me = self.local.peer;
            if let Some(member) = self.roster.get_mut(peer) {
                member.suspected_since = None;
                // What we saw ourselves stands until it answers us.
                member.suspected_by.retain(|by| *by == me);
            }
            // Those who were to look may be gone themselves, in a cluster that fell apart: by now it is known who is left.
            self.probe_if_low_rank(peer, now);
        }
    }

    /// A neighbour is silent: nothing is fetched from it any more, and others are told.
    pub(super) fn suspect(&mut self, peer: PeerId, reason: &'static str, table: &mut Inventory, now: Instant) {
        let me = self.local.peer;
        let jitter = self.jitter();
        let Some(member) = self.roster.get_mut(peer) else { return };
        let links = member.connections.take_all();
        let _ = member.connections.record_failed_dial(now, jitter);
        let (epoch, incarnation) = (member.epoch(), member.incarnation());
        let is_news = member.introduction.is_some() && !member.is_dead() && member.suspected_by.insert(me);
        if is_news {
            member.suspected_since.get_or_insert(now);
        }
        self.outputs.extend(links.into_iter().map(|link| Output::Close(link, peer)));
        self.roster.watch(peer);
        self.mark_down(peer, reason, table);
        if is_news {
            let mut suspicion = Suspicion { suspect: peer, epoch, incarnation, witness: me, signature: [0; 64].into() };
            suspicion.signature = self.verifier.sign(&suspicion.signed_bytes());
            self.push_output(Output::Publish(Gossip::Suspicion(suspicion)));
            self.confirm_dead_if_witnessed(peer, table, now);
        }
        self.chosen_is_stale = true;
    }

    pub(super) fn receive_suspicion(
        &mut self,
        suspicion: Suspicion,
        table: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let Suspicion { suspect: accused, epoch, incarnation, witness: by, .. } = suspicion;
        if by == self.local.peer || by == accused {
            return GossipVerdict::Ignore("own");
        }
        let is_known = |peer| {
            self.member(peer).is_some_and(|member| member.has_valid_credential(now) && !member.score.is_banned(now))
        };
        if !is_known(by) {
            return GossipVerdict::Ignore("unknown_author");
        }
        let is_me = accused == self.local.peer;
        let current = match self.member(accused) {
            _ if is_me => (self.log.epoch(), self.incarnation),
            Some(member) => (member.epoch(), member.incarnation()),
            None => return GossipVerdict::Ignore("unknown_peer"),
        };
        // A smaller incarnation is refuted. Only the accused itself makes larger ones, and its word may not have come here yet: what was
        // not believed is found by comparing.
        if (epoch, incarnation) != current {
            return GossipVerdict::Ignore("refuted");
        }
        if self.member(accused).is_some_and(|member| member.is_dead() || member.suspected_by.contains(&by)) {
            return GossipVerdict::Ignore("known");
        }
        if !self.verifier.is_signed(by, &suspicion.signed_bytes(), &suspicion.signature) {
            return GossipVerdict::Reject("forged");
        }
        // Only news count, or whoever plays it again would use up the witness's allowance.
        let is_within =
            self.roster.get_mut(by).is_some_and(|member| member.score.suspicions.try_take(&SUSPICION_LIMIT, now));
        if !is_within {
            return GossipVerdict::Ignore("too_many");
        }
        if is_me {
            self.refute(now);
            return GossipVerdict::Accept;
        }
        let Some(member) = self.roster.get_mut(accused) else { return GossipVerdict::Ignore("unknown_peer") };
        member.suspected_by.insert(by);
        member.suspected_since.get_or_insert(now);
        self.roster.watch(accused);
        self.confirm_dead_if_witnessed(accused, table, now);
        self.probe_if_low_rank(accused, now);
        GossipVerdict::Accept
    }

    /// An accused whom too few others are connected to is looked for by some who are not, so that there is a second witness.
    fn probe_if_low_rank(&mut self, accused: PeerId, now: Instant) {
        let rank = |peer: PeerId| super::neighbour_choice::rank(accused, peer);
        let mine = rank(self.local.peer);
        let before_me = self.roster.members.values().filter(|member| member.is_up && rank(member.peer.id) < mine);
        if before_me.take(MAX_PROBERS).count() < MAX_PROBERS {
            self.probe_suspect(accused, now);
        }
    }

    /// Whether somebody of whom others say that it is dead can be reached from here; if not, that is one more witness.
    pub(super) fn probe_suspect(&mut self, peer: PeerId, now: Instant) {
        if self.may_dial_more()
            && let Some(member) = self.roster.get_mut(peer)
            && !member.is_dead()
            && member.connections.mark_suspected()
        {
            self.dial_if_allowed(peer, now);
        }
    }

    /// Dead, if there are witnesses enough; one that is answering us is not, whoever says so.
    fn confirm_dead_if_witnessed(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        let others = self.roster.members.values().filter(|member| member.is_up && member.peer.id != peer).count();
        let Some(member) = self.member(peer) else { return };
        // Two keys of one pod are one witness.
        let pod = |by: &PeerId| self.member(*by).and_then(|member| member.pod.as_deref());
        let pods: BTreeSet<_> = member.suspected_by.iter().filter_map(pod).collect();
        let without = member.suspected_by.iter().filter(|by| pod(by).is_none()).count();
        if pods.len() + without < WITNESSES.min(others + 1) || member.connections.has_answered_recently() {
            return;
        }
        self.mark_dead(peer, "does not answer two of its neighbours", table, now);
    }

    pub(super) fn mark_dead(&mut self, peer: PeerId, reason: &'static str, table: &mut Inventory, now: Instant) {
        let Some(member) = self.roster.get_mut(peer) else { return };
        member.liveness = Liveness::Dead(now);
        member.suspected_since = None;
        let links = member.connections.take_all();
        self.outputs.extend(links.into_iter().map(|link| Output::Close(link, peer)));
        self.mark_down(peer, reason, table);
        self.roster.update_bucket(peer);
        self.chosen_is_stale = true;
    }

    /// Somebody takes this agent for dead, in its present incarnation.
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

    /// What was said into connections that were just ending has not been heard.
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
        table: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let Refutation { peer, epoch, incarnation, .. } = refutation;
        let Some(member) = self.member(peer) else { return GossipVerdict::Ignore("unknown_author") };
        if member.epoch() != epoch || incarnation <= member.incarnation() {
            return GossipVerdict::Ignore("known");
        }
        if !self.verifier.is_signed(peer, &refutation.signed_bytes(), &refutation.signature) {
            return GossipVerdict::Reject("forged");
        }
        let Some(member) = self.roster.get_mut(peer) else { return GossipVerdict::Ignore("unknown_author") };
        // An answer to what is really held against it costs nothing, or accusing would be cheaper than answering.
        let is_answer = !member.suspected_by.is_empty() || member.liveness != Liveness::Alive;
        if !is_answer && !member.score.refutations.try_take(&INTRODUCTION_LIMIT, now) {
            return GossipVerdict::Ignore("too_many");
        }
        member.refutation = Some(refutation);
        member.liveness = Liveness::Alive;
        member.suspected_by.clear();
        member.suspected_since = None;
        member.connections.record_refutation(now);
        member.connections.allow_dial_from(now);
        self.chosen_is_stale = true;
        self.mark_up_if_valid(peer, table, now);
        self.roster.update_bucket(peer);
        GossipVerdict::Accept
    }

    pub(super) fn receive_leave(
        &mut self,
        farewell: LeaveNotice,
        table: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let LeaveNotice { peer, epoch, .. } = farewell;
        let Some(member) = self.member(peer) else { return GossipVerdict::Ignore("unknown_author") };
        if member.epoch() != epoch || member.is_dead() {
            return GossipVerdict::Ignore("known");
        }
        if !self.verifier.is_signed(peer, &farewell.signed_bytes(), &farewell.signature) {
            return GossipVerdict::Reject("forged");
        }
        self.mark_dead(peer, "left", table, now);
        GossipVerdict::Accept
    }
}
