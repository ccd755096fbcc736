//! Whom to follow: a random few of those who have a blob or are fetching it, most of them of our own zone.

use std::time::Instant;

use super::blob::{Blob, Known};
use super::peers::Peers;
use super::{Candidate, Neighbour, Pool, mix};
use crate::model::PeerId;
use crate::oci::Digest;

/// Neighbours of one blob. In simulations of a thousand nodes the last is done after 1.27 times the time that its link needs with 10 of
/// them, 1.17 with 20 and 1.13 with 40; each costs a stream.
pub(super) const NEIGHBOURS: usize = 20;

/// Of them from other zones, where there are any: enough that zones do not become islands. Whoever brings pieces into its zone needs more.
const FAR: usize = NEIGHBOURS / 4;
const FAR_CROSSING: usize = NEIGHBOURS / 2;

/// Candidates that are kept, of our own zone and of others: three replacements for each neighbour until the list is next given.
const KEPT: usize = 4 * NEIGHBOURS;

/// What a liar's standing is.
const LYING: u8 = 2;

impl Pool {
    /// Takes the place of what was known about who has or is fetching a blob.
    pub fn candidates(&mut self, digest: Digest, list: &[Candidate]) {
        let Some(&place) = self.places.get(&digest) else { return };
        let (zone, salt) = (&self.zone, self.salt);
        let is_far = |one: &Candidate| matches!((zone, &one.zone), (Some(ours), Some(its)) if ours != its);
        let (far, near) = list.iter().partition::<Vec<_>, _>(|one| is_far(one));
        let blob = &mut self.blobs[place];
        blob.near = kept(near, salt, digest);
        blob.far = kept(far, salt, digest);
        blob.is_unsettled = true;
    }

    /// What changes in whom to follow. A complete holder is not followed, and one that has said [`crate::model::Availability::Whole`] not any
    /// more; so is one that was lost ([`Pool::loses`]).
    pub fn neighbours(&mut self, now: Instant) -> Vec<Neighbour> {
        self.clock(now);
        if self.returns_at.is_some_and(|at| at <= now) {
            self.returns_at = self.peers.returns_at(now);
            self.blobs.iter_mut().for_each(|blob| blob.is_unsettled = true);
        }
        for place in 0..self.blobs.len() {
            if std::mem::take(&mut self.blobs[place].is_unsettled) {
                self.settle(place, now);
            }
        }
        std::mem::take(&mut self.changes)
    }

    fn settle(&mut self, place: usize, now: Instant) {
        let far = if self.cross { FAR_CROSSING } else { FAR };
        let chosen = choose(&self.blobs[place], &self.peers, far, now);
        let gone: Vec<_> = self.blobs[place].links.iter().map(|link| link.peer).collect();
        for peer in gone {
            if !chosen.iter().any(|(one, _)| one.peer == self.peers.get(peer).id) {
                self.detach(place, peer);
                self.withdraw(peer, Some(place), false);
            }
        }
        for (candidate, is_far) in chosen {
            self.attach(place, &candidate, is_far);
        }
    }

    fn attach(&mut self, place: usize, candidate: &Candidate, is_far: bool) {
        let peer = self.peers.number(candidate.peer);
        let blob = &mut self.blobs[place];
        let (digest, id) = (blob.digest, candidate.peer);
        let link = blob.link_of(peer).unwrap_or_else(|| {
            blob.attach(peer, is_far);
            blob.links.len() - 1
        });
        match (candidate.whole, blob.links[link].is_whole) {
            (true, false) => {
                blob.has_all(link);
                if std::mem::take(&mut blob.links[link].is_followed) {
                    self.changes.push(Neighbour::Leave { peer: id, digest });
                }
            }
            // It is told of as fetching, and is not followed: it has to say itself what it has.
            (false, _) if !blob.links[link].is_followed && !blob.links[link].said_whole => {
                blob.has_nothing(link);
                blob.links[link].is_followed = true;
                self.changes.push(Neighbour::Follow { peer: id, digest });
            }
            _ => {}
        }
    }

    /// Takes a neighbour away.
    pub(super) fn detach(&mut self, place: usize, peer: usize) {
        let blob = &mut self.blobs[place];
        if let Some(link) = blob.link_of(peer)
            && blob.detach(link).is_followed
        {
            self.changes.push(Neighbour::Leave { peer: self.peers.get(peer).id, digest: blob.digest });
        }
    }
}

/// The best of them, in order: by standing, then at random.
fn kept(list: Vec<&Candidate>, salt: u64, digest: Digest) -> Vec<Known> {
    let [first, ..] = digest.as_bytes().as_chunks::<8>().0 else { return Vec::new() };
    let salt = salt ^ u64::from_le_bytes(*first);
    let mut keyed: Vec<_> = list.into_iter().map(|one| (one.standing, score(one.peer, salt), one)).collect();
    keyed.sort_unstable_by_key(|(standing, score, one)| (*standing, *score, one.peer));
    keyed.dedup_by_key(|(_, _, one)| one.peer);
    let known = |(_, score, candidate): (u8, u32, &Candidate)| {
        // Zones are told apart by now.
        Known { candidate: Candidate { zone: None, ..candidate.clone() }, score, is_lost: false }
    };
    keyed.into_iter().take(KEPT).map(known).collect()
}

/// Differs from pool to pool, and nobody can choose its key for it.
fn score(peer: PeerId, salt: u64) -> u32 {
    let words = peer.public_key().as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    (words.fold(salt, |hash, word| mix(hash ^ word)) >> 32) as u32
}

/// The neighbours that a blob should have, and whether each is in another zone.
fn choose(blob: &Blob, peers: &Peers, far: usize, now: Instant) -> Vec<(Candidate, bool)> {
    if blob.missing() == 0 {
        return Vec::new();
    }
    let order = |known: &[Known]| {
        let fits = |one: &&Known| !one.is_lost && !peers.is_forgotten(one.candidate.peer, now);
        let linked = |one: &Known| peers.known(one.candidate.peer).is_some_and(|peer| blob.link_of(peer).is_some());
        let mut fit: Vec<_> = known.iter().filter(fits).collect();
        // Whoever is a neighbour stays one for a little longer: a change costs a stream and a first word.
        fit.sort_by_cached_key(|one| (one.candidate.standing, if linked(one) { one.score / 2 } else { one.score }));
        fit.into_iter().map(|one| one.candidate.clone()).collect::<Vec<_>>()
    };
    let (near, far_ones) = (order(&blob.near), order(&blob.far));
    let from_far = far.min(far_ones.len()).max(NEIGHBOURS.saturating_sub(near.len()));
    let far_ones = far_ones.into_iter().take(from_far).map(|one| (one, true));
    let near = near.into_iter().take(NEIGHBOURS - from_far.min(far_ones.len())).map(|one| (one, false));
    let mut chosen: Vec<_> = near.chain(far_ones).collect();
    if chosen.iter().any(|(one, _)| one.standing < LYING) {
        chosen.retain(|(one, _)| one.standing < LYING);
    }
    chosen
}
