//! One blob on its way: which of its pieces are here, and which of them are known to be right.
//!
//! Whatever is served, or counts towards the proof, fits the list of states. How pieces are written so that this stays true is [`super::sink`]'s.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::chain_prefixes::{ChainPrefixes, PrefixCheck};
use crate::decide::piece_picker::PieceRequestId;
use crate::model::{Bits, PeerId};
use crate::oci::{BlobProof, Descriptor, HashChain, HashState as ChainState, PieceHasher, PieceLayout, PieceVerifier};
use crate::ports::{PartialBlob, StagedBlob, StoreError};

/// A blob that is being fetched.
pub(in crate::agent::recovery) struct BlobDownload {
    blob: Descriptor,
    layout: PieceLayout,
    staged: Arc<dyn StagedBlob>,
    state: Mutex<DownloadState>,
    /// Taken away when nothing is to be served of it any more.
    changes: Mutex<Option<watch::Sender<u64>>>,
}

#[derive(Default)]
struct DownloadState {
    hash_chain: Option<AuthoredChain>,
    /// What there is of lists before there is one.
    prefixes: ChainPrefixes,
    /// Written, and not compared with a list yet; who sent it, unless a process before this one wrote it.
    unverified: BTreeMap<u32, Option<PeerId>>,
    /// Pieces that are being written, each by one task.
    piece_slots: HashMap<u32, Arc<PieceSlot>>,
    /// What came, from whom.
    bytes_by_peer: BTreeMap<PeerId, u64>,
    /// Of whom a piece fitted.
    verified_senders: BTreeSet<PeerId>,
}

impl DownloadState {
    fn is_verified(&self, piece: u32) -> bool {
        self.hash_chain.as_ref().is_some_and(|list| list.verifier.has_piece(piece as usize))
    }

    fn is_present(&self, piece: u32) -> bool {
        self.is_verified(piece) || self.unverified.contains_key(&piece)
    }
}

struct AuthoredChain {
    verifier: PieceVerifier,
    /// Whose word it is; nobody's where there is nothing to be said, because the blob is one piece.
    author: Option<PeerId>,
}

/// The right to write one piece, for one task at a time.
pub(in crate::agent::recovery) type PieceSlot = tokio::sync::Mutex<LastWriter>;

/// Which ask wrote there last, of those that have the place now.
pub(in crate::agent::recovery) type LastWriter = Option<PieceRequestId>;

/// What is at the place of a piece whose bytes begin to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent::recovery) enum SlotState {
    /// Nothing, and nobody else writes there.
    Free,
    /// Somebody else writes there.
    Taken,
    /// The piece, right or not compared yet: it must not be written over.
    Present,
}

/// What became of a piece whose bytes are all here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent::recovery) enum ReceivedPiece {
    /// It fits.
    Valid,
    /// There is no list yet to compare it with.
    Unverified,
    /// It does not fit.
    Invalid,
}

/// What a piece that was here already turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent::recovery) enum StoredPiece {
    /// It fits; who sent it, if that is known.
    Valid(Option<PeerId>),
    /// It does not fit; the same.
    Invalid(Option<PeerId>),
    /// There is another list by now, or none.
    ChainReplaced,
}

impl BlobDownload {
    pub(in crate::agent::recovery) fn new(blob: Descriptor, staged: Arc<dyn StagedBlob>) -> Self {
        let layout = PieceLayout::for_size(blob.size);
        let left = staged.resumed_ranges().into_iter().flat_map(|range| layout.pieces_within(range));
        let unchecked = left.filter_map(|piece| Some((u32::try_from(piece).ok()?, None))).collect();
        let mut state = DownloadState { unverified: unchecked, ..DownloadState::default() };
        if layout.piece_count() == 1
            && let Ok(chain) = HashChain::unverified(blob.digest, layout, Vec::new())
        {
            state.hash_chain = Some(AuthoredChain { verifier: PieceVerifier::new(Arc::new(chain)), author: None });
        }
        Self { blob, layout, staged, state: Mutex::new(state), changes: Mutex::new(Some(watch::Sender::new(0))) }
    }

