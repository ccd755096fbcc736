//! Pieces that are hashed as they come, and the proof that they add up to.

use std::sync::Arc;

use super::{Chain, Running, State};
use crate::oci::Verified;

/// Hashes one piece while it streams by.
#[derive(Clone, Debug)]
pub struct PieceHasher {
    piece: usize,
    before: State,
    running: Running,
}

impl PieceHasher {
    pub(super) fn new(piece: usize, before: State) -> Self {
        Self { piece, before, running: Running::new(before) }
    }

    /// Which piece.
    pub fn piece(&self) -> usize {
        self.piece
    }

    /// Takes the next bytes of the piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.running.update(bytes);
    }

    /// Whether it began as this list says; one that did not tells nothing about the bytes.
    pub fn began_by(&self, chain: &Chain) -> bool {
        self.before == chain.before(self.piece)
    }

    /// The state after the piece, if it began with this one and so many bytes were taken.
    pub(super) fn takes(&self, before: State, length: u64) -> Option<State> {
        (self.before == before && self.running.taken() == length).then(|| self.running.state())
    }

    /// Whether the bytes taken are the piece, according to this list.
    pub fn fits(self, chain: &Chain) -> bool {
        let began = self.began_by(chain);
        let Self { piece, running, .. } = self;
        let (cut, taken) = (chain.cut(), running.taken());
        if !began || piece >= cut.pieces() || taken != cut.length(piece) {
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
pub struct Proving {
    chain: Arc<Chain>,
    fitted: Vec<bool>,
    left: usize,
}

impl Proving {
    /// Nothing is proved yet.
    pub fn new(chain: Arc<Chain>) -> Self {
        let left = chain.cut().pieces();
        Self { chain, fitted: vec![false; left], left }
    }

    /// The list.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Counts a piece if it fits; false when it does not.
    pub fn take(&mut self, hasher: PieceHasher) -> bool {
        let piece = hasher.piece();
        if !hasher.fits(&self.chain) {
            return false;
        }
        self.left -= usize::from(!std::mem::replace(&mut self.fitted[piece], true));
        true
    }

    /// Whether the piece was found to fit.
    pub fn has(&self, piece: usize) -> bool {
        self.fitted.get(piece).is_some_and(|fitted| *fitted)
    }

    /// The proof, when every piece fits: the first state is SHA-256's own and the last link ends at the digest.
    pub fn verified(&self) -> Option<Verified> {
        (self.left == 0).then(|| Verified::proved(self.chain.digest(), self.chain.cut().size()))
    }
}
