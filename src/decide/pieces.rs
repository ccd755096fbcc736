//! Which piece is asked of which peer next, over all blobs of one recovery. Pure: no sockets, no clock, no randomness but a seed, so that a
//! thousand of them run in one simulation.
//!
//! Whoever drives it says what there is to fetch ([`Pool::add`]), who may have it ([`Pool::candidates`]), what those say of themselves
//! ([`Pool::hears`]) and what comes of what was asked; then takes [`Pool::neighbours`], [`Pool::cancels`] and [`Pool::next`] until there is
//! nothing left, and comes again when something happens or [`Pool::wake_at`] is reached.
//!
//! # The rules
//!
//! - Of each blob the last piece first, which proves its length; then the rarest among the neighbours, in a random order where they are equally
//!   rare. Never in reading order: all would wait for the same piece.
//! - A partial neighbour is asked for exactly what is wanted of it. One that holds everything, or pieces that nobody else near has, is offered
//!   more and sends what it has sent the least, even while nobody else is known: a swarm is as fast as its one source sends each piece once, and a
//!   zone's one source is whoever fetches from other zones. What is offered is set aside until it has chosen or is late, and less is offered the less there is.
//! - How rare a piece is counts where it would come from: in our own zone for a neighbour there.
//! - Of the peers that have something, the one is asked that will be done first: what it owes and the new ask, at its rate.
//! - What a neighbour of our own zone has is not asked of another zone, unless nothing comes of asking it.
//! - Nobody is waited for: what a peer is silent about for longer than it usually is, is asked of another too.
//! - A piece is asked of one peer, of two when the first is late, and at the very end.
//! - Of a blob a peer is asked for one piece, and for more when that one was compared with the list, so that a liar is found by its first. Where there
//!   is no list yet the first piece in reading order is best, since a list that is being made reaches it first.
//!
//! Not here: whether what comes fits (the driver says [`Pool::unfit`]), which peers are to be trusted, and how a serving node chooses
//! ([`super::slots`]).

mod asking;
mod blob;
mod ending;
mod neighbours;
mod peers;
mod rate;
mod set;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::model::{Availability, Order, PeerId, Zone};
use crate::oci::{Cut, Digest};
use asking::Asked;
pub use asking::MAX_ASKS;
use blob::Blob;
use peers::Peers;
use rate::Rate;

/// One ask, until it is over. Never used twice in a pool.
pub type AskId = u64;

/// What to ask of whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Stands for it from now on.
    pub id: AskId,
    /// What to send.
    pub order: Order,
}

/// Somebody who has a blob or is fetching it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Who.
    pub peer: PeerId,
    /// Its zone, where that is known.
    pub zone: Option<Zone>,
    /// Whether it announced all of it.
    pub whole: bool,
    /// 0 good, 1 troubled, 2 lying. The lower is preferred; 2 counts only when there is nobody else.
    pub standing: u8,
}

/// A change in whom to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbour {
    /// Hear from now on which pieces it has.
    Follow {
        /// Who.
        peer: PeerId,
        /// Of which blob.
        digest: Digest,
    },
    /// Hear no more of it. It may have ended already.
    Leave {
        /// Who.
        peer: PeerId,
        /// Of which blob.
        digest: Digest,
    },
}

/// How an ask ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The peer sent all that it would.
    Done,
    /// It has no time now.
    Busy,
    /// It broke off. Whether the peer is to be forgotten the driver decides.
    Failed,
}

/// What one recovery wants, and from whom.
#[derive(Debug)]
pub struct Pool {
    zone: Option<Zone>,
    rng: SmallRng,
    salt: u64,
    /// Whether other zones may be asked.
    cross: bool,
    blobs: Vec<Blob>,
    places: HashMap<Digest, usize>,
    peers: Peers,
    /// At most [`asking::MAX_ASKS`].
    asks: BTreeMap<AskId, Asked>,
    next_id: AskId,
    cancels: Vec<AskId>,
    changes: Vec<Neighbour>,
    /// All that comes.
    rate: Rate,
    /// The latest moment that was told of.
    now: Option<Instant>,
    wake_at: Option<Instant>,
    /// When somebody who was forgotten may be a neighbour again.
    returns_at: Option<Instant>,
}

impl Pool {
    /// Nothing to fetch yet. `zone` is our own, `seed` all the randomness there is.
    pub fn new(zone: Option<Zone>, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        Self {
            zone,
            salt: rng.random(),
            rng,
            cross: true,
            blobs: Vec::new(),
            places: HashMap::new(),
            peers: Peers::default(),
            asks: BTreeMap::new(),
            next_id: 0,
            cancels: Vec::new(),
            changes: Vec::new(),
            rate: Rate::default(),
            now: None,
            wake_at: None,
            returns_at: None,
        }
    }

