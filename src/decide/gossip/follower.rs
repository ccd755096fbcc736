//! The other side of a member's log: which of its entries can be used now, and what is missing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::back_off;
use crate::model::{LogEntry, LogHead, PeerId};

/// Entries kept while one before them is missing. Twice what a publisher makes of one batch; at 64 KiB the
/// most that a member can make us keep is 2 MiB.
const MAX_BUFFERED: usize = 32;

/// How long a missing entry may take: gossip goes several ways and overtakes itself by some round trips, and a lost message
/// comes again by gossipsub's own repair, a heartbeat later.
const GOSSIP_DELAY: Duration = Duration::from_secs(2);

/// Who passed on that everything is to be asked for, as of a node that starts, is just asking for it as well, from whom it had it from. So
/// it is asked again so often, after up to so long: the content passes from the publisher outward, and any two are four steps apart.
const QUICK_RETRIES: u32 = 5;
const QUICK_RETRY_DELAY: Duration = Duration::from_secs(1);

/// A gap of so many entries is filled entry by entry; a larger one by a snapshot.
const MAX_GAP: u64 = 64;

/// What is known of one member's log, in one epoch.
#[derive(Debug, Clone, Default)]
pub(super) struct LogFollower {
    /// The last number up to which nothing is missing.
    sequence: u64,
    /// Of that entry; none before the first.
    head: Option<LogHead>,
    /// What the table holds of this member is not what its head says, because it was too much: it cannot be passed on.
    is_partial: bool,
    /// Entries further on, that wait for one in between.
    buffered: BTreeMap<u64, LogEntry>,
    /// The largest number that somebody spoke of.
    known_sequence: u64,
    /// Who spoke of it.
    source: Option<PeerId>,
    /// Nothing is asked before.
    request_at: Option<Instant>,
    /// A question is under way.
    is_requested: bool,
    /// Entries did not help; everything is asked for.
    needs_snapshot: bool,
    attempts: u32,
}

/// What became of an entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EntryReceipt {
    /// These are next, in this order.
    Next(Vec<LogEntry>),
    /// It waits for one that is missing.
    Buffered,
    /// Known already.
    Duplicate,
    /// The publisher signed two different entries with one number.
    Contradiction,
}

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MissingEntries {
    /// The entries after this number.
    Entries(u64),
    /// Everything.
    Snapshot,
}

impl LogFollower {
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// What the log's state here is proved by, if it can be.
    pub(super) fn proof(&self) -> Option<&LogHead> {
        self.head.as_ref().filter(|_| !self.is_partial)
    }

    /// How many entries are known to be missing.
    pub(super) fn behind(&self) -> u64 {
        self.known_sequence.saturating_sub(self.sequence)
    }

    /// The table could not take everything.
    pub(super) fn mark_partial(&mut self) {
        self.is_partial = true;
    }

    /// Takes an entry whose signature was checked; `from` passed it on.
    pub(super) fn receive(&mut self, entry: LogEntry, from: PeerId, now: Instant) -> EntryReceipt {
        let sequence = entry.head.sequence;
        if sequence <= self.sequence {
            let contradicts = self
                .head
                .as_ref()
                .is_some_and(|head| sequence == self.sequence && are_contradictory(head, &entry.head));
            return if contradicts { EntryReceipt::Contradiction } else { EntryReceipt::Duplicate };
        }
        if sequence == self.sequence + 1 {
            self.advance(&entry.head);
            let mut next = vec![entry];
            next.extend(self.take_consecutive());
            self.clear_if_complete();
            return EntryReceipt::Next(next);
        }
        match self.buffered.get(&sequence) {
            Some(held) if are_contradictory(&held.head, &entry.head) => return EntryReceipt::Contradiction,
            Some(_) => return EntryReceipt::Duplicate,
            None => {}
        }
        self.buffered.insert(sequence, entry);
        if self.buffered.len() > MAX_BUFFERED {
            // What has to come covers the oldest first.
            self.buffered.pop_first();
        }
        self.record_gap(sequence, from, now + GOSSIP_DELAY);
        EntryReceipt::Buffered
    }

    /// Whether nothing has come under this number yet.
    pub(super) fn is_new(&self, head: &LogHead) -> bool {
        head.sequence > self.sequence && !self.buffered.contains_key(&head.sequence)
    }

    /// Whether this very entry, or one beyond it, has come.
    pub(super) fn contains(&self, head: &LogHead) -> bool {
        let same = |known: &LogHead| !are_contradictory(known, head);
        head.sequence < self.sequence
            || (head.sequence == self.sequence && self.head.as_ref().is_none_or(same))
            || self.buffered.get(&head.sequence).is_some_and(|held| same(&held.head))
    }

