//! One blob of the pool: what is here, what is asked for, and who has what.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::peers::Number;
use super::set::Set;
use super::{Candidate, mix};
use crate::model::{Availability, MAX_NEWS};
use crate::oci::{Cut, Digest, MAX_PIECES};

/// Most that are asked for one piece at a time.
pub(super) const MAX_ASKERS: u8 = 2;

/// How long the first piece of a peer may wait for its comparison before the peer is asked for another one, and then one at a time. A list that is
/// being made reaches the first pieces within milliseconds of its maker's beginning; this leaves it time to read them from a disk that is busy.
const COMPARISON: Duration = Duration::from_millis(500);

/// The same for one whose piece did not fit the list as far as that is made. Time for another peer's list, which is asked for two seconds after the first;
/// not longer, because the list may be the lie.
const DOUBT: Duration = Duration::from_millis(2500);

const _: () = assert!(MAX_PIECES <= 1 << 18);

#[derive(Debug)]
pub(super) struct Blob {
    pub(super) digest: Digest,
    pub(super) cut: Cut,
    here: Set,
    missing: usize,
    /// Neither here nor asked for.
    free: Set,
    free_count: usize,
    /// By how many asks a piece is expected.
    askers: Vec<u8>,
    /// How many of the partial neighbours have it: all of them, and those of our own zone.
    counts: Vec<u16>,
    near_counts: Vec<u16>,
    near_whole: usize,
    /// Orders pieces that are equally rare; another order in every pool.
    salt: u64,
    /// There is a list, so that what comes is compared at once.
    pub(super) is_listed: bool,
    /// Who has sent something of it.
    senders: HashMap<Number, Sender>,
    pub(super) links: Vec<Link>,
    pub(super) near: Vec<Known>,
    pub(super) far: Vec<Known>,
    /// Whom to follow has to be thought over.
    pub(super) is_unsettled: bool,
}

/// What is known of what a peer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sender {
    /// A piece of it waits to be compared, until then.
    Waits(Instant),
    /// A piece of it fitted.
    Fits,
}

/// A neighbour.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) peer: Number,
    /// In another zone.
    pub(super) is_far: bool,
    pub(super) is_whole: bool,
    /// It was to be followed, and has not said its last word.
    pub(super) is_followed: bool,
    /// Its own word is that it has everything; what others say of it comes later.
    pub(super) said_whole: bool,
    /// It was asked and nothing came of it. What it has may be asked of other zones.
    is_vain: bool,
    held: Set,
    /// How many free pieces it has.
    pub(super) useful: usize,
}

/// Somebody who may become a neighbour.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) candidate: Candidate,
    pub(super) score: u32,
    /// It turned out to have nothing.
    pub(super) is_lost: bool,
}

impl Blob {
    pub(super) fn new(digest: Digest, cut: Cut, salt: u64) -> Self {
        let pieces = cut.pieces();
        Self {
            digest,
            cut,
            here: Set::none(pieces),
            missing: pieces,
            free: Set::all(pieces),
            free_count: pieces,
            askers: vec![0; pieces],
            counts: vec![0; pieces],
            near_counts: vec![0; pieces],
            near_whole: 0,
            salt,
            is_listed: false,
            senders: HashMap::new(),
            links: Vec::new(),
            near: Vec::new(),
            far: Vec::new(),
            is_unsettled: false,
        }
    }

    pub(super) fn missing(&self) -> usize {
        self.missing
    }

    pub(super) fn free_count(&self) -> usize {
        self.free_count
    }

    pub(super) fn is_here(&self, piece: u32) -> bool {
        self.here.has(piece)
    }

    pub(super) fn exists(&self, piece: u32) -> bool {
        (piece as usize) < self.askers.len()
    }

    pub(super) fn askers(&self, piece: u32) -> u8 {
        self.askers[piece as usize]
    }

    pub(super) fn length(&self, piece: u32) -> u64 {
        self.cut.length(piece as usize)
    }

    pub(super) fn tail(&self) -> u32 {
        (self.askers.len() - 1) as u32
    }

    /// False when it was here already.
    pub(super) fn arrives(&mut self, piece: u32) -> bool {
        let is_new = self.here.insert(piece);
        if is_new {
            self.missing -= 1;
            self.set_free(piece, false);
        }
        is_new
    }

    /// It is not here after all.
    pub(super) fn goes(&mut self, piece: u32) {
        if self.here.remove(piece) {
            self.missing += 1;
            self.set_free(piece, self.askers(piece) == 0);
            self.is_unsettled = true;
        }
    }

