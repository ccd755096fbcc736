//! The first piece of a sender, compared with a list that is still being made.
//!
//! A holder that has no list yet hashes the blob for it, a second for each 1.8 GB. So long nothing can be served, proved or blamed; but what its first
//! states say of the first pieces tells whether their senders may be asked for more. Whoever fits here is asked, no more: everything is compared again
//! with the whole list. And as long as such a list gets on, there is something to wait for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

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
    /// Bytes of the blob that the longest list of each maker covered, so that one who begins again gets on with what is new only.
    covered: BTreeMap<PeerId, u64>,
}

/// Bytes a second that whoever makes a list hashes at least: a disk that has much else to do. One who is slower is not waited for longer than
/// anybody who sends nothing, and a list of 10 GiB keeps a recovery for 21 minutes at most.
const SLOWEST_LISTING: u64 = 8 << 20;

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
        self.beginnings.entry(author).or_insert_with(|| Beginning::new(cut)).extend(states);
    }

    /// Whether a list has become longer since it was last asked, and is not made more slowly than a disk reads. `listing` says since when each is
    /// waited for.
    pub(super) fn gets_on(&mut self, listing: &HashMap<PeerId, Instant>, now: Instant) -> bool {
        let mut gets_on = false;
        for (author, beginning) in &self.beginnings {
            let covers = beginning.covers();
            let covered = self.covered.entry(*author).or_default();
            let is_longer = covers > *covered;
            *covered = covers.max(*covered);
            let since = listing.get(author);
            gets_on |= is_longer && since.is_some_and(|since| keeps_up(covers, now.saturating_duration_since(*since)));
        }
        gets_on
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

fn keeps_up(covers: u64, age: Duration) -> bool {
    u128::from(covers) * 1000 >= u128::from(SLOWEST_LISTING) * age.as_millis()
}