    pub(in crate::agent::recovery) fn blob(&self) -> &Descriptor {
        &self.blob
    }

    pub(in crate::agent::recovery) fn layout(&self) -> PieceLayout {
        self.layout
    }

    pub(in crate::agent::recovery) fn staged(&self) -> &Arc<dyn StagedBlob> {
        &self.staged
    }

    /// The list in use, and whose it is.
    pub(in crate::agent::recovery) fn hash_chain(&self) -> Option<(Arc<HashChain>, Option<PeerId>)> {
        self.state().hash_chain.as_ref().map(|list| (Arc::clone(list.verifier.hash_chain()), list.author))
    }

    /// Checks by this list from now on. Everything that is here has to be checked by it.
    pub(in crate::agent::recovery) fn set_hash_chain(&self, chain: Arc<HashChain>, author: PeerId) {
        let mut state = self.state();
        if let Some(AuthoredChain { verifier: proving, .. }) = &state.hash_chain {
            let fitted = (0..self.layout.piece_count()).filter(|piece| proving.has_piece(*piece));
            let fitted: Vec<_> = fitted.filter_map(|piece| Some((u32::try_from(piece).ok()?, None))).collect();
            state.unverified.extend(fitted);
        }
        state.hash_chain = Some(AuthoredChain { verifier: PieceVerifier::new(chain), author: Some(author) });
        state.prefixes = ChainPrefixes::default();
    }

    /// The next states of a list that a peer makes.
    pub(in crate::agent::recovery) fn extend_prefix(&self, author: PeerId, states: &[ChainState]) {
        let mut state = self.state();
        if state.hash_chain.is_none() {
            state.prefixes.extend(author, self.layout, states);
        }
    }

    /// Whether a list that is being made got on, while there is none; see [`Early::gets_on`].
    pub(in crate::agent::recovery) fn record_prefix_progress(&self, chain_requests: &HashMap<PeerId, Instant>, now: Instant) -> bool {
        self.state().prefixes.record_progress(chain_requests, now)
    }

    /// A peer's list will not come.
    pub(in crate::agent::recovery) fn drop_prefix(&self, author: PeerId) {
        self.state().prefixes.remove(author);
    }

    /// A piece that a list can tell of that is being made. `is_alone` where nobody but its sender has the blob.
    pub(in crate::agent::recovery) fn next_prefix_check(&self, is_alone: bool) -> Option<PrefixCheck> {
        let state = self.state();
        let unchecked = state.unverified.iter().filter_map(|(piece, from)| Some((*piece, (*from)?)));
        state.prefixes.next_check(unchecked, is_alone)
    }

    /// Whether it fits what there is of the list.
    ///
    /// # Errors
    /// As the store says.
    pub(in crate::agent::recovery) async fn check_prefix(&self, check: PrefixCheck) -> Result<bool, StoreError> {
        let Some(mut hasher) = self.state().prefixes.hasher(check) else { return Ok(false) };
        let slot = self.acquire_slot(check.piece).0;
        let guard = slot.lock().await;
        let read = self.hash_stored(check.piece, &mut hasher).await;
        drop(guard);
        self.release_slot(check.piece, slot);
        read.map(|()| self.state().prefixes.record_check(check, &hasher))
    }

    /// Pieces that are here and were not compared with the list.
    pub(in crate::agent::recovery) fn unverified(&self) -> Vec<u32> {
        self.state().unverified.keys().copied().collect()
    }

    /// Whether the piece is here and fits.
    pub(in crate::agent::recovery) fn is_verified(&self, piece: u32) -> bool {
        self.state().is_verified(piece)
    }

    /// For the bytes of a piece that begins to come, if there is a list.
    pub(in crate::agent::recovery) fn hasher(&self, piece: u32) -> Option<PieceHasher> {
        self.state().hash_chain.as_ref().map(|list| list.verifier.hash_chain().hasher(piece as usize))
    }

