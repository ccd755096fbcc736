//! One blob on its way: which of its pieces are here, and which of them are known to be right.
//!
//! Whatever is served, or counts towards the proof, fits the list of states. How pieces are written so that this stays true is [`super::sink`]'s.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::early::{Early, Trial};
use crate::decide::pieces::AskId;
use crate::model::{Bits, PeerId};
use crate::oci::{Chain, Cut, Descriptor, PieceHasher, Proving, State as ChainState, Verified};
use crate::ports::{Partial, Staged, StoreError};

/// A blob that is being fetched.
pub(super) struct Incoming {
    blob: Descriptor,
    cut: Cut,
    staged: Arc<dyn Staged>,
    state: Mutex<State>,
    /// Taken away when nothing is to be served of it any more.
    changes: Mutex<Option<watch::Sender<u64>>>,
}

#[derive(Default)]
struct State {
    list: Option<List>,
    /// What there is of lists before there is one.
    early: Early,
    /// Written, and not compared with a list yet; who sent it, unless a process before this one wrote it.
    unchecked: BTreeMap<u32, Option<PeerId>>,
    /// Pieces that are being written, each by one task.
    places: HashMap<u32, Arc<Place>>,
    /// What came, from whom.
    from: BTreeMap<PeerId, u64>,
    /// Of whom a piece fitted.
    proven: BTreeSet<PeerId>,
}

impl State {
    fn has(&self, piece: u32) -> bool {
        self.list.as_ref().is_some_and(|list| list.proving.has(piece as usize))
    }

    fn is_here(&self, piece: u32) -> bool {
        self.has(piece) || self.unchecked.contains_key(&piece)
    }
}

struct List {
    proving: Proving,
    /// Whose word it is; nobody's where there is nothing to be said, because the blob is one piece.
    author: Option<PeerId>,
}

/// The right to write one piece, for one task at a time.
pub(super) type Place = tokio::sync::Mutex<LastWriter>;

/// Which ask wrote there last, of those that have the place now.
pub(super) type LastWriter = Option<AskId>;

/// What is at the place of a piece whose bytes begin to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing, and nobody else writes there.
    Free,
    /// Somebody else writes there.
    Taken,
    /// The piece, right or not compared yet: it must not be written over.
    Here,
}

/// What became of a piece whose bytes are all here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrived {
    /// It fits.
    Fits,
    /// There is no list yet to compare it with.
    Unchecked,
    /// It does not fit.
    Unfit,
}

/// What a piece that was here already turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checked {
    /// It fits; who sent it, if that is known.
    Fits(Option<PeerId>),
    /// It does not fit; the same.
    Unfit(Option<PeerId>),
    /// There is another list by now, or none.
    Again,
}

impl Incoming {
    pub(super) fn new(blob: Descriptor, staged: Arc<dyn Staged>) -> Self {
        let cut = Cut::usual(blob.size);
        let left = staged.left().into_iter().flat_map(|range| cut.within(range));
        let unchecked = left.filter_map(|piece| Some((u32::try_from(piece).ok()?, None))).collect();
        let mut state = State { unchecked, ..State::default() };
        if cut.pieces() == 1
            && let Ok(chain) = Chain::claimed(blob.digest, cut, Vec::new())
        {
            state.list = Some(List { proving: Proving::new(Arc::new(chain)), author: None });
        }
        Self { blob, cut, staged, state: Mutex::new(state), changes: Mutex::new(Some(watch::Sender::new(0))) }
    }

    pub(super) fn blob(&self) -> &Descriptor {
        &self.blob
    }

    pub(super) fn cut(&self) -> Cut {
        self.cut
    }

    pub(super) fn staged(&self) -> &Arc<dyn Staged> {
        &self.staged
    }

    /// The list in use, and whose it is.
    pub(super) fn list(&self) -> Option<(Arc<Chain>, Option<PeerId>)> {
        self.state().list.as_ref().map(|list| (Arc::clone(list.proving.chain()), list.author))
    }

    /// Checks by this list from now on. Everything that is here has to be checked by it.
    pub(super) fn adopt(&self, chain: Arc<Chain>, author: PeerId) {
        let mut state = self.state();
        if let Some(List { proving, .. }) = &state.list {
            let fitted = (0..self.cut.pieces()).filter(|piece| proving.has(*piece));
            let fitted: Vec<_> = fitted.filter_map(|piece| Some((u32::try_from(piece).ok()?, None))).collect();
            state.unchecked.extend(fitted);
        }
        state.list = Some(List { proving: Proving::new(chain), author: Some(author) });
        state.early = Early::default();
    }

