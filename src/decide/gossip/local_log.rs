//! Our own side of the inventory: what this node holds, and the entries that follow from its changes.

use std::collections::BTreeSet;

use crate::model::{
    InventoryChange, InventoryItem, LogEntry, LogHead, MAX_CHANGES, MAX_ITEMS, PeerId, Signature, changes_digest,
    state_digest,
};

/// Most entries made of one batch. Past that a snapshot is cheaper: it goes to each member once, where gossip carries a
/// message several times.
const MAX_BATCH: usize = 16;

/// What the items of one node may weigh, so that a snapshot of it fits into one reply: [`MAX_ITEMS`] of 120 bytes on average, where a
/// blob has some 40, an image's name rarely over 120.
pub(super) const MAX_WEIGHT: usize = MAX_ITEMS * 120;

/// What this node holds, and how far it has told.
#[derive(Debug, Clone)]
pub(super) struct LocalLog {
    publisher: PeerId,
    epoch: u64,
    sequence: u64,
    items: BTreeSet<InventoryItem>,
    weight: usize,
    /// Items that came or went since the last entry.
    changed: BTreeSet<InventoryItem>,
    /// The last entry's, which a snapshot is proved by.
    head: Option<LogHead>,
}

impl LocalLog {
    /// An empty log. A later start of the same node needs a larger epoch.
    pub(super) fn new(publisher: PeerId, epoch: u64) -> Self {
        let (items, touched) = Default::default();
        Self { publisher, epoch, sequence: 0, items, weight: 0, changed: touched, head: None }
    }

    /// Everything is told again, in an epoch that is larger than one that others know of this node.
    pub(super) fn restart(&mut self, epoch: u64) {
        let items = std::mem::take(&mut self.items);
        *self = Self { changed: items.clone(), items, weight: self.weight, ..Self::new(self.publisher, epoch) };
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The last entry's number; 0 before the first.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// What is held, in order.
    pub(super) fn items(&self) -> &BTreeSet<InventoryItem> {
        &self.items
    }

    /// The last entry's head, where everything that is held has been told; a snapshot can be given only then.
    pub(super) fn head(&self) -> Option<&LogHead> {
        self.head.as_ref().filter(|_| self.changed.is_empty())
    }

    /// Takes in what changed; what changes nothing is never announced.
    ///
    /// Returns how many items were left out, because others would not accept them.
    pub(super) fn record(&mut self, changes: Vec<InventoryChange>) -> usize {
        let mut left_out = 0;
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
            // Twice is as it was told.
            if !self.changed.remove(&item) {
                self.changed.insert(item);
            }
        }
        left_out
    }

    /// The entries that bring everybody up to date. Of very many changes none is announced: a number is skipped instead, and who
    /// finds the gap takes a snapshot.
    pub(super) fn take_entries(&mut self, sign: impl Fn(&[u8]) -> Signature) -> Vec<LogEntry> {
        let touched = std::mem::take(&mut self.changed);
        if touched.is_empty() {
            return Vec::new();
        }
        if touched.len() > MAX_BATCH * MAX_CHANGES {
            self.sequence += 1;
            return vec![self.append_entry(Vec::new(), state_digest(&self.items), &sign)];
        }
        let changes = touched.iter().map(|item| match self.items.contains(item) {
            true => InventoryChange::Added(item.clone()),
            false => InventoryChange::Removed(item.clone()),
        });
        let changes: Vec<_> = changes.collect();
        // What others hold after each entry but the last differs from what is held now by the entries that follow.
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

/// What an item counts against a reply's limit, where lengths are counted by their width in memory: four for its kind, eight for each
/// text's length, one for whether there is a tag, and its bits for up to 256 holders.
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
