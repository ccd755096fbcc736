//! Verification of pieces with the hash chain of a download, and comparison of pieces with prefixes
//! of hash chains.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::{BlobDownload, DownloadState, StoredPiece};
use crate::agent::recovery::downloads::chain_prefixes::PrefixCheck;
use crate::model::PeerId;
use crate::oci::{HashChain, HashState as ChainState, PieceHasher};
use crate::ports::StoreError;

/// Bytes per read of a verification.
const READ_BYTES: usize = 512 << 10;

impl BlobDownload {
    /// Appends states of a chain that this peer computes. Ignored once a chain is in use.
    pub(in crate::agent::recovery) fn extend_prefix(&self, author: PeerId, states: &[ChainState]) {
        let mut state = self.state();
        if state.hash_chain.is_none() {
            state.prefixes.extend(author, self.layout, states);
        }
    }

    /// Whether a prefix grows, while no chain is in use; see
    /// [`ChainPrefixes::record_progress`](super::ChainPrefixes::record_progress).
    pub(in crate::agent::recovery) fn record_prefix_progress(
        &self,
        chain_requests: &HashMap<PeerId, Instant>,
        now: Instant,
    ) -> bool {
        self.state().prefixes.record_progress(chain_requests, now)
    }

    /// Removes the prefix of an author whose request ended.
    pub(in crate::agent::recovery) fn drop_prefix(&self, author: PeerId) {
        self.state().prefixes.remove(author);
    }

    /// The next piece to compare with a prefix. `is_alone` when the sender is the only provider of
    /// the blob.
    pub(in crate::agent::recovery) fn next_prefix_check(&self, has_single_provider: bool) -> Option<PrefixCheck> {
        let state = self.state();
        let unverified = state.unverified.iter().filter_map(|(piece, from)| Some((*piece, (*from)?)));
        state.prefixes.next_check(unverified, has_single_provider)
    }

    /// Whether the piece matches the prefix.
    ///
    /// # Errors
    /// [`StoreError`] of the read.
    pub(in crate::agent::recovery) async fn check_prefix(&self, check: PrefixCheck) -> Result<bool, StoreError> {
        let Some(mut hasher) = self.state().prefixes.hasher(check) else { return Ok(false) };
        let slot = self.acquire_slot(check.piece).0;
        let guard = slot.lock().await;
        let read = self.hash_stored(check.piece, &mut hasher).await;
        drop(guard);
        self.release_slot(check.piece, slot);
        read.map(|()| self.state().prefixes.record_check(check, &hasher))
    }

    /// A hasher for a piece that begins to arrive; `None` without a hash chain.
    pub(in crate::agent::recovery) fn hasher(&self, piece: u32) -> Option<PieceHasher> {
        self.state()
            .hash_chain
            .as_ref()
            .map(|authored_chain| authored_chain.verifier.hash_chain().hasher(piece as usize))
    }

    /// A hasher of the whole piece that starts with a state of the chain in use: the given hasher,
    /// or a new hasher of `bytes`. `None` without a chain.
    pub(in crate::agent::recovery) fn current_hasher(
        &self,
        piece: u32,
        hasher: Option<PieceHasher>,
        bytes: &[u8],
    ) -> Option<PieceHasher> {
        let (chain, _) = self.hash_chain()?;
        let known = hasher.filter(|hasher| hasher.has_start_state_of(&chain));
        Some(known.unwrap_or_else(|| {
            let mut hasher = chain.hasher(piece as usize);
            hasher.update(bytes);
            hasher
        }))
    }

    /// Whether the hashed bytes match the chain in use.
    pub(in crate::agent::recovery) fn matches_chain(&self, hasher: Option<&PieceHasher>) -> bool {
        let state = self.state();
        let authored_chain = state.hash_chain.as_ref();
        authored_chain.zip(hasher).is_some_and(|(list, hasher)| hasher.clone().is_valid_for(list.verifier.hash_chain()))
    }

    /// Verifies a stored piece with the hash chain.
    ///
    /// # Errors
    /// [`StoreError`] of the read.
    pub(in crate::agent::recovery) async fn verify_stored(&self, piece: u32) -> Result<StoredPiece, StoreError> {
        let Some((chain, _)) = self.hash_chain() else { return Ok(StoredPiece::ChainReplaced) };
        let mut hasher = chain.hasher(piece as usize);
        let slot = self.acquire_slot(piece).0;
        let guard = slot.lock().await;
        self.hash_stored(piece, &mut hasher).await?;
        let stored = self.record_stored(piece, &chain, hasher);
        // The lock ends here, so no task can overwrite the bytes between the read and the verdict.
        drop(guard);
        self.release_slot(piece, slot);
        if matches!(stored, StoredPiece::Valid(_)) {
            self.notify_followers();
        }
        Ok(stored)
    }

    /// Hashes the stored bytes of a piece. The caller holds the slot's lock.
    async fn hash_stored(&self, piece: u32, hasher: &mut PieceHasher) -> Result<(), StoreError> {
        let (mut at, end) = self.bounds(piece);
        while at < end {
            let limit = usize::try_from(end - at).unwrap_or(READ_BYTES).min(READ_BYTES);
            let bytes = self.staged.read_at(at, limit).await?;
            if bytes.is_empty() {
                break;
            }
            hasher.update(&bytes);
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Records the verdict on a stored piece. An invalid piece with a known sender stays unverified
    /// until a dispute shows whether the chain is wrong instead.
    fn record_stored(&self, piece: u32, chain: &Arc<HashChain>, hasher: PieceHasher) -> StoredPiece {
        let mut state = self.state();
        let DownloadState { hash_chain: Some(authored_chain), unverified, verified_senders, .. } = &mut *state else {
            return StoredPiece::ChainReplaced;
        };
        if !Arc::ptr_eq(authored_chain.verifier.hash_chain(), chain) {
            return StoredPiece::ChainReplaced;
        }
        if authored_chain.verifier.record(hasher) {
            let from = unverified.remove(&piece).flatten();
            verified_senders.extend(from);
            return StoredPiece::Valid(from);
        }
        match unverified.get(&piece).copied().flatten() {
            Some(from) => StoredPiece::Invalid(Some(from)),
            None => {
                unverified.remove(&piece);
                StoredPiece::Invalid(None)
            }
        }
    }
}