    /// A piece of this peer came, whatever it is.
    pub(super) fn came_from(&mut self, peer: Number, now: Instant) {
        self.senders.entry(peer).or_insert(Sender::Waits(now + COMPARISON));
    }

    /// A piece of this peer fits. False when that was known.
    pub(super) fn fits(&mut self, peer: Number) -> bool {
        self.senders.insert(peer, Sender::Fits) != Some(Sender::Fits)
    }

    /// A piece of this peer does not fit what there is of a list.
    pub(super) fn doubts(&mut self, peer: Number, now: Instant) {
        if let Some(Sender::Waits(until)) = self.senders.get_mut(&peer) {
            *until = now + DOUBT;
        }
    }

    /// Whether a piece of this peer fitted.
    pub(super) fn is_tried(&self, peer: Number) -> bool {
        self.senders.get(&peer) == Some(&Sender::Fits)
    }

    /// Until when nothing more is asked of a peer, because what it sent first is to be compared.
    pub(super) fn compares_until(&self, peer: Number) -> Option<Instant> {
        match self.senders.get(&peer) {
            Some(Sender::Waits(until)) => Some(*until),
            Some(Sender::Fits) | None => None,
        }
    }

    /// When somebody may be asked again though nothing was compared.
    pub(super) fn wake_at(&self, now: Instant) -> Option<Instant> {
        let waits = self.links.iter().filter_map(|link| self.compares_until(link.peer));
        waits.filter(|until| self.missing > 0 && *until > now).min()
    }

    pub(super) fn expect(&mut self, piece: u32) {
        self.askers[piece as usize] += 1;
        self.set_free(piece, false);
    }

    pub(super) fn expect_no_more(&mut self, piece: u32) {
        let askers = &mut self.askers[piece as usize];
        *askers -= 1;
        if *askers == 0 && !self.here.has(piece) {
            self.set_free(piece, true);
        }
    }

    fn set_free(&mut self, piece: u32, is_free: bool) {
        let changed = if is_free { self.free.insert(piece) } else { self.free.remove(piece) };
        if !changed {
            return;
        }
        let step = |count: &mut usize| if is_free { *count += 1 } else { *count -= 1 };
        step(&mut self.free_count);
        self.links.iter_mut().filter(|link| link.has(piece)).for_each(|link| step(&mut link.useful));
    }

    pub(super) fn link_of(&self, peer: Number) -> Option<usize> {
        self.links.iter().position(|link| link.peer == peer)
    }

    pub(super) fn attach(&mut self, peer: Number, is_far: bool) {
        self.links.push(Link {
            peer,
            is_far,
            is_whole: false,
            is_followed: false,
            said_whole: false,
            is_vain: false,
            held: Set::none(self.askers.len()),
            useful: 0,
        });
    }

    pub(super) fn detach(&mut self, link: usize) -> Link {
        self.has_these(link, Set::none(self.askers.len()));
        self.links.remove(link)
    }

    /// What a neighbour said of itself.
    pub(super) fn hears(&mut self, link: usize, word: &Availability) {
        match word {
            Availability::Whole => {
                self.has_all(link);
                self.links[link].is_followed = false;
                self.links[link].said_whole = true;
            }
            Availability::These(bits) => {
                let mut held = Set::none(self.askers.len());
                // What lies beyond the end is not inserted; and no more than there is is looked at.
                let bits = bits.0.iter().take(self.askers.len().div_ceil(8)).enumerate();
                for (place, byte) in bits {
                    (0..8).filter(|bit| byte & 1 << bit != 0).for_each(|bit| {
                        held.insert(place as u32 * 8 + bit);
                    });
                }
                self.has_these(link, held);
            }
            Availability::Also(pieces) => pieces.iter().take(MAX_NEWS).for_each(|piece| self.has_also(link, *piece)),
        }
    }

    pub(super) fn has_all(&mut self, place: usize) {
        self.has_nothing(place);
        let link = &mut self.links[place];
        (link.is_whole, link.useful) = (true, self.free_count);
        self.near_whole += usize::from(link.is_near());
    }

    pub(super) fn has_nothing(&mut self, place: usize) {
        self.has_these(place, Set::none(self.askers.len()));
    }

    fn has_these(&mut self, place: usize, held: Set) {
        self.count(place, false);
        let link = &mut self.links[place];
        (link.is_whole, link.useful) = (false, held.and(&self.free).count());
        link.held = held;
        self.count(place, true);
    }

