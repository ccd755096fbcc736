//! One blob in flight: its pieces that are here, and the pieces that are verified.
//!
//! Every piece that is served, or that counts towards the proof, matches the hash chain. The writes
//! that guarantee this are in `download_sink` of [`crate::agent::recovery::swarm`].

mod verification;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use super::chain_prefixes::ChainPrefixes;
use crate::decide::piece_picker::PieceRequestId;
use crate::model::{Bits, PeerId};
use crate::oci::{BlobProof, Descriptor, HashChain, PieceHasher, PieceLayout, PieceVerifier};
use crate::ports::{PartialBlob, StagedBlob, StoreError};

/// A blob that is being fetched.
pub(in crate::agent::recovery) struct BlobDownload {
    blob: Descriptor,
    layout: PieceLayout,
    staged: Arc<dyn StagedBlob>,
    state: Mutex<DownloadState>,
    /// Dropped when the download ends, so that followers see the end.
    changes: Mutex<Option<watch::Sender<u64>>>,
}

#[derive(Default)]
struct DownloadState {
    hash_chain: Option<AuthoredChain>,
    /// Prefixes of hash chains, until a whole chain is here.
    prefixes: ChainPrefixes,
    /// Written pieces that are not verified, with their senders. The sender is unknown for pieces
    /// that an earlier process wrote, and for pieces that a replaced chain verified.
    unverified: BTreeMap<u32, Option<PeerId>>,
    /// Pieces that are being written, by one task at a time.
    piece_slots: HashMap<u32, Arc<PieceSlot>>,
    /// Accepted bytes, by sender.
    bytes_by_peer: BTreeMap<PeerId, u64>,
    /// Senders of a piece that matched the hash chain.
    verified_senders: BTreeSet<PeerId>,
}

impl DownloadState {
    fn is_verified(&self, piece: u32) -> bool {
        self.hash_chain.as_ref().is_some_and(|authored_chain| authored_chain.verifier.has_piece(piece as usize))
    }

    fn is_present(&self, piece: u32) -> bool {
        self.is_verified(piece) || self.unverified.contains_key(&piece)
    }
}

struct AuthoredChain {
    verifier: PieceVerifier,
    /// The peer that sent the chain. `None` for a blob of one piece: its chain is empty.
    author: Option<PeerId>,
}

/// The right to write one piece, for one task at a time.
pub(in crate::agent::recovery) type PieceSlot = tokio::sync::Mutex<LastWriter>;

/// The request that wrote last to the piece, among the tasks that share the slot now.
pub(in crate::agent::recovery) type LastWriter = Option<PieceRequestId>;

/// State of a piece when its bytes begin to arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent::recovery) enum SlotState {
    /// The piece is absent, and no other task writes the piece.
    Free,
    /// Another task writes the piece.
    Taken,
    /// The piece is here, verified or not, and must not be overwritten.
    Present,
}

/// Result of a piece whose bytes have all arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent::recovery) enum ReceivedPiece {
    /// The piece matches the hash chain.
    Valid,
    /// No hash chain has verified the piece yet.
    Unverified,
    /// The piece does not match the hash chain.
    Invalid,
}

/// Result of the verification of a stored piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent::recovery) enum StoredPiece {
    /// The piece matches. Contains the sender, if known.
    Valid(Option<PeerId>),
    /// The piece does not match. Contains the sender, if known.
    Invalid(Option<PeerId>),
    /// The chain was replaced meanwhile, or no chain is here.
    ChainReplaced,
}

