//! The other side of a member's log: which of its entries can be used now, and what is missing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pause;
use crate::model::{Entry, Head, PeerId};

/// Entries kept while one before them is missing. Twice what a publisher makes of one batch; at 64 KiB the
/// most that a member can make us keep is 2 MiB.
const MAX_HELD: usize = 32;

/// How long a missing entry may take: gossip goes several ways and overtakes itself by some round trips, and a lost message
/// comes again by gossipsub's own repair, a heartbeat later.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who passed on that everything is to be asked for, as of a node that starts, is just asking for it as well, from whom it had it from. So
/// it is asked again so often, after up to so long: the content passes from the publisher outward, and any two are four steps apart.
const SOON_TRIES: u32 = 5;
const SOON: Duration = Duration::from_secs(1);

/// A gap of so many entries is filled entry by entry; a larger one by a snapshot.
const MAX_GAP: u64 = 64;

/// What is known of one member's log, in one epoch.
#[derive(Debug, Clone, Default)]
pub(super) struct Follower {
    /// The last number up to which nothing is missing.
    at: u64,
    /// Of that entry; none before the first.
    head: Option<Head>,
    /// What the table holds of this member is not what its head says, because it was too much: it cannot be passed on.
    partial: bool,
    /// Entries further on, that wait for one in between.
    held: BTreeMap<u64, Entry>,
    /// The largest number that somebody spoke of.
    known: u64,
    /// Who spoke of it.
    source: Option<PeerId>,
    /// Nothing is asked before.
    ask_at: Option<Instant>,
    /// A question is under way.
    asked: bool,
    /// Entries did not help; everything is asked for.
    needs_all: bool,
    attempts: u32,
}

/// What became of an entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Receipt {
    /// These are next, in this order.
    Next(Vec<Entry>),
    /// It waits for one that is missing.
    Held,
    /// Known already.
    Late,
    /// The publisher signed two different entries with one number.
    Contradiction,
}

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// The entries after this number.
    Entries(u64),
    /// Everything.
    Snapshot,
}

impl Follower {
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// What the log's state here is proved by, if it can be.
    pub(super) fn proof(&self) -> Option<&Head> {
        self.head.as_ref().filter(|_| !self.partial)
    }

    /// How many entries are known to be missing.
    pub(super) fn behind(&self) -> u64 {
        self.known.saturating_sub(self.at)
    }

    /// The table could not take everything.
    pub(super) fn mark_partial(&mut self) {
        self.partial = true;
    }

    /// Takes an entry whose signature was checked; `from` passed it on.
    pub(super) fn receive(&mut self, entry: Entry, from: PeerId, now: Instant) -> Receipt {
        let sequence = entry.head.sequence;
        if sequence <= self.at {
            let contradicts = self.head.as_ref().is_some_and(|head| sequence == self.at && differ(head, &entry.head));
            return if contradicts { Receipt::Contradiction } else { Receipt::Late };
        }
        if sequence == self.at + 1 {
            self.step(&entry.head);
            let mut next = vec![entry];
            next.extend(self.release());
            self.settle();
            return Receipt::Next(next);
        }
        match self.held.get(&sequence) {
            Some(held) if differ(&held.head, &entry.head) => return Receipt::Contradiction,
            Some(_) => return Receipt::Late,
            None => {}
        }
        self.held.insert(sequence, entry);
        if self.held.len() > MAX_HELD {
            // What has to come covers the oldest first.
            self.held.pop_first();
        }
        self.missing(sequence, from, now + PATIENCE);
        Receipt::Held
    }

    /// Whether nothing has come under this number yet.
    pub(super) fn is_news(&self, head: &Head) -> bool {
        head.sequence > self.at && !self.held.contains_key(&head.sequence)
    }

    /// Whether this very entry, or one beyond it, has come.
    pub(super) fn has(&self, head: &Head) -> bool {
        let same = |known: &Head| !differ(known, head);
        head.sequence < self.at
            || (head.sequence == self.at && self.head.as_ref().is_none_or(same))
            || self.held.get(&head.sequence).is_some_and(|held| same(&held.head))
    }

