//! Piece picker: which piece is requested from which peer next, over all blobs of one recovery.
//! Pure: no sockets, no clock, and a seed for all randomness, so one simulation can run a thousand
//! pickers.
//!
//! The driver adds the blobs ([`PiecePicker::add_blob`]) and their providers
//! ([`PiecePicker::set_providers`]), and reports the providers' piece maps
//! ([`PiecePicker::record_piece_map`]) and the results of requests. Then the driver calls
//! [`PiecePicker::take_follow_changes`], [`PiecePicker::take_cancellations`] and
//! [`PiecePicker::next_request`] until they return nothing, and repeats that after every event and
//! at [`PiecePicker::wake_at`].
//!
//! # Rules
//!
//! - The last piece of a blob comes first, because the last piece proves the blob's length. Then
//!   come the pieces that are rarest among the selected providers; equally rare pieces come in
//!   random order. Reading order would make all nodes wait for the same piece.
//! - A partial provider gets requests for exactly the wanted pieces. A whole provider, or the only
//!   one of our zone with certain pieces, is offered more pieces and sends those that it has sent
//!   least. A swarm is as fast as its seed sends each piece once, and a zone's only source is the
//!   zone leader. Offered pieces stay reserved until the provider has chosen or is late. Offers
//!   shrink with the unassigned pieces.
//! - Rarity is counted where the piece would come from: for a provider of our own zone, in our own
//!   zone.
//! - Among the ready providers, the one that would finish first gets the request: its bytes in
//!   flight plus the new request, at its rate.
//! - Pieces that a provider of our own zone has are not requested from other zones, unless requests
//!   to that provider fail.
//! - A request that is silent for longer than its peer's usual gap is hedged at another provider.
//! - A piece has one request in flight, or two when the first is late, or for the last pieces.
//! - A provider gets one piece of a blob until that piece is verified, so the first piece exposes a
//!   lying provider. Before the hash chain is ready, that piece is the provider's lowest unassigned
//!   one, because a chain under construction reaches the lowest piece first.
//!
//! Not here: verification (the driver calls [`PiecePicker::discard_piece`]), trust in peers, and
//! a provider's choice of the pieces to send ([`super::upload_slots`]).

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

/// Identifies a request. A picker never reuses a number.
pub type PieceRequestId = u64;

/// A request for the driver to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PickedRequest {
    /// Identifies the request in all later reports.
    pub id: PieceRequestId,
    /// The message to send.
    pub request: PieceRequest,
}

/// A peer that has a blob, or is downloading the blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// The peer to request from.
    pub peer: PeerId,
    /// The peer's zone, if known.
    pub zone: Option<Zone>,
    /// Whether the peer announced the whole blob.
    pub is_whole: bool,
    /// 0 good, 1 faulty, 2 lying. A lower value is preferred; 2 is used only without an
    /// alternative.
    pub standing: u8,
}

/// A change of the followed providers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FollowChange {
    /// Subscribe to the peer's piece maps.
    Follow {
        /// The peer to subscribe to.
        peer: PeerId,
        /// The blob of the piece maps.
        digest: Digest,
    },
    /// End the subscription. The peer may have ended the stream already.
    Unfollow {
        /// The peer of the subscription.
        peer: PeerId,
        /// The blob of the piece maps.
        digest: Digest,
    },
}

/// The end of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestEnd {
    /// The peer sent all pieces that it would send.
    Done,
    /// The peer has no upload slot now.
    Busy,
    /// The peer broke off. The driver decides whether to exclude the peer.
    Failed,
}

/// The requests of one recovery.
#[derive(Debug)]
pub struct PiecePicker {
    zone: Option<Zone>,
    rng: SmallRng,
    salt: u64,
    /// Whether providers of other zones may get requests.
    is_cross_zone_allowed: bool,
    blobs: Vec<BlobPicker>,
    blob_indexes: HashMap<Digest, usize>,
    peers: PeerRecords,
    /// At most [`MAX_IN_FLIGHT`].
    in_flight: BTreeMap<PieceRequestId, InFlightRequest>,
    next_id: PieceRequestId,
    cancellations: Vec<PieceRequestId>,
    follow_changes: Vec<FollowChange>,
    /// Arrival rate over all peers.
    rate: RateEstimate,
    /// The latest `now` of any call.
    now: Option<Instant>,
    wake_at: Option<Instant>,
    /// The next end of an exclusion.
    exclusion_ends_at: Option<Instant>,
}

impl PiecePicker {
    /// A picker without blobs. `zone` is our own; `seed` is the only source of randomness.
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

    /// Adds a blob whose hash chain is not ready before [`PiecePicker::mark_hash_chain_ready`].
    /// Adding a known blob changes nothing.
    pub fn add_blob(&mut self, digest: Digest, layout: PieceLayout) {
        let salt = self.rng.random();
        let next = self.blobs.len();
        if *self.blob_indexes.entry(digest).or_insert(next) == next {
            self.blobs.push(BlobPicker::new(digest, layout, salt));
        }
    }