impl BlobDownload {
    pub(in crate::agent::recovery) fn new(blob: Descriptor, staged: Arc<dyn StagedBlob>) -> Self {
        let layout = PieceLayout::for_size(blob.size);
        let resumed = staged.resumed_ranges().into_iter().flat_map(|range| layout.pieces_within(range));
        let unverified = resumed.filter_map(|piece| Some((u32::try_from(piece).ok()?, None))).collect();
        let mut state = DownloadState { unverified, ..DownloadState::default() };
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

    /// The hash chain in use and its author.
    pub(in crate::agent::recovery) fn hash_chain(&self) -> Option<(Arc<HashChain>, Option<PeerId>)> {
        self.state()
            .hash_chain
            .as_ref()
            .map(|authored_chain| (Arc::clone(authored_chain.verifier.hash_chain()), authored_chain.author))
    }

    /// Replaces the hash chain. All present pieces become unverified.
    pub(in crate::agent::recovery) fn set_hash_chain(&self, chain: Arc<HashChain>, author: PeerId) {
        let mut state = self.state();
        if let Some(AuthoredChain { verifier, .. }) = &state.hash_chain {
            let verified = (0..self.layout.piece_count()).filter(|piece| verifier.has_piece(*piece));
            let verified: Vec<_> = verified.filter_map(|piece| Some((u32::try_from(piece).ok()?, None))).collect();
            state.unverified.extend(verified);
        }
        state.hash_chain = Some(AuthoredChain { verifier: PieceVerifier::new(chain), author: Some(author) });
        state.prefixes = ChainPrefixes::default();
    }

    /// Present pieces that are not verified.
    pub(in crate::agent::recovery) fn unverified(&self) -> Vec<u32> {
        self.state().unverified.keys().copied().collect()
    }

    /// Whether the piece is here and matches the hash chain.
    pub(in crate::agent::recovery) fn is_verified(&self, piece: u32) -> bool {
        self.state().is_verified(piece)
    }

    /// Takes the slot of a piece whose bytes begin to arrive, and returns the piece's state. One
    /// lock covers both: a task that finds the piece free has the slot before another task can
    /// complete the piece.
    pub(in crate::agent::recovery) fn acquire_slot(&self, piece: u32) -> (Arc<PieceSlot>, SlotState) {
        let mut state = self.state();
        let is_present = state.is_present(piece);
        let slot = state.piece_slots.entry(piece).or_default();
        let slot_state = match (is_present, Arc::strong_count(slot)) {
            (true, _) => SlotState::Present,
            (false, 1) => SlotState::Free,
            (false, _) => SlotState::Taken,
        };
        (Arc::clone(slot), slot_state)
    }

    /// Returns a slot. The slot ends with its last user.
    pub(in crate::agent::recovery) fn release_slot(&self, piece: u32, slot: Arc<PieceSlot>) {
        let mut state = self.state();
        drop(slot);
        if state.piece_slots.get(&piece).is_some_and(|slot| Arc::strong_count(slot) == 1) {
            state.piece_slots.remove(&piece);
        }
    }

    /// Records a piece whose bytes are all written. The caller holds the slot's lock.
    pub(in crate::agent::recovery) fn record_received(
        &self,
        piece: u32,
        hasher: Option<PieceHasher>,
        from: PeerId,
    ) -> ReceivedPiece {
        let mut state = self.state();
        let received =
            match (&mut state.hash_chain, hasher) {
                (Some(authored_chain), Some(hasher))
                    if hasher.has_start_state_of(authored_chain.verifier.hash_chain()) =>
                {
                    if authored_chain.verifier.record(hasher) { ReceivedPiece::Valid } else { ReceivedPiece::Invalid }
                }
                // The piece began before this chain was in use, or no chain is in use.
                _ => {
                    state.unverified.insert(piece, Some(from));
                    ReceivedPiece::Unverified
                }
            };
        if received == ReceivedPiece::Valid {
            state.verified_senders.insert(from);
        }
        if received != ReceivedPiece::Invalid {
            *state.bytes_by_peer.entry(from).or_default() += self.layout.piece_length(piece as usize);
        }
        drop(state);
        if received == ReceivedPiece::Valid {
            self.notify_followers();
        }
        received
    }

    /// Whether the piece is here, verified or not.
    pub(in crate::agent::recovery) fn is_present(&self, piece: u32) -> bool {
        self.state().is_present(piece)
    }

    /// Removes an unverified or invalid piece. False when the piece was not among these.
    pub(in crate::agent::recovery) fn discard(&self, piece: u32) -> bool {
        let mut state = self.state();
        let Some(from) = state.unverified.remove(&piece) else { return false };
        if let Some(share) = from.and_then(|from| state.bytes_by_peer.get_mut(&from)) {
            *share = share.saturating_sub(self.layout.piece_length(piece as usize));
        }
        true
    }

    /// The begin and the end of a piece, in bytes.
    pub(in crate::agent::recovery) fn bounds(&self, piece: u32) -> (u64, u64) {
        let begin = self.layout.offset(piece as usize);
        (begin, begin + self.layout.piece_length(piece as usize))
    }

    /// The proof, once every piece is here and matches.
    pub(in crate::agent::recovery) fn proof(&self) -> Option<BlobProof> {
        let state = self.state();
        let proof = state.hash_chain.as_ref()?.verifier.proof()?;
        state.unverified.is_empty().then_some(proof)
    }

    /// Whether a piece from this peer matched the hash chain.
    pub(in crate::agent::recovery) fn has_valid_piece_from(&self, peer: PeerId) -> bool {
        self.state().verified_senders.contains(&peer)
    }

    pub(in crate::agent::recovery) fn bytes_by_peer(&self) -> BTreeMap<PeerId, u64> {
        self.state().bytes_by_peer.clone()
    }

    /// Ends the download for followers. Nothing more is served from the download.
    pub(in crate::agent::recovery) fn close(&self) {
        self.changes.lock().take();
    }

    fn notify_followers(&self) {
        if let Some(changes) = &*self.changes.lock() {
            changes.send_modify(|changes| *changes += 1);
        }
    }

    fn state(&self) -> MutexGuard<'_, DownloadState> {
        self.state.lock()
    }
}

/// A download with a hash chain, as peers are served from it.
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
        let mut piece_map = Bits::none_of(pieces);
        if let Some(authored_chain) = &state.hash_chain {
            (0..pieces)
                .filter(|piece| authored_chain.verifier.has_piece(*piece))
                .for_each(|piece| piece_map.set(piece));
        }
        piece_map
    }

    fn changes(&self) -> watch::Receiver<u64> {
        let changes = self.download.changes.lock();
        changes.as_ref().map_or_else(|| watch::channel(0).1, watch::Sender::subscribe)
    }

    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        self.download.staged.read_at(offset, limit).await
    }
}
