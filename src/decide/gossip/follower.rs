//! The receiving side of a member's log: the entries that can be applied now, and the missing ones.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::BACKOFF;
use crate::model::{LogEntry, LogHead, PeerId};

/// Entries buffered behind a missing entry: twice what a publisher makes of one batch. At 64 KiB
/// each, a member can make this agent keep 2 MiB at most.
const MAX_BUFFERED: usize = 32;

/// Time that a missing entry may take. Gossip travels on several paths and overtakes itself by some
/// round trips. gossipsub repairs a lost message a heartbeat later.
const GOSSIP_DELAY: Duration = Duration::from_secs(2);

/// A neighbor that announces the log of a new node is often requesting the same log itself. So a
/// snapshot is requested again so often, after up to this delay: content spreads from the publisher
/// outward, and any two members are four steps apart.
const QUICK_RETRIES: u32 = 5;
const QUICK_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Up to this gap, the missing entries are requested; a larger gap needs a snapshot.
const MAX_GAP: u64 = 64;

/// The state of one member's log in one epoch.
#[derive(Debug, Clone, Default)]
pub(super) struct LogFollower {
    /// Number up to which the log is complete.
    sequence: u64,
    /// Head of that entry; `None` before the first.
    head: Option<LogHead>,
    /// The inventory dropped items beyond its limit. The items do not match the head, so the log
    /// cannot be relayed.
    is_partial: bool,
    /// Entries that wait for a missing one before them.
    buffered: BTreeMap<u64, LogEntry>,
    /// The largest number that a neighbor announced.
    known_sequence: u64,
    /// The neighbor that announced this number.
    source: Option<PeerId>,
    /// No request before this time.
    request_at: Option<Instant>,
    /// A request is in flight.
    is_requested: bool,
    /// A request for entries failed, so the next one is for a snapshot.
    needs_snapshot: bool,
    attempts: u32,
}

/// The result for a received entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EntryReceipt {
    /// Apply these entries, in this order.
    Next(Vec<LogEntry>),
    /// The entry waits for a missing one.
    Buffered,
    /// The entry or a later one was applied before, or waits already.
    Duplicate,
    /// The publisher signed two different entries with one number.
    Contradiction,
}

/// The request that a log needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MissingEntries {
    /// The entries after this number.
    Entries(u64),
    /// All items.
    Snapshot,
}

impl LogFollower {
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The head that proves the items of this log, unless the inventory dropped some.
    pub(super) fn complete_head(&self) -> Option<&LogHead> {
        self.head.as_ref().filter(|_| !self.is_partial)
    }

    /// Known entries that are missing.
    pub(super) fn behind(&self) -> u64 {
        self.known_sequence.saturating_sub(self.sequence)
    }

    /// The inventory dropped items beyond its limit.
    pub(super) fn mark_partial(&mut self) {
        self.is_partial = true;
    }

    /// Receives an entry with a verified signature, relayed by `from`.
    pub(super) fn receive(&mut self, entry: LogEntry, from: PeerId, now: Instant) -> EntryReceipt {
        let sequence = entry.head.sequence;
        if sequence <= self.sequence {
            let contradicts = self
                .head
                .as_ref()
                .is_some_and(|head| sequence == self.sequence && are_contradictory(head, &entry.head));
            return if contradicts { EntryReceipt::Contradiction } else { EntryReceipt::Duplicate };
        }
        if self.sequence.checked_add(1) == Some(sequence) {
            self.advance(&entry.head);
            let mut next = vec![entry];
            next.extend(self.take_consecutive());
            self.clear_if_complete();
            return EntryReceipt::Next(next);
        }
        match self.buffered.get(&sequence) {
            Some(known) if are_contradictory(&known.head, &entry.head) => return EntryReceipt::Contradiction,
            Some(_) => return EntryReceipt::Duplicate,
            None => {}
        }
        self.buffered.insert(sequence, entry);
        if self.buffered.len() > MAX_BUFFERED {
            // The missing entries come first and cover the oldest again.
            self.buffered.pop_first();
        }
        self.record_gap(sequence, from, now + GOSSIP_DELAY);
        EntryReceipt::Buffered
    }

    /// Whether no entry of this number has arrived.
    pub(super) fn is_new(&self, head: &LogHead) -> bool {
        head.sequence > self.sequence && !self.buffered.contains_key(&head.sequence)
    }

    /// Whether this entry was applied or is buffered, or a later one was applied.
    pub(super) fn contains(&self, head: &LogHead) -> bool {
        let is_same = |known: &LogHead| !are_contradictory(known, head);
        head.sequence < self.sequence
            || (head.sequence == self.sequence && self.head.as_ref().is_none_or(is_same))
            || self.buffered.get(&head.sequence).is_some_and(|known| is_same(&known.head))
    }

    /// A neighbor announced that the log goes up to `sequence`.
    pub(super) fn record_sequence(&mut self, sequence: u64, from: PeerId, now: Instant) {
        if sequence > self.sequence {
            // Gossip may still bring the entries, unless nothing of this log is here.
            let delay = if self.sequence == 0 { Duration::ZERO } else { GOSSIP_DELAY };
            self.record_gap(sequence, from, now + delay);
        }
    }

