//! This agent's own log: the items of this node, and the entries of their changes.

use std::collections::BTreeSet;

use crate::model::{
    InventoryChange, InventoryItem, LogEntry, LogHead, MAX_CHANGES, MAX_ITEMS, PeerId, Signature, changes_digest,
    state_digest,
};

/// Most entries of one batch. Beyond, a snapshot is cheaper: each member gets a snapshot once, and
/// gossip carries a message several times.
const MAX_BATCH: usize = 16;

/// Most weight of one node's items, so that their snapshot fits into one reply: [`MAX_ITEMS`] of
/// 120 bytes on average. A blob has some 40 bytes, and an image's name rarely more than 120.
pub(super) const MAX_WEIGHT: usize = MAX_ITEMS * 120;

/// The items of this node, and the published part of their changes.
#[derive(Debug, Clone)]
pub(super) struct LocalLog {
    publisher: PeerId,
    epoch: u64,
    sequence: u64,
    items: BTreeSet<InventoryItem>,
    weight: usize,
    /// Items added or removed since the last entry.
    changed: BTreeSet<InventoryItem>,
    /// Head of the last entry, which proves a snapshot.
    head: Option<LogHead>,
}

impl LocalLog {
    /// An empty log. A later process of the same node needs a larger epoch.
    pub(super) fn new(publisher: PeerId, epoch: u64) -> Self {
        let (items, changed) = Default::default();
        Self { publisher, epoch, sequence: 0, items, weight: 0, changed, head: None }
    }

    /// Publishes all items again, in an epoch that is larger than the members' epoch of this node.
    pub(super) fn restart(&mut self, epoch: u64) {
        let items = std::mem::take(&mut self.items);
        *self = Self { changed: items.clone(), items, weight: self.weight, ..Self::new(self.publisher, epoch) };
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Number of the last entry; 0 before the first.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The items of this node, sorted.
    pub(super) fn items(&self) -> &BTreeSet<InventoryItem> {
        &self.items
    }

    /// Head of the last entry, if all changes are published. Only then a snapshot can be proved.
    pub(super) fn head(&self) -> Option<&LogHead> {
        self.head.as_ref().filter(|_| self.changed.is_empty())
    }

    /// Records changes. A change without an effect is never announced.
    ///
    /// Returns the number of items left out, because other members would not accept them.
    pub(super) fn record(&mut self, changes: Vec<InventoryChange>) -> usize {
        let mut dropped = 0;
        for change in changes {
            let (item, present) = match change {
                InventoryChange::Added(item) => (item, true),
                InventoryChange::Removed(item) => (item, false),
            };
            if present == self.items.contains(&item) {
                continue;
            }
            let weight = weight(&item);
            if present && (self.items.len() == MAX_ITEMS || self.weight + weight > MAX_WEIGHT) {
                dropped += 1;
                continue;
            }
            if present {
                self.weight += weight;
                self.items.insert(item.clone());
            } else {
                self.weight -= weight;
                self.items.remove(&item);
            }
            // Two changes of one item restore what was published.
            if !self.changed.remove(&item) {
                self.changed.insert(item);
            }
        }
        dropped
    }

    /// Takes the entries that announce all changes. Very many changes are not announced: one number
    /// is skipped, and a member that finds the gap requests a snapshot.
    pub(super) fn take_entries(&mut self, sign: impl Fn(&[u8]) -> Signature) -> Vec<LogEntry> {
        let changed = std::mem::take(&mut self.changed);
        if changed.is_empty() {
            return Vec::new();
        }
        if changed.len() > MAX_BATCH * MAX_CHANGES {
            self.sequence += 1;
            return vec![self.append_entry(Vec::new(), state_digest(&self.items), &sign)];
        }
        let changes = changed.iter().map(|item| match self.items.contains(item) {
            true => InventoryChange::Added(item.clone()),
            false => InventoryChange::Removed(item.clone()),
        });
        let changes: Vec<_> = changes.collect();
        // The state after an earlier entry differs from the present items by the entries that
        // follow.
        let mut state: BTreeSet<InventoryItem> = self.items.clone();
        let mut states = Vec::new();
        for chunk in changes.chunks(MAX_CHANGES).rev() {
            states.push(state_digest(&state));
            for change in chunk {
                match change {
                    InventoryChange::Added(item) => drop(state.remove(item)),
                    InventoryChange::Removed(item) => drop(state.insert(item.clone())),
                }
            }
        }
        let chunks = changes.chunks(MAX_CHANGES).zip(states.into_iter().rev());
        chunks.map(|(chunk, state)| self.append_entry(chunk.to_vec(), state, &sign)).collect()
    }

    fn append_entry(
        &mut self,
        changes: Vec<InventoryChange>,
        state: crate::oci::Digest,
        sign: impl Fn(&[u8]) -> Signature,
    ) -> LogEntry {
        self.sequence += 1;
        let unsigned = Signature::from([0; 64]);
        let mut head = LogHead {
            publisher: self.publisher,
            epoch: self.epoch,
            sequence: self.sequence,
            changes: changes_digest(&changes),
            state,
            signature: unsigned,
        };
        head.signature = sign(&head.signed_bytes());
        self.head = Some(head.clone());
        LogEntry { head, changes }
    }
}

/// The weight of an item in a reply's limit, which counts lengths by their width in memory: four
/// bytes for the kind, eight for each text's length, one for the presence of a tag, and the bits of
/// up to 256 providers.
pub(super) fn weight(item: &InventoryItem) -> usize {
    const BITS: usize = 8 + 1;
    BITS + match item {
        InventoryItem::Blob(_) | InventoryItem::Fetching(_) => 4 + 32,
        InventoryItem::Image(repository, tag, _) => {
            let texts = repository.registry.len() + repository.path.len() + tag.as_ref().map_or(0, String::len);
            4 + 32 + 1 + 3 * 8 + texts
        }
        InventoryItem::Outage(outage) => 4 + 8 + outage.registry.len() + 4 + 8,
    }
}
