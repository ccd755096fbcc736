//! One blob of the picker: its pieces, their requests, and the providers of each piece.

mod availability;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::peers::PeerIndex;
use super::piece_set::PieceSet;
use super::{Provider, mix};
use crate::oci::{Digest, MAX_PIECES, PieceLayout};

/// A late request, or the endgame, adds a second request for a piece; never a third.
pub(super) const MAX_REQUESTS_PER_PIECE: u8 = 2;

/// Time limit for the verification of a provider's first piece. Afterwards the provider gets
/// requests of one piece each. A hash chain under construction covers its first pieces within
/// milliseconds; the limit leaves time to read those pieces from a busy disk.
const VERIFICATION_WAIT: Duration = Duration::from_millis(500);

/// Wait after a provider's first piece contradicts a hash chain under construction. The driver
/// requests another peer's chain two seconds after the first, so the wait covers that request. A
/// longer wait would punish an honest provider for a false chain.
const MISMATCH_WAIT: Duration = Duration::from_millis(2500);

const _: () = assert!(MAX_PIECES <= 1 << 18);

#[derive(Debug)]
pub(super) struct BlobPicker {
    pub(super) digest: Digest,
    pub(super) layout: PieceLayout,
    present: PieceSet,
    missing: usize,
    /// Neither present nor requested.
    unassigned: PieceSet,
    unassigned_count: usize,
    /// Reserving requests per piece.
    request_counts: Vec<u8>,
    /// Selected partial providers that have the piece: in all zones, and in our own zone only.
    availability: Vec<u16>,
    near_availability: Vec<u16>,
    near_whole: usize,
    /// Orders equally rare pieces; differs from picker to picker.
    salt: u64,
    /// The hash chain is ready, so each piece is verified on arrival.
    pub(super) has_hash_chain: bool,
    /// Peers that sent pieces of this blob.
    senders: HashMap<PeerIndex, SenderState>,
    pub(super) selected: Vec<SelectedProvider>,
    pub(super) near_listed: Vec<ListedProvider>,
    pub(super) far_listed: Vec<ListedProvider>,
    /// The set of selected providers is recomputed by the next `take_follow_changes`.
    pub(super) needs_selection: bool,
}

/// Verification of the pieces that a peer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SenderState {
    /// A first piece awaits verification, at most until this instant.
    Unverified(Instant),
    /// At least one piece matched the hash chain.
    Verified,
}

/// A provider that this blob requests pieces from.
#[derive(Debug)]
pub(super) struct SelectedProvider {
    pub(super) peer: PeerIndex,
    /// The provider is in another zone.
    pub(super) is_far: bool,
    pub(super) is_whole: bool,
    /// Sends piece maps to us, and has not sent [`HaveAll`](crate::model::PieceMapUpdate::HaveAll)
    /// yet.
    pub(super) is_followed: bool,
    /// Sent [`HaveAll`](crate::model::PieceMapUpdate::HaveAll). The inventory may list the peer as
    /// partial for longer.
    pub(super) announced_whole: bool,
    /// The last request was late or failed. The provider's pieces may be requested from other
    /// zones.
    is_unproductive: bool,
    pieces: PieceSet,
    /// Unassigned pieces that the provider has.
    pub(super) useful_count: usize,
}

/// A provider that may be selected.
#[derive(Debug)]
pub(super) struct ListedProvider {
    pub(super) provider: Provider,
    pub(super) score: u32,
    /// The provider lost the blob ([`super::PiecePicker::remove_provider`]).
    pub(super) is_lost: bool,
}

impl BlobPicker {
    pub(super) fn new(digest: Digest, layout: PieceLayout, salt: u64) -> Self {
        let pieces = layout.piece_count();
        Self {
            digest,
            layout,
            present: PieceSet::none(pieces),
            missing: pieces,
            unassigned: PieceSet::all(pieces),
            unassigned_count: pieces,
            request_counts: vec![0; pieces],
            availability: vec![0; pieces],
            near_availability: vec![0; pieces],
            near_whole: 0,
            salt,
            has_hash_chain: false,
            senders: HashMap::new(),
            selected: Vec::new(),
            near_listed: Vec::new(),
            far_listed: Vec::new(),
            needs_selection: false,
        }
    }

