//! What a neighbour answers: believed as far as its authors signed it, and what follows for what is still missing.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::asking::{Asked, MAX_OF};
use super::entries::{check, is_proper};
use super::follower::Need;
use super::{AskId, Notary, Output, Protocol, Verdict};
use crate::decide::inventory::Inventory;
use crate::model::{
    Bits, Entry, Head, Item, MAX_ITEMS, MAX_MEMBERS, Mark, PeerId, Question, Reply, Snapshot, state_digest,
};

/// How long our refutation may take to be heard everywhere. Somebody who has not heard it by then never will.
const UNHEARD: Duration = Duration::from_millis(500);

impl<N: Notary> Protocol<N> {
    /// A question was answered.
    pub fn answered(&mut self, ask: AskId, reply: Reply, table: &mut Inventory, now: Instant) {
        let Some(Asked { of: from, question }) = self.asked.remove(&ask) else { return };
        match (question, reply) {
            (Question::Compare(_), Reply::Marks(marks)) => {
                for mark in marks.into_iter().take(MAX_MEMBERS + 1) {
                    self.mark(from, &mark, now);
                }
            }
            (Question::Introductions(wanted), Reply::Introductions(introductions, refutations)) => {
                let mut left: BTreeSet<_> = wanted.iter().copied().collect();
                for introduction in introductions.into_iter().take(MAX_OF) {
                    if !left.remove(&introduction.profile.peer) {
                        continue;
                    }
                    if let Verdict::Reject(fault) = self.introduction(introduction, table, now) {
                        self.nonsense(from, fault, now);
                    }
                }
                let mut left: BTreeSet<_> = wanted.iter().copied().collect();
                for refutation in refutations.into_iter().take(MAX_OF) {
                    if !left.remove(&refutation.peer) {
                        continue;
                    }
                    if let Verdict::Reject(fault) = self.refutation(refutation, table, now) {
                        self.nonsense(from, fault, now);
                    }
                }
                // Their logs are known to go further than nothing, which the next comparison tells.
                self.compare_with(from);
            }
            (Question::Entries { publisher, epoch, after }, Reply::Entries(entries)) => {
                self.take_entries(from, publisher, epoch, after, entries, table, now);
            }
            (Question::Snapshot(wanted), Reply::Snapshot(snapshot)) => {
                self.take_snapshot(from, &wanted, snapshot, table, now);
            }
            (Question::Part, _) => self.close_links(from),
            (question, Reply::Busy) => self.in_vain(question, now),
            (question, _) => {
                self.nonsense(from, "malformed", now);
                self.in_vain(question, now);
            }
        }
        self.ask(now);
    }

    /// A question was not answered: not in time, or the connection is gone.
    pub fn unanswered(&mut self, ask: AskId, now: Instant) {
        if let Some(Asked { of, question }) = self.asked.remove(&ask) {
            match question {
                Question::Part => self.close_links(of),
                question => self.in_vain(question, now),
            }
        }
        self.ask(now);
    }

    fn close_links(&mut self, peer: PeerId) {
        let Some(member) = self.roster.get_mut(peer) else { return };
        let links = member.links.drop_all();
        self.outputs.extend(links.into_iter().map(|link| Output::Close(link, peer)));
    }

    pub(super) fn in_vain(&mut self, question: Question, now: Instant) {
        let (publishers, need) = match question {
            Question::Entries { publisher, after, .. } => (vec![publisher], Need::Entries(after)),
            Question::Snapshot(publishers) => (publishers, Need::Snapshot),
            Question::Compare(_) | Question::Introductions(_) | Question::Part => return,
        };
        for publisher in publishers {
            let jitter = self.jitter();
            if let Some(member) = self.roster.get_mut(publisher) {
                member.log.asked_in_vain(need, now, jitter);
            }
        }
    }

