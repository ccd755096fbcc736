//! Whom to greet next. No address and no peer is greeted twice at once, and those that the mesh asks for come before mere hints.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::model::PeerId;

/// Addresses that wait because somebody may be there: what one look-up yields, and the address book.
pub(super) const MAX_HINTS: usize = 1024;

/// Peers that wait because the mesh asks for them. It asks for a few at a time: neighbors that it lacks.
const MAX_REQUESTED: usize = 256;

/// So many met at hinted addresses are enough for one round: the mesh makes the others known, and greeting everybody would cost each
/// node of a large cluster as many handshakes as there are nodes. Each agent of many that start at once picks its own few at random,
/// and a graph with eight random edges for each of 5000 nodes is in one piece but for one case in billions.
const ENOUGH_PEERS: usize = 8;

/// One greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DialTarget {
    /// Where.
    pub(super) address: SocketAddr,
    /// Who has to answer, if it matters.
    pub(super) expected_peer: Option<PeerId>,
}

/// The greetings that wait and those that are under way.
#[derive(Default)]
pub(super) struct DialQueue {
    requested: Vec<DialTarget>,
    hints: Vec<SocketAddr>,
    dialing: Vec<DialTarget>,
    connected: usize,
}

impl DialQueue {
    /// The mesh asks for this peer. `false` when too many wait already.
    pub(super) fn insert_requested(&mut self, peer: PeerId, address: SocketAddr) -> bool {
        let target = DialTarget { address, expected_peer: Some(peer) };
        if self.dialing.iter().any(|other| other.expected_peer == target.expected_peer) {
            // How that ends answers this as well.
            return true;
        }
        self.requested.retain(|other| other.expected_peer != target.expected_peer);
        let has_room = self.requested.len() < MAX_REQUESTED;
        if has_room {
            self.requested.push(target);
        }
        has_room
    }

    /// Somebody may be at these addresses, in the order that they are to be tried. Begins a round.
    pub(super) fn insert_hints(&mut self, addresses: impl IntoIterator<Item = SocketAddr>) {
        self.connected = 0;
        let mut there: BTreeSet<_> = self.hints.iter().copied().collect();
        for address in addresses {
            if self.hints.len() < MAX_HINTS && there.insert(address) {
                self.hints.push(address);
            }
        }
    }

    /// The next greeting, which is under way from now on.
    pub(super) fn start_next(&mut self) -> Option<DialTarget> {
        let is_free = |address: SocketAddr| self.dialing.iter().all(|other| other.address != address);
        let target = if let Some(position) = self.requested.iter().position(|call| is_free(call.address)) {
            self.requested.remove(position)
        } else {
            let position = self.hints.iter().position(|address| is_free(*address))?;
            DialTarget { address: self.hints.remove(position), expected_peer: None }
        };
        self.dialing.push(target);
        Some(target)
    }

    /// It ended; whether a peer was met there.
    pub(super) fn finish(&mut self, target: DialTarget, met: bool) {
        self.dialing.retain(|other| *other != target);
        if met && target.expected_peer.is_none() {
            self.connected += 1;
            if self.connected >= ENOUGH_PEERS {
                self.hints.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(last: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, (last >> 8) as u8, last as u8], 4701))
    }

    fn peer(number: u8) -> PeerId {
        PeerId::from_public_key([number; 32])
    }

    fn hinted(last: u16) -> DialTarget {
        DialTarget { address: at(last), expected_peer: None }
    }

    #[test]
    fn a_requested_peer_is_dialed_before_hinted_addresses() {
        let mut queue = DialQueue::default();
        queue.insert_hints([at(1), at(2)]);
        assert!(queue.insert_requested(peer(9), at(9)));
        let order: Vec<_> = std::iter::from_fn(|| queue.start_next()).collect();
        assert_eq!(order, [DialTarget { address: at(9), expected_peer: Some(peer(9)) }, hinted(1), hinted(2)]);
    }

    #[test]
    fn no_address_and_no_peer_is_dialed_twice_at_once() {
        let mut queue = DialQueue::default();
        queue.insert_hints([at(1), at(1)]);
        queue.insert_hints([at(1)]);
        assert_eq!(queue.start_next(), Some(hinted(1)));
        queue.insert_hints([at(1)]);
        assert!(queue.insert_requested(peer(1), at(1)));
        assert_eq!(queue.start_next(), None, "that address is being greeted");
        queue.finish(hinted(1), true);
        let requested = DialTarget { address: at(1), expected_peer: Some(peer(1)) };
        assert_eq!(queue.start_next(), Some(requested));
        assert!(queue.insert_requested(peer(1), at(2)), "being met already, wherever it is");
        assert_eq!(queue.start_next(), None);
        queue.finish(requested, false);
        assert_eq!(queue.start_next(), Some(hinted(1)));
    }

    #[test]
    fn a_queued_peer_that_moved_is_dialed_at_its_new_address() {
        let mut queue = DialQueue::default();
        assert!(queue.insert_requested(peer(1), at(1)) && queue.insert_requested(peer(1), at(2)));
        assert_eq!(queue.start_next(), Some(DialTarget { address: at(2), expected_peer: Some(peer(1)) }));
        assert_eq!(queue.start_next(), None);
    }

    #[test]
    fn a_round_ends_when_enough_peers_are_connected() {
        let mut queue = DialQueue::default();
        queue.insert_hints((0..100).map(at));
        for number in 0..ENOUGH_PEERS as u16 {
            let absent = queue.start_next().unwrap();
            queue.finish(absent, false);
            let target = queue.start_next().unwrap();
            assert_eq!(target, hinted(2 * number + 1), "those who were not met do not count");
            queue.finish(target, true);
        }
        assert_eq!(queue.start_next(), None);
        queue.insert_hints([at(200)]);
        assert_eq!(queue.start_next(), Some(hinted(200)), "the next round is another one");
    }

    #[test]
    fn the_dial_queue_is_bounded() {
        let mut queue = DialQueue::default();
        queue.insert_hints((0..3000).map(at));
        for number in 0..MAX_REQUESTED {
            let mut key = [7; 32];
            key[..2].copy_from_slice(&(number as u16).to_le_bytes());
            assert!(queue.insert_requested(PeerId::from_public_key(key), at(5000 + number as u16)));
        }
        assert!(!queue.insert_requested(peer(1), at(1)));
        assert_eq!(std::iter::from_fn(|| queue.start_next()).count(), MAX_REQUESTED + MAX_HINTS);
    }
}
