//! One blob of the pool: what is here, what is asked for, and who has what.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::peers::PeerIndex;
use super::piece_set::PieceSet;
use super::{Provider, mix};
use crate::model::{MAX_HAVE_PIECES, PieceMapUpdate};
use crate::oci::{Digest, MAX_PIECES, PieceLayout};

/// Most that are asked for one piece at a time.
pub(super) const MAX_REQUESTS_PER_PIECE: u8 = 2;

/// How long the first piece of a peer may wait for its comparison before the peer is asked for another one, and then one at a time. A list that is
/// being made reaches the first pieces within milliseconds of its maker's beginning; this leaves it time to read them from a disk that is busy.
const VERIFICATION_WAIT: Duration = Duration::from_millis(500);

/// The same for one whose piece did not fit the list as far as that is made. Time for another peer's list, which is asked for two seconds after the first;
/// not longer, because the list may be the lie.
const MISMATCH_WAIT: Duration = Duration::from_millis(2500);

const _: () = assert!(MAX_PIECES <= 1 << 18);

#[derive(Debug)]
pub(super) struct BlobPicker {
    pub(super) digest: Digest,
    pub(super) layout: PieceLayout,
    present: PieceSet,
    missing: usize,
    /// Neither here nor asked for.
    unassigned: PieceSet,
    unassigned_count: usize,
    /// By how many asks a piece is expected.
    request_counts: Vec<u8>,
    /// How many of the partial neighbours have it: all of them, and those of our own zone.
    availability: Vec<u16>,
    near_availability: Vec<u16>,
    near_whole: usize,
    /// Orders pieces that are equally rare; another order in every pool.
    salt: u64,
    /// There is a list, so that what comes is compared at once.
    pub(super) has_hash_chain: bool,
    /// Who has sent something of it.
    senders: HashMap<PeerIndex, SenderState>,
    pub(super) selected: Vec<SelectedProvider>,
    pub(super) near_listed: Vec<ListedProvider>,
    pub(super) far_listed: Vec<ListedProvider>,
    /// Whom to follow has to be thought over.
    pub(super) needs_selection: bool,
}

/// What is known of what a peer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SenderState {
    /// A piece of it waits to be compared, until then.
    Unverified(Instant),
    /// A piece of it fitted.
    Verified,
}

/// A neighbour.
#[derive(Debug)]
pub(super) struct SelectedProvider {
    pub(super) peer: PeerIndex,
    /// In another zone.
    pub(super) is_far: bool,
    pub(super) is_whole: bool,
    /// It was to be followed, and has not said its last word.
    pub(super) is_followed: bool,
    /// Its own word is that it has everything; what others say of it comes later.
    pub(super) announced_whole: bool,
    /// It was asked and nothing came of it. What it has may be asked of other zones.
    is_unproductive: bool,
    pieces: PieceSet,
    /// How many free pieces it has.
    pub(super) useful_count: usize,
}

/// Somebody who may become a neighbour.
#[derive(Debug)]
pub(super) struct ListedProvider {
    pub(super) provider: Provider,
    pub(super) score: u32,
    /// It turned out to have nothing.
    pub(super) is_lost: bool,
}

