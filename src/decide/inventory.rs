//! The inventory: which peers have which blobs and images, built from the announcements of the
//! mesh.
//!
//! Every entry is a hint. The inventory names the peers to fetch from, and the fetching agent
//! verifies. Not here: the content of this node, and the choice when peers disagree about a tag.
//!
//! A digest or name is stored once, with the numbers of the peers that have it. A layer of a
//! thousand nodes costs one entry and one bit per node. Peers have no lists of their own: to forget
//! a peer, or to replace its items, walks the whole inventory, a millisecond for 20 000 digests. A
//! peer that is down is only masked, because it returns with the same items.

mod content;
mod peer_sets;
mod peers;
mod same_repository;

use std::collections::{BTreeMap, HashMap};
use std::mem::size_of;

use self::content::Content;
use self::peer_sets::{Bitmap, PeerNumber, Providers};
use self::peers::InventoryPeers;
use crate::model::{
    Bits, InventoryChange, InventoryItem, MAX_ITEMS, MeshEvent, NodeName, Outage, OutageKind, Peer, PeerId, Zone,
};
use crate::oci::{Digest, Repository};

/// Most peers in one call of [`Inventory::shared_items`].
pub const MAX_SHARED: usize = 256;

/// The items of all peers. Queries count only peers that are up, unless they say otherwise.
///
/// Peers are not bounded here: the membership table bounds its members, and forgets dead ones.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    peers: InventoryPeers,
    content: Content,
}

impl Inventory {
    /// Applies a change of the mesh. A peer that is down is hidden, not forgotten.
    ///
    /// Returns the number of items dropped because their peer is at the limit of [`MAX_ITEMS`]; the
    /// other items count.
    pub fn apply(&mut self, event: MeshEvent) -> usize {
        match event {
            MeshEvent::Up(peer) => self.up(peer),
            MeshEvent::Down(peer) => self.hide(peer),
            MeshEvent::Snapshot(peer, items) => return self.replace(peer, items),
            MeshEvent::Changed(peer, changes) => return self.change(peer, changes),
        }
        0
    }

    /// Marks a peer up, so its earlier items count again. For a peer that is up already, only the
    /// addresses change.
    pub fn up(&mut self, peer: Peer) {
        self.peers.mark_up(peer);
    }

    /// Hides a peer's items and keeps them for the peer's return, so they need not be sent again.
    /// The cost does not depend on the number of items.
    pub fn hide(&mut self, peer: PeerId) {
        self.peers.mark_hidden(peer);
    }

    /// Removes a peer and all its items.
    pub fn forget(&mut self, peer: PeerId) {
        if let Some(number) = self.peers.number_of(peer) {
            self.clear(number);
            self.peers.remove(peer);
        }
    }

    /// Replaces all items of a peer that is up or hidden. An unknown peer is added as hidden.
    ///
    /// Returns the number of items dropped because of [`MAX_ITEMS`].
    pub fn replace(&mut self, peer: PeerId, items: impl IntoIterator<Item = InventoryItem>) -> usize {
        let number = self.peers.number_or_insert(peer);
        self.clear(number);
        self.change(peer, items.into_iter().map(InventoryChange::Added))
    }

    /// Changes the items of a peer that is up or hidden. An unknown peer is added as hidden,
    /// without items.
    ///
    /// Returns the number of items dropped because of [`MAX_ITEMS`].
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

    /// The providers of a blob.
    pub fn blob_providers(&self, digest: Digest) -> Vec<PeerId> {
        self.content.blob(digest).map(|providers| self.up_peers_of(providers)).unwrap_or_default()
    }

    /// The number of a blob's providers.
    pub fn count_blob_providers(&self, digest: Digest) -> usize {
        self.content.blob(digest).map_or(0, |providers| providers.within(self.peers.up()).count())
    }

    /// The partial providers of a blob: peers that download the blob and serve its pieces.
    pub fn partial_providers(&self, digest: Digest) -> Vec<PeerId> {
        self.content.partial_providers(digest).map(|fetching| self.up_peers_of(fetching)).unwrap_or_default()
    }

