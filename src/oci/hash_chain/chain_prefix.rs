//! The first states of a chain that is being computed.

use super::{HashState, PieceHasher, PieceLayout};

/// The states that a provider has sent while the provider hashes the blob. A prefix verifies
/// nothing, not even that the chain ends at the digest. A prefix shows early whether a piece from
/// another peer agrees with the chain.
#[derive(Clone, Debug)]
pub struct ChainPrefix {
    layout: PieceLayout,
    states: Vec<HashState>,
}

impl ChainPrefix {
    /// A prefix without states.
    pub fn new(layout: PieceLayout) -> Self {
        Self { layout, states: Vec::new() }
    }

    /// Appends states; more states than the blob has are dropped.
    pub fn extend(&mut self, states: &[HashState]) {
        let left = (self.layout.piece_count() - 1).saturating_sub(self.states.len());
        self.states.extend_from_slice(&states[..states.len().min(left)]);
    }

    /// Bytes of the blob that the provider has hashed for these states.
    pub fn hashed_bytes(&self) -> u64 {
        self.layout.offset(self.states.len())
    }

    /// A hasher for this piece, if both states around the piece are present.
    pub fn hasher(&self, piece: usize) -> Option<PieceHasher> {
        self.states.get(piece)?;
        Some(PieceHasher::new(piece, self.start_state(piece)))
    }

    /// Whether the hashed bytes are the piece, according to these states.
    pub fn is_valid_piece(&self, hasher: &PieceHasher) -> bool {
        let piece = hasher.piece();
        hasher
            .end_state(self.start_state(piece), self.layout.piece_length(piece))
            .is_some_and(|after| self.states.get(piece) == Some(&after))
    }

    fn start_state(&self, piece: usize) -> HashState {
        piece.checked_sub(1).and_then(|index| self.states.get(index)).copied().unwrap_or(HashState::INITIAL)
    }
}
