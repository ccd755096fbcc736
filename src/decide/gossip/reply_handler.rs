//! Handles the replies of neighbors. Content counts as far as its author signed it.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::entries::{is_valid_item, validate_entry};
use super::follower::MissingEntries;
use super::requests::{MAX_MEMBERS_PER_REQUEST, PendingRequest};
use super::{CredentialVerifier, GossipVerdict, Output, Protocol, SyncRequestId};
use crate::decide::inventory::Inventory;
use crate::model::{
    Bits, InventoryItem, InventorySnapshot, LogEntry, LogHead, MAX_ITEMS, MAX_MEMBERS, MemberSummary, PeerId,
    SyncReply, SyncRequest, state_digest,
};

/// Time in which a refutation reaches all members. A member without the refutation by then has
/// missed it.
const REFUTATION_SPREAD_TIME: Duration = Duration::from_millis(500);

impl<N: CredentialVerifier> Protocol<N> {
    /// A neighbor replied to a request.
    pub fn receive_reply(&mut self, ask: SyncRequestId, reply: SyncReply, table: &mut Inventory, now: Instant) {
        let Some(PendingRequest { peer: from, question }) = self.in_flight.remove(&ask) else { return };
        match (question, reply) {
            (SyncRequest::Compare(_), SyncReply::Summaries(marks)) => {
                for mark in marks.into_iter().take(MAX_MEMBERS + 1) {
                    self.compare_mark(from, &mark, now);
                }
            }
            (SyncRequest::Introductions(wanted), SyncReply::Introductions(introductions, refutations)) => {
                let mut left: BTreeSet<_> = wanted.iter().copied().collect();
                for introduction in introductions.into_iter().take(MAX_MEMBERS_PER_REQUEST) {
                    if !left.remove(&introduction.profile.peer) {
                        continue;
                    }
                    if let GossipVerdict::Reject(fault) = self.receive_introduction(introduction, table, now) {
                        self.record_fault(from, fault, now);
                    }
                }
                let mut left: BTreeSet<_> = wanted.iter().copied().collect();
                for refutation in refutations.into_iter().take(MAX_MEMBERS_PER_REQUEST) {
                    if !left.remove(&refutation.peer) {
                        continue;
                    }
                    if let GossipVerdict::Reject(fault) = self.receive_refutation(refutation, table, now) {
                        self.record_fault(from, fault, now);
                    }
                }
                // The next comparison shows the sequences of the new members' logs.
                self.compare_with(from);
            }
            (SyncRequest::Entries { publisher, epoch, after }, SyncReply::Entries(entries)) => {
                self.apply_entries(from, publisher, epoch, after, entries, table, now);
            }
            (SyncRequest::Snapshot(wanted), SyncReply::Snapshot(snapshot)) => {
                self.apply_snapshot(from, &wanted, snapshot, table, now);
            }
            (SyncRequest::Disconnect, _) => self.close_connections(from),
            (question, SyncReply::Busy) => self.reschedule(question, now),
            (question, _) => {
                self.record_fault(from, "malformed", now);
                self.reschedule(question, now);
            }
        }
        self.request_missing(now);
    }

    /// A request failed: no reply in time, or the connection closed.
    pub fn record_request_failure(&mut self, ask: SyncRequestId, now: Instant) {
        if let Some(PendingRequest { peer: of, question }) = self.in_flight.remove(&ask) {
            match question {
                SyncRequest::Disconnect => self.close_connections(of),
                question => self.reschedule(question, now),
            }
        }
        self.request_missing(now);
    }

    fn close_connections(&mut self, peer: PeerId) {
        let Some(member) = self.roster.get_mut(peer) else { return };
        let links = member.connections.take_all();
        self.outputs.extend(links.into_iter().map(|link| Output::Close(link, peer)));
    }

    pub(super) fn reschedule(&mut self, question: SyncRequest, now: Instant) {
        let (publishers, need) = match question {
            SyncRequest::Entries { publisher, after, .. } => (vec![publisher], MissingEntries::Entries(after)),
            SyncRequest::Snapshot(publishers) => (publishers, MissingEntries::Snapshot),
            SyncRequest::Compare(_) | SyncRequest::Introductions(_) | SyncRequest::Disconnect => return,
        };
        for publisher in publishers {
            let jitter = self.jitter();
            if let Some(member) = self.roster.get_mut(publisher) {
                member.log.record_failed_request(need, now, jitter);
            }
        }
    }

