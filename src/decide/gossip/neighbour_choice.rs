//! Whom to connect to: everybody while there are few, else a few that are chosen at random once, so that the choice does not change
//! with every newcomer.

use crate::model::{PeerId, Zone};
use crate::oci::Digest;

/// Up to so many others, an agent connects to all.
pub(super) const MAX_FULL_MESH: usize = 12;

/// Beyond, it chooses so many. With those that chose it, it has twice as many neighbours: a random graph of this degree stays whole
/// when a quarter of its nodes dies at once, and any two nodes are four steps apart at a thousand.
pub(super) const CHOSEN: usize = 4;

/// Of those, so many of its own zone: gossip between zones costs money, and too little of it would split the mesh.
const SAME_ZONE: usize = 2;

/// More connections than this are thinned out, down to [`NEIGHBOURS_AFTER_THINNING`]: at random, of those whom we did not choose. One that chose us
/// comes back, and others have met more members by then.
pub(super) const MAX_NEIGHBOURS: usize = 32;
pub(super) const NEIGHBOURS_AFTER_THINNING: usize = 24;

/// Who should be a neighbour, of those that can be.
pub(super) fn choose<'a>(
    salt: u64,
    zone: Option<&Zone>,
    candidates: impl Iterator<Item = (PeerId, Option<&'a Zone>)>,
) -> Vec<PeerId> {
    let mut ranked: Vec<_> = candidates.map(|(peer, of)| (salted_rank(salt, peer), peer, of)).collect();
    ranked.sort_unstable_by_key(|(rank, _, _)| *rank);
    if ranked.len() <= MAX_FULL_MESH {
        return ranked.into_iter().map(|(_, peer, _)| peer).collect();
    }
    let near = ranked.iter().filter(|(_, _, of)| zone.is_some() && *of == zone).take(SAME_ZONE);
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

/// Random, and nobody else's choice: a key that is made to come first for one agent would need its salt.
fn salted_rank(salt: u64, peer: PeerId) -> u64 {
    first_bytes(&[salt.to_be_bytes().as_slice(), peer.public_key()].concat())
}

/// Random for any two, and always the same for them (rendezvous hashing).
pub(super) fn rank(me: PeerId, peer: PeerId) -> u64 {
    first_bytes(&[me.public_key().as_slice(), peer.public_key()].concat())
}

fn first_bytes(text: &[u8]) -> u64 {
    Digest::of(text).as_bytes()[..8].iter().fold(0, |rank, byte| rank << 8 | u64::from(*byte))
}
