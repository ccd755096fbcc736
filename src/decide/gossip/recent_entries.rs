//! Recent entries, kept so that a neighbor that missed some can have them without a snapshot.

use std::collections::{BTreeMap, VecDeque};

use crate::model::{LogEntry, PeerId};

/// Most bytes of all kept entries, by [`cost`]: a minute of the busiest thousand nodes, or some
/// hours of an idle mesh.
const MAX_BYTES: usize = 4 << 20;

/// Most bytes of entries in one reply. The neighbor requests the rest again.
const MAX_REPLY_BYTES: usize = 256 << 10;

/// The latest entries of all members, up to [`MAX_BYTES`].
#[derive(Debug, Clone, Default)]
pub(super) struct RecentEntries {
    entries: BTreeMap<(PeerId, u64, u64), LogEntry>,
    order: VecDeque<(PeerId, u64, u64)>,
    bytes: usize,
}

impl RecentEntries {
    /// Adds an entry, and evicts the oldest entries beyond [`MAX_BYTES`].
    pub(super) fn push(&mut self, entry: LogEntry) {
        let key = (entry.head.publisher, entry.head.epoch, entry.head.sequence);
        self.bytes += cost(&entry);
        if let Some(before) = self.entries.insert(key, entry) {
            self.bytes -= cost(&before);
            return;
        }
        self.order.push_back(key);
        while self.bytes > MAX_BYTES
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.entries.remove(&oldest).map_or(0, |entry| cost(&entry));
        }
    }

    /// The entries after a number, without a gap, as many as one reply may hold.
    pub(super) fn after(&self, publisher: PeerId, epoch: u64, after: u64) -> Vec<LogEntry> {
        let Some(first) = after.checked_add(1) else { return Vec::new() };
        let mut left = MAX_REPLY_BYTES;
        let of_log = self.entries.range((publisher, epoch, first)..=(publisher, epoch, u64::MAX));
        let consecutive = of_log.zip(first..).take_while(|((key, _), next)| key.2 == *next);
        let fitting = consecutive.take_while(|((_, entry), _)| match left.checked_sub(cost(entry)) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        });
        fitting.map(|((_, entry), _)| entry.clone()).collect()
    }
}

/// The estimated bytes of an entry: its head, and its changes.
fn cost(entry: &LogEntry) -> usize {
    const HEAD: usize = 300;
    let change_cost = |change: &crate::model::InventoryChange| match change {
        crate::model::InventoryChange::Added(item) | crate::model::InventoryChange::Removed(item) => {
            super::local_log::weight(item) + 64
        }
    };
    HEAD + entry.changes.iter().map(change_cost).sum::<usize>()
}
