//! Whom this agent is connected to: those that it chose, those that it looks for, and how many.

use std::time::{Duration, Instant};

use rand::seq::IteratorRandom;

use super::membership::GIVEN_UP;
use super::roster::Member;
use super::{Notary, Output, Protocol, neighbours};
use crate::model::{PeerId, Question};

/// How often somebody who is held for dead is looked for: after a partition each side holds the other for dead.
const HEAL: Duration = Duration::from_secs(10);

/// Greetings and dials under way.
const MAX_TRIES: usize = 16;

impl<N: Notary> Protocol<N> {
    /// Connects to those who were chosen, finds others, and thins out.
    pub(super) fn keep_neighbours(&mut self, now: Instant) {
        if std::mem::take(&mut self.chosen_is_stale) {
            self.choose(now);
        }
        let me = self.own.peer;
        let mut tries = self.roster.watched().filter(|member| member.links.is_trying()).count();
        // Whom we lost ourselves counts again only when it answers us.
        let is_missed = |member: &&Member| !member.is_down() && member.accusers.contains(&me) && member.is_vouched(now);
        let missed = self.roster.watched().filter(is_missed).map(|member| member.peer.id);
        for peer in self.chosen.iter().copied().chain(missed).collect::<Vec<_>>() {
            if tries >= MAX_TRIES {
                break;
            }
            tries += usize::from(self.try_one(peer, now));
        }
        if self.heal_at <= now {
            self.heal_at = now + HEAL.mul_f64(0.8 + 0.2 * self.jitter());
            let down = |member: &&Member| member.is_down() && member.is_vouched(now) && member.links.may_try(now);
            let count = self.roster.members.values().filter(down).count();
            if count > 0 {
                let nth = (self.jitter() * count as f64) as usize;
                let found = self.roster.members.values().filter(down).nth(nth).map(|member| member.peer.id);
                found.map(|peer| self.try_one(peer, now));
            }
            self.thin_out();
        }
    }

    pub(super) fn has_room_to_try(&self) -> bool {
        self.roster.watched().filter(|member| member.links.is_trying()).count() < MAX_TRIES
    }

    /// Greets or dials it, if it is time.
    pub(super) fn try_one(&mut self, peer: PeerId, now: Instant) -> bool {
        let Some(member) = self.roster.get_mut(peer) else { return false };
        if !member.links.may_try(now) || member.conduct.is_banned(now) {
            return false;
        }
        member.links.trying(now);
        let output = match member.is_admitted(now) {
            true => Output::Dial(member.peer.clone()),
            false => Output::Greet(member.peer.clone()),
        };
        self.output(output);
        self.roster.watch(peer);
        true
    }

    fn choose(&mut self, now: Instant) {
        let zone = self.presence.as_ref().and_then(|presence| presence.zone.as_ref());
        let fit = |member: &&Member| {
            !member.is_down()
                && !member.conduct.is_banned(now)
                && member.links.attempts() < GIVEN_UP
                && (member.is_vouched(now) || member.is_admitted(now))
        };
        let members = self.roster.members.iter();
        let candidates =
            members.filter(|(_, member)| fit(member)).map(|(peer, member)| (*peer, member.peer.zone.as_ref()));
        self.chosen = neighbours::choose(self.salt, zone, candidates);
    }

    /// Too many connected to us, as to the first agents of a cluster: those whom we did not choose are told that we close, and have by now
    /// met others.
    fn thin_out(&mut self) {
        let linked: Vec<_> = self.roster.neighbours().map(|member| member.peer.id).collect();
        if linked.len() <= neighbours::MANY {
            return;
        }
        let excess = linked.len() - neighbours::THINNED;
        let unchosen = linked.into_iter().filter(|peer| !self.chosen.contains(peer));
        for peer in unchosen.choose_multiple(&mut self.rng, excess) {
            self.question(peer, Question::Part);
        }
    }
}
