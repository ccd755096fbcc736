//! SHA-256 as a chain: every piece of a blob can be checked alone, in any order, from any peer, and when all of them hold the blob's
//! digest is proved without another pass.
//!
//! SHA-256 (FIPS 180-4, section 6.2.2) takes a message in blocks of 64 bytes and carries a state of 32 bytes from one to the next. Cut at
//! multiples of 64 bytes, a blob is a row of pieces, each of which takes one state to the next:
//!
//! ```text
//! initial value --piece 0--> state 1 --piece 1--> state 2 ... state n-1 --last piece, padding, length--> digest
//! ```
//!
//! Whoever hashes a blob has all the states for nothing; the list of them, 32 bytes a piece, is a [`Chain`]. A piece fits if it takes the
//! state before it to the state after it. The first state is a constant and the last link ends at the digest, so a blob whose pieces all
//! fit *is* the blob of that digest: this is no other hash, it is SHA-256 itself, computed out of order.
//!
//! # What it rests on
//!
//! - **All pieces fit: the blob is proved**, by SHA-256's collision resistance as always. Nothing is ever committed on less.
//! - **Some pieces fit: they are as good as the list.** The list is a claim until the end. From its tail it is proved step by step: the last
//!   piece proves the state before it *and the blob's length*, the piece before that one proves the state before it, and so on. A forged
//!   list therefore breaks at some link. For this the compression function must be hard to invert to a given output with a state of the
//!   attacker's choice (free-start second preimage), which is a little more than plain SHA-256 promises and for which no attack better
//!   than brute force is known. It decides only how soon a liar is found, never what is committed.
//! - **Two lists that differ are settled by one piece** ([`Dispute`]): above the last difference they agree, so the piece at it can fit one
//!   of them at most.
//!
//! Not here: which piece is fetched when and from whom.

mod chain_prefix;
mod piece_verifier;
mod streaming_hash;

use sha2::block_api::compress256;

use self::streaming_hash::StreamingHash;
use super::Digest;

pub use self::chain_prefix::ChainPrefix;
pub use self::piece_verifier::{PieceHasher, PieceVerifier};

/// SHA-256's block, in bytes.
const BLOCK: usize = 64;

/// The state between two pieces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HashState([u32; 8]);

impl HashState {
    /// Its 32 bytes: the words in big endian, as in a digest.
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (place, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(self.0) {
            *place = word.to_be_bytes();
        }
        bytes
    }

    /// A state from its 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut words = [0; 8];
        for (word, place) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_be_bytes(*place);
        }
        Self(words)
    }

    /// What every message begins with (FIPS 180-4, section 5.3.3).
    pub const INITIAL: Self =
        Self([0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19]);

    /// Takes in whole blocks; what is left over is returned.
    fn absorb<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (blocks, rest) = bytes.as_chunks::<BLOCK>();
        compress256(&mut self.0, blocks);
        rest
    }

    /// The digest of a message of `length` bytes that ends with `rest`, less than a block (FIPS 180-4, section 5.1.1).
    fn finish(mut self, rest: &[u8], length: u64) -> Digest {
        let mut padded = [0; 2 * BLOCK];
        padded[..rest.len()].copy_from_slice(rest);
        padded[rest.len()] = 0x80;
        // The mark and the eight bytes of the length need room.
        let end = if rest.len() + 9 <= BLOCK { BLOCK } else { 2 * BLOCK };
        padded[end - 8..end].copy_from_slice(&length.wrapping_mul(8).to_be_bytes());
        self.absorb(&padded[..end]);
        Digest::from_bytes(self.to_bytes())
    }
}

/// How a blob is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PieceLayout {
    size: u64,
    piece_size: u64,
}

/// A cut that nobody uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PieceLayoutError {
    /// Pieces end at the end of a block, or the states between them mean nothing.
    #[error("pieces of {0} bytes; they must be a multiple of 64")]
    Unaligned(u64),
    /// More pieces than a list may have.
    #[error("{pieces} pieces; at most {MAX_PIECES} are used")]
    TooMany {
        /// As many as there would be.
        pieces: u64,
    },
}

