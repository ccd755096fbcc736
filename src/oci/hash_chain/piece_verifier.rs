//! Verifies pieces as their bytes arrive, and the blob as a whole.

use std::sync::Arc;

use super::{HashChain, HashState, StreamingHash};
use crate::oci::BlobProof;

/// Hashes one piece while its bytes arrive.
#[derive(Clone, Debug)]
pub struct PieceHasher {
    piece: usize,
    start_state: HashState,
    hash: StreamingHash,
}

impl PieceHasher {
    pub(super) fn new(piece: usize, before: HashState) -> Self {
        Self { piece, start_state: before, hash: StreamingHash::new(before) }
    }

    /// The number of the piece, counted from 0.
    pub fn piece(&self) -> usize {
        self.piece
    }

    /// Hashes the next bytes of the piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
    }

    /// Whether the hasher began with the state of this chain. Otherwise the result says nothing
    /// about the bytes.
    pub fn has_start_state_of(&self, chain: &HashChain) -> bool {
        self.start_state == chain.start_state(self.piece)
    }

    /// The state after the piece, if the hasher began with `before` and hashed `length` bytes.
    pub(super) fn end_state(&self, before: HashState, length: u64) -> Option<HashState> {
        (self.start_state == before && self.hash.taken() == length).then(|| self.hash.state())
    }

    /// Whether the hashed bytes are the piece, according to this chain.
    pub fn is_valid_for(self, chain: &HashChain) -> bool {
        let is_start_valid = self.has_start_state_of(chain);
        let Self { piece, hash, .. } = self;
        let (layout, taken) = (chain.layout(), hash.taken());
        if !is_start_valid || piece >= layout.piece_count() || taken != layout.piece_length(piece) {
            return false;
        }
        match chain.states().get(piece) {
            Some(after) => hash.state() == *after,
            None => hash.finish(layout.size()) == chain.digest(),
        }
    }
}

/// The pieces of a blob that are valid by one chain. When all pieces are valid, the blob is
/// verified.
#[derive(Debug)]
pub struct PieceVerifier {
    chain: Arc<HashChain>,
    valid: Vec<bool>,
    left: usize,
}

impl PieceVerifier {
    /// No piece is valid yet.
    pub fn new(chain: Arc<HashChain>) -> Self {
        let left = chain.layout().piece_count();
        Self { chain, valid: vec![false; left], left }
    }

    /// The chain that verifies the pieces.
    pub fn hash_chain(&self) -> &Arc<HashChain> {
        &self.chain
    }

    /// Records a valid piece; `false` when the piece is not valid.
    pub fn record(&mut self, hasher: PieceHasher) -> bool {
        let piece = hasher.piece();
        if !hasher.is_valid_for(&self.chain) {
            return false;
        }
        self.left -= usize::from(!std::mem::replace(&mut self.valid[piece], true));
        true
    }

    /// Whether the piece was recorded as valid.
    pub fn has_piece(&self, piece: usize) -> bool {
        self.valid.get(piece).is_some_and(|valid| *valid)
    }

    /// The proof, when every piece is valid: the first state is SHA-256's own and the last link
    /// ends at the digest.
    pub fn proof(&self) -> Option<BlobProof> {
        (self.left == 0).then(|| BlobProof::new(self.chain.digest(), self.chain.layout().size()))
    }
}
