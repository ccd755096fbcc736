//! The other side of a peer's log: which of its announcements can be used now, and when to ask it for everything. Pure; the time
//! is an argument.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::backoff;
use crate::model::{ContentChange, MAX_ITEMS};
use crate::oci::{Reference, Repository};
use crate::wire::{Announcement, MAX_CHANGES, Snapshot};

/// Announcements kept while one before them is missing. Twice what a publisher makes of one batch; at 64 KiB the
/// most that a peer can make us keep is 2 MiB.
const MAX_HELD: usize = 32;

/// An announcement that is this far behind is late (a snapshot overtook it) and may still be news to others. One that is
/// further behind is an old message played again.
const LATE: u64 = MAX_HELD as u64;

/// How long a missing announcement may take: gossip goes several ways and overtakes itself by some round trips.
const PATIENCE: Duration = Duration::from_secs(1);

/// Between two snapshots of one peer, so that a publisher that skips numbers without end costs little.
const REST: Duration = Duration::from_secs(5);

/// Epoch and sequence.
type Position = (u64, u64);

/// What is known of one peer's log while the peer is up.
#[derive(Debug)]
pub(super) struct Follower {
    /// The last position up to which nothing is missing; none before the first snapshot.
    at: Option<Position>,
    /// Announcements further on, that wait for one in between.
    held: BTreeMap<Position, Vec<ContentChange>>,
    ask: Ask,
    /// Times that asking did not help, in a row.
    attempts: u32,
    /// No snapshot is asked for before.
    rested: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Ask {
    /// Nothing is missing.
    Nothing,
    /// For a snapshot, from then on.
    At(Instant),
    /// The peer was asked.
    Waiting,
}

/// What became of an announcement.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Receipt {
    /// These changes are next, in this order.
    Next(Vec<ContentChange>),
    /// It waits for one that is missing.
    Held,
    /// Known already, and harmless.
    Late,
    /// No honest peer sends it; the reason is for counting.
    Refused(&'static str),
}

/// A snapshot, and what was announced after it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Replacement {
    /// Everything at some position.
    pub(super) items: Vec<ContentChange>,
    /// What followed.
    pub(super) changes: Vec<ContentChange>,
}

impl Follower {
    /// Of a peer that just came up: everything is missing.
    pub(super) fn new(now: Instant) -> Self {
        Self { at: None, held: BTreeMap::new(), ask: Ask::At(now), attempts: 0, rested: now }
    }

    /// Takes an announcement that this peer signed.
    pub(super) fn receive(&mut self, announcement: Announcement, now: Instant) -> Receipt {
        if let Err(reason) = check(&announcement) {
            return Receipt::Refused(reason);
        }
        let Announcement { epoch, sequence, mut changes } = announcement;
        let mut patience = PATIENCE;
        if let Some((known_epoch, known)) = self.at {
            if epoch < known_epoch {
                return Receipt::Refused("old_epoch");
            }
            if epoch > known_epoch {
                patience = Duration::ZERO;
            } else if sequence <= known {
                return if known - sequence < LATE { Receipt::Late } else { Receipt::Refused("replayed") };
            } else if sequence - 1 == known {
                self.at = Some((epoch, sequence));
                changes.extend(self.release());
                self.settle();
                return Receipt::Next(changes);
            }
        }
        self.held.insert((epoch, sequence), changes);
        if self.held.len() > MAX_HELD {
            // The snapshot that has to come covers the oldest first.
            self.held.pop_first();
        }
        self.want(now + patience);
        Receipt::Held
    }

    /// Something may have been missed: the peer has a new connection, perhaps a new process.
    pub(super) fn doubt(&mut self, now: Instant) {
        self.want(now);
    }

    /// Whether a snapshot should be asked for now.
    pub(super) fn asks(&self, now: Instant) -> bool {
        matches!(self.ask, Ask::At(at) if at <= now)
    }

    /// The peer was asked for a snapshot.
    pub(super) fn asked(&mut self) {
        self.ask = Ask::Waiting;
    }

