//! All items, each once, with the numbers of its peers. Items without a peer are removed.

use std::collections::{BTreeMap, HashMap};
use std::mem::size_of;

use super::hash_table_bytes;
use super::peer_sets::{PeerNumber, Providers};
use crate::model::{InventoryItem, Outage};
use crate::oci::{Digest, Repository};

/// The items of all peers.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    blobs: HashMap<Digest, Providers>,
    records: BTreeMap<RecordKey, Providers>,
    /// Each node has its own start of an outage, so one registry may have several entries.
    outages: BTreeMap<Outage, Providers>,
    /// Blobs that peers are downloading.
    partial: BTreeMap<Digest, Providers>,
}

/// In this order, all names of one image in one repository are neighbors in the tree.
type RecordKey = (Repository, Digest, Option<String>);

impl Content {
    /// The number of different items.
    pub(super) fn len(&self) -> usize {
        self.blobs.len() + self.records.len() + self.outages.len() + self.partial.len()
    }

    pub(super) fn blobs(&self) -> impl Iterator<Item = &Providers> {
        self.blobs.values()
    }

    pub(super) fn blob(&self, digest: Digest) -> Option<&Providers> {
        self.blobs.get(&digest)
    }

    /// The peers that are downloading the blob.
    pub(super) fn partial_providers(&self, digest: Digest) -> Option<&Providers> {
        self.partial.get(&digest)
    }

    /// The peers of every name that an image has in this repository.
    pub(super) fn records_of(&self, repository: &Repository, image: Digest) -> impl Iterator<Item = &Providers> {
        let records = self.records.range((repository.clone(), image, None)..);
        records.take_while(move |((r, d, _), _)| r == repository && *d == image).map(|(_, providers)| providers)
    }

    /// The digests that the tag has in this repository, with the peers of each.
    pub(super) fn tagged(&self, repository: &Repository, tag: &str) -> impl Iterator<Item = (Digest, &Providers)> {
        let records = self.records.range((repository.clone(), Digest::from_bytes([0; 32]), None)..);
        let of_repository = records.take_while(move |((r, ..), _)| r == repository);
        of_repository
            .filter(move |((_, _, record_tag), _)| record_tag.as_deref() == Some(tag))
            .map(|((_, digest, _), providers)| (*digest, providers))
    }

    /// The outages from `first` on, in order.
    pub(super) fn outages_from(&self, first: &Outage) -> impl Iterator<Item = (&Outage, &Providers)> {
        self.outages.range(first..)
    }

    pub(super) fn outages(&self) -> impl Iterator<Item = (&Outage, &Providers)> {
        self.outages.iter()
    }

    /// False when the item was there.
    pub(super) fn insert(&mut self, number: PeerNumber, item: InventoryItem) -> bool {
        let providers = match item {
            InventoryItem::Blob(digest) => self.blobs.entry(digest).or_default(),
            InventoryItem::Image(repository, tag, digest) => self.records.entry((repository, digest, tag)).or_default(),
            InventoryItem::Outage(outage) => self.outages.entry(outage).or_default(),
            InventoryItem::Fetching(digest) => self.partial.entry(digest).or_default(),
        };
        providers.insert(number)
    }

    /// False when the item was not there.
    pub(super) fn remove(&mut self, number: PeerNumber, item: InventoryItem) -> bool {
        match item {
            InventoryItem::Blob(digest) => {
                let Some(providers) = self.blobs.get_mut(&digest) else { return false };
                let removed = providers.remove(number);
                if providers.is_empty() {
                    self.blobs.remove(&digest);
                }
                removed
            }
            InventoryItem::Image(repository, tag, digest) => {
                remove(&mut self.records, &(repository, digest, tag), number)
            }
            InventoryItem::Outage(outage) => remove(&mut self.outages, &outage, number),
            InventoryItem::Fetching(digest) => remove(&mut self.partial, &digest, number),
        }
    }

