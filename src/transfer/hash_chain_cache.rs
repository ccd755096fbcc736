//! The hash chains of blobs in the store: computed once, by hashing the blob on the first request,
//! and cached.
//!
//! Only requests compute a chain: each hashes a slice while no other does, and hashing stops with
//! the last request. Not here: the chains of partial blobs, which are fetched with them.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hashlink::LruCache;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{OwnedMutexGuard, Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::oci::{Digest, HashChain, HashChainBuilder, HashState, PieceLayout};
use crate::ports::{BlobReader, Blobs, StoreError};

/// Slices that are hashed at a time: half the cores of a small node, for a second or two per
/// gigabyte.
const MAX_HASHING: usize = 2;

/// Bytes of a blob in one slice: some milliseconds of hashing.
const SLICE_BYTES: usize = 2 << 20;

/// Chains that are computed at a time. Each costs 32 bytes a piece and an open file.
const MAX_PENDING: usize = 64;

/// Bytes of cached chains: a thousand blobs of 512 pieces, more than a node has. The least recently
/// used chains are evicted.
const MAX_CACHED_BYTES: usize = 16 << 20;

/// Bytes of a cached chain beside its states.
const ENTRY_OVERHEAD: usize = 256;

pub(super) struct HashChainCache {
    table: Mutex<CacheTable>,
    hashing_permits: Arc<Semaphore>,
    /// For the store to open the blob, and to read each slice.
    read_timeout: Duration,
}

struct CacheTable {
    cached: LruCache<Digest, Arc<HashChain>>,
    bytes: usize,
    pending: HashMap<Digest, Weak<PendingHashChain>>,
}

pub(super) enum HashChainLookup {
    /// The whole chain.
    Cached(Arc<HashChain>),
    /// [`HashChainCache::next_states`] returns the states.
    Pending(Arc<PendingHashChain>),
}

/// A chain that is being computed, as long as a request holds this.
pub(super) struct PendingHashChain {
    digest: Digest,
    layout: PieceLayout,
    work: Arc<tokio::sync::Mutex<HashingProgress>>,
    computed: watch::Sender<ComputedStates>,
}

struct HashingProgress {
    reader: Option<Box<dyn BlobReader>>,
    /// `None` when the blob is hashed.
    builder: Option<HashChainBuilder>,
    offset: u64,
}

#[derive(Default)]
struct ComputedStates {
    states: Vec<HashState>,
    is_end: bool,
    /// The bytes do not match the digest.
    is_corrupt: bool,
}

/// States after the ones that a request already has.
pub(super) struct StateBatch {
    pub(super) states: Vec<HashState>,
    /// No states follow.
    pub(super) is_end: bool,
}

impl HashChainCache {
    pub(super) fn new(read_timeout: Duration) -> Self {
        let table = CacheTable { cached: LruCache::new_unbounded(), bytes: 0, pending: HashMap::new() };
        Self { table: Mutex::new(table), hashing_permits: Arc::new(Semaphore::new(MAX_HASHING)), read_timeout }
    }

    /// Caches the chain of a verified blob.
    pub(super) fn insert(&self, chain: Arc<HashChain>) {
        self.lock().insert(chain);
    }

    /// The cached or pending chain of a blob in the store; `None` when too many chains are pending.
    pub(super) fn get_or_start(&self, digest: Digest, layout: PieceLayout) -> Option<HashChainLookup> {
        if let Ok(empty) = HashChain::unverified(digest, layout, Vec::new()) {
            return Some(HashChainLookup::Cached(Arc::new(empty)));
        }
        let mut table = self.lock();
        if let Some(chain) = table.cached.get(&digest).filter(|chain| chain.layout() == layout) {
            return Some(HashChainLookup::Cached(Arc::clone(chain)));
        }
        if let Some(pending) =
            table.pending.get(&digest).and_then(Weak::upgrade).filter(|pending| pending.layout == layout)
        {
            return Some(HashChainLookup::Pending(pending));
        }
        table.pending.retain(|_, pending| pending.strong_count() > 0);
        if table.pending.len() >= MAX_PENDING {
            return None;
        }
        let work = HashingProgress { reader: None, builder: Some(HashChainBuilder::new(layout)), offset: 0 };
        let work = Arc::new(tokio::sync::Mutex::new(work));
        let pending = Arc::new(PendingHashChain { digest, layout, work, computed: watch::Sender::default() });
        table.pending.insert(digest, Arc::downgrade(&pending));
        Some(HashChainLookup::Pending(pending))
    }

    /// The states after the first `had`; hashes slices while there are none.
    ///
    /// # Errors
    /// [`StoreError`], also when the blob's bytes do not match its digest. Not all states were
    /// returned before that error.
    pub(super) async fn next_states(
        &self,
        pending: &PendingHashChain,
        known: usize,
        store: &dyn Blobs,
    ) -> Result<StateBatch, StoreError> {
        let mut computed = pending.computed.subscribe();
        loop {
            if let Some(batch) = states_after(&computed.borrow_and_update(), pending.digest, known)? {
                return Ok(batch);
            }
            tokio::select! {
                _ = computed.changed() => {}
                work = pending.work.clone().lock_owned() => self.hash_slice(pending, work, store).await?,
            }
        }
    }