    fn record_gap(&mut self, sequence: u64, from: PeerId, at: Instant) {
        if sequence > self.known_sequence || self.source.is_none() {
            self.known_sequence = sequence.max(self.known_sequence);
            self.source = Some(from);
        }
        self.request_at.get_or_insert(at);
    }

    /// Whether any known entry is missing.
    pub(super) fn is_behind(&self) -> bool {
        self.behind() > 0
    }

    /// The request that is due now, and the neighbor that announced the missing entries.
    pub(super) fn due_request(&self, now: Instant) -> Option<(MissingEntries, Option<PeerId>)> {
        if self.is_requested || !self.is_behind() || self.request_at.is_none_or(|at| at > now) {
            return None;
        }
        // Without any entry, one snapshot is cheaper.
        let is_far_behind = self.behind() > MAX_GAP || (self.sequence == 0 && self.known_sequence > 1);
        let need = if self.needs_snapshot || is_far_behind {
            MissingEntries::Snapshot
        } else {
            MissingEntries::Entries(self.sequence)
        };
        Some((need, self.source))
    }

    /// A request was sent.
    pub(super) fn mark_requested(&mut self) {
        self.is_requested = true;
    }

    /// A request failed. Entries that are still missing are requested later; `jitter` is random, in
    /// 0..1.
    pub(super) fn record_failed_request(&mut self, need: MissingEntries, now: Instant, jitter: f64) {
        self.schedule_request(need, false, now, jitter);
    }

    fn schedule_request(&mut self, need: MissingEntries, answered: bool, now: Instant, jitter: f64) {
        self.is_requested = false;
        if self.is_behind() {
            let delay = match need {
                MissingEntries::Snapshot if answered && self.attempts < QUICK_RETRIES && self.source.is_some() => {
                    QUICK_RETRY_DELAY.mul_f64(0.5 + jitter / 2.0)
                }
                _ => {
                    // The next request goes to another neighbor.
                    self.source = None;
                    BACKOFF.jittered_wait(self.attempts.saturating_sub(QUICK_RETRIES), jitter)
                }
            };
            self.needs_snapshot = matches!(need, MissingEntries::Entries(_)) || self.needs_snapshot;
            self.request_at = Some(now + delay);
            self.attempts = self.attempts.saturating_add(1);
        } else {
            self.clear_if_complete();
        }
    }

    /// A neighbor replied without any missing entry. After a snapshot request, numbers that were
    /// only announced are forgotten. The next comparison brings back true ones; false ones would be
    /// requested without end.
    pub(super) fn record_empty_reply(&mut self, need: MissingEntries, now: Instant, jitter: f64) {
        if need == MissingEntries::Snapshot {
            self.known_sequence =
                self.buffered.last_key_value().map_or(self.sequence, |(sequence, _)| *sequence).max(self.sequence);
        }
        self.schedule_request(need, true, now, jitter);
    }

    /// Requests in a row without a useful reply.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// A reply brought entries.
    pub(super) fn record_useful_reply(&mut self, now: Instant) {
        self.is_requested = false;
        self.attempts = 0;
        if self.is_behind() {
            self.request_at = Some(now);
        } else {
            self.clear_if_complete();
        }
    }

    /// The inventory now has the items that this verified head covers, or a part of them if
    /// `partial`. Returns the buffered entries that follow.
    pub(super) fn replace(&mut self, head: LogHead, partial: bool) -> Vec<LogEntry> {
        self.is_partial = partial;
        self.needs_snapshot = false;
        self.advance(&head);
        let next = self.take_consecutive();
        self.clear_if_complete();
        next
    }

    fn advance(&mut self, head: &LogHead) {
        self.sequence = head.sequence;
        self.head = Some(head.clone());
        self.known_sequence = self.known_sequence.max(self.sequence);
    }

    /// Takes the buffered entries that are next, and drops the earlier ones.
    fn take_consecutive(&mut self) -> Vec<LogEntry> {
        let mut next = Vec::new();
        // A member may sign any number, and no entry follows the largest.
        self.buffered = self.sequence.checked_add(1).map(|first| self.buffered.split_off(&first)).unwrap_or_default();
        while let Some(entry) = self.sequence.checked_add(1).and_then(|number| self.buffered.remove(&number)) {
            self.advance(&entry.head);
            next.push(entry);
        }
        next
    }

    /// Resets the request state if no entry is missing.
    fn clear_if_complete(&mut self) {
        if !self.is_behind() {
            (self.request_at, self.source, self.needs_snapshot, self.attempts) = (None, None, false, 0);
        }
    }
}

/// Whether two heads of one number differ in content. One content may have several valid
/// signatures.
fn are_contradictory(a: &LogHead, b: &LogHead) -> bool {
    (a.changes, a.state) != (b.changes, b.state)
}