    /// The place of a piece whose bytes begin to come, and what is there. Both at once: whoever finds it free has it before the piece can be here by
    /// another.
    pub(in crate::agent::recovery) fn acquire_slot(&self, piece: u32) -> (Arc<PieceSlot>, SlotState) {
        let mut state = self.state();
        let is_here = state.is_present(piece);
        let slot = state.piece_slots.entry(piece).or_default();
        let found = match (is_here, Arc::strong_count(slot)) {
            (true, _) => SlotState::Present,
            (false, 1) => SlotState::Free,
            (false, _) => SlotState::Taken,
        };
        (Arc::clone(slot), found)
    }

    /// Nobody writes at the piece's place any more, unless others do.
    pub(in crate::agent::recovery) fn release_slot(&self, piece: u32, slot: Arc<PieceSlot>) {
        let mut state = self.state();
        drop(slot);
        if state.piece_slots.get(&piece).is_some_and(|slot| Arc::strong_count(slot) == 1) {
            state.piece_slots.remove(&piece);
        }
    }

    /// All bytes of a piece were written, or are about to be under its place's lock.
    pub(in crate::agent::recovery) fn record_received(&self, piece: u32, hasher: Option<PieceHasher>, from: PeerId) -> ReceivedPiece {
        let mut state = self.state();
        let arrived = match (&mut state.hash_chain, hasher) {
            (Some(list), Some(hasher)) if hasher.has_start_state_of(list.verifier.hash_chain()) => {
                if list.verifier.record(hasher) { ReceivedPiece::Valid } else { ReceivedPiece::Invalid }
            }
            // It began before there was this list.
            _ => {
                state.unverified.insert(piece, Some(from));
                ReceivedPiece::Unverified
            }
        };
        if arrived == ReceivedPiece::Valid {
            state.verified_senders.insert(from);
        }
        if arrived != ReceivedPiece::Invalid {
            *state.bytes_by_peer.entry(from).or_default() += self.layout.piece_length(piece as usize);
        }
        drop(state);
        if arrived == ReceivedPiece::Valid {
            self.notify_followers();
        }
        arrived
    }

    /// Whether the piece is here, right or still to be compared with a list.
    pub(in crate::agent::recovery) fn is_present(&self, piece: u32) -> bool {
        self.state().is_present(piece)
    }

    /// A hasher of these bytes, the whole piece, that tells something about the list in use: the one that there is, or another one.
    pub(in crate::agent::recovery) fn current_hasher(&self, piece: u32, hasher: Option<PieceHasher>, bytes: &[u8]) -> Option<PieceHasher> {
        let (chain, _) = self.hash_chain()?;
        let known = hasher.filter(|hasher| hasher.has_start_state_of(&chain));
        Some(known.unwrap_or_else(|| {
            let mut hasher = chain.hasher(piece as usize);
            hasher.update(bytes);
            hasher
        }))
    }

    /// Whether what was hashed fits the list in use.
    pub(in crate::agent::recovery) fn matches_chain(&self, hasher: Option<&PieceHasher>) -> bool {
        let state = self.state();
        let list = state.hash_chain.as_ref();
        list.zip(hasher).is_some_and(|(list, hasher)| hasher.clone().is_valid_for(list.verifier.hash_chain()))
    }

    /// Compares a piece that is here with the list.
    ///
    /// # Errors
    /// As the store says.
    pub(in crate::agent::recovery) async fn verify_stored(&self, piece: u32) -> Result<StoredPiece, StoreError> {
        let Some((chain, _)) = self.hash_chain() else { return Ok(StoredPiece::ChainReplaced) };
        let mut hasher = chain.hasher(piece as usize);
        let slot = self.acquire_slot(piece).0;
        let guard = slot.lock().await;
        self.hash_stored(piece, &mut hasher).await?;
        let checked = self.record_stored(piece, &chain, hasher);
        // Only now: what was read has to be what is judged.
        drop(guard);
        self.release_slot(piece, slot);
        if matches!(checked, StoredPiece::Valid(_)) {
            self.notify_followers();
        }
        Ok(checked)
    }