    /// The hash chain of the blob is ready: each piece is verified on arrival.
    pub fn mark_hash_chain_ready(&mut self, digest: Digest) {
        if let Some(&blob_index) = self.blob_indexes.get(&digest) {
            self.blobs[blob_index].has_hash_chain = true;
        }
    }

    /// A piece of this blob from this peer matched the hash chain, so later requests may hold
    /// several pieces. Unverified pieces do not count, nor do pieces of other blobs: the peer's
    /// file of another blob may be whole where the file of this one is not.
    pub fn record_verified_piece(&mut self, peer: PeerId, digest: Digest) {
        let number = self.peers.index_or_insert(peer);
        if let Some(&blob_index) = self.blob_indexes.get(&digest)
            && self.blobs[blob_index].record_verified(number)
        {
            self.peers.get_mut(number).mark_verified();
        }
    }

    /// A piece is present without a request of this picker: from an earlier try, or by another way.
    pub fn mark_piece_present(&mut self, digest: Digest, piece: u32) {
        if let Some(&blob_index) = self.blob_indexes.get(&digest) {
            self.mark_present(blob_index, piece, None);
        }
    }

    /// A present piece is wrong, and is fetched again.
    pub fn discard_piece(&mut self, digest: Digest, piece: u32) {
        if let Some(&blob_index) = self.blob_indexes.get(&digest) {
            self.blobs[blob_index].mark_absent(piece);
        }
    }

    /// A piece from this peer contradicts an incomplete hash chain, which itself is not proved yet.
    /// The peer gets no more requests for the blob until the complete chain decides, or for some
    /// seconds when no chain comes.
    pub fn record_mismatch(&mut self, peer: PeerId, digest: Digest, now: Instant) {
        let number = self.peers.index_or_insert(peer);
        if let Some(&blob_index) = self.blob_indexes.get(&digest) {
            self.blobs[blob_index].record_mismatch(number, now);
        }
    }

    /// Records a piece map of a selected provider; piece maps of other peers are ignored. Repeated
    /// pieces and numbers beyond the blob change nothing.
    pub fn record_piece_map(&mut self, peer: PeerId, digest: Digest, update: &PieceMapUpdate, now: Instant) {
        self.advance_clock(now);
        if let Some(&blob_index) = self.blob_indexes.get(&digest)
            && let Some(number) = self.peers.index_of(peer)
            && let Some(provider_index) = self.blobs[blob_index].selected_index(number)
        {
            self.blobs[blob_index].record_piece_map(provider_index, update);
        }
    }

    /// The peer is no longer followed, or lost the blob. The peer is not selected again before
    /// [`PiecePicker::set_providers`] lists the peer. Its requests in flight end on their own.
    pub fn remove_provider(&mut self, peer: PeerId, digest: Digest) {
        let Some(&blob_index) = self.blob_indexes.get(&digest) else { return };
        let blob = &mut self.blobs[blob_index];
        if let Some(provider_index) = self.peers.index_of(peer).and_then(|number| blob.selected_index(number)) {
            blob.deselect(provider_index);
        }
        let all = blob.near_listed.iter_mut().chain(&mut blob.far_listed);
        all.filter(|listed| listed.provider.peer == peer).for_each(|listed| listed.is_lost = true);
        blob.needs_selection = true;
    }

    /// The peer is unreachable or banned: no requests before `until`, and those in flight are
    /// canceled.
    pub fn exclude_peer(&mut self, peer: PeerId, until: Instant) {
        let number = self.peers.index_or_insert(peer);
        self.peers.get_mut(number).exclude(until);
        self.exclusion_ends_at = Some(self.exclusion_ends_at.map_or(until, |at| at.min(until)));
        self.cancel_requests(number, None, true);
        for blob_index in 0..self.blobs.len() {
            self.deselect(blob_index, number);
            self.blobs[blob_index].needs_selection = true;
        }
    }

    /// Whether providers of other zones may get requests; initially true. A peer without a zone
    /// counts as near, and every peer does when this node has no zone. Unstarted requests to other
    /// zones are canceled.
    pub fn set_cross_zone(&mut self, allowed: bool) {
        if std::mem::replace(&mut self.is_cross_zone_allowed, allowed) == allowed {
            return;
        }
        for blob_index in 0..self.blobs.len() {
            self.blobs[blob_index].needs_selection = true;
            let far =
                self.blobs[blob_index].selected.iter().filter(|provider| provider.is_far).map(|provider| provider.peer);
            for peer in if allowed { Vec::new() } else { far.collect() } {
                self.cancel_requests(peer, Some(blob_index), false);
            }
        }
    }

    /// Missing pieces of a blob; 0 for an unknown blob.
    pub fn missing_pieces(&self, digest: Digest) -> usize {
        self.blob_indexes.get(&digest).map_or(0, |blob_index| self.blobs[*blob_index].missing())
    }

    /// Whether all blobs are complete.
    pub fn is_complete(&self) -> bool {
        self.blobs.iter().all(|blob| blob.missing() == 0)
    }

    fn advance_clock(&mut self, now: Instant) {
        self.now = self.now.max(Some(now));
    }
}

/// Hash of a number, for random orders without stored state (the finalizer of SplitMix64).
fn mix(mut number: u64) -> u64 {
    number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
