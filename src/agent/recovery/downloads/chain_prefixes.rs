//! The first piece of a sender, compared with a list that is still being made.
//!
//! A holder that has no list yet hashes the blob for it, a second for each 1.8 GB. So long nothing can be served, proved or blamed; but what its first
//! states say of the first pieces tells whether their senders may be asked for more. Whoever fits here is asked, no more: everything is compared again
//! with the whole list. And as long as such a list gets on, there is something to wait for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::model::PeerId;
use crate::oci::{ChainPrefix, HashState, PieceHasher, PieceLayout};

/// Lists that are being made, as many as are asked for at a time, and what came of comparing with them.
#[derive(Default)]
pub(in crate::agent::recovery) struct ChainPrefixes {
    prefixes: BTreeMap<PeerId, ChainPrefix>,
    /// Makers of lists that a piece of somebody else fitted.
    corroborated_authors: BTreeSet<PeerId>,
    /// Whose first piece was compared with whose list.
    checked_pairs: BTreeSet<(PeerId, PeerId)>,
    /// Whose first piece fitted.
    matching_senders: BTreeSet<PeerId>,
    /// Bytes of the blob that the longest list of each maker covered, so that one who begins again gets on with what is new only.
    covered_bytes: BTreeMap<PeerId, u64>,
}

/// Bytes a second that whoever makes a list hashes at least: a disk that has much else to do. One who is slower is not waited for longer than
/// anybody who sends nothing, and a list of 10 GiB keeps a recovery for 21 minutes at most.
const MIN_CHAIN_RATE: u64 = 8 << 20;

/// What can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent::recovery) struct PrefixCheck {
    pub(in crate::agent::recovery) piece: u32,
    pub(in crate::agent::recovery) sender: PeerId,
    pub(in crate::agent::recovery) author: PeerId,
}

impl ChainPrefixes {
    /// The next states of a list that this peer makes.
    pub(in crate::agent::recovery) fn extend(&mut self, author: PeerId, layout: PieceLayout, states: &[HashState]) {
        self.prefixes.entry(author).or_insert_with(|| ChainPrefix::new(layout)).extend(states);
    }

    /// Whether a list has become longer since it was last asked, and is not made more slowly than a disk reads. `listing` says since when each is
    /// waited for.
    pub(in crate::agent::recovery) fn record_progress(&mut self, chain_requests: &HashMap<PeerId, Instant>, now: Instant) -> bool {
        let mut gets_on = false;
        for (author, beginning) in &self.prefixes {
            let covers = beginning.hashed_bytes();
            let covered = self.covered_bytes.entry(*author).or_default();
            let is_longer = covers > *covered;
            *covered = covers.max(*covered);
            let since = chain_requests.get(author);
            gets_on |=
                is_longer && since.is_some_and(|since| is_fast_enough(covers, now.saturating_duration_since(*since)));
        }
        gets_on
    }

    /// Its list is whole, or will not be.
    pub(in crate::agent::recovery) fn remove(&mut self, author: PeerId) {
        self.prefixes.remove(&author);
    }

    /// The next of these pieces to compare. What a sender says of itself counts where it is alone, or where somebody else's piece fitted its list.
    pub(in crate::agent::recovery) fn next_check(
        &self,
        unchecked: impl Iterator<Item = (u32, PeerId)>,
        is_alone: bool,
    ) -> Option<PrefixCheck> {
        let authors = |piece: u32, sender: PeerId| {
            self.prefixes.iter().find_map(|(author, beginning)| {
                let counts = *author != sender || is_alone || self.corroborated_authors.contains(author);
                let is_new = !self.checked_pairs.contains(&(sender, *author));
                (counts && is_new && beginning.hasher(piece as usize).is_some()).then_some(*author)
            })
        };
        let mut unchecked = unchecked.filter(|(_, sender)| !self.matching_senders.contains(sender));
        unchecked.find_map(|(piece, sender)| Some(PrefixCheck { piece, sender, author: authors(piece, sender)? }))
    }

    /// For the bytes of the piece; none where the list was forgotten meanwhile.
    pub(in crate::agent::recovery) fn hasher(&self, check: PrefixCheck) -> Option<PieceHasher> {
        self.prefixes.get(&check.author)?.hasher(check.piece as usize)
    }

    /// Whether the piece fits. It is not compared with this list again.
    pub(in crate::agent::recovery) fn record_check(&mut self, check: PrefixCheck, hasher: &PieceHasher) -> bool {
        let PrefixCheck { sender, author, .. } = check;
        self.checked_pairs.insert((sender, author));
        let fits = self.prefixes.get(&author).is_some_and(|beginning| beginning.is_valid_piece(hasher));
        if fits {
            self.matching_senders.insert(sender);
            if author != sender {
                self.corroborated_authors.insert(author);
            }
        }
        fits
    }
}

fn is_fast_enough(covers: u64, age: Duration) -> bool {
    u128::from(covers) * 1000 >= u128::from(MIN_CHAIN_RATE) * age.as_millis()
}
