//! The blobs that this node is fetching, for others: peers that want them take what is here already.

pub(in crate::agent::recovery) mod blob_download;
mod chain_prefixes;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, watch};

use self::blob_download::{BlobDownload, ServedDownload};
use crate::oci::{Digest, MIN_PIECE_SIZE};
use crate::ports::{PartialBlob, PartialBlobs};

/// Blobs of fewer pieces are not told of while they come: they are here before the word has gone round (a second), and would only add to it.
const MIN_ANNOUNCED_BYTES: u64 = 16 * MIN_PIECE_SIZE;

/// Blobs that are told of at a time. An image has a handful that are large, and a few images come at once; the rest is found when it is whole.
const MAX_ANNOUNCED: usize = 64;

/// Pieces that wait in memory at a time: 8 MiB each at most, of blobs up to a terabyte.
const MAX_BUFFERED_PIECES: usize = 4;

/// A handle to the list. Clones share it.
#[derive(Clone)]
pub struct Downloads(Arc<DownloadTable>);

struct DownloadTable {
    blobs: Mutex<HashMap<Digest, Arc<BlobDownload>>>,
    announced: watch::Sender<BTreeSet<Digest>>,
    /// Moves when one has come, or was given up.
    ended: watch::Sender<u64>,
    /// The blob that a recovery waits for because it is being written already.
    awaited: watch::Sender<Option<Digest>>,
    buffer_permits: Arc<Semaphore>,
}

impl Default for Downloads {
    fn default() -> Self {
        Self(Arc::new(DownloadTable {
            blobs: Mutex::default(),
            announced: watch::Sender::new(BTreeSet::new()),
            ended: watch::Sender::new(0),
            awaited: watch::Sender::new(None),
            buffer_permits: Arc::new(Semaphore::new(MAX_BUFFERED_PIECES)),
        }))
    }
}

impl Downloads {
    /// The blobs that peers should know of.
    pub fn announced(&self) -> watch::Receiver<BTreeSet<Digest>> {
        self.0.announced.subscribe()
    }

    /// Moves whenever a blob has come, or was given up.
    pub(in crate::agent) fn ended(&self) -> watch::Receiver<u64> {
        self.0.ended.subscribe()
    }

    /// A recovery waits for this blob, which is being written already.
    pub(in crate::agent) fn mark_awaited(&self, digest: Digest) {
        self.0.awaited.send_replace(Some(digest));
    }

    /// Moves whenever a recovery begins to wait for a blob, and every 1.5 s while it waits.
    pub(in crate::agent) fn awaited(&self) -> watch::Receiver<Option<Digest>> {
        self.0.awaited.subscribe()
    }

    /// The store lets one recovery at a time write a blob, so there is no other of this digest.
    pub(in crate::agent::recovery) fn insert(&self, incoming: &Arc<BlobDownload>) {
        let blob = incoming.blob();
        self.blobs().insert(blob.digest, Arc::clone(incoming));
        if blob.size >= MIN_ANNOUNCED_BYTES {
            self.0.announced.send_if_modified(|told| told.len() < MAX_ANNOUNCED && told.insert(blob.digest));
        }
    }

    /// It is in the store now, or given up.
    pub(in crate::agent::recovery) fn remove(&self, incoming: &Arc<BlobDownload>) {
        incoming.close();
        let digest = incoming.blob().digest;
        self.blobs().remove(&digest);
        self.0.announced.send_if_modified(|told| told.remove(&digest));
        self.0.ended.send_modify(|ended| *ended += 1);
    }

    /// For pieces that wait in memory, of all recoveries of this node.
    pub(in crate::agent::recovery) fn buffer_permits(&self) -> Arc<Semaphore> {
        Arc::clone(&self.0.buffer_permits)
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, Arc<BlobDownload>>> {
        self.0.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialBlobs for Downloads {
    fn partial(&self, digest: Digest) -> Option<Arc<dyn PartialBlob>> {
        let incoming = self.blobs().get(&digest).cloned()?;
        let (chain, _) = incoming.hash_chain()?;
        Some(Arc::new(ServedDownload { download: incoming, chain }))
    }
}
