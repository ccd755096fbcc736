//! Who holds what: a table of the content of the peers that are up, built from what the mesh tells.
//!
//! Everything in it is hearsay. It is good for knowing whom to ask; whoever fetches verifies. Not here: our own content, and what
//! to do when peers disagree about a tag.
//!
//! A digest stands once, with the numbers of the peers that hold it, so that a layer that a thousand nodes share costs one entry
//! and four bytes a node. To forget a peer walks the whole table: milliseconds for 100 000 digests, and rare.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::model::{ContentChange, MAX_ITEMS, MeshEvent, NodeName, Outage, OutageKind, Peer, PeerId};
use crate::oci::{Digest, Repository};

/// What is known of the content of the peers that are up.
#[derive(Debug, Default)]
pub struct Inventory {
    numbers: HashMap<PeerId, Number>,
    /// By [`Number`]; `None` is free to be given out again.
    peers: Vec<Option<Known>>,
    blobs: HashMap<Digest, Holders>,
    images: HashMap<Repository, BTreeMap<Digest, BTreeMap<Option<String>, Holders>>>,
    /// By what each node saw, so the same registry may stand here several times: each node has its own moment.
    outages: BTreeMap<Outage, Holders>,
}

/// Stands for a peer in the table while it is up.
type Number = u32;

#[derive(Debug)]
struct Known {
    peer: Peer,
    items: usize,
}

/// Numbers in ascending order. Most digests have few holders, so a sorted list beats a set.
#[derive(Debug, Default)]
struct Holders(Vec<Number>);

impl Inventory {
    /// Takes in what the mesh tells. Events of peers that are not up are ignored.
    ///
    /// Returns how many items were dropped because their peer is at its limit of [`MAX_ITEMS`]; the others still count.
    pub fn apply(&mut self, event: MeshEvent) -> usize {
        match event {
            MeshEvent::Up(peer) => self.up(peer),
            MeshEvent::Down(peer) => self.down(peer),
            MeshEvent::Snapshot(peer, items) => {
                let Some(&number) = self.numbers.get(&peer) else { return 0 };
                self.forget(number);
                return self.change(number, items);
            }
            MeshEvent::Changed(peer, changes) => {
                let Some(&number) = self.numbers.get(&peer) else { return 0 };
                return self.change(number, changes);
            }
        }
        0
    }

    /// The peers that hold a blob.
    pub fn holders(&self, digest: Digest) -> Vec<PeerId> {
        self.blobs.get(&digest).map(|holders| self.names(holders)).unwrap_or_default()
    }

    /// The peers that hold an image's index or manifest *and* know it under this very repository.
    ///
    /// A digest alone is not a permission: it would let anybody fetch any image by inventing a registry.
    pub fn providers(&self, repository: &Repository, root: Digest) -> Vec<PeerId> {
        let Some(holders) = self.blobs.get(&root) else { return Vec::new() };
        let Some(names) = self.images.get(repository).and_then(|images| images.get(&root)) else { return Vec::new() };
        let knowing: BTreeSet<Number> = names.values().flat_map(|holders| &holders.0).copied().collect();
        let both = holders.0.iter().filter(|number| knowing.contains(number)).copied().collect();
        self.names(&Holders(both))
    }

    /// What a tag points at, by whom. More than one digest means that the peers disagree.
    pub fn tag(&self, repository: &Repository, tag: &str) -> BTreeMap<Digest, Vec<PeerId>> {
        let tag = Some(tag.to_owned());
        let images = self.images.get(repository).into_iter().flatten();
        let held = images.filter_map(|(digest, names)| {
            // A name without the content that it points at is no voice.
            let holders = &self.blobs.get(digest)?.0;
            let named = names.get(&tag)?.0.iter().filter(|number| holders.contains(number)).copied().collect();
            Some((*digest, self.names(&Holders(named))))
        });
        held.filter(|(_, peers)| !peers.is_empty()).collect()
    }

    /// What peers say about registries that they cannot reach.
    pub fn outages(&self, registry: &str) -> Vec<(&Outage, Vec<PeerId>)> {
        let from = Outage { registry: registry.to_owned(), kind: OutageKind::NoSuchHost, since: 0 };
        let of_registry = self.outages.range(from..).take_while(|(outage, _)| outage.registry == registry);
        of_registry.map(|(outage, holders)| (outage, self.names(holders))).collect()
    }

    /// Everything that peers say about registries that they cannot reach, by registry.
    pub fn all_outages(&self) -> impl Iterator<Item = (&Outage, Vec<PeerId>)> {
        self.outages.iter().map(|(outage, holders)| (outage, self.names(holders)))
    }

    /// The peers that are up.
    pub fn peers(&self) -> Vec<&Peer> {
        self.peers.iter().flatten().map(|known| &known.peer).collect()
    }

    /// The node that a peer runs on, while it is up.
    pub fn node_of(&self, peer: PeerId) -> Option<&NodeName> {
        Some(&self.known(*self.numbers.get(&peer)?)?.peer.node)
    }

    /// How many blobs and image names a peer holds; 0 when it is not up.
    pub fn items_of(&self, peer: PeerId) -> usize {
        self.numbers.get(&peer).and_then(|number| self.known(*number)).map_or(0, |known| known.items)
    }

