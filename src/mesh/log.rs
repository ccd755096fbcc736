//! Our own side of the inventory: what this node holds, and the announcements that follow from its changes. Pure.

use std::collections::BTreeSet;

use bytes::Bytes;

use crate::model::{ContentChange, MAX_ITEMS};
use crate::wire::{self, Announcement, MAX_CHANGES, Message, Snapshot, WireError};

/// Most announcements made of one batch. Past that a snapshot is cheaper: it goes to each peer once, where gossip carries a
/// message several times.
const MAX_BATCH: usize = 16;

/// What this node holds, and how far it has told.
pub(super) struct Log {
    epoch: u64,
    sequence: u64,
    /// As the additions that make them.
    items: BTreeSet<ContentChange>,
    /// What they count against a snapshot's limit.
    weight: usize,
    /// Items that came or went since the last announcement.
    touched: BTreeSet<ContentChange>,
    /// The snapshot as it stands, encoded once for all who ask.
    encoded: Option<Bytes>,
}

impl Log {
    /// An empty log. A later start of the same node needs a larger epoch.
    pub(super) fn new(epoch: u64) -> Self {
        Self { epoch, sequence: 0, items: BTreeSet::new(), weight: 0, touched: BTreeSet::new(), encoded: None }
    }

    /// How many items there are.
    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    /// Takes in what changed; what changes nothing is never announced.
    ///
    /// Returns how many items were left out, because a snapshot with them would exceed what others accept.
    pub(super) fn record(&mut self, changes: Vec<ContentChange>) -> usize {
        let mut left_out = 0;
        for change in changes {
            let (item, present) = as_item(change);
            if present == self.items.contains(&item) {
                continue;
            }
            let weight = weight(&item);
            if present && (self.items.len() == MAX_ITEMS || self.weight + weight > MAX_WEIGHT) {
                left_out += 1;
                continue;
            }
            if present {
                self.weight += weight;
                self.items.insert(item.clone());
            } else {
                self.weight -= weight;
                self.items.remove(&item);
            }
            self.touched.insert(item);
            self.encoded = None;
        }
        left_out
    }

    /// Whether there is anything to announce.
    pub(super) fn is_behind(&self) -> bool {
        !self.touched.is_empty()
    }

    /// The announcements that bring everybody up to date. Of very many changes none is announced: a number is
    /// skipped instead, and who finds the gap takes a snapshot.
    pub(super) fn announce(&mut self) -> Vec<Announcement> {
        let touched = std::mem::take(&mut self.touched);
        if touched.len() > MAX_BATCH * MAX_CHANGES {
            self.sequence += 1;
            return vec![self.mark()];
        }
        let changes: Vec<_> =
            touched.into_iter().map(|item| if self.items.contains(&item) { item } else { removal(item) }).collect();
        changes.chunks(MAX_CHANGES).map(|chunk| self.next(chunk.to_vec())).collect()
    }

    /// An announcement of nothing, by which others find out that they missed the one before.
    pub(super) fn mark(&mut self) -> Announcement {
        self.next(Vec::new())
    }

    fn next(&mut self, changes: Vec<ContentChange>) -> Announcement {
        self.sequence += 1;
        self.encoded = None;
        Announcement { epoch: self.epoch, sequence: self.sequence, changes }
    }

    /// Everything, as it goes over the wire. It may be ahead of its own sequence number by changes not yet announced; those
    /// then change nothing.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if [`weight`] is wrong.
    pub(super) fn snapshot(&mut self) -> Result<Bytes, WireError> {
        if let Some(encoded) = &self.encoded {
            return Ok(encoded.clone());
        }
        let items = self.items.iter().cloned().collect();
        let encoded = Bytes::from(wire::encode(&Snapshot { epoch: self.epoch, sequence: self.sequence, items })?);
        self.encoded = Some(encoded.clone());
        Ok(encoded)
    }
}

/// What the items of a snapshot may weigh: its limit without epoch, sequence and count.
const MAX_WEIGHT: usize = Snapshot::LIMIT - 3 * 9;

/// What an item counts against the limit of a snapshot where it is decoded. bincode counts a number by its width in memory
/// there, which is more than it takes on the wire: four for the kind; for an image also eight for each text's length and one
/// for whether there is a tag.
fn weight(item: &ContentChange) -> usize {
    match item {
        ContentChange::BlobAdded(_) | ContentChange::BlobRemoved(_) => 4 + 32,
        ContentChange::Tagged(repository, tag, _) | ContentChange::Untagged(repository, tag, _) => {
            let texts = repository.registry.len() + repository.path.len() + tag.as_ref().map_or(0, String::len);
            4 + 32 + 1 + 3 * 8 + texts
        }
        // The kind of change, the length of the name and the name, the kind of outage, and since when.
        ContentChange::RegistryDown(outage) | ContentChange::RegistryUp(outage) => {
            4 + 8 + outage.registry.len() + 4 + 8
        }
    }
}

