//! Which piece is asked of which peer next, over all blobs of one recovery. Pure: no sockets, no clock, no randomness but a seed, so that a
//! thousand of them run in one simulation.
//!
//! Whoever drives it says what there is to fetch ([`PiecePicker::add_blob`]), who may have it ([`PiecePicker::set_providers`]), what those say of themselves
//! ([`PiecePicker::record_piece_map`]) and what comes of what was asked; then takes [`PiecePicker::take_follow_changes`], [`PiecePicker::take_cancellations`] and [`PiecePicker::next_request`] until there is
//! nothing left, and comes again when something happens or [`PiecePicker::wake_at`] is reached.
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
//! Not here: whether what comes fits (the driver says [`PiecePicker::discard_piece`]), which peers are to be trusted, and how a serving node chooses
//! ([`super::upload_slots`]).

mod blob;
mod peers;
mod piece_set;
mod progress;
mod provider_selection;
mod rate_estimate;
mod requests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::model::{PeerId, PieceMapUpdate, PieceRequest, Zone};
use crate::oci::{Digest, PieceLayout};
use blob::BlobPicker;
use peers::PeerRecords;
use rate_estimate::RateEstimate;
use requests::InFlightRequest;
pub use requests::MAX_IN_FLIGHT;

/// One ask, until it is over. Never used twice in a pool.
pub type PieceRequestId = u64;

/// What to ask of whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PickedRequest {
    /// Stands for it from now on.
    pub id: PieceRequestId,
    /// What to send.
    pub request: PieceRequest,
}

/// Somebody who has a blob or is fetching it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// Who.
    pub peer: PeerId,
    /// Its zone, where that is known.
    pub zone: Option<Zone>,
    /// Whether it announced all of it.
    pub is_whole: bool,
    /// 0 good, 1 troubled, 2 lying. The lower is preferred; 2 counts only when there is nobody else.
    pub standing: u8,
}

/// A change in whom to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FollowChange {
    /// Hear from now on which pieces it has.
    Follow {
        /// Who.
        peer: PeerId,
        /// Of which blob.
        digest: Digest,
    },
    /// Hear no more of it. It may have ended already.
    Unfollow {
        /// Who.
        peer: PeerId,
        /// Of which blob.
        digest: Digest,
    },
}

/// How an ask ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestEnd {
    /// The peer sent all that it would.
    Done,
    /// It has no time now.
    Busy,
    /// It broke off. Whether the peer is to be forgotten the driver decides.
    Failed,
}

/// What one recovery wants, and from whom.
#[derive(Debug)]
pub struct PiecePicker {
    zone: Option<Zone>,
    rng: SmallRng,
    salt: u64,
    /// Whether other zones may be asked.
    is_cross_zone_allowed: bool,
    blobs: Vec<BlobPicker>,
    blob_indexes: HashMap<Digest, usize>,
    peers: PeerRecords,
    /// At most [`requests::MAX_IN_FLIGHT`].
    in_flight: BTreeMap<PieceRequestId, InFlightRequest>,
    next_id: PieceRequestId,
    cancellations: Vec<PieceRequestId>,
    follow_changes: Vec<FollowChange>,
    /// All that comes.
    rate: RateEstimate,
    /// The latest moment that was told of.
    now: Option<Instant>,
    wake_at: Option<Instant>,
    /// When somebody who was forgotten may be a neighbour again.
    exclusion_ends_at: Option<Instant>,
}

impl PiecePicker {
    /// Nothing to fetch yet. `zone` is our own, `seed` all the randomness there is.
    pub fn new(zone: Option<Zone>, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        Self {
            zone,
            salt: rng.random(),
            rng,
            is_cross_zone_allowed: true,
            blobs: Vec::new(),
            blob_indexes: HashMap::new(),
            peers: PeerRecords::default(),
            in_flight: BTreeMap::new(),
            next_id: 0,
            cancellations: Vec::new(),
            follow_changes: Vec::new(),
            rate: RateEstimate::default(),
            now: None,
            wake_at: None,
            exclusion_ends_at: None,
        }
    }

    /// A blob to fetch, whose list of states is still to come unless it [`PiecePicker::mark_hash_chain_ready`]. One that is there already stays as it is.
    pub fn add_blob(&mut self, digest: Digest, cut: PieceLayout) {
        let salt = self.rng.random();
        let next = self.blobs.len();
        if *self.blob_indexes.entry(digest).or_insert(next) == next {
            self.blobs.push(BlobPicker::new(digest, cut, salt));
        }
    }

    /// There is a list for a blob: what comes can be compared at once.
    pub fn mark_hash_chain_ready(&mut self, digest: Digest) {
        if let Some(&place) = self.blob_indexes.get(&digest) {
            self.blobs[place].has_hash_chain = true;
        }
    }

