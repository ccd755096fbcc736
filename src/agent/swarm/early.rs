//! The first piece of a sender, compared with a list that is still being made.
//!
//! A holder that has no list yet hashes the blob for it, a second for each 1.8 GB. So long nothing can be served, proved or blamed; but what its first
//! states say of the first pieces tells whether their senders may be asked for more. Whoever fits here is asked, no more: everything is compared again
//! with the whole list.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::PeerId;
use crate::oci::{Beginning, Cut, PieceHasher, State};

/// Lists that are being made, as many as are asked for at a time, and what came of comparing with them.
#[derive(Default)]
pub(super) struct Early {
    beginnings: BTreeMap<PeerId, Beginning>,
    /// Makers of lists that a piece of somebody else fitted.
    vouched: BTreeSet<PeerId>,
    /// Whose first piece was compared with whose list.
    compared: BTreeSet<(PeerId, PeerId)>,
    /// Whose first piece fitted.
    fitted: BTreeSet<PeerId>,
    /// States that came, of all lists.
    heard: usize,
}

/// What can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trial {
    pub(super) piece: u32,
    pub(super) sender: PeerId,
    pub(super) author: PeerId,
}

impl Early {
    /// The next states of a list that this peer makes.
    pub(super) fn hears(&mut self, author: PeerId, cut: Cut, states: &[State]) {
        self.heard += states.len();
        self.beginnings.entry(author).or_insert_with(|| Beginning::new(cut)).extend(states);
    }

    /// How many states came, of all lists.
    pub(super) fn heard(&self) -> usize {
        self.heard
    }

    /// Its list is whole, or will not be.
    pub(super) fn forget(&mut self, author: PeerId) {
        self.beginnings.remove(&author);
    }

    /// The next of these pieces to compare. What a sender says of itself counts where it is alone, or where somebody else's piece fitted its list.
    pub(super) fn next(&self, unchecked: impl Iterator<Item = (u32, PeerId)>, is_alone: bool) -> Option<Trial> {
        let authors = |piece: u32, sender: PeerId| {
            self.beginnings.iter().find_map(|(author, beginning)| {
                let counts = *author != sender || is_alone || self.vouched.contains(author);
                let is_new = !self.compared.contains(&(sender, *author));
                (counts && is_new && beginning.hasher(piece as usize).is_some()).then_some(*author)
            })
        };
        let mut unchecked = unchecked.filter(|(_, sender)| !self.fitted.contains(sender));
        unchecked.find_map(|(piece, sender)| Some(Trial { piece, sender, author: authors(piece, sender)? }))
    }

    /// For the bytes of the piece; none where the list was forgotten meanwhile.
    pub(super) fn hasher(&self, trial: Trial) -> Option<PieceHasher> {
        self.beginnings.get(&trial.author)?.hasher(trial.piece as usize)
    }

    /// Whether the piece fits. It is not compared with this list again.
    pub(super) fn judge(&mut self, trial: Trial, hasher: &PieceHasher) -> bool {
        let Trial { sender, author, .. } = trial;
        self.compared.insert((sender, author));
        let fits = self.beginnings.get(&author).is_some_and(|beginning| beginning.fits(hasher));
        if fits {
            self.fitted.insert(sender);
            if author != sender {
                self.vouched.insert(author);
            }
        }
        fits
    }
}
