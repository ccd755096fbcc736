//! Pieces that are hashed as they come, and the proof that they add up to.

use std::sync::Arc;

use super::{HashChain, HashState, StreamingHash};
use crate::oci::BlobProof;

/// Hashes one piece while it streams by.
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

    /// Which piece.
    pub fn piece(&self) -> usize {
        self.piece
    }

    /// Takes the next bytes of the piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
    }

    /// Whether it began as this list says; one that did not tells nothing about the bytes.
    pub fn has_start_state_of(&self, chain: &HashChain) -> bool {
        self.start_state == chain.start_state(self.piece)
    }

    /// The state after the piece, if it began with this one and so many bytes were taken.
    pub(super) fn end_state(&self, before: HashState, length: u64) -> Option<HashState> {
        (self.start_state == before && self.hash.taken() == length).then(|| self.hash.state())
    }

    /// Whether the bytes taken are the piece, according to this list.
    pub fn is_valid_for(self, chain: &HashChain) -> bool {
        let began = self.has_start_state_of(chain);
        let Self { piece, hash: running, .. } = self;
        let (cut, taken) = (chain.layout(), running.taken());
        if !began || piece >= cut.piece_count() || taken != cut.piece_length(piece) {
            return false;
        }
        match chain.states().get(piece) {
            Some(after) => running.state() == *after,
            None => running.finish(cut.size()) == chain.digest(),
        }
    }
}

/// The pieces of a blob that were found to fit one list. When they are all, the blob is proved.
#[derive(Debug)]
pub struct PieceVerifier {
    chain: Arc<HashChain>,
    valid: Vec<bool>,
    left: usize,
}

impl PieceVerifier {
    /// Nothing is proved yet.
    pub fn new(chain: Arc<HashChain>) -> Self {
        let left = chain.layout().piece_count();
        Self { chain, valid: vec![false; left], left }
    }

    /// The list.
    pub fn hash_chain(&self) -> &Arc<HashChain> {
        &self.chain
    }

    /// Counts a piece if it fits; false when it does not.
    pub fn record(&mut self, hasher: PieceHasher) -> bool {
        let piece = hasher.piece();
        if !hasher.is_valid_for(&self.chain) {
            return false;
        }
        self.left -= usize::from(!std::mem::replace(&mut self.valid[piece], true));
        true
    }

    /// Whether the piece was found to fit.
    pub fn has_piece(&self, piece: usize) -> bool {
        self.valid.get(piece).is_some_and(|fitted| *fitted)
    }

    /// The proof, when every piece fits: the first state is SHA-256's own and the last link ends at the digest.
    pub fn proof(&self) -> Option<BlobProof> {
        (self.left == 0).then(|| BlobProof::new(self.chain.digest(), self.chain.layout().size()))
    }
}
