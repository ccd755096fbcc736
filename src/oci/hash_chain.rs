//! SHA-256 as a chain: each piece of a blob is verified alone, in any order, from any peer. When
//! all pieces are valid, the blob's digest is verified without another pass.
//!
//! SHA-256 (FIPS 180-4, section 6.2.2) reads a message in blocks of 64 bytes and carries a state of
//! 32 bytes from one block to the next. Divided at multiples of 64 bytes, a blob is a row of
//! pieces, each of which takes one state to the next:
//!
//! ```text
//! initial value --piece 0--> state 1 --piece 1--> state 2 ...
//! ... state n-1 --last piece, padding, length--> digest
//! ```
//!
//! Hashing a blob yields all states at no extra cost. The list of the states, 32 bytes a piece, is
//! a [`HashChain`]. A piece is valid if it takes the state before the piece to the state after the
//! piece. The first state is a constant and the last link ends at the digest, so a blob whose
//! pieces are all valid *is* the blob of that digest. The chain is no other hash: it is SHA-256
//! itself, computed out of order.
//!
//! # Security
//!
//! - **All pieces are valid: the blob is verified**, by SHA-256's collision resistance as always.
//!   Nothing is ever committed on less.
//! - **Some pieces are valid: the pieces are as good as the chain.** The chain is a claim until the
//!   end, and is verified step by step from the tail. The last piece verifies the state before the
//!   piece *and the blob's length*, the piece before verifies the previous state, and so on. A
//!   forged chain therefore breaks at some link. For this the compression function must be hard to
//!   invert to a given output with a state of the attacker's choice (free-start second preimage).
//!   That is a little more than plain SHA-256 promises, and no attack better than brute force is
//!   known. The assumption decides only how soon a forged chain is detected, never what is
//!   committed.
//! - **One piece resolves a conflict of two chains** ([`ChainConflict`]): after the last difference
//!   the chains agree, so the piece at the difference is valid for one of the chains at most.
//!
//! Not here: which piece is fetched when, and from which peer.

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
    /// The 32 bytes of the state: the words in big endian, as in a digest.
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(self.0) {
            *chunk = word.to_be_bytes();
        }
        bytes
    }

    /// A state from its 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut words = [0; 8];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_be_bytes(*chunk);
        }
        Self(words)
    }

    /// The state at the start of every message (FIPS 180-4, section 5.3.3).
    pub const INITIAL: Self =
        Self([0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19]);

    /// Hashes whole blocks, and returns the rest.
    fn absorb<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (blocks, rest) = bytes.as_chunks::<BLOCK>();
        compress256(&mut self.0, blocks);
        rest
    }

    /// The digest of a message of `length` bytes that ends with `rest`, less than a block (FIPS
    /// 180-4, section 5.1.1).
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

/// The division of a blob into pieces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PieceLayout {
    size: u64,
    piece_size: u64,
}

/// A division that no agent uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PieceLayoutError {
    /// Pieces end at the end of a block; otherwise the states between them have no meaning.
    #[error("pieces of {0} bytes; the length must be a multiple of 64")]
    Unaligned(u64),
    /// More pieces than a hash chain may have.
    #[error("{pieces} pieces are over the limit of {MAX_PIECES}")]
    TooMany {
        /// The number of pieces.
        pieces: u64,
    },
}

/// Most pieces of one blob: a terabyte in pieces of the largest usual size. The chain then takes 4
/// MiB.
pub const MAX_PIECES: u64 = 1 << 17;

/// The smallest piece of [`PieceLayout::for_size`], in bytes. Smaller pieces cost more requests
/// than they save waiting. Of larger pieces, one bad byte costs more to fetch again.
pub const MIN_PIECE_SIZE: u64 = 256 << 10;
const MAX_PIECE_SIZE: u64 = 8 << 20;

/// Pieces of a blob at least, as long as none is too small.
const MIN_PIECES: u64 = 256;

impl PieceLayout {
    /// Divides a blob of `size` bytes into pieces of `piece` bytes; the last piece may be shorter.
    ///
    /// # Errors
    /// [`PieceLayoutError`].
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

    /// The layout that all agents use for a blob of this size: 256 to 512 pieces of a power of two
    /// of bytes, but none under 256 KiB or over 8 MiB. A blob beyond a terabyte has larger pieces.
    ///
    /// Fewer pieces are slower, since a node passes on whole pieces only. Of a thousand simulated
    /// nodes the last one is done after 1.26 times the time of its link with 257 pieces, after 1.46
    /// with 129.
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

    /// The number of pieces; an empty blob has one, which is empty.
    pub fn piece_count(&self) -> usize {
        usize::try_from(self.size.div_ceil(self.piece_size)).expect("at most MAX_PIECES").max(1)
    }

    /// The offset of a piece, in bytes.
    pub fn offset(&self, piece: usize) -> u64 {
        self.piece_size * piece as u64
    }