    /// A piece of this blob that this peer sent fits: from now on it is asked for several. One that only came, and was not compared with anything yet,
    /// does not count; nor does what it sent of other blobs, whose files may be whole where this one's is not.
    pub fn record_verified_piece(&mut self, peer: PeerId, digest: Digest) {
        let number = self.peers.index_or_insert(peer);
        if let Some(&place) = self.blob_indexes.get(&digest)
            && self.blobs[place].record_verified(number)
        {
            self.peers.get_mut(number).mark_verified();
        }
    }

    /// A piece is here: from an earlier try, or by a way that this pool did not ask for.
    pub fn mark_piece_present(&mut self, digest: Digest, piece: u32) {
        if let Some(&place) = self.blob_indexes.get(&digest) {
            self.mark_present(place, piece, None);
        }
    }

    /// A piece that counted as here is not what it should be. It is fetched again.
    pub fn discard_piece(&mut self, digest: Digest, piece: u32) {
        if let Some(&place) = self.blob_indexes.get(&digest) {
            self.blobs[place].mark_absent(piece);
        }
    }

    /// A piece of this blob that this peer sent does not fit what there is of somebody's list: it is asked for nothing more of it until a list is
    /// whole and tells who is wrong, or for some seconds if none comes.
    pub fn record_mismatch(&mut self, peer: PeerId, digest: Digest, now: Instant) {
        let number = self.peers.index_or_insert(peer);
        if let Some(&place) = self.blob_indexes.get(&digest) {
            self.blobs[place].record_mismatch(number, now);
        }
    }

    /// What a neighbour said about its pieces. Of others nothing is believed; numbers that there are not, and what was said before, change nothing.
    pub fn record_piece_map(&mut self, peer: PeerId, digest: Digest, word: &PieceMapUpdate, now: Instant) {
        self.advance_clock(now);
        if let Some(&place) = self.blob_indexes.get(&digest)
            && let Some(number) = self.peers.index_of(peer)
            && let Some(link) = self.blobs[place].selected_index(number)
        {
            self.blobs[place].record_piece_map(link, word);
        }
    }

    /// A peer is not followed any more, or has nothing of this blob after all. It is no neighbour until [`PiecePicker::set_providers`] names it again.
    /// What was asked of it ends by itself.
    pub fn remove_provider(&mut self, peer: PeerId, digest: Digest) {
        let Some(&place) = self.blob_indexes.get(&digest) else { return };
        let blob = &mut self.blobs[place];
        if let Some(link) = self.peers.index_of(peer).and_then(|number| blob.selected_index(number)) {
            blob.deselect(link);
        }
        let all = blob.near_listed.iter_mut().chain(&mut blob.far_listed);
        all.filter(|known| known.provider.peer == peer).for_each(|known| known.is_lost = true);
        blob.needs_selection = true;
    }

    /// A peer cannot be reached, or is banned: nothing is asked of it before then, and what was asked is over.
    pub fn exclude_peer(&mut self, peer: PeerId, until: Instant) {
        let number = self.peers.index_or_insert(peer);
        self.peers.get_mut(number).exclude(until);
        self.exclusion_ends_at = Some(self.exclusion_ends_at.map_or(until, |at| at.min(until)));
        self.cancel_requests(number, None, true);
        for place in 0..self.blobs.len() {
            self.deselect(place, number);
            self.blobs[place].needs_selection = true;
        }
    }

    /// Whether peers of other zones may be asked; at first they may. Peers without a zone are never of another one, nor is anybody when we
    /// have none. What was asked and has not begun is taken back.
    pub fn set_cross_zone(&mut self, allowed: bool) {
        if std::mem::replace(&mut self.is_cross_zone_allowed, allowed) == allowed {
            return;
        }
        for place in 0..self.blobs.len() {
            self.blobs[place].needs_selection = true;
            let far = self.blobs[place].selected.iter().filter(|link| link.is_far).map(|link| link.peer);
            for peer in if allowed { Vec::new() } else { far.collect() } {
                self.cancel_requests(peer, Some(place), false);
            }
        }
    }

    /// How many pieces of a blob are not here; 0 for one that is not of this pool.
    pub fn missing_pieces(&self, digest: Digest) -> usize {
        self.blob_indexes.get(&digest).map_or(0, |place| self.blobs[*place].missing())
    }

    /// Whether everything is here.
    pub fn is_complete(&self) -> bool {
        self.blobs.iter().all(|blob| blob.missing() == 0)
    }

    fn advance_clock(&mut self, now: Instant) {
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