    /// The next states of a list that a peer makes.
    pub(super) fn hears(&self, author: PeerId, states: &[ChainState]) {
        let mut state = self.state();
        if state.list.is_none() {
            state.early.hears(author, self.cut, states);
        }
    }

    /// Whether a list that is being made got on, while there is none; see [`Early::gets_on`].
    pub(super) fn gets_on(&self, listing: &HashMap<PeerId, Instant>, now: Instant) -> bool {
        self.state().early.gets_on(listing, now)
    }

    /// A peer's list will not come.
    pub(super) fn hears_no_more(&self, author: PeerId) {
        self.state().early.forget(author);
    }

    /// A piece that a list can tell of that is being made. `is_alone` where nobody but its sender has the blob.
    pub(super) fn next_trial(&self, is_alone: bool) -> Option<Trial> {
        let state = self.state();
        let unchecked = state.unchecked.iter().filter_map(|(piece, from)| Some((*piece, (*from)?)));
        state.early.next(unchecked, is_alone)
    }

    /// Whether it fits what there is of the list.
    ///
    /// # Errors
    /// As the store says.
    pub(super) async fn try_early(&self, trial: Trial) -> Result<bool, StoreError> {
        let Some(mut hasher) = self.state().early.hasher(trial) else { return Ok(false) };
        let place = self.enter(trial.piece).0;
        let alone = place.lock().await;
        let read = self.hash(trial.piece, &mut hasher).await;
        drop(alone);
        self.leave(trial.piece, place);
        read.map(|()| self.state().early.judge(trial, &hasher))
    }

    /// Pieces that are here and were not compared with the list.
    pub(super) fn unchecked(&self) -> Vec<u32> {
        self.state().unchecked.keys().copied().collect()
    }

    /// Whether the piece is here and fits.
    pub(super) fn has(&self, piece: u32) -> bool {
        self.state().has(piece)
    }

    /// For the bytes of a piece that begins to come, if there is a list.
    pub(super) fn hasher(&self, piece: u32) -> Option<PieceHasher> {
        self.state().list.as_ref().map(|list| list.proving.chain().hasher(piece as usize))
    }

    /// The place of a piece whose bytes begin to come, and what is there. Both at once: whoever finds it free has it before the piece can be here by
    /// another.
    pub(super) fn enter(&self, piece: u32) -> (Arc<Place>, Found) {
        let mut state = self.state();
        let is_here = state.is_here(piece);
        let place = state.places.entry(piece).or_default();
        let found = match (is_here, Arc::strong_count(place)) {
            (true, _) => Found::Here,
            (false, 1) => Found::Free,
            (false, _) => Found::Taken,
        };
        (Arc::clone(place), found)
    }

    /// Nobody writes at the piece's place any more, unless others do.
    pub(super) fn leave(&self, piece: u32, place: Arc<Place>) {
        let mut state = self.state();
        drop(place);
        if state.places.get(&piece).is_some_and(|place| Arc::strong_count(place) == 1) {
            state.places.remove(&piece);
        }
    }

    /// All bytes of a piece were written, or are about to be under its place's lock.
    pub(super) fn arrives(&self, piece: u32, hasher: Option<PieceHasher>, from: PeerId) -> Arrived {
        let mut state = self.state();
        let arrived = match (&mut state.list, hasher) {
            (Some(list), Some(hasher)) if hasher.began_by(list.proving.chain()) => {
                if list.proving.take(hasher) {
                    Arrived::Fits
                } else {
                    Arrived::Unfit
                }
            }
            // It began before there was this list.
            _ => {
                state.unchecked.insert(piece, Some(from));
                Arrived::Unchecked
            }
        };
        if arrived == Arrived::Fits {
            state.proven.insert(from);
        }
        if arrived != Arrived::Unfit {
            *state.from.entry(from).or_default() += self.cut.length(piece as usize);
        }
        drop(state);
        if arrived == Arrived::Fits {
            self.tell();
        }
        arrived
    }

    /// Whether the piece is here, right or still to be compared with a list.
    pub(super) fn is_here(&self, piece: u32) -> bool {
        self.state().is_here(piece)
    }

    /// A hasher of these bytes, the whole piece, that tells something about the list in use: the one that there is, or another one.
    pub(super) fn hashed(&self, piece: u32, hasher: Option<PieceHasher>, bytes: &[u8]) -> Option<PieceHasher> {
        let (chain, _) = self.list()?;
        let known = hasher.filter(|hasher| hasher.began_by(&chain));
        Some(known.unwrap_or_else(|| {
            let mut hasher = chain.hasher(piece as usize);
            hasher.update(bytes);
            hasher
        }))
    }