    /// Hashes what is written of a piece. Its place has to be held meanwhile.
    async fn hash_stored(&self, piece: u32, hasher: &mut PieceHasher) -> Result<(), StoreError> {
        let (mut at, end) = self.bounds(piece);
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(READ_BYTES).min(READ_BYTES);
            let bytes = self.staged.read_at(at, most).await?;
            if bytes.is_empty() {
                break;
            }
            hasher.update(&bytes);
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// What is known to be wrong, and whose it is, stays marked until it is known whether the list is wrong instead.
    fn record_stored(&self, piece: u32, chain: &Arc<HashChain>, hasher: PieceHasher) -> StoredPiece {
        let mut state = self.state();
        let DownloadState { hash_chain: Some(list), unverified: unchecked, verified_senders: proven, .. } = &mut *state
        else {
            return StoredPiece::ChainReplaced;
        };
        if !Arc::ptr_eq(list.verifier.hash_chain(), chain) {
            return StoredPiece::ChainReplaced;
        }
        if list.verifier.record(hasher) {
            let from = unchecked.remove(&piece).flatten();
            proven.extend(from);
            return StoredPiece::Valid(from);
        }
        match unchecked.get(&piece).copied().flatten() {
            Some(from) => StoredPiece::Invalid(Some(from)),
            None => {
                unchecked.remove(&piece);
                StoredPiece::Invalid(None)
            }
        }
    }

    /// A piece that was not compared, or does not fit, is not here any more. False where it was not among those.
    pub(in crate::agent::recovery) fn discard(&self, piece: u32) -> bool {
        let mut state = self.state();
        let Some(from) = state.unverified.remove(&piece) else { return false };
        if let Some(share) = from.and_then(|from| state.bytes_by_peer.get_mut(&from)) {
            *share = share.saturating_sub(self.layout.piece_length(piece as usize));
        }
        true
    }

    /// Where a piece begins and ends.
    pub(in crate::agent::recovery) fn bounds(&self, piece: u32) -> (u64, u64) {
        let begin = self.layout.offset(piece as usize);
        (begin, begin + self.layout.piece_length(piece as usize))
    }

    /// The proof, when all of it is here and fits.
    pub(in crate::agent::recovery) fn proof(&self) -> Option<BlobProof> {
        let state = self.state();
        let proof = state.hash_chain.as_ref()?.verifier.proof()?;
        state.unverified.is_empty().then_some(proof)
    }

    /// Whether a piece that this peer sent fitted.
    pub(in crate::agent::recovery) fn has_valid_piece_from(&self, peer: PeerId) -> bool {
        self.state().verified_senders.contains(&peer)
    }

    /// What came, from whom.
    pub(in crate::agent::recovery) fn bytes_by_peer(&self) -> BTreeMap<PeerId, u64> {
        self.state().bytes_by_peer.clone()
    }

    /// Nothing of it is served any more.
    pub(in crate::agent::recovery) fn close(&self) {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn notify_followers(&self) {
        if let Some(changes) = &*self.changes.lock().unwrap_or_else(PoisonError::into_inner) {
            changes.send_modify(|changes| *changes += 1);
        }
    }

    fn state(&self) -> MutexGuard<'_, DownloadState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that are read at a time to be checked.
const READ_BYTES: usize = 512 << 10;

/// An incoming blob that has a list.
pub(in crate::agent::recovery) struct ServedDownload {
    pub(in crate::agent::recovery) download: Arc<BlobDownload>,
    pub(in crate::agent::recovery) chain: Arc<HashChain>,
}

#[async_trait]
impl PartialBlob for ServedDownload {
    fn hash_chain(&self) -> Arc<HashChain> {
        Arc::clone(&self.chain)
    }

    fn piece_map(&self) -> Bits {
        let state = self.download.state();
        let pieces = self.download.layout.piece_count();
        let mut held = Bits::none_of(pieces);
        if let Some(list) = &state.hash_chain {
            (0..pieces).filter(|piece| list.verifier.has_piece(*piece)).for_each(|piece| held.set(piece));
        }
        held
    }

    fn changes(&self) -> watch::Receiver<u64> {
        let changes = self.download.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.as_ref().map_or_else(|| watch::channel(0).1, watch::Sender::subscribe)
    }

    async fn read_at(&self, offset: u64, most: usize) -> Result<Bytes, StoreError> {
        self.download.staged.read_at(offset, most).await
    }
}
