//! What there is, each thing once, and by which numbers it is held. Nothing stands here that nobody holds.

use std::collections::{BTreeMap, HashMap};
use std::mem::size_of;

use super::hash_table_bytes;
use super::providers::{PeerNumber, Providers};
use crate::model::{InventoryItem, Outage};
use crate::oci::{Digest, Repository};

/// Everything that any peer holds.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    blobs: HashMap<Digest, Providers>,
    names: BTreeMap<Name, Providers>,
    /// By what each node saw, so the same registry may stand here several times: each node has its own moment.
    outages: BTreeMap<Outage, Providers>,
    /// Blobs that are under way.
    partial: BTreeMap<Digest, Providers>,
}

/// The names of one image in one repository stand side by side.
type Name = (Repository, Digest, Option<String>);

impl Content {
    /// How many different things there are.
    pub(super) fn len(&self) -> usize {
        self.blobs.len() + self.names.len() + self.outages.len() + self.partial.len()
    }

    pub(super) fn blobs(&self) -> impl Iterator<Item = &Providers> {
        self.blobs.values()
    }

    pub(super) fn blob(&self, digest: Digest) -> Option<&Providers> {
        self.blobs.get(&digest)
    }

    /// By whom the blob is being fetched.
    pub(super) fn partial_providers(&self, digest: Digest) -> Option<&Providers> {
        self.partial.get(&digest)
    }

    /// Every name of an image in this repository.
    pub(super) fn names_of(&self, repository: &Repository, root: Digest) -> impl Iterator<Item = &Providers> {
        let names = self.names.range((repository.clone(), root, None)..);
        names.take_while(move |((r, d, _), _)| r == repository && *d == root).map(|(_, providers)| providers)
    }

    /// What a tag is said to mean in this repository.
    pub(super) fn tagged(&self, repository: &Repository, tag: &str) -> impl Iterator<Item = (Digest, &Providers)> {
        let names = self.names.range((repository.clone(), Digest::from_bytes([0; 32]), None)..);
        let of_repository = names.take_while(move |((r, ..), _)| r == repository);
        of_repository
            .filter(move |((_, _, named), _)| named.as_deref() == Some(tag))
            .map(|((_, digest, _), providers)| (*digest, providers))
    }

    /// From the first outage that is not before this one.
    pub(super) fn outages_from(&self, first: &Outage) -> impl Iterator<Item = (&Outage, &Providers)> {
        self.outages.range(first..)
    }

    pub(super) fn outages(&self) -> impl Iterator<Item = (&Outage, &Providers)> {
        self.outages.iter()
    }

    /// False when it is known.
    pub(super) fn insert(&mut self, number: PeerNumber, item: InventoryItem) -> bool {
        let providers = match item {
            InventoryItem::Blob(digest) => self.blobs.entry(digest).or_default(),
            InventoryItem::Image(repository, tag, digest) => self.names.entry((repository, digest, tag)).or_default(),
            InventoryItem::Outage(outage) => self.outages.entry(outage).or_default(),
            InventoryItem::Fetching(digest) => self.partial.entry(digest).or_default(),
        };
        providers.insert(number)
    }

    /// False when it is not known.
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
                remove(&mut self.names, &(repository, digest, tag), number)
            }
            InventoryItem::Outage(outage) => remove(&mut self.outages, &outage, number),
            InventoryItem::Fetching(digest) => remove(&mut self.partial, &digest, number),
        }
    }

    pub(super) fn contains(&self, number: PeerNumber, item: &InventoryItem) -> bool {
        let providers = match item {
            InventoryItem::Blob(digest) => self.blobs.get(digest),
            InventoryItem::Image(repository, tag, digest) => {
                self.names.get(&(repository.clone(), *digest, tag.clone()))
            }
            InventoryItem::Outage(outage) => self.outages.get(outage),
            InventoryItem::Fetching(digest) => self.partial.get(digest),
        };
        providers.is_some_and(|providers| providers.contains(number))
    }

    /// Removes all that a number holds. Walks everything.
    pub(super) fn clear(&mut self, number: PeerNumber) {
        let without = |providers: &mut Providers| !providers.remove(number) || !providers.is_empty();
        self.blobs.retain(|_, providers| without(providers));
        self.names.retain(|_, providers| without(providers));
        self.outages.retain(|_, providers| without(providers));
        self.partial.retain(|_, providers| without(providers));
        // The room of a peer that held very much goes with it.
        if self.blobs.capacity() > 4 * self.blobs.len() {
            self.blobs.shrink_to(2 * self.blobs.len());
        }
    }

    /// What is chosen by who holds it, in the order of [`Item`].
    pub(super) fn select_items<T>(&self, mut chosen: impl FnMut(&Providers) -> Option<T>) -> Vec<(InventoryItem, T)> {
        let blobs = self.blobs.iter().filter_map(|(digest, providers)| Some((*digest, chosen(providers)?)));
        let mut blobs: Vec<_> = blobs.collect();
        blobs.sort_unstable_by_key(|(digest, _)| *digest);
        let names = self.names.iter().filter_map(|(name, providers)| Some((name, chosen(providers)?)));
        let mut names: Vec<_> = names.collect();
        names.sort_unstable_by(|((r, d, t), _), ((repository, digest, tag), _)| {
            (r, t, d).cmp(&(repository, tag, digest))
        });
        let mut items: Vec<_> = blobs.into_iter().map(|(digest, found)| (InventoryItem::Blob(digest), found)).collect();
        items.extend(names.into_iter().map(|((repository, digest, tag), found)| {
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
        let sets = self.blobs.values().chain(self.names.values()).chain(self.outages.values());
        let sets = sets.chain(self.partial.values());
        let names = self.names.keys().map(|(repository, _, tag)| {
            repository.registry.len() + repository.path.len() + tag.as_ref().map_or(0, String::len)
        });
        let texts = names.chain(self.outages.keys().map(|outage| outage.registry.len()));
        let trees = tree_bytes(&self.names) + tree_bytes(&self.outages) + tree_bytes(&self.partial);
        let tables = hash_table_bytes(&self.blobs) + trees;
        tables + sets.map(Providers::bytes).sum::<usize>() + texts.sum::<usize>()
    }
}

fn remove<K: Ord>(held: &mut BTreeMap<K, Providers>, key: &K, number: PeerNumber) -> bool {
    let Some(providers) = held.get_mut(key) else { return false };
    let removed = providers.remove(number);
    if providers.is_empty() {
        held.remove(key);
    }
    removed
}

/// Its nodes have room for eleven entries, and are two thirds full.
fn tree_bytes<K, V>(tree: &BTreeMap<K, V>) -> usize {
    tree.len() * size_of::<(K, V)>() * 3 / 2
}