    /// Whether what was hashed fits the list in use.
    pub(super) fn fits(&self, hasher: Option<&PieceHasher>) -> bool {
        let state = self.state();
        let list = state.list.as_ref();
        list.zip(hasher).is_some_and(|(list, hasher)| hasher.clone().fits(list.proving.chain()))
    }

    /// Compares a piece that is here with the list.
    ///
    /// # Errors
    /// As the store says.
    pub(super) async fn check(&self, piece: u32) -> Result<Checked, StoreError> {
        let Some((chain, _)) = self.list() else { return Ok(Checked::Again) };
        let mut hasher = chain.hasher(piece as usize);
        let place = self.enter(piece).0;
        let alone = place.lock().await;
        self.hash(piece, &mut hasher).await?;
        let checked = self.checked(piece, &chain, hasher);
        // Only now: what was read has to be what is judged.
        drop(alone);
        self.leave(piece, place);
        if matches!(checked, Checked::Fits(_)) {
            self.tell();
        }
        Ok(checked)
    }

    /// Hashes what is written of a piece. Its place has to be held meanwhile.
    async fn hash(&self, piece: u32, hasher: &mut PieceHasher) -> Result<(), StoreError> {
        let (mut at, end) = self.bounds(piece);
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(READ).min(READ);
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
    fn checked(&self, piece: u32, chain: &Arc<Chain>, hasher: PieceHasher) -> Checked {
        let mut state = self.state();
        let State { list: Some(list), unchecked, proven, .. } = &mut *state else { return Checked::Again };
        if !Arc::ptr_eq(list.proving.chain(), chain) {
            return Checked::Again;
        }
        if list.proving.take(hasher) {
            let from = unchecked.remove(&piece).flatten();
            proven.extend(from);
            return Checked::Fits(from);
        }
        match unchecked.get(&piece).copied().flatten() {
            Some(from) => Checked::Unfit(Some(from)),
            None => {
                unchecked.remove(&piece);
                Checked::Unfit(None)
            }
        }
    }

    /// A piece that was not compared, or does not fit, is not here any more. False where it was not among those.
    pub(super) fn discard(&self, piece: u32) -> bool {
        let mut state = self.state();
        let Some(from) = state.unchecked.remove(&piece) else { return false };
        if let Some(share) = from.and_then(|from| state.from.get_mut(&from)) {
            *share = share.saturating_sub(self.cut.length(piece as usize));
        }
        true
    }

    /// Where a piece begins and ends.
    pub(super) fn bounds(&self, piece: u32) -> (u64, u64) {
        let begin = self.cut.offset(piece as usize);
        (begin, begin + self.cut.length(piece as usize))
    }

    /// The proof, when all of it is here and fits.
    pub(super) fn verified(&self) -> Option<Verified> {
        let state = self.state();
        let proof = state.list.as_ref()?.proving.verified()?;
        state.unchecked.is_empty().then_some(proof)
    }

    /// Whether a piece that this peer sent fitted.
    pub(super) fn is_proven(&self, peer: PeerId) -> bool {
        self.state().proven.contains(&peer)
    }

    /// What came, from whom.
    pub(super) fn from(&self) -> BTreeMap<PeerId, u64> {
        self.state().from.clone()
    }

    /// Nothing of it is served any more.
    pub(super) fn close(&self) {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn tell(&self) {
        if let Some(changes) = &*self.changes.lock().unwrap_or_else(PoisonError::into_inner) {
            changes.send_modify(|changes| *changes += 1);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that are read at a time to be checked.
const READ: usize = 512 << 10;

/// An incoming blob that has a list.
pub(super) struct Served {
    pub(super) incoming: Arc<Incoming>,
    pub(super) chain: Arc<Chain>,
}

#[async_trait]
impl Partial for Served {
    fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.chain)
    }

    fn held(&self) -> Bits {
        let state = self.incoming.state();
        let pieces = self.incoming.cut.pieces();
        let mut held = Bits::none_of(pieces);
        if let Some(list) = &state.list {
            (0..pieces).filter(|piece| list.proving.has(*piece)).for_each(|piece| held.set(piece));
        }
        held
    }

    fn changes(&self) -> watch::Receiver<u64> {
        let changes = self.incoming.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.as_ref().map_or_else(|| watch::channel(0).1, watch::Sender::subscribe)
    }

    async fn read_at(&self, offset: u64, most: usize) -> Result<Bytes, StoreError> {
        self.incoming.staged.read_at(offset, most).await
    }
}
