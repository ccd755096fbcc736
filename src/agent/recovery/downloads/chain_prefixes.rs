//! Compares the first piece of a sender with the start of a hash chain that is still being
//! computed.
//!
//! A provider without a chain hashes the blob for the chain, a second for each 1.8 GB. Until the
//! chain is complete, no piece can be served, verified or blamed on a peer. The first states
//! already show whether a first piece matches, and so whether its sender gets further requests. A
//! match decides nothing else: all pieces are verified again with the complete chain. A growing
//! chain also counts as progress of the download.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::model::PeerId;
use crate::oci::{ChainPrefix, HashState, PieceHasher, PieceLayout};

/// Incomplete chains, one of each author with a request in flight, and the results of the
/// comparisons.
#[derive(Default)]
pub(in crate::agent::recovery) struct ChainPrefixes {
    prefixes: BTreeMap<PeerId, ChainPrefix>,
    /// Authors of chains that matched a piece of another sender.
    corroborated_authors: BTreeSet<PeerId>,
    /// Senders and authors whose piece and chain were compared.
    checked_pairs: BTreeSet<(PeerId, PeerId)>,
    /// Senders whose first piece matched.
    matching_senders: BTreeSet<PeerId>,
    /// Bytes of the blob that the longest prefix of each author covered. An author that starts
    /// again makes progress only beyond these bytes.
    covered_bytes: BTreeMap<PeerId, u64>,
}

/// Lowest hashing rate of an author, in bytes per second: that of a disk with much other work. A
/// slower author counts as a peer that sends nothing. A chain of 10 GiB delays a recovery by 21
/// minutes at most.
const MIN_CHAIN_RATE: u64 = 8 << 20;

/// A piece to compare with the prefix of an author.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent::recovery) struct PrefixCheck {
    pub(in crate::agent::recovery) piece: u32,
    pub(in crate::agent::recovery) sender: PeerId,
    pub(in crate::agent::recovery) author: PeerId,
}

impl ChainPrefixes {
    /// Appends states of the chain that this peer computes.
    pub(in crate::agent::recovery) fn extend(&mut self, author: PeerId, layout: PieceLayout, states: &[HashState]) {
        self.prefixes.entry(author).or_insert_with(|| ChainPrefix::new(layout)).extend(states);
    }

    /// Whether a prefix has grown since the last call, and at no less than [`MIN_CHAIN_RATE`].
    /// `chain_requests` has the time of each request.
    pub(in crate::agent::recovery) fn record_progress(
        &mut self,
        chain_requests: &HashMap<PeerId, Instant>,
        now: Instant,
    ) -> bool {
        let mut is_progressing = false;
        for (author, prefix) in &self.prefixes {
            let hashed_bytes = prefix.hashed_bytes();
            let covered = self.covered_bytes.entry(*author).or_default();
            let is_longer = hashed_bytes > *covered;
            *covered = hashed_bytes.max(*covered);
            let since = chain_requests.get(author);
            is_progressing |= is_longer
                && since.is_some_and(|since| is_fast_enough(hashed_bytes, now.saturating_duration_since(*since)));
        }
        is_progressing
    }

    /// Removes a prefix whose chain is complete, or will not arrive.
    pub(in crate::agent::recovery) fn remove(&mut self, author: PeerId) {
        self.prefixes.remove(&author);
    }

    /// The next piece to compare. A sender's own chain counts if the sender is the only provider,
    /// or if the chain matched a piece of another sender.
    pub(in crate::agent::recovery) fn next_check(
        &self,
        unverified: impl Iterator<Item = (u32, PeerId)>,
        has_single_provider: bool,
    ) -> Option<PrefixCheck> {
        let author_of_check = |piece: u32, sender: PeerId| {
            self.prefixes.iter().find_map(|(author, prefix)| {
                let is_usable = *author != sender || has_single_provider || self.corroborated_authors.contains(author);
                let is_new = !self.checked_pairs.contains(&(sender, *author));
                (is_usable && is_new && prefix.hasher(piece as usize).is_some()).then_some(*author)
            })
        };
        let mut unverified = unverified.filter(|(_, sender)| !self.matching_senders.contains(sender));
        unverified
            .find_map(|(piece, sender)| Some(PrefixCheck { piece, sender, author: author_of_check(piece, sender)? }))
    }

    /// A hasher for the piece's bytes; `None` when the prefix was removed meanwhile.
    pub(in crate::agent::recovery) fn hasher(&self, check: PrefixCheck) -> Option<PieceHasher> {
        self.prefixes.get(&check.author)?.hasher(check.piece as usize)
    }

    /// Whether the piece matches. The pair of sender and author is not compared again.
    pub(in crate::agent::recovery) fn record_check(&mut self, check: PrefixCheck, hasher: &PieceHasher) -> bool {
        let PrefixCheck { sender, author, .. } = check;
        self.checked_pairs.insert((sender, author));
        let is_valid = self.prefixes.get(&author).is_some_and(|prefix| prefix.is_valid_piece(hasher));
        if is_valid {
            self.matching_senders.insert(sender);
            if author != sender {
                self.corroborated_authors.insert(author);
            }
        }
        is_valid
    }
}

fn is_fast_enough(hashed_bytes: u64, age: Duration) -> bool {
    u128::from(hashed_bytes) * 1000 >= u128::from(MIN_CHAIN_RATE) * age.as_millis()
}
