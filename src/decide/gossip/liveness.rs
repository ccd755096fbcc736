//! Who lives: neighbours that fall silent, suspicion, its confirmation by a second witness, and the word of the accused.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::conduct::{SUSPICIONS, WORDS};
use super::links::Heard;
use super::roster::Life;
use super::{GRAFTED, LinkId, Notary, Output, Protocol, Verdict};
use crate::decide::inventory::Inventory;
use crate::model::{Farewell, Gossip, PeerId, Refutation, Suspicion};

/// A suspicion that nobody confirmed is forgotten.
const UNCONFIRMED: Duration = Duration::from_secs(10);

/// Between two refutations: those who accuse at the same time are answered together.
const BREATH: Duration = Duration::from_millis(500);

/// Members that look for one that was accused.
const SEEKERS: usize = 3;

/// Witnesses that make a member dead everywhere, where there are as many.
const WITNESSES: usize = 2;

impl<N: Notary> Protocol<N> {
    /// A ping was answered over a connection.
    pub fn heard(&mut self, link: LinkId, peer: PeerId, table: &mut Inventory, now: Instant) {
        let is_first = self.roster.neighbours().next().is_none();
        let me = self.own.peer;
        let Some(member) = self.roster.get_mut(peer) else { return };
        if member.links.heard(link) == Heard::Alive {
            return;
        }
        // Others learn so from itself.
        if member.answers(me, now) {
            self.roster.touched(peer);
            self.chosen_is_stale = true;
        }
        self.judge(peer, table, now);
        self.compare_with(peer);
        if is_first {
            // It was we who were cut off, or just begin: how often others could not be reached says nothing.
            self.roster.members.values_mut().for_each(|member| member.links.try_anew());
            if self.introduction.is_some() {
                self.introduce_at = Some(now + GRAFTED);
            }
        }
    }

    /// A connection closed, whoever closed it.
    pub fn closed(&mut self, link: LinkId, peer: PeerId, now: Instant) {
        let jitter = self.jitter();
        let Some(member) = self.roster.get_mut(peer) else { return };
        if member.links.closed(link, now, jitter) && !member.is_down() {
            // Refused at once if its process is gone; a dial that works shows that it lives.
            self.try_one(peer, now);
        }
    }

    /// It could not be reached to fetch from. Unless it has just answered a ping, nothing is fetched from it until it is heard of again.
    pub fn doubted(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        if self.member(peer).is_some_and(|member| member.is_up && !member.links.fresh()) {
            self.accuse(peer, "cannot be reached to fetch from", table, now);
        }
    }

    /// A neighbour sent something that cannot be decoded, or is forged, or too much of it.
    pub fn nonsense(&mut self, from: PeerId, fault: &'static str, now: Instant) {
        let Some(member) = self.roster.get_mut(from) else { return };
        let banned = member.conduct.blame(fault, now);
        self.output(Output::Blame { peer: from, fault, banned });
        if banned.is_some() {
            self.shut_out(from);
        }
    }

    /// Its connections end, and what it said does not count while it is banned.
    fn shut_out(&mut self, peer: PeerId) {
        let Some(member) = self.roster.get_mut(peer) else { return };
        member.links.drop_all();
        member.admitted_until = None;
        self.output(Output::Deny(peer));
        self.banned_lately.push(peer);
        self.chosen_is_stale = true;
    }

    pub(super) fn watch_neighbours(&mut self, table: &mut Inventory, now: Instant) {
        for peer in std::mem::take(&mut self.banned_lately) {
            self.take_down(peer, "banned", table);
        }
        let mut silent = Vec::new();
        let mut settled = Vec::new();
        self.roster.look_after(|peer, member| {
            if member.links.tick(now) {
                silent.push(peer);
            }
            if member.accused_at.is_some_and(|at| now.duration_since(at) > UNCONFIRMED) && !member.is_down() {
                settled.push(peer);
            }
        });
        for peer in silent {
            self.accuse(peer, "does not answer", table, now);
        }
        for peer in settled {
            let me = self.own.peer;
            if let Some(member) = self.roster.get_mut(peer) {
                member.accused_at = None;
                // What we saw ourselves stands until it answers us.
                member.accusers.retain(|by| *by == me);
            }
            // Those who were to look may be gone themselves, in a cluster that fell apart: by now it is known who is left.
            self.see_for_myself(peer, now);
        }
    }