impl BlobPicker {
    pub(super) fn new(digest: Digest, cut: PieceLayout, salt: u64) -> Self {
        let pieces = cut.piece_count();
        Self {
            digest,
            layout: cut,
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

    /// False when it was here already.
    pub(super) fn mark_present(&mut self, piece: u32) -> bool {
        let is_new = self.present.insert(piece);
        if is_new {
            self.missing -= 1;
            self.set_unassigned(piece, false);
        }
        is_new
    }

    /// It is not here after all.
    pub(super) fn mark_absent(&mut self, piece: u32) {
        if self.present.remove(piece) {
            self.missing += 1;
            self.set_unassigned(piece, self.request_count(piece) == 0);
            self.needs_selection = true;
        }
    }

    /// A piece of this peer came, whatever it is.
    pub(super) fn record_unverified(&mut self, peer: PeerIndex, now: Instant) {
        self.senders.entry(peer).or_insert(SenderState::Unverified(now + VERIFICATION_WAIT));
    }

    /// A piece of this peer fits. False when that was known.
    pub(super) fn record_verified(&mut self, peer: PeerIndex) -> bool {
        self.senders.insert(peer, SenderState::Verified) != Some(SenderState::Verified)
    }

    /// A piece of this peer does not fit what there is of a list.
    pub(super) fn record_mismatch(&mut self, peer: PeerIndex, now: Instant) {
        if let Some(SenderState::Unverified(until)) = self.senders.get_mut(&peer) {
            *until = now + MISMATCH_WAIT;
        }
    }

    /// Whether a piece of this peer fitted.
    pub(super) fn is_verified(&self, peer: PeerIndex) -> bool {
        self.senders.get(&peer) == Some(&SenderState::Verified)
    }

    /// Until when nothing more is asked of a peer, because what it sent first is to be compared.
    pub(super) fn verification_deadline(&self, peer: PeerIndex) -> Option<Instant> {
        match self.senders.get(&peer) {
            Some(SenderState::Unverified(until)) => Some(*until),
            Some(SenderState::Verified) | None => None,
        }
    }

    /// When somebody may be asked again though nothing was compared.
    pub(super) fn wake_at(&self, now: Instant) -> Option<Instant> {
        let waits = self.selected.iter().filter_map(|link| self.verification_deadline(link.peer));
        waits.filter(|until| self.missing > 0 && *until > now).min()
    }

    pub(super) fn add_request(&mut self, piece: u32) {
        self.request_counts[piece as usize] += 1;
        self.set_unassigned(piece, false);
    }

    pub(super) fn remove_request(&mut self, piece: u32) {
        let askers = &mut self.request_counts[piece as usize];
        *askers -= 1;
        if *askers == 0 && !self.present.contains(piece) {
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
        self.selected.iter_mut().filter(|link| link.has_piece(piece)).for_each(|link| step(&mut link.useful_count));
    }

    pub(super) fn selected_index(&self, peer: PeerIndex) -> Option<usize> {
        self.selected.iter().position(|link| link.peer == peer)
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

    pub(super) fn deselect(&mut self, link: usize) -> SelectedProvider {
        self.set_pieces(link, PieceSet::none(self.request_counts.len()));
        self.selected.remove(link)
    }

    /// What a neighbour said of itself.
    pub(super) fn record_piece_map(&mut self, link: usize, word: &PieceMapUpdate) {
        match word {
            PieceMapUpdate::HaveAll => {
                self.set_whole(link);
                self.selected[link].is_followed = false;
                self.selected[link].announced_whole = true;
            }
            PieceMapUpdate::Map(bits) => {
                let mut held = PieceSet::none(self.request_counts.len());
                // What lies beyond the end is not inserted; and no more than there is is looked at.
                let bits = bits.0.iter().take(self.request_counts.len().div_ceil(8)).enumerate();
                for (place, byte) in bits {
                    (0..8).filter(|bit| byte & 1 << bit != 0).for_each(|bit| {
                        held.insert(place as u32 * 8 + bit);
                    });
                }
                self.set_pieces(link, held);
            }
            PieceMapUpdate::Have(pieces) => {
                pieces.iter().take(MAX_HAVE_PIECES).for_each(|piece| self.add_piece(link, *piece))
            }
        }
    }

    pub(super) fn set_whole(&mut self, place: usize) {
        self.clear_pieces(place);
        let link = &mut self.selected[place];
        (link.is_whole, link.useful_count) = (true, self.unassigned_count);
        self.near_whole += usize::from(link.is_near());
    }

    pub(super) fn clear_pieces(&mut self, place: usize) {
        self.set_pieces(place, PieceSet::none(self.request_counts.len()));
    }

    fn set_pieces(&mut self, place: usize, held: PieceSet) {
        self.count_availability(place, false);
        let link = &mut self.selected[place];
        (link.is_whole, link.useful_count) = (false, held.and(&self.unassigned).count());
        link.pieces = held;
        self.count_availability(place, true);
    }

    /// Counts what a neighbour has, or does so no more.
    fn count_availability(&mut self, place: usize, is_more: bool) {
        let Self { selected: links, availability: counts, near_availability: near_counts, near_whole, .. } = self;
        let link = &links[place];
        let step = |count: &mut u16| if is_more { *count += 1 } else { *count -= 1 };
        link.pieces.iter().for_each(|piece| step(&mut counts[piece as usize]));
        if !link.is_near() {
            return;
        }
        link.pieces.iter().for_each(|piece| step(&mut near_counts[piece as usize]));
        if link.is_whole && is_more {
            *near_whole += 1;
        } else if link.is_whole {
            *near_whole -= 1;
        }
    }

    /// Something came of asking it, or nothing.
    pub(super) fn set_unproductive(&mut self, place: usize, is_vain: bool) {
        if self.selected[place].is_unproductive != is_vain {
            self.count_availability(place, false);
            self.selected[place].is_unproductive = is_vain;
            self.count_availability(place, true);
        }
    }

    fn add_piece(&mut self, place: usize, piece: u32) {
        let link = &mut self.selected[place];
        if link.is_whole || !link.pieces.insert(piece) {
            return;
        }
        link.useful_count += usize::from(self.unassigned.contains(piece));
        self.availability[piece as usize] += 1;
        self.near_availability[piece as usize] += u16::from(link.is_near());
    }

    /// It says that it has a piece and does not send it.
    pub(super) fn remove_piece(&mut self, place: usize, piece: u32) {
        let link = &mut self.selected[place];
        if link.is_whole || !link.pieces.remove(piece) {
            return;
        }
        link.useful_count -= usize::from(self.unassigned.contains(piece));
        self.availability[piece as usize] -= 1;
        self.near_availability[piece as usize] -= u16::from(link.is_near());
    }

    /// Whether this neighbour may be asked for this piece: it has it, and what a neighbour of our own zone has does not cross zones.
    pub(super) fn may_provide(&self, link: &SelectedProvider, piece: u32) -> bool {
        link.has_piece(piece) && !(link.is_far && (self.near_whole > 0 || self.near_availability[piece as usize] > 0))
    }

    /// The free pieces that this neighbour may be asked for: the tail, then the rarest, at most so many.
    pub(super) fn rarest(&self, link: usize, most: usize) -> Vec<u32> {
        let link = &self.selected[link];
        if link.is_far && self.near_whole > 0 {
            return Vec::new();
        }
        let of_partial = (!link.is_whole).then(|| self.unassigned.and(&link.pieces)).into_iter().flatten();
        let of_whole = link.is_whole.then(|| self.unassigned.iter()).into_iter().flatten();
        let fits = |piece: &u32| !link.is_far || self.near_availability[*piece as usize] == 0;
        let mut keys: Vec<_> =
            of_partial.chain(of_whole).filter(fits).map(|piece| self.priority_key(piece, link.is_far)).collect();
        if !self.has_hash_chain && !self.is_verified(link.peer) {
            // A list that is being made reaches the first of them first. The others are there for a holder that has sent it to many.
            keys.iter_mut().min_by_key(|key| **key as u32).into_iter().for_each(|key| *key = u64::from(*key as u32));
        }
        if keys.len() > most {
            keys.select_nth_unstable(most);
            keys.truncate(most);
        }
        keys.sort_unstable();
        keys.into_iter().map(|key| key as u32).collect()
    }

    /// How many free pieces this neighbour has and no other of our zone, so that nobody else is to be asked for them meanwhile.
    pub(super) fn sole_count(&self, link: usize) -> usize {
        let link = &self.selected[link];
        if link.is_whole || link.is_far || self.near_whole > 0 {
            return 0;
        }
        self.unassigned.and(&link.pieces).filter(|piece| self.near_availability[*piece as usize] == 1).count()
    }

    /// The least is wanted most. Its lower half is the piece itself; above that are 18 bits of order, and 14 of rarity.
    fn priority_key(&self, piece: u32, is_far: bool) -> u64 {
        let counts = if is_far { &self.availability } else { &self.near_availability };
        let rarity = if piece == self.tail() { 0 } else { u64::from(counts[piece as usize]) + 1 };
        let order = if self.selected.len() == 1 {
            // In a row, for one who reads them from a disk. Many that begin with the same lone source do not all begin with the same piece.
            (self.salt >> 32).wrapping_add(piece.into()) % self.request_counts.len() as u64
        } else {
            mix(self.salt ^ u64::from(piece)) & 0x3_ffff
        };
        rarity.min(0x3fff) << 50 | order << 32 | u64::from(piece)
    }

    /// Whether its tail is free and this neighbour has it.
    pub(super) fn has_unassigned_tail(&self, link: &SelectedProvider) -> bool {
        self.unassigned.contains(self.tail()) && self.may_provide(link, self.tail())
    }
}

impl SelectedProvider {
    pub(super) fn has_piece(&self, piece: u32) -> bool {
        self.is_whole || self.pieces.contains(piece)
    }

    /// What it has is not to be fetched from another zone.
    fn is_near(&self) -> bool {
        !self.is_far && !self.is_unproductive
    }
}
