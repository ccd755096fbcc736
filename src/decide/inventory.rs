//! Who holds what: a table of the content of the peers, built from what the mesh tells.
//!
//! Everything in it is hearsay. It is good for knowing whom to ask; whoever fetches verifies. Not here: our own content, and what
//! to do when peers disagree about a tag.
//!
//! A digest or name stands once, with the numbers of the peers that hold it, so that a layer that a thousand nodes share costs one
//! entry and a bit a node. Peers have no lists of their own; to forget one, or to replace what it holds, walks the whole table: a
//! millisecond for 20 000 digests. A peer that is away is only masked, because it comes back with what it had.

mod content;
mod peers;
mod providers;

use std::collections::{BTreeMap, HashMap};
use std::mem::size_of;

use self::content::Content;
use self::peers::InventoryPeers;
use self::providers::{Bitmap, PeerNumber, Providers};
use crate::model::{
    Bits, InventoryChange, InventoryItem, MAX_ITEMS, MeshEvent, NodeName, Outage, OutageKind, Peer, PeerId, Zone,
};
use crate::oci::{Digest, Repository};

/// Most peers that [`Inventory::shared_items`] answers for at once.
pub const MAX_SHARED: usize = 256;

/// What is known of the content of peers. Questions are answered from those that are up, unless they say otherwise.
///
/// Peers are not bounded here: whoever admits them bounds them, and forgets those that do not come back.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    peers: InventoryPeers,
    content: Content,
}

impl Inventory {
    /// Takes in what the mesh tells. A peer that is down is hidden, not forgotten.
    ///
    /// Returns how many items were dropped because their peer is at its limit of [`MAX_ITEMS`]; the others still count.
    pub fn apply(&mut self, event: MeshEvent) -> usize {
        match event {
            MeshEvent::Up(peer) => self.up(peer),
            MeshEvent::Down(peer) => self.hide(peer),
            MeshEvent::Snapshot(peer, items) => return self.replace(peer, items),
            MeshEvent::Changed(peer, changes) => return self.change(peer, changes),
        }
        0
    }

    /// A peer counts from now on: what was known of it before counts again. Of one that is up already, only where it is changes.
    pub fn up(&mut self, peer: Peer) {
        self.peers.mark_up(peer);
    }

    /// A peer's content no longer counts but stays known, so that it need not be told again when the peer comes back. Costs the same
    /// however much it holds.
    pub fn hide(&mut self, peer: PeerId) {
        self.peers.mark_hidden(peer);
    }

    /// Nothing of a peer is kept.
    pub fn forget(&mut self, peer: PeerId) {
        if let Some(number) = self.peers.number_of(peer) {
            self.clear(number);
            self.peers.remove(peer);
        }
    }

    /// What a peer holds, replacing what was known; whether it is up or hidden. A peer never heard of is hidden until it is up.
    ///
    /// Returns how many items were dropped because of [`MAX_ITEMS`].
    pub fn replace(&mut self, peer: PeerId, items: impl IntoIterator<Item = InventoryItem>) -> usize {
        let number = self.peers.number_or_insert(peer);
        self.clear(number);
        self.change(peer, items.into_iter().map(InventoryChange::Added))
    }

    /// What changed at a peer, whether it is up or hidden. A peer never heard of held nothing, and is hidden until it is up.
    ///
    /// Returns how many items were dropped because of [`MAX_ITEMS`].
    pub fn change(&mut self, peer: PeerId, changes: impl IntoIterator<Item = InventoryChange>) -> usize {
        let number = self.peers.number_or_insert(peer);
        let Some(known) = self.peers.get_mut(number) else { return 0 };
        let mut dropped = 0;
        for change in changes {
            match change {
                InventoryChange::Added(item) if known.items == MAX_ITEMS => {
                    dropped += usize::from(!self.content.contains(number, &item));
                }
                InventoryChange::Added(item) => known.items += usize::from(self.content.insert(number, item)),
                InventoryChange::Removed(item) => known.items -= usize::from(self.content.remove(number, item)),
            }
        }
        dropped
    }

    /// The peers that hold a blob.
    pub fn blob_providers(&self, digest: Digest) -> Vec<PeerId> {
        self.content.blob(digest).map(|holders| self.up_peers_of(holders)).unwrap_or_default()
    }

    /// How many peers hold a blob.
    pub fn count_blob_providers(&self, digest: Digest) -> usize {
        self.content.blob(digest).map_or(0, |holders| holders.within(self.peers.up()).count())
    }

    /// The peers that are fetching a blob, and serve what they have of it.
    pub fn partial_providers(&self, digest: Digest) -> Vec<PeerId> {
        self.content.partial_providers(digest).map(|fetching| self.up_peers_of(fetching)).unwrap_or_default()
    }

    /// The peers that hold an image's index or manifest *and* know it under this very repository.
    ///
    /// A digest alone is not a permission: it would let anybody fetch any image by inventing a registry.
    pub fn image_providers(&self, repository: &Repository, root: Digest) -> Vec<PeerId> {
        let Some(holders) = self.content.blob(root) else { return Vec::new() };
        let mut knowing = Bitmap::default();
        for named in self.content.names_of(repository, root) {
            knowing.extend(named.within(self.peers.up()));
        }
        self.peers.ids(holders.within(&knowing))
    }