    /// A neighbour is silent: nothing is fetched from it any more, and others are told.
    pub(super) fn accuse(&mut self, peer: PeerId, reason: &'static str, table: &mut Inventory, now: Instant) {
        let me = self.own.peer;
        let jitter = self.jitter();
        let Some(member) = self.roster.get_mut(peer) else { return };
        let links = member.links.drop_all();
        let _ = member.links.failed(now, jitter);
        let (epoch, incarnation) = (member.epoch(), member.incarnation());
        let is_news = member.introduction.is_some() && !member.is_down() && member.accusers.insert(me);
        if is_news {
            member.accused_at.get_or_insert(now);
        }
        self.outputs.extend(links.into_iter().map(|link| Output::Close(link, peer)));
        self.roster.watch(peer);
        self.take_down(peer, reason, table);
        if is_news {
            let mut suspicion = Suspicion { accused: peer, epoch, incarnation, by: me, signature: [0; 64].into() };
            suspicion.signature = self.notary.sign(&suspicion.signed());
            self.output(Output::Publish(Gossip::Suspicion(suspicion)));
            self.confirm(peer, table, now);
        }
        self.chosen_is_stale = true;
    }

    pub(super) fn suspicion(&mut self, suspicion: Suspicion, table: &mut Inventory, now: Instant) -> Verdict {
        let Suspicion { accused, epoch, incarnation, by, .. } = suspicion;
        if by == self.own.peer || by == accused {
            return Verdict::Ignore("own");
        }
        let is_known =
            |peer| self.member(peer).is_some_and(|member| member.is_vouched(now) && !member.conduct.is_banned(now));
        if !is_known(by) {
            return Verdict::Ignore("unknown_author");
        }
        let is_me = accused == self.own.peer;
        let current = match self.member(accused) {
            _ if is_me => (self.log.epoch(), self.incarnation),
            Some(member) => (member.epoch(), member.incarnation()),
            None => return Verdict::Ignore("unknown_peer"),
        };
        // A smaller incarnation is refuted. Only the accused itself makes larger ones, and its word may not have come here yet: what was
        // not believed is found by comparing.
        if (epoch, incarnation) != current {
            return Verdict::Ignore("refuted");
        }
        if self.member(accused).is_some_and(|member| member.is_down() || member.accusers.contains(&by)) {
            return Verdict::Ignore("known");
        }
        if !self.notary.is_signed(by, &suspicion.signed(), &suspicion.signature) {
            return Verdict::Reject("forged");
        }
        // Only news count, or whoever plays it again would use up the witness's allowance.
        let is_within = self.roster.get_mut(by).is_some_and(|member| member.conduct.suspicions.take(&SUSPICIONS, now));
        if !is_within {
            return Verdict::Ignore("too_many");
        }
        if is_me {
            self.refute(now);
            return Verdict::Accept;
        }
        let Some(member) = self.roster.get_mut(accused) else { return Verdict::Ignore("unknown_peer") };
        member.accusers.insert(by);
        member.accused_at.get_or_insert(now);
        self.roster.watch(accused);
        self.confirm(accused, table, now);
        self.see_for_myself(accused, now);
        Verdict::Accept
    }

    /// An accused whom too few others are connected to is looked for by some who are not, so that there is a second witness.
    fn see_for_myself(&mut self, accused: PeerId, now: Instant) {
        let rank = |peer: PeerId| super::neighbours::rank(accused, peer);
        let mine = rank(self.own.peer);
        let before_me = self.roster.members.values().filter(|member| member.is_up && rank(member.peer.id) < mine);
        if before_me.take(SEEKERS).count() < SEEKERS {
            self.look_for(accused, now);
        }
    }

    /// Whether somebody of whom others say that it is dead can be reached from here; if not, that is one more witness.
    pub(super) fn look_for(&mut self, peer: PeerId, now: Instant) {
        if self.has_room_to_try()
            && let Some(member) = self.roster.get_mut(peer)
            && !member.is_down()
            && member.links.doubt()
        {
            self.try_one(peer, now);
        }
    }

