//! A staged blob: a file in `ingest/` that outlives its process.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};

use super::write_slot::WriteSlot;
use super::{BLOBS, Folder, INGEST, io_error};
use crate::files::{StagingFile, blob_path, leftovers, sync_folder};
use crate::oci::{BlobProof, Digest};
use crate::ports::{BlobMetadata, STAGED_BLOB_LIFE, StagedBlob, StoreError};

/// Suffix of staged files. Files of documents have none, because no process resumes them.
const SUFFIX: &str = ".staged";

pub(super) struct LayoutStagedBlob {
    inner: Arc<StagedState>,
}

struct StagedState {
    folder: Arc<Folder>,
    digest: Digest,
    file: Arc<StagingFile>,
    /// `None` after the commit or `abandon`.
    open: Mutex<Option<OpenStage>>,
}

struct OpenStage {
    _slot: WriteSlot,
    /// The file is renamed into `blobs/`, perhaps not on disk yet.
    is_in_blobs: bool,
}

impl LayoutStagedBlob {
    pub(super) fn begin(folder: &Arc<Folder>, digest: Digest, size: u64) -> Result<Self, StoreError> {
        let slot = WriteSlot::take(folder, digest)?;
        let ingest = folder.path(INGEST);
        sweep(&ingest, |digest| WriteSlot::take(folder, digest).ok()).map_err(|error| io_error(&ingest, &error))?;
        let opened = StagingFile::open(&staged_path(folder, digest), size);
        let file = Arc::new(opened.map_err(|error| folder.write_error(digest, &error))?);
        let open = Mutex::new(Some(OpenStage { _slot: slot, is_in_blobs: false }));
        Ok(Self { inner: Arc::new(StagedState { folder: Arc::clone(folder), digest, file, open }) })
    }
}

fn staged_path(folder: &Folder, digest: Digest) -> PathBuf {
    folder.path(INGEST).join(digest.hex() + SUFFIX)
}

/// Digest of a staged file's name.
fn staged_digest(name: &OsStr) -> Option<Digest> {
    format!("sha256:{}", name.to_str()?.strip_suffix(SUFFIX)?).parse().ok()
}

/// Removes the documents of a killed process, which no process resumes, and old staged files. Call
/// without writers.
pub(super) fn sweep_unstaged(ingest: &Path) -> io::Result<()> {
    for leftover in leftovers(ingest)? {
        if staged_digest(&leftover.name).is_none() {
            fs::remove_file(ingest.join(&leftover.name))?;
        }
    }
    sweep(ingest, |_| Some(()))
}

/// Removes staged files older than [`STAGED_BLOB_LIFE`]. `take` reserves a blob without a writer.
fn sweep<T>(ingest: &Path, take: impl Fn(Digest) -> Option<T>) -> io::Result<()> {
    for leftover in leftovers(ingest)? {
        if leftover.age > STAGED_BLOB_LIFE
            && let Some(digest) = staged_digest(&leftover.name)
            && let Some(_slot) = take(digest)
        {
            fs::remove_file(ingest.join(&leftover.name))?;
        }
    }
    Ok(())
}

impl StagedState {
    fn open(&self) -> MutexGuard<'_, Option<OpenStage>> {
        // A panic leaves no half change: the rename is atomic.
        self.open.lock()
    }

    /// In the order of [`Folder::put`]: a visible blob is on disk and has its metadata.
    fn commit(&self, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let not_written = |error| self.folder.write_error(self.digest, &error);
        let mut guard = self.open();
        let closed = || StoreError::Other(format!("{} is closed for writing", self.digest));
        let open = guard.as_mut().ok_or_else(closed)?;
        self.file.seal().map_err(not_written)?;
        let folder_guard = self.folder.lock();
        self.folder.add_metadata(&folder_guard, self.digest, metadata)?;
        if !open.is_in_blobs {
            fs::rename(self.file.path(), blob_path(&self.folder.root, self.digest)).map_err(not_written)?;
            open.is_in_blobs = true;
        }
        sync_folder(&self.folder.path(BLOBS)).map_err(not_written)?;
        *guard = None;
        drop(folder_guard);
        self.folder.record_change();
        Ok(())
    }
}

#[async_trait]
impl StagedBlob for LayoutStagedBlob {
    fn resumed_ranges(&self) -> Vec<Range<u64>> {
        self.inner.file.resumed_ranges()
    }

    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError> {
        let StagedState { folder, digest, file, .. } = &*self.inner;
        file.write_at(offset, chunks).await.map_err(|error| folder.write_error(*digest, &error))
    }

    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        let read = self.inner.file.read_at(offset, limit).await;
        read.map_err(|error| io_error(self.inner.file.path(), &error))
    }

    async fn commit(&self, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let (digest, size) = (self.inner.digest, self.inner.file.size());
        if proof.digest() != digest || proof.size() != size {
            let (proved, length) = (proof.digest(), proof.size());
            return Err(StoreError::Other(format!(
                "the proof is for {length} bytes of {proved}, staged were {size} of {digest}"
            )));
        }
        let (inner, metadata) = (Arc::clone(&self.inner), metadata.clone());
        let committed = tokio::task::spawn_blocking(move || inner.commit(&metadata)).await;
        committed.unwrap_or_else(|panicked| Err(StoreError::Other(format!("committing panicked: {panicked}"))))
    }

    async fn abandon(&self) {
        let inner = Arc::clone(&self.inner);
        let abandoned = tokio::task::spawn_blocking(move || {
            let mut open = inner.open();
            if open.as_ref().is_some_and(|open| !open.is_in_blobs) {
                inner.file.remove();
            }
            *open = None;
        });
        // The task cannot panic; a later sweep would remove the file.
        let _ = abandoned.await;
    }
}