    /// How many different blobs the peers hold together.
    pub fn blobs(&self) -> usize {
        self.blobs.len()
    }

    fn up(&mut self, peer: Peer) {
        if let Some(&number) = self.numbers.get(&peer.id) {
            // It moved, or its node is known better now. Its content is the same.
            if let Some(known) = &mut self.peers[number as usize] {
                known.peer = peer;
            }
            return;
        }
        let free = self.peers.iter().position(Option::is_none).unwrap_or_else(|| {
            self.peers.push(None);
            self.peers.len() - 1
        });
        let number = Number::try_from(free).expect("fewer peers than 2^32");
        self.numbers.insert(peer.id, number);
        self.peers[free] = Some(Known { peer, items: 0 });
    }

    fn down(&mut self, peer: PeerId) {
        if let Some(number) = self.numbers.remove(&peer) {
            self.forget(number);
            self.peers[number as usize] = None;
        }
    }

    /// Forgets all that a peer holds, not the peer.
    fn forget(&mut self, number: Number) {
        self.blobs.retain(|_, holders| holders.without(number));
        self.images.retain(|_, images| {
            images.retain(|_, names| {
                names.retain(|_, holders| holders.without(number));
                !names.is_empty()
            });
            !images.is_empty()
        });
        self.outages.retain(|_, holders| holders.without(number));
        if let Some(known) = &mut self.peers[number as usize] {
            known.items = 0;
        }
    }

    fn change(&mut self, number: Number, changes: Vec<ContentChange>) -> usize {
        let mut items = self.known(number).map_or(0, |known| known.items);
        let mut dropped = 0;
        for change in changes {
            let added = change.is_addition();
            if added && items == MAX_ITEMS {
                dropped += usize::from(!self.holds(number, &change));
                continue;
            }
            match (self.note(number, change), added) {
                (true, true) => items += 1,
                (true, false) => items -= 1,
                (false, _) => {}
            }
        }
        if let Some(known) = &mut self.peers[number as usize] {
            known.items = items;
        }
        dropped
    }

    /// Notes one change; false when it says nothing new.
    fn note(&mut self, number: Number, change: ContentChange) -> bool {
        match change {
            ContentChange::BlobAdded(digest) => self.blobs.entry(digest).or_default().insert(number),
            ContentChange::BlobRemoved(digest) => {
                let Some(holders) = self.blobs.get_mut(&digest) else { return false };
                let removed = holders.remove(number);
                if holders.0.is_empty() {
                    self.blobs.remove(&digest);
                }
                removed
            }
            ContentChange::Tagged(repository, tag, digest) => {
                let images = self.images.entry(repository).or_default();
                images.entry(digest).or_default().entry(tag).or_default().insert(number)
            }
            ContentChange::Untagged(repository, tag, digest) => self.untag(number, &repository, &tag, digest),
            ContentChange::RegistryDown(outage) => self.outages.entry(outage).or_default().insert(number),
            ContentChange::RegistryUp(outage) => {
                let Some(holders) = self.outages.get_mut(&outage) else { return false };
                let removed = holders.remove(number);
                if holders.0.is_empty() {
                    self.outages.remove(&outage);
                }
                removed
            }
        }
    }

    fn untag(&mut self, number: Number, repository: &Repository, tag: &Option<String>, digest: Digest) -> bool {
        let Some(images) = self.images.get_mut(repository) else { return false };
        let Some(names) = images.get_mut(&digest) else { return false };
        let Some(holders) = names.get_mut(tag) else { return false };
        let removed = holders.remove(number);
        if holders.0.is_empty() {
            names.remove(tag);
        }
        if names.is_empty() {
            images.remove(&digest);
        }
        if images.is_empty() {
            self.images.remove(repository);
        }
        removed
    }

    /// Whether the peer is known to hold what this change adds.
    fn holds(&self, number: Number, added: &ContentChange) -> bool {
        let holders = match added {
            ContentChange::BlobAdded(digest) | ContentChange::BlobRemoved(digest) => self.blobs.get(digest),
            ContentChange::Tagged(repository, tag, digest) | ContentChange::Untagged(repository, tag, digest) => {
                let names = self.images.get(repository).and_then(|images| images.get(digest));
                names.and_then(|names| names.get(tag))
            }
            ContentChange::RegistryDown(outage) | ContentChange::RegistryUp(outage) => self.outages.get(outage),
        };
        holders.is_some_and(|holders| holders.0.binary_search(&number).is_ok())
    }

    fn known(&self, number: Number) -> Option<&Known> {
        self.peers[number as usize].as_ref()
    }

    fn names(&self, holders: &Holders) -> Vec<PeerId> {
        holders.0.iter().filter_map(|number| Some(self.known(*number)?.peer.id)).collect()
    }
}

impl Holders {
    /// False when it was there.
    fn insert(&mut self, number: Number) -> bool {
        let Err(place) = self.0.binary_search(&number) else { return false };
        self.0.insert(place, number);
        true
    }

    /// False when it was not there.
    fn remove(&mut self, number: Number) -> bool {
        let Ok(place) = self.0.binary_search(&number) else { return false };
        self.0.remove(place);
        true
    }

    /// Removes it and says whether anybody is left.
    fn without(&mut self, number: Number) -> bool {
        self.remove(number);
        !self.0.is_empty()
    }
}

#[cfg(test)]
mod tests;
