//! The downloads of this node, which also serve peers: a peer fetches the pieces that are here
//! already.

pub(in crate::agent::recovery) mod blob_download;
mod chain_prefixes;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Semaphore, watch};

use self::blob_download::{BlobDownload, ServedDownload};
use crate::oci::{Digest, MIN_PIECE_SIZE};
use crate::ports::{PartialBlob, PartialBlobs};

/// Smallest announced download, in bytes. A blob of fewer pieces is complete before gossip has
/// spread the announcement (a second), and would only add to the gossip.
const MIN_ANNOUNCED_BYTES: u64 = 16 * MIN_PIECE_SIZE;

/// Most announced downloads. An image has a handful of large blobs, and a few images are recovered
/// at a time. The other blobs are announced when they are whole.
const MAX_ANNOUNCED: usize = 64;

/// Most pieces that wait in memory at a time: 8 MiB each at most, for blobs of up to a terabyte.
const MAX_BUFFERED_PIECES: usize = 4;

/// The downloads in flight. Clones share the table.
#[derive(Clone)]
pub struct Downloads(Arc<DownloadTable>);

struct DownloadTable {
    blobs: Mutex<HashMap<Digest, Arc<BlobDownload>>>,
    announced: watch::Sender<BTreeSet<Digest>>,
    /// Changes when a download is complete or abandoned.
    ended: watch::Sender<u64>,
    /// The blob that a recovery waits for, because another writer has the blob open.
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
    /// The downloads that gossip announces.
    pub fn announced(&self) -> watch::Receiver<BTreeSet<Digest>> {
        self.0.announced.subscribe()
    }

    pub(in crate::agent) fn ended(&self) -> watch::Receiver<u64> {
        self.0.ended.subscribe()
    }

    pub(in crate::agent) fn mark_awaited(&self, digest: Digest) {
        self.0.awaited.send_replace(Some(digest));
    }

    /// Changes when a recovery begins to wait for a blob, and every 1.5 s during the wait.
    pub(in crate::agent) fn awaited(&self) -> watch::Receiver<Option<Digest>> {
        self.0.awaited.subscribe()
    }

    /// Adds a download. The store permits one writer of a blob at a time, so the digest has no
    /// other download.
    pub(in crate::agent::recovery) fn insert(&self, download: &Arc<BlobDownload>) {
        let blob = download.blob();
        self.blobs().insert(blob.digest, Arc::clone(download));
        if blob.size >= MIN_ANNOUNCED_BYTES {
            self.0
                .announced
                .send_if_modified(|announced| announced.len() < MAX_ANNOUNCED && announced.insert(blob.digest));
        }
    }

    /// Removes a download that is complete or abandoned.
    pub(in crate::agent::recovery) fn remove(&self, download: &Arc<BlobDownload>) {
        download.close();
        let digest = download.blob().digest;
        self.blobs().remove(&digest);
        self.0.announced.send_if_modified(|announced| announced.remove(&digest));
        self.0.ended.send_modify(|ended| *ended += 1);
    }

    /// Permits for pieces that wait in memory, shared by all recoveries of this node.
    pub(in crate::agent::recovery) fn buffer_permits(&self) -> Arc<Semaphore> {
        Arc::clone(&self.0.buffer_permits)
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, Arc<BlobDownload>>> {
        self.0.blobs.lock()
    }
}

impl PartialBlobs for Downloads {
    fn partial(&self, digest: Digest) -> Option<Arc<dyn PartialBlob>> {
        let download = self.blobs().get(&digest).cloned()?;
        let (chain, _) = download.hash_chain()?;
        Some(Arc::new(ServedDownload { download, chain }))
    }
}
