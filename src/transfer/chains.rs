//! The lists of states of blobs that are here: made once by hashing the blob when somebody asks for the first time, and kept.
//!
//! Nobody makes a list but those who wait for it: each takes a slice of the blob when no other does, and when all of them have left
//! nothing goes on. Not here: the lists of blobs that are being fetched, which came with them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::oci::{Chain, ChainBuilder, Cut, Digest, State};
use crate::ports::{BlobReader, ContentStore, StoreError};

/// Slices that are hashed at a time: half of a small node's cores, for a second or two a gigabyte.
const HASHING: usize = 2;

/// Bytes of a blob in one slice: some milliseconds of hashing, for which no asker waits alone.
const SLICE: usize = 2 << 20;

/// Lists that are being made at a time. Each costs 32 bytes a piece and an open file.
const MAX_MAKING: usize = 64;

/// Bytes of lists that are kept: of a thousand blobs of 512 pieces, more than a node has. Those that were not asked for the longest
/// make room.
const KEPT: usize = 16 << 20;

/// What one list costs beside its states.
const ENTRY: usize = 256;

/// Lists that are known, and that are being made.
pub(super) struct Chains {
    table: Mutex<Table>,
    hashing: Arc<Semaphore>,
    /// For the store to open the blob, and for each slice of it.
    patience: Duration,
}

#[derive(Default)]
struct Table {
    known: HashMap<Digest, Kept>,
    /// By when they were last asked for.
    order: BTreeMap<u64, Digest>,
    asked: u64,
    bytes: usize,
    making: HashMap<Digest, Weak<Making>>,
}

struct Kept {
    chain: Arc<Chain>,
    asked: u64,
}

/// What there is of a list.
pub(super) enum Listed {
    /// All of it.
    Known(Arc<Chain>),
    /// What [`Chains::more`] says.
    Making(Arc<Making>),
}

/// A list that is being made as long as this is held.
pub(super) struct Making {
    digest: Digest,
    cut: Cut,
    work: Arc<tokio::sync::Mutex<Work>>,
    made: watch::Sender<Made>,
}

struct Work {
    reader: Option<Box<dyn BlobReader>>,
    /// None when it is done.
    builder: Option<ChainBuilder>,
    at: u64,
}

#[derive(Default)]
struct Made {
    states: Vec<State>,
    is_end: bool,
    /// The bytes are not the blob's.
    is_wrong: bool,
}

/// States that follow those that were had.
pub(super) struct More {
    pub(super) states: Vec<State>,
    /// These are the last.
    pub(super) is_end: bool,
}

impl Chains {
    pub(super) fn new(patience: Duration) -> Self {
        Self { table: Mutex::default(), hashing: Arc::new(Semaphore::new(HASHING)), patience }
    }

    /// Keeps the list of a blob that was proved.
    pub(super) fn know(&self, chain: Arc<Chain>) {
        self.lock().keep(chain);
    }

    /// The list of a blob that is here, or the making of it; `None` when too many are being made.
    pub(super) fn of(&self, digest: Digest, cut: Cut) -> Option<Listed> {
        if let Ok(empty) = Chain::claimed(digest, cut, Vec::new()) {
            return Some(Listed::Known(Arc::new(empty)));
        }
        let mut table = self.lock();
        if let Some(chain) = table.find(digest).filter(|chain| chain.cut() == cut) {
            return Some(Listed::Known(chain));
        }
        if let Some(making) = table.making.get(&digest).and_then(Weak::upgrade).filter(|making| making.cut == cut) {
            return Some(Listed::Making(making));
        }
        table.making.retain(|_, making| making.strong_count() > 0);
        if table.making.len() >= MAX_MAKING {
            return None;
        }
        let work = Work { reader: None, builder: Some(ChainBuilder::new(cut)), at: 0 };
        let work = Arc::new(tokio::sync::Mutex::new(work));
        let making = Arc::new(Making { digest, cut, work, made: watch::Sender::default() });
        table.making.insert(digest, Arc::downgrade(&making));
        Some(Listed::Making(making))
    }

    /// What there is after so many states; makes some when there is nothing.
    ///
    /// # Errors
    /// [`StoreError`]; also when the blob's bytes are not what its digest says. Then not all states were given.
    pub(super) async fn more(&self, making: &Making, had: usize, store: &dyn ContentStore) -> Result<More, StoreError> {
        let mut made = making.made.subscribe();
        loop {
            if let Some(more) = more_of(&made.borrow_and_update(), making.digest, had)? {
                return Ok(more);
            }
            tokio::select! {
                _ = made.changed() => {}
                work = making.work.clone().lock_owned() => self.make(making, work, store).await?,
            }
        }
    }