    /// The peer did not answer, or uselessly. `jitter` is random, in 0..1.
    pub(super) fn failed(&mut self, now: Instant, jitter: f64) {
        self.ask = Ask::At(now + backoff(self.attempts, jitter));
        self.attempts = self.attempts.saturating_add(1);
    }

    /// Takes the snapshot that was asked for; `None` when announcements have brought more meanwhile.
    ///
    /// # Errors
    /// What no honest peer sends, as a reason for counting. It is asked again, later.
    pub(super) fn replace(
        &mut self,
        snapshot: Snapshot,
        now: Instant,
        jitter: f64,
    ) -> Result<Option<Replacement>, &'static str> {
        if let Err(reason) = check_snapshot(&snapshot) {
            self.failed(now, jitter);
            return Err(reason);
        }
        let Snapshot { epoch, sequence, items } = snapshot;
        self.rested = now + REST;
        self.ask = Ask::Nothing;
        let overtaken = self.at.is_some_and(|(known_epoch, known)| known_epoch == epoch && sequence < known);
        let replacement = (!overtaken).then(|| {
            // The peer says so itself, over a connection that it authenticated. Even an older epoch is then the truth: its
            // clock went back.
            self.at = Some((epoch, sequence));
            Replacement { items, changes: self.release() }
        });
        if self.held.is_empty() {
            self.attempts = 0;
        } else {
            self.failed(now, jitter);
        }
        Ok(replacement)
    }

    /// The changes of held announcements that are next now; what is behind is thrown away.
    fn release(&mut self) -> Vec<ContentChange> {
        let mut changes = Vec::new();
        while let Some((epoch, sequence)) = self.at {
            let Some(next) = sequence.checked_add(1).map(|next| (epoch, next)) else { break };
            self.held = self.held.split_off(&next);
            let Some(more) = self.held.remove(&next) else { break };
            changes.extend(more);
            self.at = Some(next);
        }
        changes
    }

    fn want(&mut self, at: Instant) {
        if self.ask == Ask::Nothing {
            self.ask = Ask::At(at.max(self.rested));
        }
    }

    /// What was missing has come.
    fn settle(&mut self) {
        if self.held.is_empty() && matches!(self.ask, Ask::At(_)) {
            self.ask = Ask::Nothing;
            self.attempts = 0;
        }
    }
}

/// What can be said of an announcement without knowing its publisher.
pub(super) fn check(announcement: &Announcement) -> Result<(), &'static str> {
    if announcement.sequence == 0 {
        return Err("bad_sequence");
    }
    if announcement.changes.len() > MAX_CHANGES {
        return Err("too_many_changes");
    }
    if announcement.changes.iter().all(is_proper) { Ok(()) } else { Err("bad_name") }
}

fn check_snapshot(snapshot: &Snapshot) -> Result<(), &'static str> {
    if snapshot.items.len() > MAX_ITEMS {
        return Err("snapshot_too_long");
    }
    let is_item = |item: &ContentChange| {
        matches!(item, ContentChange::BlobAdded(_) | ContentChange::Tagged(..) | ContentChange::RegistryDown(_))
    };
    if snapshot.items.iter().all(|item| is_item(item) && is_proper(item)) { Ok(()) } else { Err("snapshot_malformed") }
}

/// Whether an image's name is one that CRI would write, which also bounds its length.
fn is_proper(change: &ContentChange) -> bool {
    let reference = match change {
        ContentChange::BlobAdded(_) | ContentChange::BlobRemoved(_) => return true,
        ContentChange::RegistryDown(outage) | ContentChange::RegistryUp(outage) => {
            return Repository::is_registry(&outage.registry);
        }
        ContentChange::Tagged(repository, tag, digest) | ContentChange::Untagged(repository, tag, digest) => {
            match tag {
                Some(tag) => Reference::Tag(repository.clone(), tag.clone()),
                None => Reference::Digest(repository.clone(), *digest),
            }
        }
    };
    reference.to_string().parse() == Ok(reference)
}

#[cfg(test)]
mod tests;
