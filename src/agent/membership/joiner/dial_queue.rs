//! The queue of dials. No address and no peer is dialed twice at once, and peers that the mesh
//! requests come before hints.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::model::PeerId;

/// Addresses of possible agents that wait: the result of one look-up, and the address book.
pub(super) const MAX_HINTS: usize = 1024;

/// Peers that wait because the mesh requests them. The mesh requests missing neighbors, a few at a
/// time.
const MAX_REQUESTED: usize = 256;

/// Connections from hints that end a round. The mesh reports the other members, and a dial of every
/// member would cost each node of a large cluster as many handshakes as there are nodes. Agents
/// that start together each pick a few peers at random. A graph with eight random edges for each of
/// 5000 nodes is connected, but for one case in billions.
const ENOUGH_PEERS: usize = 8;

/// One dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DialTarget {
    pub(super) address: SocketAddr,
    /// The peer that must answer; `None` for any peer.
    pub(super) expected_peer: Option<PeerId>,
}

/// Dials that wait, and dials in progress.
#[derive(Default)]
pub(super) struct DialQueue {
    requested: Vec<DialTarget>,
    hints: Vec<SocketAddr>,
    dialing: Vec<DialTarget>,
    connected: usize,
}

impl DialQueue {
    /// Queues a dial that the mesh requests. Returns `false` when the queue is full.
    pub(super) fn insert_requested(&mut self, peer: PeerId, address: SocketAddr) -> bool {
        let target = DialTarget { address, expected_peer: Some(peer) };
        if self.dialing.iter().any(|other| other.expected_peer == target.expected_peer) {
            // The dial in progress also answers this request.
            return true;
        }
        self.requested.retain(|other| other.expected_peer != target.expected_peer);
        let has_room = self.requested.len() < MAX_REQUESTED;
        if has_room {
            self.requested.push(target);
        }
        has_room
    }

    /// Begins a round with these addresses of possible agents, in the order of their dials.
    pub(super) fn insert_hints(&mut self, addresses: impl IntoIterator<Item = SocketAddr>) {
        self.connected = 0;
        let mut queued: BTreeSet<_> = self.hints.iter().copied().collect();
        for address in addresses {
            if self.hints.len() < MAX_HINTS && queued.insert(address) {
                self.hints.push(address);
            }
        }
    }

    /// The next dial, which counts as in progress from here on.
    pub(super) fn start_next(&mut self) -> Option<DialTarget> {
        let is_free = |address: SocketAddr| self.dialing.iter().all(|other| other.address != address);
        let target = if let Some(position) = self.requested.iter().position(|target| is_free(target.address)) {
            self.requested.remove(position)
        } else {
            let position = self.hints.iter().position(|address| is_free(*address))?;
            DialTarget { address: self.hints.remove(position), expected_peer: None }
        };
        self.dialing.push(target);
        Some(target)
    }

    /// Records the end of a dial, and whether a peer answered there.
    pub(super) fn finish(&mut self, target: DialTarget, is_connected: bool) {
        self.dialing.retain(|other| *other != target);
        if is_connected && target.expected_peer.is_none() {
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

    fn address(last: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, (last >> 8) as u8, last as u8], 4701))
    }

    fn peer(number: u8) -> PeerId {
        PeerId::from_public_key([number; 32])
    }

    fn hinted(last: u16) -> DialTarget {
        DialTarget { address: address(last), expected_peer: None }
    }

    #[test]
    fn a_requested_peer_is_dialed_before_hinted_addresses() {
        let mut queue = DialQueue::default();
        queue.insert_hints([address(1), address(2)]);
        assert!(queue.insert_requested(peer(9), address(9)));
        let dialed: Vec<_> = std::iter::from_fn(|| queue.start_next()).collect();
        assert_eq!(dialed, [DialTarget { address: address(9), expected_peer: Some(peer(9)) }, hinted(1), hinted(2)]);
    }

    #[test]
    fn no_address_and_no_peer_is_dialed_twice_at_once() {
        let mut queue = DialQueue::default();
        queue.insert_hints([address(1), address(1)]);
        queue.insert_hints([address(1)]);
        assert_eq!(queue.start_next(), Some(hinted(1)));
        queue.insert_hints([address(1)]);
        assert!(queue.insert_requested(peer(1), address(1)));
        assert_eq!(queue.start_next(), None, "the address is being dialed");
        queue.finish(hinted(1), true);
        let requested = DialTarget { address: address(1), expected_peer: Some(peer(1)) };
        assert_eq!(queue.start_next(), Some(requested));
        assert!(queue.insert_requested(peer(1), address(2)), "the peer is being dialed at another address");
        assert_eq!(queue.start_next(), None);
        queue.finish(requested, false);
        assert_eq!(queue.start_next(), Some(hinted(1)));
    }

    #[test]
    fn a_queued_peer_that_moved_is_dialed_at_its_new_address() {
        let mut queue = DialQueue::default();
        assert!(queue.insert_requested(peer(1), address(1)) && queue.insert_requested(peer(1), address(2)));
        assert_eq!(queue.start_next(), Some(DialTarget { address: address(2), expected_peer: Some(peer(1)) }));
        assert_eq!(queue.start_next(), None);
    }

    #[test]
    fn a_round_ends_when_enough_peers_are_connected() {
        let mut queue = DialQueue::default();
        queue.insert_hints((0..100).map(address));
        for number in 0..ENOUGH_PEERS as u16 {
            let absent = queue.start_next().unwrap();
            queue.finish(absent, false);
            let target = queue.start_next().unwrap();
            assert_eq!(target, hinted(2 * number + 1), "failed dials do not count");
            queue.finish(target, true);
        }
        assert_eq!(queue.start_next(), None);
        queue.insert_hints([address(200)]);
        assert_eq!(queue.start_next(), Some(hinted(200)), "a new round starts");
    }

    #[test]
    fn the_dial_queue_is_bounded() {
        let mut queue = DialQueue::default();
        queue.insert_hints((0..3000).map(address));
        for number in 0..MAX_REQUESTED {
            let mut key = [7; 32];
            key[..2].copy_from_slice(&(number as u16).to_le_bytes());
            assert!(queue.insert_requested(PeerId::from_public_key(key), address(5000 + number as u16)));
        }
        assert!(!queue.insert_requested(peer(1), address(1)));
        assert_eq!(std::iter::from_fn(|| queue.start_next()).count(), MAX_REQUESTED + MAX_HINTS);
    }
}