    /// Takes in one slice.
    async fn make(
        &self,
        making: &Making,
        mut work: OwnedMutexGuard<Work>,
        store: &dyn ContentStore,
    ) -> Result<(), StoreError> {
        let hashing = self.hashing.clone().acquire_owned().await;
        if work.builder.is_none() {
            return Ok(());
        }
        if work.at < making.cut.size() {
            let read = timeout(self.patience, work.read(making.digest, store)).await;
            let bytes = read.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into())))?;
            work.at += bytes.len() as u64;
            // Who left while it is hashed leaves the work behind for the next.
            let hashed = spawn_blocking(move || {
                let _hashing = hashing;
                work.builder.iter_mut().for_each(|builder| builder.update(&bytes));
                work
            });
            work = hashed.await.map_err(|error| StoreError::Other(error.to_string()))?;
        }
        if work.at == making.cut.size() {
            self.end(making, work.builder.take());
        } else if let Some(builder) = &work.builder {
            // The last state is kept back: no list is whole before it is proved.
            let known = builder.states().len().min(making.cut.pieces() - 2);
            publish(making, |made| made.states.extend_from_slice(&builder.states()[made.states.len()..known]));
        }
        Ok(())
    }

    fn end(&self, making: &Making, builder: Option<ChainBuilder>) {
        match builder.and_then(ChainBuilder::finish).filter(|chain| chain.digest() == making.digest) {
            Some(chain) => {
                publish(making, |made| {
                    made.states.extend_from_slice(&chain.states()[made.states.len()..]);
                    made.is_end = true;
                });
                self.know(Arc::new(chain));
            }
            None => {
                let (digest, size) = (making.digest, making.cut.size());
                tracing::warn!(%digest, size, "the bytes of a blob in the content store are not what its digest says");
                publish(making, |made| made.is_wrong = true);
            }
        }
    }

    /// How many lists somebody waits for.
    #[cfg(test)]
    pub(super) fn making(&self) -> usize {
        self.lock().making.values().filter(|making| making.strong_count() > 0).count()
    }

    /// Nothing that runs under it panics half-way through a change, so a poisoned one is as good.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn more_of(made: &Made, digest: Digest, had: usize) -> Result<Option<More>, StoreError> {
    if made.is_wrong {
        return Err(StoreError::Other(format!("the bytes of {digest} are not what it says")));
    }
    let states = &made.states[had..];
    Ok((made.is_end || !states.is_empty()).then(|| More { states: states.to_vec(), is_end: made.is_end }))
}

fn publish(making: &Making, change: impl FnOnce(&mut Made)) {
    making.made.send_modify(change);
}

impl Work {
    /// The next slice, not empty.
    async fn read(&mut self, digest: Digest, store: &dyn ContentStore) -> Result<bytes::Bytes, StoreError> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            None => self.reader.insert(store.open(digest).await?),
        };
        let bytes = reader.read_at(self.at, SLICE).await?;
        if bytes.is_empty() {
            return Err(StoreError::Other(format!("{digest} ends at {}", self.at)));
        }
        Ok(bytes)
    }
}

impl Table {
    fn find(&mut self, digest: Digest) -> Option<Arc<Chain>> {
        self.asked += 1;
        let kept = self.known.get_mut(&digest)?;
        self.order.remove(&std::mem::replace(&mut kept.asked, self.asked));
        self.order.insert(self.asked, digest);
        Some(kept.chain.clone())
    }

    fn keep(&mut self, chain: Arc<Chain>) {
        let digest = chain.digest();
        self.remove(digest);
        self.asked += 1;
        self.bytes += cost(&chain);
        self.order.insert(self.asked, digest);
        self.known.insert(digest, Kept { chain, asked: self.asked });
        while self.bytes > KEPT
            && let Some((_, oldest)) = self.order.first_key_value()
        {
            self.remove(*oldest);
        }
    }

    fn remove(&mut self, digest: Digest) {
        if let Some(kept) = self.known.remove(&digest) {
            self.order.remove(&kept.asked);
            self.bytes -= cost(&kept.chain);
        }
    }
}

fn cost(chain: &Chain) -> usize {
    ENTRY + size_of_val(chain.states())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(number: usize, pieces: usize) -> Arc<Chain> {
        let digest = Digest::of(&number.to_be_bytes());
        let states = vec![State::INITIAL; pieces - 1];
        Arc::new(Chain::claimed(digest, Cut::usual((pieces as u64) << 18), states).unwrap())
    }

    #[test]
    fn the_lists_that_are_kept_are_those_that_were_asked_for_last() {
        let chains = Chains::new(Duration::ZERO);
        let each = cost(&chain(0, 256));
        let most = KEPT / each;
        (0..most).for_each(|number| chains.know(chain(number, 256)));
        let is_known = |number| {
            let chain = chain(number, 256);
            matches!(chains.of(chain.digest(), chain.cut()), Some(Listed::Known(_)))
        };
        assert!(is_known(0), "and asked for again");
        chains.know(chain(most, 256));
        assert_eq!((is_known(0), is_known(1), is_known(2), is_known(most)), (true, false, true, true));
        // The same again takes no more room.
        chains.know(chain(most, 256));
        assert_eq!((is_known(2), chains.lock().bytes), (true, most * each));
    }

    #[test]
    fn only_so_many_lists_are_made_at_a_time() {
        let chains = Chains::new(Duration::ZERO);
        let ask = |number| chains.of(chain(number, 2).digest(), Cut::usual(2 << 18));
        let mut making: Vec<_> = (0..MAX_MAKING).map(|number| ask(number).unwrap()).collect();
        assert!(ask(MAX_MAKING).is_none() && ask(0).is_some(), "which is one of them");
        making.pop();
        assert!(ask(MAX_MAKING).is_some());
    }
}