/// The addition that a change makes or undoes, and whether it makes it.
fn as_item(change: ContentChange) -> (ContentChange, bool) {
    match change {
        ContentChange::BlobRemoved(digest) => (ContentChange::BlobAdded(digest), false),
        ContentChange::Untagged(repository, tag, digest) => (ContentChange::Tagged(repository, tag, digest), false),
        ContentChange::RegistryUp(outage) => (ContentChange::RegistryDown(outage), false),
        addition => (addition, true),
    }
}

fn removal(item: ContentChange) -> ContentChange {
    match item {
        ContentChange::BlobAdded(digest) => ContentChange::BlobRemoved(digest),
        ContentChange::Tagged(repository, tag, digest) => ContentChange::Untagged(repository, tag, digest),
        ContentChange::RegistryDown(outage) => ContentChange::RegistryUp(outage),
        already => already,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{Digest, Repository};

    fn blob(number: usize) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    fn added(numbers: std::ops::Range<usize>) -> Vec<ContentChange> {
        numbers.map(|number| ContentChange::BlobAdded(blob(number))).collect()
    }

    fn decoded(log: &mut Log) -> Snapshot {
        wire::decode(&log.snapshot().unwrap()).unwrap()
    }

    #[test]
    fn changes_are_announced_in_numbered_chunks() {
        let mut log = Log::new(7);
        log.record(added(0..MAX_CHANGES + 1));
        let announcements = log.announce();
        let shape: Vec<_> = announcements.iter().map(|a| (a.epoch, a.sequence, a.changes.len())).collect();
        assert_eq!(shape, [(7, 1, MAX_CHANGES), (7, 2, 1)]);
        assert!(!log.is_behind() && log.announce().is_empty(), "nothing is announced twice");
        assert_eq!(log.mark(), Announcement { epoch: 7, sequence: 3, changes: vec![] });
    }

    #[test]
    fn what_changes_nothing_is_not_announced() {
        let mut log = Log::new(1);
        log.record(added(0..1));
        log.announce();
        log.record(added(0..1));
        log.record(vec![ContentChange::BlobRemoved(blob(9))]);
        assert!(!log.is_behind());
    }

    #[test]
    fn an_item_that_came_and_went_between_announcements_is_told_as_gone() {
        let mut log = Log::new(1);
        log.record(added(0..1));
        log.record(vec![ContentChange::BlobRemoved(blob(0))]);
        assert_eq!(log.announce()[0].changes, [ContentChange::BlobRemoved(blob(0))]);
        assert_eq!(decoded(&mut log), Snapshot { epoch: 1, sequence: 1, items: vec![] });
    }

    #[test]
    fn a_snapshot_follows_what_was_announced() {
        let mut log = Log::new(1);
        let image = Repository { registry: "registry.test".into(), path: "app".into() };
        log.record(vec![ContentChange::Tagged(image.clone(), Some("v1".into()), blob(0))]);
        assert_eq!(decoded(&mut log).sequence, 0, "not announced yet, and there already");
        assert_eq!(decoded(&mut log).items.len(), 1);
        log.announce();
        assert_eq!(decoded(&mut log).sequence, 1);
        log.record(vec![ContentChange::Untagged(image, Some("v1".into()), blob(0))]);
        log.announce();
        assert_eq!(decoded(&mut log), Snapshot { epoch: 1, sequence: 2, items: vec![] });
        log.mark();
        assert_eq!(decoded(&mut log).sequence, 3);
    }

    #[test]
    fn of_very_many_changes_a_number_is_skipped_instead() {
        let mut log = Log::new(1);
        log.record(added(0..MAX_BATCH * MAX_CHANGES + 1));
        assert_eq!(log.announce(), [Announcement { epoch: 1, sequence: 2, changes: vec![] }]);
        assert_eq!(decoded(&mut log).items.len(), MAX_BATCH * MAX_CHANGES + 1);
    }

    #[test]
    fn no_more_is_held_than_a_snapshot_carries() {
        let mut log = Log::new(u64::MAX);
        assert_eq!(log.record(added(0..MAX_ITEMS + 2)), 2);
        assert_eq!(log.len(), MAX_ITEMS);
        assert_eq!(decoded(&mut log).items.len(), MAX_ITEMS);
    }

    #[test]
    fn the_longest_names_still_make_a_snapshot_that_can_be_sent() {
        let mut log = Log::new(u64::MAX);
        let long = Repository { registry: "r".repeat(253), path: "p".to_owned() };
        let tagged = |n: usize| ContentChange::Tagged(long.clone(), Some(format!("{n:0>128}")), blob(n));
        let left_out = log.record((0..MAX_ITEMS).map(tagged).collect());
        assert!(left_out > 0, "443 bytes each are over the limit");
        assert_eq!(decoded(&mut log).items.len(), MAX_ITEMS - left_out);
        log.record((0..MAX_ITEMS).map(|n| removal(tagged(n))).collect());
        assert_eq!((log.len(), log.weight), (0, 0));
    }
}