    /// Counts what a neighbour has, or does so no more.
    fn count(&mut self, place: usize, is_more: bool) {
        let Self { links, counts, near_counts, near_whole, .. } = self;
        let link = &links[place];
        let step = |count: &mut u16| if is_more { *count += 1 } else { *count -= 1 };
        link.held.iter().for_each(|piece| step(&mut counts[piece as usize]));
        if !link.is_near() {
            return;
        }
        link.held.iter().for_each(|piece| step(&mut near_counts[piece as usize]));
        if link.is_whole && is_more {
            *near_whole += 1;
        } else if link.is_whole {
            *near_whole -= 1;
        }
    }

    /// Something came of asking it, or nothing.
    pub(super) fn set_vain(&mut self, place: usize, is_vain: bool) {
        if self.links[place].is_vain != is_vain {
            self.count(place, false);
            self.links[place].is_vain = is_vain;
            self.count(place, true);
        }
    }

    fn has_also(&mut self, place: usize, piece: u32) {
        let link = &mut self.links[place];
        if link.is_whole || !link.held.insert(piece) {
            return;
        }
        link.useful += usize::from(self.free.has(piece));
        self.counts[piece as usize] += 1;
        self.near_counts[piece as usize] += u16::from(link.is_near());
    }

    /// It says that it has a piece and does not send it.
    pub(super) fn has_not(&mut self, place: usize, piece: u32) {
        let link = &mut self.links[place];
        if link.is_whole || !link.held.remove(piece) {
            return;
        }
        link.useful -= usize::from(self.free.has(piece));
        self.counts[piece as usize] -= 1;
        self.near_counts[piece as usize] -= u16::from(link.is_near());
    }

    /// Whether this neighbour may be asked for this piece: it has it, and what a neighbour of our own zone has does not cross zones.
    pub(super) fn gives(&self, link: &Link, piece: u32) -> bool {
        link.has(piece) && !(link.is_far && (self.near_whole > 0 || self.near_counts[piece as usize] > 0))
    }

    /// The free pieces that this neighbour may be asked for: the tail, then the rarest, at most so many.
    pub(super) fn rarest(&self, link: usize, most: usize) -> Vec<u32> {
        let link = &self.links[link];
        if link.is_far && self.near_whole > 0 {
            return Vec::new();
        }
        let of_partial = (!link.is_whole).then(|| self.free.and(&link.held)).into_iter().flatten();
        let of_whole = link.is_whole.then(|| self.free.iter()).into_iter().flatten();
        let fits = |piece: &u32| !link.is_far || self.near_counts[*piece as usize] == 0;
        let mut keys: Vec<_> =
            of_partial.chain(of_whole).filter(fits).map(|piece| self.key(piece, link.is_far)).collect();
        if !self.is_listed && !self.is_tried(link.peer) {
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
    pub(super) fn sole(&self, link: usize) -> usize {
        let link = &self.links[link];
        if link.is_whole || link.is_far || self.near_whole > 0 {
            return 0;
        }
        self.free.and(&link.held).filter(|piece| self.near_counts[*piece as usize] == 1).count()
    }

    /// The least is wanted most. Its lower half is the piece itself; above that are 18 bits of order, and 14 of rarity.
    fn key(&self, piece: u32, is_far: bool) -> u64 {
        let counts = if is_far { &self.counts } else { &self.near_counts };
        let rarity = if piece == self.tail() { 0 } else { u64::from(counts[piece as usize]) + 1 };
        let order = if self.links.len() == 1 {
            // In a row, for one who reads them from a disk. Many that begin with the same lone source do not all begin with the same piece.
            (self.salt >> 32).wrapping_add(piece.into()) % self.askers.len() as u64
        } else {
            mix(self.salt ^ u64::from(piece)) & 0x3_ffff
        };
        rarity.min(0x3fff) << 50 | order << 32 | u64::from(piece)
    }

    /// Whether its tail is free and this neighbour has it.
    pub(super) fn offers_tail(&self, link: &Link) -> bool {
        self.free.has(self.tail()) && self.gives(link, self.tail())
    }
}

impl Link {
    pub(super) fn has(&self, piece: u32) -> bool {
        self.is_whole || self.held.has(piece)
    }

    /// What it has is not to be fetched from another zone.
    fn is_near(&self) -> bool {
        !self.is_far && !self.is_vain
    }
}