    /// The digests that a tag points at, with the peers that say so. More than one digest means
    /// that the peers disagree.
    pub fn tag(&self, repository: &Repository, tag: &str) -> BTreeMap<Digest, Vec<PeerId>> {
        let digests = self.content.tagged(repository, tag).filter_map(|(digest, recorded)| {
            // A name counts only with the content that the name points at.
            let providers = self.content.blob(digest)?;
            let numbers = recorded.within(self.peers.up()).filter(|number| providers.contains(*number));
            Some((digest, self.peers.ids(numbers)))
        });
        digests.filter(|(_, peers)| !peers.is_empty()).collect()
    }

    /// The outages of this registry that peers announce.
    pub fn outages(&self, registry: &str) -> Vec<(&Outage, Vec<PeerId>)> {
        let first = Outage { registry: registry.to_owned(), kind: OutageKind::NoSuchHost, since: 0 };
        let of_registry = self.content.outages_from(&first).take_while(|(outage, _)| outage.registry == registry);
        self.reported_outages(of_registry).collect()
    }

    /// All outages that peers announce, by registry.
    pub fn all_outages(&self) -> impl Iterator<Item = (&Outage, Vec<PeerId>)> {
        self.reported_outages(self.content.outages())
    }

    /// The peers that are up.
    pub fn peers(&self) -> Vec<&Peer> {
        self.peers.all_up().collect()
    }

    /// The node of a peer, while the peer is up.
    pub fn node_of(&self, peer: PeerId) -> Option<&NodeName> {
        Some(&self.peers.get_up(peer)?.0.node)
    }

    /// The zone that a peer announces, while the peer is up.
    pub fn zone_of(&self, peer: PeerId) -> Option<&Zone> {
        self.peers.get_up(peer)?.0.zone.as_ref()
    }

    /// The number of a peer's items; 0 unless the peer is up.
    pub fn items_of(&self, peer: PeerId) -> usize {
        self.peers.get_up(peer).map_or(0, |(_, items)| items)
    }

    /// The number of different blobs of all peers that are up. Walks the whole inventory.
    pub fn blobs(&self) -> usize {
        self.content.blobs().filter(|providers| self.is_any_up(providers)).count()
    }

    /// All items of these peers, hidden ones included, in the order of [`InventoryItem`], with one
    /// bit per peer in the given order. A relay answers snapshot requests with these. Walks the
    /// whole inventory.
    ///
    /// Name each peer once. Peers beyond the first [`MAX_SHARED`] are left out.
    pub fn shared_items(&self, peers: &[PeerId]) -> Vec<(InventoryItem, Bits)> {
        let peers = &peers[..peers.len().min(MAX_SHARED)];
        let mut requested = Bitmap::default();
        // Positions by peer number. The positions of other peers are never read.
        let mut positions = Vec::new();
        for (position, peer) in peers.iter().enumerate() {
            if let Some(number) = self.peers.number_of(*peer) {
                requested.insert(number);
                positions.resize(positions.len().max(number as usize + 1), 0);
                positions[number as usize] = position;
            }
        }
        self.content.select_items(|providers| {
            let mut found = providers.within(&requested).peekable();
            found.peek()?;
            let mut bits = Bits::none_of(peers.len());
            found.for_each(|number| bits.set(positions[number as usize]));
            Some(bits)
        })
    }

    /// The number of different items, those of hidden peers included.
    pub fn items(&self) -> usize {
        self.content.len()
    }

    /// Estimated bytes of the inventory on the heap, without the allocator's overhead. Walks the
    /// whole inventory.
    pub fn bytes(&self) -> usize {
        self.peers.bytes() + self.content.bytes()
    }

    /// Removes all items of a peer, and keeps the peer.
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

/// A hash table uses seven eighths of its slots. The number of slots is a power of two, and each
/// slot takes one byte beside the entry.
fn hash_table_bytes<K, V>(table: &HashMap<K, V>) -> usize {
    match table.capacity() {
        0 => 0,
        capacity => (capacity * 8 / 7).next_power_of_two() * (size_of::<(K, V)>() + 1),
    }
}

#[cfg(test)]
mod tests;
