//! Whom to greet next. No address and no peer is greeted twice at once, and those that the mesh asks for come before mere hints.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::model::PeerId;

/// Addresses that wait because somebody may be there: what one look-up yields, and the address book.
pub(super) const MAX_HINTS: usize = 1024;

/// Peers that wait because the mesh asks for them. It asks for a few at a time: neighbours that it lacks.
const MAX_ASKED: usize = 256;

/// So many met at hinted addresses are enough for one round: the mesh makes the others known, and greeting everybody would cost each
/// node of a large cluster as many handshakes as there are nodes. Each agent of many that start at once picks its own few at random,
/// and a graph with eight random edges for each of 5000 nodes is in one piece but for one case in billions.
const ENOUGH: usize = 8;

/// One greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    /// Where.
    pub(super) address: SocketAddr,
    /// Who has to answer, if it matters.
    pub(super) meant: Option<PeerId>,
}

/// The greetings that wait and those that are under way.
#[derive(Default)]
pub(super) struct Calls {
    asked: Vec<Call>,
    hints: Vec<SocketAddr>,
    under_way: Vec<Call>,
    met: usize,
}

impl Calls {
    /// The mesh asks for this peer. `false` when too many wait already.
    pub(super) fn ask(&mut self, peer: PeerId, address: SocketAddr) -> bool {
        let call = Call { address, meant: Some(peer) };
        if self.under_way.iter().any(|other| other.meant == call.meant) {
            // How that ends answers this as well.
            return true;
        }
        self.asked.retain(|other| other.meant != call.meant);
        let has_room = self.asked.len() < MAX_ASKED;
        if has_room {
            self.asked.push(call);
        }
        has_room
    }

    /// Somebody may be at these addresses, in the order that they are to be tried. Begins a round.
    pub(super) fn hint(&mut self, addresses: impl IntoIterator<Item = SocketAddr>) {
        self.met = 0;
        let mut there: BTreeSet<_> = self.hints.iter().copied().collect();
        for address in addresses {
            if self.hints.len() < MAX_HINTS && there.insert(address) {
                self.hints.push(address);
            }
        }
    }

    /// The next greeting, which is under way from now on.
    pub(super) fn next(&mut self) -> Option<Call> {
        let is_free = |address: SocketAddr| self.under_way.iter().all(|other| other.address != address);
        let call = if let Some(position) = self.asked.iter().position(|call| is_free(call.address)) {
            self.asked.remove(position)
        } else {
            let position = self.hints.iter().position(|address| is_free(*address))?;
            Call { address: self.hints.remove(position), meant: None }
        };
        self.under_way.push(call);
        Some(call)
    }

    /// It ended; whether a peer was met there.
    pub(super) fn ended(&mut self, call: Call, met: bool) {
        self.under_way.retain(|other| *other != call);
        if met && call.meant.is_none() {
            self.met += 1;
            if self.met >= ENOUGH {
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

    fn hinted(last: u16) -> Call {
        Call { address: at(last), meant: None }
    }

    #[test]
    fn who_is_asked_for_comes_before_who_may_be_there() {
        let mut calls = Calls::default();
        calls.hint([at(1), at(2)]);
        assert!(calls.ask(peer(9), at(9)));
        let order: Vec<_> = std::iter::from_fn(|| calls.next()).collect();
        assert_eq!(order, [Call { address: at(9), meant: Some(peer(9)) }, hinted(1), hinted(2)]);
    }

    #[test]
    fn nobody_is_greeted_twice_at_once() {
        let mut calls = Calls::default();
        calls.hint([at(1), at(1)]);
        calls.hint([at(1)]);
        assert_eq!(calls.next(), Some(hinted(1)));
        calls.hint([at(1)]);
        assert!(calls.ask(peer(1), at(1)));
        assert_eq!(calls.next(), None, "that address is being greeted");
        calls.ended(hinted(1), true);
        let asked = Call { address: at(1), meant: Some(peer(1)) };
        assert_eq!(calls.next(), Some(asked));
        assert!(calls.ask(peer(1), at(2)), "being met already, wherever it is");
        assert_eq!(calls.next(), None);
        calls.ended(asked, false);
        assert_eq!(calls.next(), Some(hinted(1)));
    }

    #[test]
    fn a_peer_that_moved_while_it_waited_is_greeted_where_it_is() {
        let mut calls = Calls::default();
        assert!(calls.ask(peer(1), at(1)) && calls.ask(peer(1), at(2)));
        assert_eq!(calls.next(), Some(Call { address: at(2), meant: Some(peer(1)) }));
        assert_eq!(calls.next(), None);
    }

    #[test]
    fn a_round_ends_when_enough_were_met() {
        let mut calls = Calls::default();
        calls.hint((0..100).map(at));
        for number in 0..ENOUGH as u16 {
            let nobody = calls.next().unwrap();
            calls.ended(nobody, false);
            let call = calls.next().unwrap();
            assert_eq!(call, hinted(2 * number + 1), "those who were not met do not count");
            calls.ended(call, true);
        }
        assert_eq!(calls.next(), None);
        calls.hint([at(200)]);
        assert_eq!(calls.next(), Some(hinted(200)), "the next round is another one");
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut calls = Calls::default();
        calls.hint((0..3000).map(at));
        for number in 0..MAX_ASKED {
            let mut key = [7; 32];
            key[..2].copy_from_slice(&(number as u16).to_le_bytes());
            assert!(calls.ask(PeerId::from_public_key(key), at(5000 + number as u16)));
        }
        assert!(!calls.ask(peer(1), at(1)));
        assert_eq!(std::iter::from_fn(|| calls.next()).count(), MAX_ASKED + MAX_HINTS);
    }
}