/// Most pieces of one blob: a terabyte in pieces of the largest usual size. Its list takes 4 MiB.
pub const MAX_PIECES: u64 = 1 << 17;

/// The smallest and the largest piece that [`Cut::usual`] makes, in bytes. Smaller ones cost more questions than they save waiting; of larger
/// ones one bad byte costs more to fetch again.
pub const MIN_PIECE_SIZE: u64 = 256 << 10;
const MAX_PIECE_SIZE: u64 = 8 << 20;

/// Pieces of a blob at least, where none is too small.
const MIN_PIECES: u64 = 256;

impl PieceLayout {
    /// A blob of `size` bytes in pieces of `piece` bytes; the last one may be shorter.
    ///
    /// # Errors
    /// [`CutError`].
    pub fn new(size: u64, piece: u64) -> Result<Self, PieceLayoutError> {
        if piece == 0 || !piece.is_multiple_of(BLOCK as u64) {
            return Err(PieceLayoutError::Unaligned(piece));
        }
        let pieces = size.div_ceil(piece);
        if pieces > MAX_PIECES {
            Err(PieceLayoutError::TooMany { pieces })
        } else {
            Ok(Self { size, piece_size: piece })
        }
    }

    /// The cut that all agents make of a blob of this size: 256 to 512 pieces of a power of two of bytes, but none under 256 KiB or over 8 MiB. A
    /// blob beyond a terabyte has larger ones.
    ///
    /// Not fewer: what a node has to pass on it first has to have whole. Of a thousand simulated nodes the last is done after 1.26 times the time that
    /// its link needs with 257 pieces, after 1.46 with 129.
    pub fn for_size(size: u64) -> Self {
        let piece = 1 << (size / MIN_PIECES).max(1).ilog2();
        let piece = u64::clamp(piece, MIN_PIECE_SIZE, MAX_PIECE_SIZE);
        let least = size.div_ceil(MAX_PIECES).next_multiple_of(BLOCK as u64);
        Self { size, piece_size: piece.max(least) }
    }

    /// The blob's length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many pieces there are; an empty blob has one, which is empty.
    pub fn piece_count(&self) -> usize {
        usize::try_from(self.size.div_ceil(self.piece_size)).expect("at most MAX_PIECES").max(1)
    }

    /// Where a piece begins, in bytes.
    pub fn offset(&self, piece: usize) -> u64 {
        self.piece_size * piece as u64
    }

    /// The pieces that lie wholly within these bytes of the blob.
    pub fn pieces_within(&self, bytes: std::ops::Range<u64>) -> std::ops::Range<usize> {
        let count = |pieces: u64| usize::try_from(pieces).unwrap_or(usize::MAX).min(self.piece_count());
        let last = if bytes.end >= self.size { self.piece_count() } else { count(bytes.end / self.piece_size) };
        count(bytes.start.div_ceil(self.piece_size))..last
    }

    /// How long a piece is, in bytes; 0 for one that there is not.
    pub fn piece_length(&self, piece: usize) -> u64 {
        self.size.saturating_sub(self.piece_size.saturating_mul(piece as u64)).min(self.piece_size)
    }
}

/// The states between the pieces of a blob: a claim, as whoever made the list says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HashChain {
    digest: Digest,
    layout: PieceLayout,
    /// Before pieces 1, 2, ...; before piece 0 stands [`State::INITIAL`].
    states: Vec<HashState>,
}

/// A list that does not fit its blob's cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{found} states where {expected} are between the pieces")]
pub struct ChainLengthError {
    found: usize,
    expected: usize,
}

impl HashChain {
    /// A list that somebody made of the blob with this digest.
    ///
    /// # Errors
    /// [`LengthError`] unless it has a state between each two pieces.
    pub fn unverified(digest: Digest, cut: PieceLayout, states: Vec<HashState>) -> Result<Self, ChainLengthError> {
        let expected = cut.piece_count() - 1;
        let found = states.len();
        if found == expected {
            Ok(Self { digest, layout: cut, states })
        } else {
            Err(ChainLengthError { found, expected })
        }
    }