    /// What a neighbour knows of one member, compared with what we know.
    fn mark(&mut self, from: PeerId, mark: &Mark, now: Instant) {
        let Mark { peer, epoch, version, incarnation, sequence, down } = *mark;
        if self.unknown.len() >= MAX_MEMBERS {
            return;
        }
        if peer == self.own.peer {
            let mine = self.introduction.as_ref().map_or((0, 0), |own| (own.profile.epoch, own.profile.version));
            if (epoch, version) > mine {
                self.unknown.insert(peer, from);
            } else if down && epoch == mine.0 {
                match incarnation.cmp(&self.incarnation) {
                    Ordering::Equal => self.refute(now),
                    Ordering::Less => drop(self.refute_at.get_or_insert(now + UNHEARD)),
                    // Nobody but us makes larger ones.
                    Ordering::Greater => {}
                }
            }
            return;
        }
        let Some(member) = self.roster.get_mut(peer) else {
            // No room for it: its introduction would be ignored.
            if !down && !self.roster.is_full() {
                self.unknown.insert(peer, from);
            }
            return;
        };
        let (known_epoch, known_version) = member.version();
        let is_newer = version > known_version || incarnation > member.incarnation();
        if epoch > known_epoch || (epoch == known_epoch && is_newer) {
            self.unknown.insert(peer, from);
        }
        if epoch == known_epoch {
            member.log.hear_of(sequence, from, now);
            if member.log.is_behind() {
                self.behind.insert(peer);
            }
            if down && member.is_up && incarnation == member.incarnation() {
                // Whoever said so to others has not been heard here.
                self.look_for(peer, now);
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a question's three parts and its answer")]
    fn take_entries(
        &mut self,
        from: PeerId,
        publisher: PeerId,
        epoch: u64,
        after: u64,
        entries: Vec<Entry>,
        table: &mut Inventory,
        now: Instant,
    ) {
        let before = self.member(publisher).map(|member| member.log.at());
        for entry in entries {
            let head = &entry.head;
            let next = self.member(publisher).map(|member| (member.epoch(), member.log.at() + 1));
            // In order and without a gap, or it is not what was asked for; gossip may have been faster.
            if head.publisher != publisher || next != Some((epoch, head.sequence)) {
                if next.is_some_and(|(_, next)| head.sequence < next) {
                    continue;
                }
                break;
            }
            let is_good = check(&entry).is_ok() && self.notary.is_signed(publisher, &head.signed(), &head.signature);
            if !is_good {
                self.nonsense(from, "forged", now);
                break;
            }
            self.take_entry(from, entry, table, now);
        }
        let jitter = self.jitter();
        let Some(member) = self.roster.get_mut(publisher) else { return };
        if Some(member.log.at()) > before {
            member.log.asked_well(now);
        } else {
            member.log.answered_in_vain(Need::Entries(after), now, jitter);
        }
        self.done_with(publisher);
    }

    fn done_with(&mut self, publisher: PeerId) {
        if self.member(publisher).is_none_or(|member| !member.log.is_behind()) {
            self.behind.remove(&publisher);
        }
    }

    fn take_snapshot(
        &mut self,
        from: PeerId,
        wanted: &[PeerId],
        snapshot: Snapshot,
        table: &mut Inventory,
        now: Instant,
    ) {
        let Snapshot { heads, items } = snapshot;
        let is_sound = heads.len() <= MAX_OF + 1
            && items.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && items.iter().all(|(item, _)| is_proper(item));
        // Nobody is blamed for a name that is none: a later release may know other forms, and whoever passes it on has not made it.
        let mut left: BTreeSet<_> = wanted.iter().copied().collect();
        for (number, head) in heads.into_iter().enumerate().filter(|_| is_sound) {
            if left.remove(&head.publisher) && !self.take_part(from, number, head, &items, table, now) {
                break;
            }
        }
        for publisher in wanted {
            let jitter = self.jitter();
            if let Some(member) = self.roster.get_mut(*publisher) {
                // Settled already, if it helped.
                member.log.answered_in_vain(Need::Snapshot, now, jitter);
            }
            self.done_with(*publisher);
        }
    }

    /// One member's part of a snapshot. False when the rest is not worth looking at.
    fn take_part(
        &mut self,
        from: PeerId,
        number: usize,
        head: Head,
        items: &[(Item, Bits)],
        table: &mut Inventory,
        now: Instant,
    ) -> bool {
        let publisher = head.publisher;
        let is_news = self
            .member(publisher)
            .is_some_and(|member| member.epoch() == head.epoch && member.log.at() < head.sequence);
        if !is_news {
            return true;
        }
        if !self.notary.is_signed(publisher, &head.signed(), &head.signature) {
            self.nonsense(from, "forged", now);
            return false;
        }
        let held = || items.iter().filter(|(_, bits)| bits.get(number)).map(|(item, _)| item);
        if held().count() > MAX_ITEMS || state_digest(held()) != head.state {
            // Either the publisher signed another state than its own, or this neighbour changed it. Only who is both can be blamed; and
            // another neighbour is asked.
            if from == publisher {
                self.nonsense(from, "snapshot_mismatch", now);
            }
            return true;
        }
        let dropped = table.replace(publisher, held().cloned());
        let Some(member) = self.roster.get_mut(publisher) else { return true };
        let next = member.log.replace(head, dropped > 0);
        self.apply(publisher, next, table);
        true
    }
}