    /// Dead, if there are witnesses enough; one that is answering us is not, whoever says so.
    fn confirm(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        let others = self.roster.members.values().filter(|member| member.is_up && member.peer.id != peer).count();
        let Some(member) = self.member(peer) else { return };
        // Two keys of one pod are one witness.
        let pod = |by: &PeerId| self.member(*by).and_then(|member| member.pod.as_deref());
        let pods: BTreeSet<_> = member.accusers.iter().filter_map(pod).collect();
        let without = member.accusers.iter().filter(|by| pod(by).is_none()).count();
        if pods.len() + without < WITNESSES.min(others + 1) || member.links.fresh() {
            return;
        }
        self.bury(peer, "does not answer two of its neighbours", table, now);
    }

    pub(super) fn bury(&mut self, peer: PeerId, reason: &'static str, table: &mut Inventory, now: Instant) {
        let Some(member) = self.roster.get_mut(peer) else { return };
        member.life = Life::Down(now);
        member.accused_at = None;
        let links = member.links.drop_all();
        self.outputs.extend(links.into_iter().map(|link| Output::Close(link, peer)));
        self.take_down(peer, reason, table);
        self.roster.touched(peer);
        self.chosen_is_stale = true;
    }

    /// Somebody takes this agent for dead, in its present incarnation.
    pub(super) fn refute(&mut self, now: Instant) {
        if self.refuted_at.is_some_and(|at| now.duration_since(at) < BREATH) {
            self.refute_at.get_or_insert(now + BREATH);
            return;
        }
        self.refuted_at = Some(now);
        self.incarnation += 1;
        let refutation = self.own_refutation();
        self.output(Output::Publish(Gossip::Refutation(refutation)));
    }

    /// What was said into connections that were just ending has not been heard.
    pub(super) fn refute_again(&mut self, now: Instant) {
        if self.refute_at.is_some_and(|at| at <= now) {
            self.refute_at = None;
            self.refute(now);
        }
    }

    pub(super) fn own_refutation(&self) -> Refutation {
        let (peer, epoch) = (self.own.peer, self.log.epoch());
        let mut refutation = Refutation { peer, epoch, incarnation: self.incarnation, signature: [0; 64].into() };
        refutation.signature = self.notary.sign(&refutation.signed());
        refutation
    }

    pub(super) fn refutation(&mut self, refutation: Refutation, table: &mut Inventory, now: Instant) -> Verdict {
        let Refutation { peer, epoch, incarnation, .. } = refutation;
        let Some(member) = self.member(peer) else { return Verdict::Ignore("unknown_author") };
        if member.epoch() != epoch || incarnation <= member.incarnation() {
            return Verdict::Ignore("known");
        }
        if !self.notary.is_signed(peer, &refutation.signed(), &refutation.signature) {
            return Verdict::Reject("forged");
        }
        let Some(member) = self.roster.get_mut(peer) else { return Verdict::Ignore("unknown_author") };
        // An answer to what is really held against it costs nothing, or accusing would be cheaper than answering.
        let is_answer = !member.accusers.is_empty() || member.life != Life::Alive;
        if !is_answer && !member.conduct.refutations.take(&WORDS, now) {
            return Verdict::Ignore("too_many");
        }
        member.refutation = Some(refutation);
        member.life = Life::Alive;
        member.accusers.clear();
        member.accused_at = None;
        member.links.refuted(now);
        member.links.try_from(now);
        self.chosen_is_stale = true;
        self.judge(peer, table, now);
        self.roster.touched(peer);
        Verdict::Accept
    }

    pub(super) fn farewell(&mut self, farewell: Farewell, table: &mut Inventory, now: Instant) -> Verdict {
        let Farewell { peer, epoch, .. } = farewell;
        let Some(member) = self.member(peer) else { return Verdict::Ignore("unknown_author") };
        if member.epoch() != epoch || member.is_down() {
            return Verdict::Ignore("known");
        }
        if !self.notary.is_signed(peer, &farewell.signed(), &farewell.signature) {
            return Verdict::Reject("forged");
        }
        self.bury(peer, "left", table, now);
        Verdict::Accept
    }
}