    /// A blob to fetch, whose list of states is still to come unless it [`Pool::lists`]. One that is there already stays as it is.
    pub fn add(&mut self, digest: Digest, cut: Cut) {
        let salt = self.rng.random();
        let next = self.blobs.len();
        if *self.places.entry(digest).or_insert(next) == next {
            self.blobs.push(Blob::new(digest, cut, salt));
        }
    }

    /// There is a list for a blob: what comes can be compared at once.
    pub fn lists(&mut self, digest: Digest) {
        if let Some(&place) = self.places.get(&digest) {
            self.blobs[place].is_listed = true;
        }
    }

    /// A piece of this blob that this peer sent fits: from now on it is asked for several. One that only came, and was not compared with anything yet,
    /// does not count; nor does what it sent of other blobs, whose files may be whole where this one's is not.
    pub fn fits(&mut self, peer: PeerId, digest: Digest) {
        let number = self.peers.number(peer);
        if let Some(&place) = self.places.get(&digest)
            && self.blobs[place].fits(number)
        {
            self.peers.get_mut(number).known();
        }
    }

    /// A piece is here: from an earlier try, or by a way that this pool did not ask for.
    pub fn hold(&mut self, digest: Digest, piece: u32) {
        if let Some(&place) = self.places.get(&digest) {
            self.arrives(place, piece, None);
        }
    }

    /// A piece that counted as here is not what it should be. It is fetched again.
    pub fn unfit(&mut self, digest: Digest, piece: u32) {
        if let Some(&place) = self.places.get(&digest) {
            self.blobs[place].goes(piece);
        }
    }

    /// A piece of this blob that this peer sent does not fit what there is of somebody's list: it is asked for nothing more of it until a list is
    /// whole and tells who is wrong, or for some seconds if none comes.
    pub fn doubts(&mut self, peer: PeerId, digest: Digest, now: Instant) {
        let number = self.peers.number(peer);
        if let Some(&place) = self.places.get(&digest) {
            self.blobs[place].doubts(number, now);
        }
    }

    /// What a neighbour said about its pieces. Of others nothing is believed; numbers that there are not, and what was said before, change nothing.
    pub fn hears(&mut self, peer: PeerId, digest: Digest, word: &Availability, now: Instant) {
        self.clock(now);
        if let Some(&place) = self.places.get(&digest)
            && let Some(number) = self.peers.known(peer)
            && let Some(link) = self.blobs[place].link_of(number)
        {
            self.blobs[place].hears(link, word);
        }
    }

    /// A peer is not followed any more, or has nothing of this blob after all. It is no neighbour until [`Pool::candidates`] names it again.
    /// What was asked of it ends by itself.
    pub fn loses(&mut self, peer: PeerId, digest: Digest) {
        let Some(&place) = self.places.get(&digest) else { return };
        let blob = &mut self.blobs[place];
        if let Some(link) = self.peers.known(peer).and_then(|number| blob.link_of(number)) {
            blob.detach(link);
        }
        let all = blob.near.iter_mut().chain(&mut blob.far);
        all.filter(|known| known.candidate.peer == peer).for_each(|known| known.is_lost = true);
        blob.is_unsettled = true;
    }

    /// A peer cannot be reached, or is banned: nothing is asked of it before then, and what was asked is over.
    pub fn forget(&mut self, peer: PeerId, until: Instant) {
        let number = self.peers.number(peer);
        self.peers.get_mut(number).forget(until);
        self.returns_at = Some(self.returns_at.map_or(until, |at| at.min(until)));
        self.withdraw(number, None, true);
        for place in 0..self.blobs.len() {
            self.detach(place, number);
            self.blobs[place].is_unsettled = true;
        }
    }

    /// Whether peers of other zones may be asked; at first they may. Peers without a zone are never of another one, nor is anybody when we
    /// have none. What was asked and has not begun is taken back.
    pub fn cross(&mut self, allowed: bool) {
        if std::mem::replace(&mut self.cross, allowed) == allowed {
            return;
        }
        for place in 0..self.blobs.len() {
            self.blobs[place].is_unsettled = true;
            let far = self.blobs[place].links.iter().filter(|link| link.is_far).map(|link| link.peer);
            for peer in if allowed { Vec::new() } else { far.collect() } {
                self.withdraw(peer, Some(place), false);
            }
        }
    }

    /// How many pieces of a blob are not here; 0 for one that is not of this pool.
    pub fn missing(&self, digest: Digest) -> usize {
        self.places.get(&digest).map_or(0, |place| self.blobs[*place].missing())
    }

    /// Whether everything is here.
    pub fn is_done(&self) -> bool {
        self.blobs.iter().all(|blob| blob.missing() == 0)
    }

    fn clock(&mut self, now: Instant) {
        self.now = self.now.max(Some(now));
    }
}

/// A hash of a number, for random orders that need no memory (the finalizer of SplitMix64).
fn mix(mut number: u64) -> u64 {
    number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
