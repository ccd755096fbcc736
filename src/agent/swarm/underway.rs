//! The blobs that this node is fetching, for others: peers that want them take what is here already.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, watch};

use super::incoming::{Incoming, Served};
use crate::oci::{Digest, SMALLEST_PIECE};
use crate::ports::{Partial, Partials};

/// Blobs of fewer pieces are not told of while they come: they are here before the word has gone round (a second), and would only add to it.
const TOLD_FROM: u64 = 16 * SMALLEST_PIECE;

/// Blobs that are told of at a time. An image has a handful that are large, and a few images come at once; the rest is found when it is whole.
const MAX_TOLD: usize = 64;

/// Pieces that wait in memory at a time: 8 MiB each at most, of blobs up to a terabyte.
const MAX_WAITING: usize = 4;

/// A handle to the list. Clones share it.
#[derive(Clone)]
pub struct Underway(Arc<List>);

struct List {
    blobs: Mutex<HashMap<Digest, Arc<Incoming>>>,
    told: watch::Sender<BTreeSet<Digest>>,
    /// Moves when one has come, or was given up.
    ended: watch::Sender<u64>,
    /// The blob that a recovery waits for because it is being written already.
    awaited: watch::Sender<Option<Digest>>,
    waiting: Arc<Semaphore>,
}

impl Default for Underway {
    fn default() -> Self {
        Self(Arc::new(List {
            blobs: Mutex::default(),
            told: watch::Sender::new(BTreeSet::new()),
            ended: watch::Sender::new(0),
            awaited: watch::Sender::new(None),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        }))
    }
}

impl Underway {
    /// The blobs that peers should know of.
    pub fn told(&self) -> watch::Receiver<BTreeSet<Digest>> {
        self.0.told.subscribe()
    }

    /// Moves whenever a blob has come, or was given up.
    pub(in crate::agent) fn ended(&self) -> watch::Receiver<u64> {
        self.0.ended.subscribe()
    }

    /// A recovery waits for this blob, which is being written already.
    pub(in crate::agent) fn await_blob(&self, digest: Digest) {
        self.0.awaited.send_replace(Some(digest));
    }

    /// Moves whenever a recovery begins to wait for a blob, and every 1.5 s while it waits.
    pub(in crate::agent) fn awaited(&self) -> watch::Receiver<Option<Digest>> {
        self.0.awaited.subscribe()
    }

    /// The store lets one recovery at a time write a blob, so there is no other of this digest.
    pub(super) fn begin(&self, incoming: &Arc<Incoming>) {
        let blob = incoming.blob();
        self.blobs().insert(blob.digest, Arc::clone(incoming));
        if blob.size >= TOLD_FROM {
            self.0.told.send_if_modified(|told| told.len() < MAX_TOLD && told.insert(blob.digest));
        }
    }

    /// It is in the store now, or given up.
    pub(super) fn end(&self, incoming: &Arc<Incoming>) {
        incoming.close();
        let digest = incoming.blob().digest;
        self.blobs().remove(&digest);
        self.0.told.send_if_modified(|told| told.remove(&digest));
        self.0.ended.send_modify(|ended| *ended += 1);
    }

    /// For pieces that wait in memory, of all recoveries of this node.
    pub(super) fn waiting(&self) -> Arc<Semaphore> {
        Arc::clone(&self.0.waiting)
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Incoming>>> {
        self.0.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Partials for Underway {
    fn partial(&self, digest: Digest) -> Option<Arc<dyn Partial>> {
        let incoming = self.blobs().get(&digest).cloned()?;
        let (chain, _) = incoming.list()?;
        Some(Arc::new(Served { incoming, chain }))
    }
}
