//! A store whose user is killed at a chosen step, so that a test can try every step of a recovery.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::decide::disk_floor::Disks;
use crate::oci::{BlobProof, Digest};
use crate::ports::{
    BlobInfo, BlobMetadata, BlobReader, Blobs, ContentStore, ImageRecord, ImageRecords, Pin, Pins, Snapshots,
    StagedBlob, StoreDisks, StoreError,
};

/// Step at which the user is killed. A step is a call that changes the store; the first has number
/// 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillPoint {
    /// Before the step.
    Before(usize),
    /// After the step, and before its answer.
    After(usize),
}

/// Forwards every call until the kill point. From then on no call that changes the store returns. A
/// test awaits [`StoppingStore::reached`] and drops its work, which the inner store sees as a kill.
#[derive(Clone)]
pub struct StoppingStore {
    inner: Arc<dyn ContentStore>,
    steps: Arc<AtomicUsize>,
    kill_point: KillPoint,
    reached: watch::Sender<bool>,
    /// Staged blobs that the kill closes, even when a task still has a handle.
    staged: Arc<Mutex<Vec<Weak<StoppingStagedBlob>>>>,
}

impl StoppingStore {
    /// Wraps a store.
    pub fn new(inner: Arc<dyn ContentStore>, kill_point: KillPoint) -> Self {
        Self { inner, steps: Arc::default(), kill_point, reached: watch::Sender::new(false), staged: Arc::default() }
    }

    /// Waits for the kill point.
    pub async fn reached(&self) {
        let mut reached = self.reached.subscribe();
        // Cannot fail: `self` owns the sender.
        let _ = reached.wait_for(|reached| *reached).await;
    }

    async fn step<T>(&self, work: impl Future<Output = T>) -> T {
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        let (last, after) = match self.kill_point {
            KillPoint::Before(last) => (last, false),
            KillPoint::After(last) => (last, true),
        };
        if step < last {
            let done = work.await;
            // A call that is under way at the kill never returns.
            if !*self.reached.borrow() {
                return done;
            }
            drop(done);
            return std::future::pending().await;
        }
        if step == last && after {
            work.await;
        } else {
            // A killed process holds no resources.
            drop(work);
        }
        if step == last {
            self.staged.lock().drain(..).for_each(|stage| {
                if let Some(stage) = stage.upgrade() {
                    stage.close();
                }
            });
            self.reached.send_replace(true);
        }
        std::future::pending().await
    }
}

#[async_trait]
impl Blobs for StoppingStore {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        self.inner.blob(digest).await
    }

    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        self.inner.blobs().await
    }

    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        self.inner.open(digest).await
    }

    async fn put(&self, bytes: Bytes, proof: BlobProof, metadata: &BlobMetadata, pin: &Pin) -> Result<(), StoreError> {
        self.step(self.inner.put(bytes, proof, metadata, pin)).await
    }

    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError> {
        let staged = self.step(self.inner.stage(digest, size, pin)).await?;
        let stage = Arc::new(StoppingStagedBlob { inner: Mutex::new(Some(staged)), store: self.clone() });
        self.staged.lock().push(Arc::downgrade(&stage));
        Ok(stage)
    }

    async fn add_metadata(&self, digest: Digest, metadata: &BlobMetadata) -> Result<(), StoreError> {
        self.step(self.inner.add_metadata(digest, metadata)).await
    }

    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        self.step(self.inner.discard(digest, pin)).await
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes()
    }
}

#[async_trait]
impl ImageRecords for StoppingStore {
    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.inner.images().await
    }

    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        self.step(self.inner.put_image(record)).await
    }

    async fn remove_image(&self, name: &str, target: Digest) -> Result<(), StoreError> {
        self.step(self.inner.remove_image(name, target)).await
    }

    async fn snapshots(&self, chain_id: Digest) -> Result<Snapshots, StoreError> {
        self.inner.snapshots(chain_id).await
    }
}

#[async_trait]
impl Pins for StoppingStore {
    async fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        self.step(self.inner.pin(life)).await
    }

    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError> {
        self.step(self.inner.renew(pin, life)).await
    }

    async fn release(&self, pin: Pin) -> Result<(), StoreError> {
        self.step(self.inner.release(pin)).await
    }
}

#[async_trait]
impl StoreDisks for StoppingStore {
    async fn disks(&self) -> Result<Disks, StoreError> {
        self.inner.disks().await
    }
}

struct StoppingStagedBlob {
    /// `None` after the kill.
    inner: Mutex<Option<Arc<dyn StagedBlob>>>,
    store: StoppingStore,
}

impl StoppingStagedBlob {
    fn close(&self) {
        self.inner.lock().take();
    }

    fn open(&self) -> Option<Arc<dyn StagedBlob>> {
        self.inner.lock().clone()
    }

    /// Never returns after the kill.
    async fn inner(&self) -> Arc<dyn StagedBlob> {
        match self.open() {
            Some(inner) => inner,
            None => std::future::pending().await,
        }
    }
}

#[async_trait]
impl StagedBlob for StoppingStagedBlob {
    fn resumed_ranges(&self) -> Vec<Range<u64>> {
        self.open().map(|inner| inner.resumed_ranges()).unwrap_or_default()
    }

    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError> {
        let inner = self.inner().await;
        self.store.step(async move { inner.write_at(offset, chunks).await }).await
    }

    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        self.inner().await.read_at(offset, limit).await
    }

    async fn commit(&self, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let inner = self.inner().await;
        self.store.step(async move { inner.commit(proof, metadata).await }).await
    }

    async fn abandon(&self) {
        let inner = self.inner().await;
        self.store.step(async move { inner.abandon().await }).await;
    }
}