    async fn hash_slice(
        &self,
        pending: &PendingHashChain,
        mut work: OwnedMutexGuard<HashingProgress>,
        store: &dyn Blobs,
    ) -> Result<(), StoreError> {
        let permit = self.hashing_permits.clone().acquire_owned().await;
        if work.builder.is_none() {
            return Ok(());
        }
        if work.offset < pending.layout.size() {
            let read = timeout(self.read_timeout, work.read(pending.digest, store)).await;
            let bytes = read.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into())))?;
            work.offset += bytes.len() as u64;
            // A request that is dropped during the hashing leaves the work to the next.
            let hashed = spawn_blocking(move || {
                let _permit = permit;
                work.builder.iter_mut().for_each(|builder| builder.update(&bytes));
                work
            });
            work = hashed.await.map_err(|error| StoreError::Other(error.to_string()))?;
        }
        if work.offset == pending.layout.size() {
            self.finish(pending, work.builder.take());
        } else if let Some(builder) = &work.builder {
            // The last state is held back: no chain is complete before the blob is verified.
            let known = builder.states().len().min(pending.layout.piece_count() - 2);
            publish(pending, |computed| {
                computed.states.extend_from_slice(&builder.states()[computed.states.len()..known])
            });
        }
        Ok(())
    }

    fn finish(&self, pending: &PendingHashChain, builder: Option<HashChainBuilder>) {
        match builder.and_then(HashChainBuilder::finish).filter(|chain| chain.digest() == pending.digest) {
            Some(chain) => {
                publish(pending, |computed| {
                    computed.states.extend_from_slice(&chain.states()[computed.states.len()..]);
                    computed.is_end = true;
                });
                self.insert(Arc::new(chain));
            }
            None => {
                let (digest, size) = (pending.digest, pending.layout.size());
                tracing::warn!(%digest, size, "a blob in the content store does not match its digest");
                publish(pending, |computed| computed.is_corrupt = true);
            }
        }
    }

    /// The number of chains that requests wait for.
    #[cfg(test)]
    pub(super) fn pending(&self) -> usize {
        self.lock().pending.values().filter(|pending| pending.strong_count() > 0).count()
    }

    fn lock(&self) -> MutexGuard<'_, CacheTable> {
        self.table.lock()
    }
}

fn states_after(computed: &ComputedStates, digest: Digest, known: usize) -> Result<Option<StateBatch>, StoreError> {
    if computed.is_corrupt {
        return Err(StoreError::Other(format!("the bytes of {digest} do not match the digest")));
    }
    let states = &computed.states[known..];
    Ok((computed.is_end || !states.is_empty()).then(|| StateBatch { states: states.to_vec(), is_end: computed.is_end }))
}

fn publish(pending: &PendingHashChain, change: impl FnOnce(&mut ComputedStates)) {
    pending.computed.send_modify(change);
}

impl HashingProgress {
    /// Reads the next slice, never an empty one.
    async fn read(&mut self, digest: Digest, store: &dyn Blobs) -> Result<bytes::Bytes, StoreError> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            None => self.reader.insert(store.open(digest).await?),
        };
        let bytes = reader.read_at(self.offset, SLICE_BYTES).await?;
        if bytes.is_empty() {
            return Err(StoreError::Other(format!("{digest} ends at {}", self.offset)));
        }
        Ok(bytes)
    }
}

impl CacheTable {
    fn insert(&mut self, chain: Arc<HashChain>) {
        self.bytes += cost(&chain);
        let replaced = self.cached.insert(chain.digest(), chain);
        self.bytes -= replaced.map_or(0, |chain| cost(&chain));
        while self.bytes > MAX_CACHED_BYTES
            && let Some((_, oldest)) = self.cached.remove_lru()
        {
            self.bytes -= cost(&oldest);
        }
    }
}

fn cost(chain: &HashChain) -> usize {
    ENTRY_OVERHEAD + size_of_val(chain.states())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(number: usize, pieces: usize) -> Arc<HashChain> {
        let digest = Digest::of(&number.to_be_bytes());
        let states = vec![HashState::INITIAL; pieces - 1];
        Arc::new(HashChain::unverified(digest, PieceLayout::for_size((pieces as u64) << 18), states).unwrap())
    }

    #[test]
    fn the_least_recently_used_hash_chains_are_evicted() {
        let chains = HashChainCache::new(Duration::ZERO);
        let chain_cost = cost(&chain(0, 256));
        let capacity = MAX_CACHED_BYTES / chain_cost;
        (0..capacity).for_each(|number| chains.insert(chain(number, 256)));
        let is_cached = |number| {
            let chain = chain(number, 256);
            matches!(chains.get_or_start(chain.digest(), chain.layout()), Some(HashChainLookup::Cached(_)))
        };
        assert!(is_cached(0), "chain 0 is cached");
        chains.insert(chain(capacity, 256));
        assert_eq!((is_cached(0), is_cached(1), is_cached(2), is_cached(capacity)), (true, false, true, true));
        // The same chain again takes no more room.
        chains.insert(chain(capacity, 256));
        assert_eq!((is_cached(2), chains.lock().bytes), (true, capacity * chain_cost));
    }

    #[test]
    fn hash_chains_that_are_computed_at_once_are_bounded() {
        let chains = HashChainCache::new(Duration::ZERO);
        let start = |number| chains.get_or_start(chain(number, 2).digest(), PieceLayout::for_size(2 << 18));
        let mut pending: Vec<_> = (0..MAX_PENDING).map(|number| start(number).unwrap()).collect();
        assert!(start(MAX_PENDING).is_none() && start(0).is_some(), "a pending chain needs no further room");
        pending.pop();
        assert!(start(MAX_PENDING).is_some());
    }
}
