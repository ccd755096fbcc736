//! The peers of the inventory: their numbers, their addresses, and how many items each has.

use std::collections::HashMap;
use std::mem::size_of;

use super::hash_table_bytes;
use super::peer_sets::{Bitmap, PeerNumber};
use crate::model::{Peer, PeerId};

/// All peers, up or hidden.
#[derive(Debug, Clone, Default)]
pub(super) struct InventoryPeers {
    numbers: HashMap<PeerId, PeerNumber>,
    /// By [`PeerNumber`]; a `None` is a number to be used again.
    slots: Vec<Option<InventoryPeer>>,
    /// Numbers of the peers that are up.
    up: Bitmap,
}

/// A peer without its items.
#[derive(Debug, Clone)]
pub(super) struct InventoryPeer {
    id: PeerId,
    /// Set while the peer is up. Boxed, because queries with many peers read only the ids.
    peer: Option<Box<Peer>>,
    /// The number of the peer's items.
    pub(super) items: usize,
}

impl InventoryPeers {
    /// The peer's number. A new peer gets the lowest free number, and is hidden.
    pub(super) fn number_or_insert(&mut self, id: PeerId) -> PeerNumber {
        if let Some(number) = self.number_of(id) {
            return number;
        }
        let free = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let number = PeerNumber::try_from(free).expect("fewer than 2^32 peers");
        self.numbers.insert(id, number);
        self.slots[free] = Some(InventoryPeer { id, peer: None, items: 0 });
        number
    }

    pub(super) fn number_of(&self, id: PeerId) -> Option<PeerNumber> {
        self.numbers.get(&id).copied()
    }

    fn get(&self, number: PeerNumber) -> Option<&InventoryPeer> {
        self.slots.get(number as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: PeerNumber) -> Option<&mut InventoryPeer> {
        self.slots.get_mut(number as usize)?.as_mut()
    }

    /// The peer with this id, and the number of its items, if the peer is up.
    pub(super) fn get_up(&self, id: PeerId) -> Option<(&Peer, usize)> {
        let known = self.get(self.number_of(id)?)?;
        Some((known.peer.as_deref()?, known.items))
    }

    pub(super) fn mark_up(&mut self, peer: Peer) {
        let number = self.number_or_insert(peer.id);
        self.up.insert(number);
        if let Some(known) = self.get_mut(number) {
            known.peer = Some(Box::new(peer));
        }
    }

    pub(super) fn mark_hidden(&mut self, id: PeerId) {
        let Some(number) = self.number_of(id) else { return };
        self.up.remove(number);
        if let Some(known) = self.get_mut(number) {
            known.peer = None;
        }
    }

    /// Frees the peer's number. No item may have the number any more.
    pub(super) fn remove(&mut self, id: PeerId) {
        let Some(number) = self.numbers.remove(&id) else { return };
        self.up.remove(number);
        self.slots[number as usize] = None;
        let used = self.slots.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.slots.truncate(used);
    }

    /// Numbers of the peers that are up.
    pub(super) fn up(&self) -> &Bitmap {
        &self.up
    }

    /// The peers that are up, by number.
    pub(super) fn all_up(&self) -> impl Iterator<Item = &Peer> {
        self.slots.iter().flatten().filter_map(|known| known.peer.as_deref())
    }

    pub(super) fn ids(&self, numbers: impl Iterator<Item = PeerNumber>) -> Vec<PeerId> {
        numbers.filter_map(|number| Some(self.get(number)?.id)).collect()
    }

    pub(super) fn bytes(&self) -> usize {
        let peers: usize = self.all_up().map(|peer| size_of::<Peer>() + peer.node.as_str().len()).sum();
        let known = self.slots.capacity() * size_of::<Option<InventoryPeer>>();
        hash_table_bytes(&self.numbers) + known + self.up.bytes() + peers
    }
}