    /// What a tag points at, by whom. More than one digest means that the peers disagree.
    pub fn tag(&self, repository: &Repository, tag: &str) -> BTreeMap<Digest, Vec<PeerId>> {
        let held = self.content.tagged(repository, tag).filter_map(|(digest, named)| {
            // A name without the content that it points at is no voice.
            let holders = self.content.blob(digest)?;
            let voices = named.within(self.peers.up()).filter(|number| holders.contains(*number));
            Some((digest, self.peers.ids(voices)))
        });
        held.filter(|(_, peers)| !peers.is_empty()).collect()
    }

    /// What peers say about registries that they cannot reach.
    pub fn outages(&self, registry: &str) -> Vec<(&Outage, Vec<PeerId>)> {
        let first = Outage { registry: registry.to_owned(), kind: OutageKind::NoSuchHost, since: 0 };
        let of_registry = self.content.outages_from(&first).take_while(|(outage, _)| outage.registry == registry);
        self.reported_outages(of_registry).collect()
    }

    /// Everything that peers say about registries that they cannot reach, by registry.
    pub fn all_outages(&self) -> impl Iterator<Item = (&Outage, Vec<PeerId>)> {
        self.reported_outages(self.content.outages())
    }

    /// The peers that are up.
    pub fn peers(&self) -> Vec<&Peer> {
        self.peers.all_up().collect()
    }

    /// The node that a peer runs on, while it is up.
    pub fn node_of(&self, peer: PeerId) -> Option<&NodeName> {
        Some(&self.peers.get_up(peer)?.0.node)
    }

    /// The zone that a peer says it is in, while it is up.
    pub fn zone_of(&self, peer: PeerId) -> Option<&Zone> {
        self.peers.get_up(peer)?.0.zone.as_ref()
    }

    /// How many items a peer holds; 0 when it is not up.
    pub fn items_of(&self, peer: PeerId) -> usize {
        self.peers.get_up(peer).map_or(0, |(_, items)| items)
    }

    /// How many different blobs the peers hold together. Walks the whole table.
    pub fn blobs(&self) -> usize {
        self.content.blobs().filter(|holders| self.is_any_up(holders)).count()
    }

    /// Everything that any of these peers holds, hidden ones too, in the order of [`Item`], with one bit per peer in the order given:
    /// what a relay answers to those who missed it. Walks the whole table.
    ///
    /// Name each peer once. Those beyond the first [`MAX_SHARED`] are left out.
    pub fn shared_items(&self, peers: &[PeerId]) -> Vec<(InventoryItem, Bits)> {
        let peers = &peers[..peers.len().min(MAX_SHARED)];
        let mut asked = Bitmap::default();
        // By number; those of numbers that were not asked for are never looked at.
        let mut places = Vec::new();
        for (place, peer) in peers.iter().enumerate() {
            if let Some(number) = self.peers.number_of(*peer) {
                asked.insert(number);
                places.resize(places.len().max(number as usize + 1), 0);
                places[number as usize] = place;
            }
        }
        self.content.select_items(|providers| {
            let mut found = providers.within(&asked).peekable();
            found.peek()?;
            let mut bits = Bits::none_of(peers.len());
            found.for_each(|number| bits.set(places[number as usize]));
            Some(bits)
        })
    }

    /// How many different items there are, those of hidden peers too.
    pub fn items(&self) -> usize {
        self.content.len()
    }

    /// Estimated bytes of the table on the heap, without what the allocator adds. Walks the whole table.
    pub fn bytes(&self) -> usize {
        self.peers.bytes() + self.content.bytes()
    }

    /// Forgets all that a peer holds, not the peer.
    fn clear(&mut self, number: PeerNumber) {
        let Some(known) = self.peers.get_mut(number).filter(|known| known.items > 0) else { return };
        known.items = 0;
        self.content.clear(number);
    }

    fn up_peers_of(&self, providers: &Providers) -> Vec<PeerId> {
        self.peers.ids(providers.within(self.peers.up()))
    }

    fn is_any_up(&self, providers: &Providers) -> bool {
        providers.within(self.peers.up()).next().is_some()
    }

    fn reported_outages<'a>(
        &self,
        outages: impl Iterator<Item = (&'a Outage, &'a Providers)>,
    ) -> impl Iterator<Item = (&'a Outage, Vec<PeerId>)> {
        outages.map(|(outage, providers)| (outage, self.up_peers_of(providers))).filter(|(_, peers)| !peers.is_empty())
    }
}

/// Seven of eight places may be taken, and their number is a power of two; one byte each beside the entry.
fn hash_table_bytes<K, V>(table: &HashMap<K, V>) -> usize {
    match table.capacity() {
        0 => 0,
        capacity => (capacity * 8 / 7).next_power_of_two() * (size_of::<(K, V)>() + 1),
    }
}

#[cfg(test)]
mod tests;