    pub(super) fn missing(&self) -> usize {
        self.missing
    }

    pub(super) fn unassigned_count(&self) -> usize {
        self.unassigned_count
    }

    pub(super) fn is_present(&self, piece: u32) -> bool {
        self.present.contains(piece)
    }

    pub(super) fn exists(&self, piece: u32) -> bool {
        (piece as usize) < self.request_counts.len()
    }

    pub(super) fn request_count(&self, piece: u32) -> u8 {
        self.request_counts[piece as usize]
    }

    pub(super) fn length(&self, piece: u32) -> u64 {
        self.layout.piece_length(piece as usize)
    }

    pub(super) fn tail(&self) -> u32 {
        (self.request_counts.len() - 1) as u32
    }

    /// False when the piece was already present.
    pub(super) fn mark_present(&mut self, piece: u32) -> bool {
        let is_new = self.present.insert(piece);
        if is_new {
            self.missing -= 1;
            self.set_unassigned(piece, false);
        }
        is_new
    }

    pub(super) fn mark_absent(&mut self, piece: u32) {
        if self.present.remove(piece) {
            self.missing += 1;
            self.set_unassigned(piece, self.request_count(piece) == 0);
            self.needs_selection = true;
        }
    }

    pub(super) fn record_unverified(&mut self, peer: PeerIndex, now: Instant) {
        self.senders.entry(peer).or_insert(SenderState::Unverified(now + VERIFICATION_WAIT));
    }

    /// False when the peer was already verified.
    pub(super) fn record_verified(&mut self, peer: PeerIndex) -> bool {
        self.senders.insert(peer, SenderState::Verified) != Some(SenderState::Verified)
    }

    /// Extends the wait of a peer whose first piece contradicts an incomplete hash chain.
    pub(super) fn record_mismatch(&mut self, peer: PeerIndex, now: Instant) {
        if let Some(SenderState::Unverified(until)) = self.senders.get_mut(&peer) {
            *until = now + MISMATCH_WAIT;
        }
    }

    pub(super) fn is_verified(&self, peer: PeerIndex) -> bool {
        self.senders.get(&peer) == Some(&SenderState::Verified)
    }

    /// No request before this instant: the peer's first piece awaits verification.
    pub(super) fn verification_deadline(&self, peer: PeerIndex) -> Option<Instant> {
        match self.senders.get(&peer) {
            Some(SenderState::Unverified(until)) => Some(*until),
            Some(SenderState::Verified) | None => None,
        }
    }

    /// The next end of a verification wait.
    pub(super) fn wake_at(&self, now: Instant) -> Option<Instant> {
        let waits = self.selected.iter().filter_map(|provider| self.verification_deadline(provider.peer));
        waits.filter(|until| self.missing > 0 && *until > now).min()
    }

    pub(super) fn add_request(&mut self, piece: u32) {
        self.request_counts[piece as usize] += 1;
        self.set_unassigned(piece, false);
    }

    pub(super) fn remove_request(&mut self, piece: u32) {
        let count = &mut self.request_counts[piece as usize];
        *count -= 1;
        if *count == 0 && !self.present.contains(piece) {
            self.set_unassigned(piece, true);
        }
    }

    fn set_unassigned(&mut self, piece: u32, is_free: bool) {
        let changed = if is_free { self.unassigned.insert(piece) } else { self.unassigned.remove(piece) };
        if !changed {
            return;
        }
        let step = |count: &mut usize| if is_free { *count += 1 } else { *count -= 1 };
        step(&mut self.unassigned_count);
        self.selected
            .iter_mut()
            .filter(|provider| provider.has_piece(piece))
            .for_each(|provider| step(&mut provider.useful_count));
    }

    pub(super) fn selected_index(&self, peer: PeerIndex) -> Option<usize> {
        self.selected.iter().position(|provider| provider.peer == peer)
    }

