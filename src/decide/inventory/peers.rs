//! The peers of the table: their numbers, how much each holds, and who counts.

use std::collections::HashMap;
use std::mem::size_of;

use super::hash_table_bytes;
use super::providers::{Bitmap, Number};
use crate::model::{Peer, PeerId};

/// Every peer of which something is known.
#[derive(Debug, Clone, Default)]
pub(super) struct Peers {
    numbers: HashMap<PeerId, Number>,
    /// By [`Number`]; `None` is free to be given out again.
    known: Vec<Option<Known>>,
    /// The numbers of those that are up.
    up: Bitmap,
}

/// What is known of a peer apart from its content.
#[derive(Debug, Clone)]
pub(super) struct Known {
    id: PeerId,
    /// While it is up. Apart, because an answer of many peers reads their ids alone.
    peer: Option<Box<Peer>>,
    /// How many items it holds.
    pub(super) items: usize,
}

impl Peers {
    /// The peer's number; a peer that has none gets the lowest that is free, and does not count yet.
    pub(super) fn number(&mut self, id: PeerId) -> Number {
        if let Some(number) = self.find(id) {
            return number;
        }
        let free = self.known.iter().position(Option::is_none).unwrap_or_else(|| {
            self.known.push(None);
            self.known.len() - 1
        });
        let number = Number::try_from(free).expect("fewer peers than 2^32");
        self.numbers.insert(id, number);
        self.known[free] = Some(Known { id, peer: None, items: 0 });
        number
    }

    pub(super) fn find(&self, id: PeerId) -> Option<Number> {
        self.numbers.get(&id).copied()
    }

    fn get(&self, number: Number) -> Option<&Known> {
        self.known.get(number as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: Number) -> Option<&mut Known> {
        self.known.get_mut(number as usize)?.as_mut()
    }

    /// The peer of this id, if it is up.
    pub(super) fn get_up(&self, id: PeerId) -> Option<(&Peer, usize)> {
        let known = self.get(self.find(id)?)?;
        Some((known.peer.as_deref()?, known.items))
    }

    pub(super) fn show(&mut self, peer: Peer) {
        let number = self.number(peer.id);
        self.up.insert(number);
        if let Some(known) = self.get_mut(number) {
            known.peer = Some(Box::new(peer));
        }
    }

    pub(super) fn hide(&mut self, id: PeerId) {
        let Some(number) = self.find(id) else { return };
        self.up.remove(number);
        if let Some(known) = self.get_mut(number) {
            known.peer = None;
        }
    }

    /// Frees the number. Nothing in the table may bear it any more.
    pub(super) fn free(&mut self, id: PeerId) {
        let Some(number) = self.numbers.remove(&id) else { return };
        self.up.remove(number);
        self.known[number as usize] = None;
        let used = self.known.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.known.truncate(used);
    }

    /// The numbers of those that are up.
    pub(super) fn up(&self) -> &Bitmap {
        &self.up
    }

    /// Those that are up, by number.
    pub(super) fn all_up(&self) -> impl Iterator<Item = &Peer> {
        self.known.iter().flatten().filter_map(|known| known.peer.as_deref())
    }

    pub(super) fn ids(&self, numbers: impl Iterator<Item = Number>) -> Vec<PeerId> {
        numbers.filter_map(|number| Some(self.get(number)?.id)).collect()
    }

    pub(super) fn bytes(&self) -> usize {
        let peers: usize = self.all_up().map(|peer| size_of::<Peer>() + peer.node.as_str().len()).sum();
        let known = self.known.capacity() * size_of::<Option<Known>>();
        hash_table_bytes(&self.numbers) + known + self.up.bytes() + peers
    }
}
