//! The store of a test node.

use super::*;
use crate::ports::{BlobInfo, BlobMetadata, BlobReader, Pin, StagedBlob};

/// A read-only store that can serve wrong bytes or fail.
#[derive(Default)]
pub(super) struct TestStore {
    pub(super) blobs: HashMap<Digest, Bytes>,
    /// Reads at or after this offset fail.
    pub(super) fails_at: Option<u64>,
    /// Reads wait until this is true.
    pub(super) open: Option<watch::Receiver<bool>>,
    /// Lookups and opens fail.
    pub(super) broken: bool,
    /// Counts the bytes that were read.
    pub(super) reads: Arc<AtomicUsize>,
}

impl TestStore {
    pub(super) fn with(blob: &Bytes) -> Self {
        Self { blobs: HashMap::from([(Digest::of(blob), blob.clone())]), ..Self::default() }
    }

    fn check_works(&self) -> Result<(), StoreError> {
        if self.broken { Err(StoreError::Other("the disk is gone".into())) } else { Ok(()) }
    }
}

struct TestBlobReader {
    blob: Bytes,
    digest: Digest,
    fails_at: Option<u64>,
    open: Option<watch::Receiver<bool>>,
    reads: Arc<AtomicUsize>,
}

#[async_trait]
impl BlobReader for TestBlobReader {
    fn size(&self) -> u64 {
        self.blob.len() as u64
    }

    async fn read_at(&mut self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        if let Some(open) = &mut self.open {
            open.wait_for(|open| *open).await.map_err(|_| StoreError::Absent(self.digest))?;
        }
        if self.fails_at.is_some_and(|at| offset >= at) {
            return Err(StoreError::Other("the disk is on fire".into()));
        }
        let from = usize::try_from(offset).unwrap().min(self.blob.len());
        let bytes = self.blob.slice(from..self.blob.len().min(from + limit));
        self.reads.fetch_add(bytes.len(), Ordering::Relaxed);
        Ok(bytes)
    }
}

fn unused<T>() -> Result<T, StoreError> {
    Err(StoreError::Other("serving does not need this".into()))
}

#[async_trait]
impl Blobs for TestStore {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        self.check_works()?;
        Ok(self.blobs.get(&digest).map(|blob| BlobInfo {
            digest,
            size: blob.len() as u64,
            sources: Vec::new(),
            has_children: false,
        }))
    }
    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        self.check_works()?;
        let blob = self.blobs.get(&digest).ok_or(StoreError::Absent(digest))?.clone();
        let (open, reads) = (self.open.clone(), self.reads.clone());
        Ok(Box::new(TestBlobReader { blob, digest, fails_at: self.fails_at, open, reads }))
    }
    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        unused()
    }
    async fn put(&self, _: Bytes, _: BlobProof, _: &BlobMetadata, _: &Pin) -> Result<(), StoreError> {
        unused()
    }
    async fn stage(&self, _: Digest, _: u64, _: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError> {
        unused()
    }
    async fn add_metadata(&self, _: Digest, _: &BlobMetadata) -> Result<(), StoreError> {
        unused()
    }
    async fn discard(&self, _: Digest, _: &Pin) -> Result<(), StoreError> {
        unused()
    }
    fn changes(&self) -> watch::Receiver<u64> {
        watch::channel(0).1
    }
}
