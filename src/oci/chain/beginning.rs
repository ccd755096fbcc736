//! The first states of a list that is being made.

use super::{Cut, PieceHasher, State};

/// What there is of a list while its maker hashes the blob. Nothing is proved by it, not even that the list ends at the digest: it tells early whether a
/// piece is what somebody else says that it is.
#[derive(Clone, Debug)]
pub struct Beginning {
    cut: Cut,
    states: Vec<State>,
}

impl Beginning {
    /// Of a list of which there is nothing yet.
    pub fn new(cut: Cut) -> Self {
        Self { cut, states: Vec::new() }
    }

    /// States that follow those that were had; more than the blob has are dropped.
    pub fn extend(&mut self, states: &[State]) {
        let left = (self.cut.pieces() - 1).saturating_sub(self.states.len());
        self.states.extend_from_slice(&states[..states.len().min(left)]);
    }

    /// Bytes of the blob that its maker has hashed for these states.
    pub fn covers(&self) -> u64 {
        self.cut.offset(self.states.len())
    }

    /// For the bytes of this piece, if both states around it are there.
    pub fn hasher(&self, piece: usize) -> Option<PieceHasher> {
        self.states.get(piece)?;
        Some(PieceHasher::new(piece, self.before(piece)))
    }

    /// Whether the bytes taken are the piece, according to these states.
    pub fn fits(&self, hasher: &PieceHasher) -> bool {
        let piece = hasher.piece();
        hasher
            .takes(self.before(piece), self.cut.length(piece))
            .is_some_and(|after| self.states.get(piece) == Some(&after))
    }

    fn before(&self, piece: usize) -> State {
        piece.checked_sub(1).and_then(|place| self.states.get(place)).copied().unwrap_or(State::INITIAL)
    }
}