    /// The blob's digest, which the last link ends at.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// How the blob is cut.
    pub fn layout(&self) -> PieceLayout {
        self.layout
    }

    /// The states between the pieces.
    pub fn states(&self) -> &[HashState] {
        &self.states
    }

    /// Whether these bytes are the piece, if the list is true. When every piece of the blob has been found to fit, the blob has
    /// this digest, whoever made the list.
    pub fn is_valid_piece(&self, piece: usize, bytes: &[u8]) -> bool {
        let mut hasher = self.hasher(piece);
        hasher.update(bytes);
        hasher.is_valid_for(self)
    }

    /// For the bytes of this piece as they come.
    pub fn hasher(&self, piece: usize) -> PieceHasher {
        PieceHasher::new(piece, self.start_state(piece))
    }

    /// The state that this piece begins with; the last one's for a piece that there is not.
    fn start_state(&self, piece: usize) -> HashState {
        let place = piece.min(self.layout.piece_count() - 1).checked_sub(1);
        place.map_or(HashState::INITIAL, |place| self.states[place])
    }
}

/// Two lists of one blob that differ. At least one of those who made them lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChainConflict {
    piece: usize,
}

/// Who is right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConflictOutcome {
    /// The first list may be true; the second is forged.
    First,
    /// The second list may be true; the first is forged.
    Second,
    /// Neither: the lists are both forged, or these bytes are.
    Neither,
}

impl ChainConflict {
    /// What two lists of one blob, cut alike, differ in; `None` when they agree.
    pub fn between(first: &HashChain, second: &HashChain) -> Option<Self> {
        debug_assert_eq!((first.digest, first.layout), (second.digest, second.layout));
        let differs = |(a, b): (&HashState, &HashState)| a != b;
        let last = first.states.iter().zip(&second.states).rposition(differs)?;
        Some(Self { piece: last + 1 })
    }

    /// The piece that settles it: both lists agree on everything after it.
    pub fn piece(&self) -> usize {
        self.piece
    }

    /// Settles it by the bytes of that piece, from whomever.
    pub fn resolve(&self, first: &HashChain, second: &HashChain, bytes: &[u8]) -> ConflictOutcome {
        match (first.is_valid_piece(self.piece, bytes), second.is_valid_piece(self.piece, bytes)) {
            (true, _) => ConflictOutcome::First,
            (false, true) => ConflictOutcome::Second,
            (false, false) => ConflictOutcome::Neither,
        }
    }
}

/// Hashes a blob from its beginning to its end, and notes the states on the way.
#[derive(Clone, Debug)]
pub struct HashChainBuilder {
    layout: PieceLayout,
    hash: StreamingHash,
    states: Vec<HashState>,
}

impl HashChainBuilder {
    /// For a blob that is cut like this.
    pub fn new(cut: PieceLayout) -> Self {
        Self {
            layout: cut,
            hash: StreamingHash::new(HashState::INITIAL),
            states: Vec::with_capacity(cut.piece_count() - 1),
        }
    }

    /// Takes the bytes that follow.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // Up to the end of the piece, so that no block spans two.
            let left = self.layout.piece_size - self.hash.taken() % self.layout.piece_size;
            let (now, later) = bytes.split_at(bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
            self.hash.update(now);
            let taken = self.hash.taken();
            if taken.is_multiple_of(self.layout.piece_size) && taken < self.layout.size {
                self.states.push(self.hash.state());
            }
            bytes = later;
        }
    }

    /// The states that are known so far, the first pieces' first.
    pub fn states(&self) -> &[HashState] {
        &self.states
    }

    /// The digest of what was taken, and the list. `None` when that was not as long as the cut says.
    pub fn finish(self) -> Option<HashChain> {
        if self.hash.taken() != self.layout.size {
            return None;
        }
        let digest = self.hash.finish(self.layout.size);
        Some(HashChain { digest, layout: self.layout, states: self.states })
    }
}

#[cfg(test)]
mod tests;