    /// Compares a neighbor's summary of one member with this agent's own state.
    fn compare_mark(&mut self, from: PeerId, mark: &MemberSummary, now: Instant) {
        let MemberSummary { peer, epoch, version, incarnation, sequence, is_dead: down } = *mark;
        if self.missing_introductions.len() >= MAX_MEMBERS {
            return;
        }
        if peer == self.local.peer {
            let mine = self.introduction.as_ref().map_or((0, 0), |own| (own.profile.epoch, own.profile.version));
            if (epoch, version) > mine {
                self.missing_introductions.insert(peer, from);
            } else if down && epoch == mine.0 {
                match incarnation.cmp(&self.incarnation) {
                    Ordering::Equal => self.refute(now),
                    Ordering::Less => drop(self.refute_at.get_or_insert(now + REFUTATION_SPREAD_TIME)),
                    // Only this agent makes larger incarnations.
                    Ordering::Greater => {}
                }
            }
            return;
        }
        let Some(member) = self.roster.get_mut(peer) else {
            // A full table would ignore the introduction.
            if !down && !self.roster.is_full() {
                self.missing_introductions.insert(peer, from);
            }
            return;
        };
        let (known_epoch, known_version) = member.version();
        let is_newer = version > known_version || incarnation > member.incarnation();
        if epoch > known_epoch || (epoch == known_epoch && is_newer) {
            self.missing_introductions.insert(peer, from);
        }
        if epoch == known_epoch {
            member.log.record_sequence(sequence, from, now);
            if member.log.is_behind() {
                self.behind.insert(peer);
            }
            if down && member.is_up && incarnation == member.incarnation() {
                // The suspicions that the neighbor received have not arrived here.
                self.probe_suspect(peer, now);
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a request's three parts and its reply")]
    fn apply_entries(
        &mut self,
        from: PeerId,
        publisher: PeerId,
        epoch: u64,
        after: u64,
        entries: Vec<LogEntry>,
        table: &mut Inventory,
        now: Instant,
    ) {
        let before = self.member(publisher).map(|member| member.log.sequence());
        for entry in entries {
            let head = &entry.head;
            let next = self.member(publisher).map(|member| (member.epoch(), member.log.sequence().saturating_add(1)));
            // Requested entries come in order and without a gap. Gossip may have been faster.
            if head.publisher != publisher || next != Some((epoch, head.sequence)) {
                if next.is_some_and(|(_, next)| head.sequence < next) {
                    continue;
                }
                break;
            }
            let is_good = validate_entry(&entry).is_ok()
                && self.verifier.is_signed(publisher, &head.signed_bytes(), &head.signature);
            if !is_good {
                self.record_fault(from, "forged", now);
                break;
            }
            self.apply_entry(from, entry, table, now);
        }
        let jitter = self.jitter();
        let Some(member) = self.roster.get_mut(publisher) else { return };
        if Some(member.log.sequence()) > before {
            member.log.record_useful_reply(now);
        } else {
            member.log.record_empty_reply(MissingEntries::Entries(after), now, jitter);
        }
        self.finish_log_request(publisher);
    }

    fn finish_log_request(&mut self, publisher: PeerId) {
        if self.member(publisher).is_none_or(|member| !member.log.is_behind()) {
            self.behind.remove(&publisher);
        }
    }

    fn apply_snapshot(
        &mut self,
        from: PeerId,
        wanted: &[PeerId],
        snapshot: InventorySnapshot,
        table: &mut Inventory,
        now: Instant,
    ) {
        let InventorySnapshot { heads, items } = snapshot;
        let is_sound = heads.len() <= MAX_MEMBERS_PER_REQUEST + 1
            && items.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && items.iter().all(|(item, _)| is_valid_item(item));
        // An invalid name is no fault of the neighbor: a later release may have other forms, and
        // the neighbor only relays the publisher's items.
        let mut left: BTreeSet<_> = wanted.iter().copied().collect();
        for (number, head) in heads.into_iter().enumerate().filter(|_| is_sound) {
            if left.remove(&head.publisher) && !self.apply_member_snapshot(from, number, head, &items, table, now) {
                break;
            }
        }
        for publisher in wanted {
            let jitter = self.jitter();
            if let Some(member) = self.roster.get_mut(*publisher) {
                // Without effect on a log that the snapshot completed.
                member.log.record_empty_reply(MissingEntries::Snapshot, now, jitter);
            }
            self.finish_log_request(*publisher);
        }
    }

    /// Applies one member's part of a snapshot. False when the rest is not worth a look.
    fn apply_member_snapshot(
        &mut self,
        from: PeerId,
        number: usize,
        head: LogHead,
        items: &[(InventoryItem, Bits)],
        table: &mut Inventory,
        now: Instant,
    ) -> bool {
        let publisher = head.publisher;
        let is_news = self
            .member(publisher)
            .is_some_and(|member| member.epoch() == head.epoch && member.log.sequence() < head.sequence);
        if !is_news {
            return true;
        }
        if !self.verifier.is_signed(publisher, &head.signed_bytes(), &head.signature) {
            self.record_fault(from, "forged", now);
            return false;
        }
        let held = || items.iter().filter(|(_, bits)| bits.get(number)).map(|(item, _)| item);
        if held().count() > MAX_ITEMS || state_digest(held()) != head.state {
            // The publisher signed a state that is not its own, or this neighbor changed the items.
            // Only a neighbor that is the publisher is surely at fault. Another neighbor is asked
            // next.
            if from == publisher {
                self.record_fault(from, "snapshot_mismatch", now);
            }
            return true;
        }
        let dropped = table.replace(publisher, held().cloned());
        let Some(member) = self.roster.get_mut(publisher) else { return true };
        let next = member.log.replace(head, dropped > 0);
        self.apply_changes(publisher, next, table);
        true
    }
}