    /// A neighbour's word that the log goes up to there.
    pub(super) fn hear_of(&mut self, sequence: u64, from: PeerId, now: Instant) {
        if sequence > self.at {
            // It may be on its way by gossip, unless nothing is known of this log yet.
            let patience = if self.at == 0 { Duration::ZERO } else { PATIENCE };
            self.missing(sequence, from, now + patience);
        }
    }

    fn missing(&mut self, sequence: u64, from: PeerId, at: Instant) {
        if sequence > self.known || self.source.is_none() {
            self.known = sequence.max(self.known);
            self.source = Some(from);
        }
        self.ask_at.get_or_insert(at);
    }

    /// Whether anything is missing at all.
    pub(super) fn is_behind(&self) -> bool {
        self.behind() > 0
    }

    /// What to ask now, and who spoke of it.
    pub(super) fn need(&self, now: Instant) -> Option<(Need, Option<PeerId>)> {
        if self.asked || !self.is_behind() || self.ask_at.is_none_or(|at| at > now) {
            return None;
        }
        // From nothing, everything in one answer is cheaper.
        let far = self.behind() > MAX_GAP || (self.at == 0 && self.known > 1);
        let need = if self.needs_all || far { Need::Snapshot } else { Need::Entries(self.at) };
        Some((need, self.source))
    }

    /// It was asked for.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    /// A question has ended, however. What is still missing is asked for later; `jitter` is random, in 0..1.
    pub(super) fn asked_in_vain(&mut self, need: Need, now: Instant, jitter: f64) {
        self.later(need, false, now, jitter);
    }

    fn later(&mut self, need: Need, answered: bool, now: Instant, jitter: f64) {
        self.asked = false;
        if self.is_behind() {
            let later = match need {
                Need::Snapshot if answered && self.attempts < SOON_TRIES && self.source.is_some() => {
                    SOON.mul_f64(0.5 + jitter / 2.0)
                }
                _ => {
                    // Another one is asked the next time.
                    self.source = None;
                    pause(self.attempts.saturating_sub(SOON_TRIES), jitter)
                }
            };
            self.needs_all = matches!(need, Need::Entries(_)) || self.needs_all;
            self.ask_at = Some(now + later);
            self.attempts = self.attempts.saturating_add(1);
        } else {
            self.settle();
        }
    }

    /// Somebody answered, and had nothing more than is known here. What was only spoken of is forgotten: if it is true, the next comparison
    /// brings it up again; if it is not, it is not asked for without end.
    pub(super) fn answered_in_vain(&mut self, need: Need, now: Instant, jitter: f64) {
        if need == Need::Snapshot {
            self.known = self.held.last_key_value().map_or(self.at, |(sequence, _)| *sequence).max(self.at);
        }
        self.later(need, true, now, jitter);
    }

    /// Questions in a row that brought nothing.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// A question has brought something.
    pub(super) fn asked_well(&mut self, now: Instant) {
        self.asked = false;
        self.attempts = 0;
        if self.is_behind() {
            self.ask_at = Some(now);
        } else {
            self.settle();
        }
    }

    /// The table now holds what this head, whose signature was checked, says. The entries that follow it are returned.
    pub(super) fn replace(&mut self, head: Head, partial: bool) -> Vec<Entry> {
        self.partial = partial;
        self.needs_all = false;
        self.step(&head);
        let next = self.release();
        self.settle();
        next
    }

    fn step(&mut self, head: &Head) {
        self.at = head.sequence;
        self.head = Some(head.clone());
        self.known = self.known.max(self.at);
    }

    /// Held entries that are next now; what is behind is thrown away.
    fn release(&mut self) -> Vec<Entry> {
        let mut next = Vec::new();
        self.held = self.held.split_off(&(self.at + 1));
        while let Some(entry) = self.held.remove(&(self.at + 1)) {
            self.step(&entry.head);
            next.push(entry);
        }
        next
    }

    /// What was missing has come.
    fn settle(&mut self) {
        if !self.is_behind() {
            (self.ask_at, self.source, self.needs_all, self.attempts) = (None, None, false, 0);
        }
    }
}

/// Whether two heads of one number say different things; signatures of one text may differ.
fn differ(a: &Head, b: &Head) -> bool {
    (a.changes, a.state) != (b.changes, b.state)
}