    /// The pieces that lie wholly within these bytes of the blob.
    pub fn pieces_within(&self, bytes: std::ops::Range<u64>) -> std::ops::Range<usize> {
        let count = |pieces: u64| usize::try_from(pieces).unwrap_or(usize::MAX).min(self.piece_count());
        let last = if bytes.end >= self.size { self.piece_count() } else { count(bytes.end / self.piece_size) };
        count(bytes.start.div_ceil(self.piece_size))..last
    }

    /// The length of a piece, in bytes; 0 beyond the last piece.
    pub fn piece_length(&self, piece: usize) -> u64 {
        self.size.saturating_sub(self.piece_size.saturating_mul(piece as u64)).min(self.piece_size)
    }
}

/// The states between the pieces of a blob: a claim of the agent that computed the states.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HashChain {
    digest: Digest,
    layout: PieceLayout,
    /// The states before pieces 1, 2, ...; before piece 0 stands [`HashState::INITIAL`].
    states: Vec<HashState>,
}

/// A chain that does not fit the layout of its blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{found} states instead of {expected} between the pieces")]
pub struct ChainLengthError {
    found: usize,
    expected: usize,
}

impl HashChain {
    /// The chain of the blob with this digest, as a peer claims.
    ///
    /// # Errors
    /// [`ChainLengthError`] unless there is one state between each two pieces.
    pub fn unverified(digest: Digest, layout: PieceLayout, states: Vec<HashState>) -> Result<Self, ChainLengthError> {
        let expected = layout.piece_count() - 1;
        let found = states.len();
        if found == expected { Ok(Self { digest, layout, states }) } else { Err(ChainLengthError { found, expected }) }
    }

    /// The blob's digest, at which the last link ends.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The division of the blob.
    pub fn layout(&self) -> PieceLayout {
        self.layout
    }

    /// The states between the pieces.
    pub fn states(&self) -> &[HashState] {
        &self.states
    }

    /// Whether these bytes are the piece, if the chain is right. When every piece of the blob is
    /// valid, the blob has this digest, whatever the source of the chain.
    pub fn is_valid_piece(&self, piece: usize, bytes: &[u8]) -> bool {
        let mut hasher = self.hasher(piece);
        hasher.update(bytes);
        hasher.is_valid_for(self)
    }

    /// A hasher for the bytes of this piece.
    pub fn hasher(&self, piece: usize) -> PieceHasher {
        PieceHasher::new(piece, self.start_state(piece))
    }

    /// The state before this piece; beyond the last piece, the state before the last piece.
    fn start_state(&self, piece: usize) -> HashState {
        let index = piece.min(self.layout.piece_count() - 1).checked_sub(1);
        index.map_or(HashState::INITIAL, |index| self.states[index])
    }
}

/// Two chains of one blob that differ. At least one of the chains is forged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChainConflict {
    piece: usize,
}

/// The outcome of a conflict.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConflictOutcome {
    /// The first chain may be right; the second is forged.
    First,
    /// The second chain may be right; the first is forged.
    Second,
    /// Neither is right: both chains are forged, or the bytes are wrong.
    Neither,
}

impl ChainConflict {
    /// The difference of two chains of one blob with the same layout; `None` when the chains agree.
    pub fn between(first: &HashChain, second: &HashChain) -> Option<Self> {
        debug_assert_eq!((first.digest, first.layout), (second.digest, second.layout));
        let differs = |(a, b): (&HashState, &HashState)| a != b;
        let last = first.states.iter().zip(&second.states).rposition(differs)?;
        Some(Self { piece: last + 1 })
    }

    /// The piece that resolves the conflict: both chains agree on everything after the piece.
    pub fn piece(&self) -> usize {
        self.piece
    }

    /// Resolves the conflict by the bytes of that piece, from any source.
    pub fn resolve(&self, first: &HashChain, second: &HashChain, bytes: &[u8]) -> ConflictOutcome {
        match (first.is_valid_piece(self.piece, bytes), second.is_valid_piece(self.piece, bytes)) {
            (true, _) => ConflictOutcome::First,
            (false, true) => ConflictOutcome::Second,
            (false, false) => ConflictOutcome::Neither,
        }
    }
}

/// Hashes a blob from its beginning to its end, and records the states.
#[derive(Clone, Debug)]
pub struct HashChainBuilder {
    layout: PieceLayout,
    hash: StreamingHash,
    states: Vec<HashState>,
}

impl HashChainBuilder {
    /// A builder for a blob of this layout.
    pub fn new(layout: PieceLayout) -> Self {
        Self {
            layout,
            hash: StreamingHash::new(HashState::INITIAL),
            states: Vec::with_capacity(layout.piece_count() - 1),
        }
    }

    /// Hashes the bytes that follow.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // Up to the end of the piece, so that no block spans two pieces.
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

    /// The states so far, in the order of the pieces.
    pub fn states(&self) -> &[HashState] {
        &self.states
    }

    /// The chain of the hashed bytes. `None` when their number is not the size in the layout.
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
