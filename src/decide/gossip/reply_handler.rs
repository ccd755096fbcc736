//! Handles the replies of neighbors. Content counts as far as its author signed it.

use super::fault::GossipFault;
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
    pub fn receive_reply(&mut self, id: SyncRequestId, reply: SyncReply, inventory: &mut Inventory, now: Instant) {
        let Some(PendingRequest { peer: from, request: question }) = self.in_flight.remove(&id) else { return };
        match (question, reply) {
            (SyncRequest::Compare(_), SyncReply::Summaries(summaries)) => {
                for summary in summaries.into_iter().take(MAX_MEMBERS + 1) {
                    self.compare_summary(from, &summary, now);
                }
            }
            (SyncRequest::Introductions(wanted), SyncReply::Introductions(introductions, refutations)) => {
                let mut unanswered: BTreeSet<_> = wanted.iter().copied().collect();
                for introduction in introductions.into_iter().take(MAX_MEMBERS_PER_REQUEST) {
                    if !unanswered.remove(&introduction.profile.peer) {
                        continue;
                    }
                    if let GossipVerdict::Reject(fault) = self.receive_introduction(introduction, inventory, now) {
                        self.record_fault(from, fault, now);
                    }
                }
                let mut unanswered: BTreeSet<_> = wanted.iter().copied().collect();
                for refutation in refutations.into_iter().take(MAX_MEMBERS_PER_REQUEST) {
                    if !unanswered.remove(&refutation.peer) {
                        continue;
                    }
                    if let GossipVerdict::Reject(fault) = self.receive_refutation(refutation, inventory, now) {
                        self.record_fault(from, fault, now);
                    }
                }
                // The next comparison shows the sequences of the new members' logs.
                self.compare_with(from);
            }
            (SyncRequest::Entries { publisher, epoch, after }, SyncReply::Entries(entries)) => {
                self.apply_entries(from, publisher, epoch, after, entries, inventory, now);
            }
            (SyncRequest::Snapshot(wanted), SyncReply::Snapshot(snapshot)) => {
                self.apply_snapshot(from, &wanted, snapshot, inventory, now);
            }
            (SyncRequest::Disconnect, _) => self.close_connections(from),
            (request, SyncReply::Busy) => self.reschedule(request, now),
            (request, _) => {
                self.record_fault(from, GossipFault::Malformed, now);
                self.reschedule(request, now);
            }
        }
        self.request_missing(now);
    }

    /// A request failed: no reply in time, or the connection closed.
    pub fn record_request_failure(&mut self, id: SyncRequestId, now: Instant) {
        if let Some(PendingRequest { peer, request: question }) = self.in_flight.remove(&id) {
            match question {
                SyncRequest::Disconnect => self.close_connections(peer),
                request => self.reschedule(request, now),
            }
        }
        self.request_missing(now);
    }

    fn close_connections(&mut self, peer: PeerId) {
        let Some(member) = self.membership.get_mut(peer) else { return };
        let connections = member.connections.take_all();
        self.outputs.extend(connections.into_iter().map(|connection| Output::Close(connection, peer)));
    }

    pub(super) fn reschedule(&mut self, request: SyncRequest, now: Instant) {
        let (publishers, need) = match request {
            SyncRequest::Entries { publisher, after, .. } => (vec![publisher], MissingEntries::Entries(after)),
            SyncRequest::Snapshot(publishers) => (publishers, MissingEntries::Snapshot),
            SyncRequest::Compare(_) | SyncRequest::Introductions(_) | SyncRequest::Disconnect => return,
        };
        for publisher in publishers {
            let jitter = self.jitter();
            if let Some(member) = self.membership.get_mut(publisher) {
                member.log.record_failed_request(need, now, jitter);
            }
        }
    }

    /// Compares a neighbor's summary of one member with this agent's own state.
    fn compare_summary(&mut self, from: PeerId, summary: &MemberSummary, now: Instant) {
        let MemberSummary { peer, epoch, version, incarnation, sequence, is_dead } = *summary;
        if self.missing_introductions.len() >= MAX_MEMBERS {
            return;
        }
        if peer == self.local.peer {
            let mine = self.introduction.as_ref().map_or((0, 0), |own| (own.profile.epoch, own.profile.version));
            if (epoch, version) > mine {
                self.missing_introductions.insert(peer, from);
            } else if is_dead && epoch == mine.0 {
                match incarnation.cmp(&self.incarnation) {
                    Ordering::Equal => self.refute(now),
                    Ordering::Less => drop(self.refute_at.get_or_insert(now + REFUTATION_SPREAD_TIME)),
                    // Only this agent makes larger incarnations.
                    Ordering::Greater => {}
                }
            }
            return;
        }
        let Some(member) = self.membership.get_mut(peer) else {
            // A full table would ignore the introduction.
            if !is_dead && !self.membership.is_full() {
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
            if is_dead && member.is_up && incarnation == member.incarnation() {
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
        inventory: &mut Inventory,
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
            let is_valid = validate_entry(&entry).is_ok()
                && self.verifier.is_signed(publisher, &head.signed_bytes(), &head.signature);
            if !is_valid {
                self.record_fault(from, GossipFault::Forged, now);
                break;
            }
            self.apply_entry(from, entry, inventory, now);
        }
        let jitter = self.jitter();
        let Some(member) = self.membership.get_mut(publisher) else { return };
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
        inventory: &mut Inventory,
        now: Instant,
    ) {
        let InventorySnapshot { heads, items } = snapshot;
        let is_valid = heads.len() <= MAX_MEMBERS_PER_REQUEST + 1
            && items.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && items.iter().all(|(item, _)| is_valid_item(item));
        // An invalid name is no fault of the neighbor: a later release may have other forms, and
        // the neighbor only relays the publisher's items.
        let mut unanswered: BTreeSet<_> = wanted.iter().copied().collect();
        for (number, head) in heads.into_iter().enumerate().filter(|_| is_valid) {
            if unanswered.remove(&head.publisher)
                && !self.apply_member_snapshot(from, number, head, &items, inventory, now)
            {
                break;
            }
        }
        for publisher in wanted {
            let jitter = self.jitter();
            if let Some(member) = self.membership.get_mut(*publisher) {
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
        inventory: &mut Inventory,
        now: Instant,
    ) -> bool {
        let publisher = head.publisher;
        let is_newer = self
            .member(publisher)
            .is_some_and(|member| member.epoch() == head.epoch && member.log.sequence() < head.sequence);
        if !is_newer {
            return true;
        }
        if !self.verifier.is_signed(publisher, &head.signed_bytes(), &head.signature) {
            self.record_fault(from, GossipFault::Forged, now);
            return false;
        }
        let member_items = || items.iter().filter(|(_, bits)| bits.get(number)).map(|(item, _)| item);
        if member_items().count() > MAX_ITEMS || state_digest(member_items()) != head.state {
            // The publisher signed a state that is not its own, or this neighbor changed the items.
            // Only a neighbor that is the publisher is surely at fault. Another neighbor is asked
            // next.
            if from == publisher {
                self.record_fault(from, GossipFault::SnapshotMismatch, now);
            }
            return true;
        }
        let dropped = inventory.replace(publisher, member_items().cloned());
        let Some(member) = self.membership.get_mut(publisher) else { return true };
        let next = member.log.replace(head, dropped > 0);
        self.apply_changes(publisher, next, inventory);
        true
    }
}
