//! The choice of neighbors: all members of a small mesh, else a few members that are chosen at
//! random once, so the choice does not change with every new member.

use crate::model::{PeerId, Zone};
use crate::oci::Digest;

/// With at most so many other members, an agent connects to all of them.
pub(super) const MAX_FULL_MESH: usize = 12;

/// In a larger mesh, an agent chooses so many neighbors. With the neighbors that chose the agent,
/// there are twice as many. A random graph of this degree stays connected when a quarter of its
/// nodes dies at once, and of a thousand nodes any two are four steps apart.
pub(super) const CHOSEN: usize = 4;

/// Chosen neighbors in the agent's own zone. Gossip between zones costs money, and too little of
/// this gossip would split the mesh.
const SAME_ZONE: usize = 2;

/// Beyond this number, an agent closes random connections that it did not choose, down to
/// [`NEIGHBOURS_AFTER_THINNING`]. A member that chose this agent connects again, and the others
/// have met more members by then.
pub(super) const MAX_NEIGHBORS: usize = 32;
pub(super) const NEIGHBORS_AFTER_THINNING: usize = 24;

/// The members that should be neighbors, among those that can be.
pub(super) fn choose<'a>(
    salt: u64,
    zone: Option<&Zone>,
    candidates: impl Iterator<Item = (PeerId, Option<&'a Zone>)>,
) -> Vec<PeerId> {
    let mut ranked: Vec<_> = candidates.map(|(peer, peer_zone)| (salted_rank(salt, peer), peer, peer_zone)).collect();
    ranked.sort_unstable_by_key(|(rank, _, _)| *rank);
    if ranked.len() <= MAX_FULL_MESH {
        return ranked.into_iter().map(|(_, peer, _)| peer).collect();
    }
    let near = ranked.iter().filter(|(_, _, peer_zone)| zone.is_some() && *peer_zone == zone).take(SAME_ZONE);
    let mut chosen: Vec<_> = near.map(|(_, peer, _)| *peer).collect();
    for (_, peer, _) in &ranked {
        if chosen.len() == CHOSEN {
            break;
        }
        if !chosen.contains(peer) {
            chosen.push(*peer);
        }
    }
    chosen
}

/// A random rank of this agent alone. A key with a low rank at one agent would need the agent's
/// salt.
fn salted_rank(salt: u64, peer: PeerId) -> u64 {
    first_bytes(&[salt.to_be_bytes().as_slice(), peer.public_key()].concat())
}

/// A random rank that is the same for two given keys on every agent (rendezvous hashing).
pub(super) fn rank(me: PeerId, peer: PeerId) -> u64 {
    first_bytes(&[me.public_key().as_slice(), peer.public_key()].concat())
}

fn first_bytes(text: &[u8]) -> u64 {
    Digest::of(text).as_bytes()[..8].iter().fold(0, |rank, byte| rank << 8 | u64::from(*byte))
}
