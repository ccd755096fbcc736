//! The first states of a list that is being made.

use super::{HashState, PieceHasher, PieceLayout};

/// What there is of a list while its maker hashes the blob. Nothing is proved by it, not even that the list ends at the digest: it tells early whether a
/// piece is what somebody else says that it is.
#[derive(Clone, Debug)]
pub struct ChainPrefix {
    layout: PieceLayout,
    states: Vec<HashState>,
}

impl ChainPrefix {
    /// Of a list of which there is nothing yet.
    pub fn new(cut: PieceLayout) -> Self {
        Self { layout: cut, states: Vec::new() }
    }

    /// States that follow those that were had; more than the blob has are dropped.
    pub fn extend(&mut self, states: &[HashState]) {
        let left = (self.layout.piece_count() - 1).saturating_sub(self.states.len());
        self.states.extend_from_slice(&states[..states.len().min(left)]);
    }

    /// Bytes of the blob that its maker has hashed for these states.
    pub fn hashed_bytes(&self) -> u64 {
        self.layout.offset(self.states.len())
    }

    /// For the bytes of this piece, if both states around it are there.
    pub fn hasher(&self, piece: usize) -> Option<PieceHasher> {
        self.states.get(piece)?;
        Some(PieceHasher::new(piece, self.start_state(piece)))
    }

    /// Whether the bytes taken are the piece, according to these states.
    pub fn is_valid_piece(&self, hasher: &PieceHasher) -> bool {
        let piece = hasher.piece();
        hasher
            .end_state(self.start_state(piece), self.layout.piece_length(piece))
            .is_some_and(|after| self.states.get(piece) == Some(&after))
    }

    fn start_state(&self, piece: usize) -> HashState {
        piece.checked_sub(1).and_then(|place| self.states.get(place)).copied().unwrap_or(HashState::INITIAL)
    }
}