    /// A neighbour's word that the log goes up to there.
    pub(super) fn record_sequence(&mut self, sequence: u64, from: PeerId, now: Instant) {
        if sequence > self.sequence {
            // It may be on its way by gossip, unless nothing is known of this log yet.
            let patience = if self.sequence == 0 { Duration::ZERO } else { GOSSIP_DELAY };
            self.record_gap(sequence, from, now + patience);
        }
    }

    fn record_gap(&mut self, sequence: u64, from: PeerId, at: Instant) {
        if sequence > self.known_sequence || self.source.is_none() {
            self.known_sequence = sequence.max(self.known_sequence);
            self.source = Some(from);
        }
        self.request_at.get_or_insert(at);
    }

    /// Whether anything is missing at all.
    pub(super) fn is_behind(&self) -> bool {
        self.behind() > 0
    }

    /// What to ask now, and who spoke of it.
    pub(super) fn due_request(&self, now: Instant) -> Option<(MissingEntries, Option<PeerId>)> {
        if self.is_requested || !self.is_behind() || self.request_at.is_none_or(|at| at > now) {
            return None;
        }
        // From nothing, everything in one answer is cheaper.
        let far = self.behind() > MAX_GAP || (self.sequence == 0 && self.known_sequence > 1);
        let need =
            if self.needs_snapshot || far { MissingEntries::Snapshot } else { MissingEntries::Entries(self.sequence) };
        Some((need, self.source))
    }

    /// It was asked for.
    pub(super) fn mark_requested(&mut self) {
        self.is_requested = true;
    }

    /// A question has ended, however. What is still missing is asked for later; `jitter` is random, in 0..1.
    pub(super) fn record_failed_request(&mut self, need: MissingEntries, now: Instant, jitter: f64) {
        self.schedule_request(need, false, now, jitter);
    }

    fn schedule_request(&mut self, need: MissingEntries, answered: bool, now: Instant, jitter: f64) {
        self.is_requested = false;
        if self.is_behind() {
            let later = match need {
                MissingEntries::Snapshot if answered && self.attempts < QUICK_RETRIES && self.source.is_some() => {
                    QUICK_RETRY_DELAY.mul_f64(0.5 + jitter / 2.0)
                }
                _ => {
                    // Another one is asked the next time.
                    self.source = None;
                    back_off(self.attempts.saturating_sub(QUICK_RETRIES), jitter)
                }
            };
            self.needs_snapshot = matches!(need, MissingEntries::Entries(_)) || self.needs_snapshot;
            self.request_at = Some(now + later);
            self.attempts = self.attempts.saturating_add(1);
        } else {
            self.clear_if_complete();
        }
    }

    /// Somebody answered, and had nothing more than is known here. What was only spoken of is forgotten: if it is true, the next comparison
    /// brings it up again; if it is not, it is not asked for without end.
    pub(super) fn record_empty_reply(&mut self, need: MissingEntries, now: Instant, jitter: f64) {
        if need == MissingEntries::Snapshot {
            self.known_sequence =
                self.buffered.last_key_value().map_or(self.sequence, |(sequence, _)| *sequence).max(self.sequence);
        }
        self.schedule_request(need, true, now, jitter);
    }

    /// Questions in a row that brought nothing.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// A question has brought something.
    pub(super) fn record_useful_reply(&mut self, now: Instant) {
        self.is_requested = false;
        self.attempts = 0;
        if self.is_behind() {
            self.request_at = Some(now);
        } else {
            self.clear_if_complete();
        }
    }

    /// The table now holds what this head, whose signature was checked, says. The entries that follow it are returned.
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

    /// Held entries that are next now; what is behind is thrown away.
    fn take_consecutive(&mut self) -> Vec<LogEntry> {
        let mut next = Vec::new();
        self.buffered = self.buffered.split_off(&(self.sequence + 1));
        while let Some(entry) = self.buffered.remove(&(self.sequence + 1)) {
            self.advance(&entry.head);
            next.push(entry);
        }
        next
    }

    /// What was missing has come.
    fn clear_if_complete(&mut self) {
        if !self.is_behind() {
            (self.request_at, self.source, self.needs_snapshot, self.attempts) = (None, None, false, 0);
        }
    }
}

/// Whether two heads of one number say different things; signatures of one text may differ.
fn are_contradictory(a: &LogHead, b: &LogHead) -> bool {
    (a.changes, a.state) != (b.changes, b.state)
}