    pub(super) fn contains(&self, number: PeerNumber, item: &InventoryItem) -> bool {
        let providers = match item {
            InventoryItem::Blob(digest) => self.blobs.get(digest),
            InventoryItem::Image(repository, tag, digest) => {
                self.records.get(&(repository.clone(), *digest, tag.clone()))
            }
            InventoryItem::Outage(outage) => self.outages.get(outage),
            InventoryItem::Fetching(digest) => self.partial.get(digest),
        };
        providers.is_some_and(|providers| providers.contains(number))
    }

    /// Removes all items of a peer. Walks all items.
    pub(super) fn clear(&mut self, number: PeerNumber) {
        let without = |providers: &mut Providers| !providers.remove(number) || !providers.is_empty();
        self.blobs.retain(|_, providers| without(providers));
        self.records.retain(|_, providers| without(providers));
        self.outages.retain(|_, providers| without(providers));
        self.partial.retain(|_, providers| without(providers));
        // A peer with very many items leaves a large table, which shrinks here.
        if self.blobs.capacity() > 4 * self.blobs.len() {
            self.blobs.shrink_to(2 * self.blobs.len());
        }
    }

    /// Selects items by their peers, in the order of [`InventoryItem`].
    pub(super) fn select_items<T>(&self, mut chosen: impl FnMut(&Providers) -> Option<T>) -> Vec<(InventoryItem, T)> {
        let blobs = self.blobs.iter().filter_map(|(digest, providers)| Some((*digest, chosen(providers)?)));
        let mut blobs: Vec<_> = blobs.collect();
        blobs.sort_unstable_by_key(|(digest, _)| *digest);
        let records = self.records.iter().filter_map(|(name, providers)| Some((name, chosen(providers)?)));
        let mut records: Vec<_> = records.collect();
        records.sort_unstable_by(|((r, d, t), _), ((repository, digest, tag), _)| {
            (r, t, d).cmp(&(repository, tag, digest))
        });
        let mut items: Vec<_> = blobs.into_iter().map(|(digest, found)| (InventoryItem::Blob(digest), found)).collect();
        items.extend(records.into_iter().map(|((repository, digest, tag), found)| {
            (InventoryItem::Image(repository.clone(), tag.clone(), *digest), found)
        }));
        let outages = self.outages.iter().filter_map(|(outage, providers)| Some((outage, chosen(providers)?)));
        items.extend(outages.map(|(outage, found)| (InventoryItem::Outage(outage.clone()), found)));
        let fetching = self.partial.iter().filter_map(|(digest, providers)| Some((digest, chosen(providers)?)));
        items.extend(fetching.map(|(digest, found)| (InventoryItem::Fetching(*digest), found)));
        items
    }

    /// Estimated bytes on the heap.
    pub(super) fn bytes(&self) -> usize {
        let sets = self.blobs.values().chain(self.records.values()).chain(self.outages.values());
        let sets = sets.chain(self.partial.values());
        let record_texts = self.records.keys().map(|(repository, _, tag)| {
            repository.registry.len() + repository.path.len() + tag.as_ref().map_or(0, String::len)
        });
        let texts = record_texts.chain(self.outages.keys().map(|outage| outage.registry.len()));
        let trees = tree_bytes(&self.records) + tree_bytes(&self.outages) + tree_bytes(&self.partial);
        let tables = hash_table_bytes(&self.blobs) + trees;
        tables + sets.map(Providers::bytes).sum::<usize>() + texts.sum::<usize>()
    }
}

fn remove<K: Ord>(map: &mut BTreeMap<K, Providers>, key: &K, number: PeerNumber) -> bool {
    let Some(providers) = map.get_mut(key) else { return false };
    let removed = providers.remove(number);
    if providers.is_empty() {
        map.remove(key);
    }
    removed
}

/// A tree node has room for eleven entries, and is two thirds full on average.
fn tree_bytes<K, V>(tree: &BTreeMap<K, V>) -> usize {
    tree.len() * size_of::<(K, V)>() * 3 / 2
}