    pub(super) fn select(&mut self, peer: PeerIndex, is_far: bool) {
        self.selected.push(SelectedProvider {
            peer,
            is_far,
            is_whole: false,
            is_followed: false,
            announced_whole: false,
            is_unproductive: false,
            pieces: PieceSet::none(self.request_counts.len()),
            useful_count: 0,
        });
    }

    pub(super) fn deselect(&mut self, index: usize) -> SelectedProvider {
        self.set_pieces(index, PieceSet::none(self.request_counts.len()));
        self.selected.remove(index)
    }

    /// Whether the provider has the piece. Pieces of our own zone's providers are not fetched from
    /// another zone.
    pub(super) fn may_provide(&self, provider: &SelectedProvider, piece: u32) -> bool {
        provider.has_piece(piece)
            && !(provider.is_far && (self.near_whole > 0 || self.near_availability[piece as usize] > 0))
    }

    /// At most `most` unassigned pieces of this provider: the tail, then the rarest.
    pub(super) fn rarest(&self, index: usize, limit: usize) -> Vec<u32> {
        let provider = &self.selected[index];
        if provider.is_far && self.near_whole > 0 {
            return Vec::new();
        }
        let of_partial = (!provider.is_whole).then(|| self.unassigned.and(&provider.pieces)).into_iter().flatten();
        let of_whole = provider.is_whole.then(|| self.unassigned.iter()).into_iter().flatten();
        let fits = |piece: &u32| !provider.is_far || self.near_availability[*piece as usize] == 0;
        let mut keys: Vec<_> =
            of_partial.chain(of_whole).filter(fits).map(|piece| self.priority_key(piece, provider.is_far)).collect();
        if !self.has_hash_chain && !self.is_verified(provider.peer) {
            // A hash chain under construction reaches the piece with the lowest number first. The
            // other pieces leave a whole provider the choice of a piece that it has sent less
            // often.
            keys.iter_mut().min_by_key(|key| **key as u32).into_iter().for_each(|key| *key = u64::from(*key as u32));
        }
        if keys.len() > limit {
            keys.select_nth_unstable(limit);
            keys.truncate(limit);
        }
        keys.sort_unstable();
        keys.into_iter().map(|key| key as u32).collect()
    }

    /// Unassigned pieces that no other provider of our zone has. Reserving them takes no work from
    /// another provider of the zone.
    pub(super) fn sole_count(&self, index: usize) -> usize {
        let provider = &self.selected[index];
        if provider.is_whole || provider.is_far || self.near_whole > 0 {
            return 0;
        }
        self.unassigned.and(&provider.pieces).filter(|piece| self.near_availability[*piece as usize] == 1).count()
    }

    /// The lowest key is wanted most. The lower 32 bits are the piece; above them stand 18 bits of
    /// order and 14 bits of rarity.
    fn priority_key(&self, piece: u32, is_far: bool) -> u64 {
        let counts = if is_far { &self.availability } else { &self.near_availability };
        let rarity = if piece == self.tail() { 0 } else { u64::from(counts[piece as usize]) + 1 };
        let order = if self.selected.len() == 1 {
            // Consecutive pieces, for a provider that reads from a disk. The salt spreads the
            // start: pickers with the same lone seed begin with different pieces.
            (self.salt >> 32).wrapping_add(piece.into()) % self.request_counts.len() as u64
        } else {
            mix(self.salt ^ u64::from(piece)) & 0x3_ffff
        };
        rarity.min(0x3fff) << 50 | order << 32 | u64::from(piece)
    }

    /// Whether the tail is unassigned and may come from this provider.
    pub(super) fn has_unassigned_tail(&self, provider: &SelectedProvider) -> bool {
        self.unassigned.contains(self.tail()) && self.may_provide(provider, self.tail())
    }
}

impl SelectedProvider {
    pub(super) fn has_piece(&self, piece: u32) -> bool {
        self.is_whole || self.pieces.contains(piece)
    }

    /// Whether this provider's pieces count as available in our zone.
    fn is_near(&self) -> bool {
        !self.is_far && !self.is_unproductive
    }
}
