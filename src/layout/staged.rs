//! A blob whose pieces come in any order: a file in `ingest/` too, which stays when its process ends.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::Bytes;

use super::writer::Slot;
use super::{BLOBS, Folder, INGEST, failed};
use crate::files::{StagingFile, blob_path, leftovers, sync_folder};
use crate::oci::{Digest, Verified};
use crate::ports::{Remembered, STAGED_LIFE, Staged, StoreError};

/// Tells these files from those of writers, which nobody goes on with.
const SUFFIX: &str = ".staged";

pub(super) struct InFolder {
    inner: Arc<Inner>,
}

struct Inner {
    folder: Arc<Folder>,
    digest: Digest,
    file: Arc<StagingFile>,
    /// Until it is a blob or is thrown away.
    open: Mutex<Option<Open>>,
}

struct Open {
    _slot: Slot,
    /// The file has its name among the blobs, perhaps not on disk yet.
    placed: bool,
}

impl InFolder {
    pub(super) fn begin(folder: &Arc<Folder>, digest: Digest, size: u64) -> Result<Self, StoreError> {
        let slot = Slot::take(folder, digest)?;
        let ingest = folder.path(INGEST);
        sweep(&ingest, |digest| Slot::take(folder, digest).ok()).map_err(|error| failed(&ingest, &error))?;
        let opened = StagingFile::open(&staged_path(folder, digest), size);
        let file = Arc::new(opened.map_err(|error| folder.not_written(digest, &error))?);
        let open = Mutex::new(Some(Open { _slot: slot, placed: false }));
        Ok(Self { inner: Arc::new(Inner { folder: Arc::clone(folder), digest, file, open }) })
    }
}

fn staged_path(folder: &Folder, digest: Digest) -> PathBuf {
    folder.path(INGEST).join(digest.hex() + SUFFIX)
}

/// The blob that a file of this name is staged for.
fn staged_digest(name: &OsStr) -> Option<Digest> {
    format!("sha256:{}", name.to_str()?.strip_suffix(SUFFIX)?).parse().ok()
}

/// Removes everything but what is staged: nobody goes on with it. Only for when nothing is being written.
pub(super) fn sweep_unstaged(ingest: &Path) -> io::Result<()> {
    for left in leftovers(ingest)? {
        if staged_digest(&left.name).is_none() {
            fs::remove_file(ingest.join(&left.name))?;
        }
    }
    sweep(ingest, |_| Some(()))
}

/// Removes what was staged and not taken up again. `take` keeps others from it meanwhile, if nobody has it.
fn sweep<T>(ingest: &Path, take: impl Fn(Digest) -> Option<T>) -> io::Result<()> {
    for left in leftovers(ingest)? {
        if left.age > STAGED_LIFE
            && let Some(digest) = staged_digest(&left.name)
            && let Some(_taken) = take(digest)
        {
            fs::remove_file(ingest.join(&left.name))?;
        }
    }
    Ok(())
}

impl Inner {
    fn open(&self) -> MutexGuard<'_, Option<Open>> {
        // A panic leaves files, and each of them is in its place or is not.
        self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// As a writer does it: at no moment is there a blob that lacks what is remembered, or is not on disk.
    fn commit(&self, remembered: &Remembered) -> Result<(), StoreError> {
        let not_written = |error| self.folder.not_written(self.digest, &error);
        let mut guard = self.open();
        let closed = || StoreError::Other(format!("{} is not being written any more", self.digest));
        let open = guard.as_mut().ok_or_else(closed)?;
        self.file.seal().map_err(not_written)?;
        let changing = self.folder.changing();
        self.folder.remember(&changing, self.digest, remembered)?;
        if !open.placed {
            fs::rename(self.file.path(), blob_path(&self.folder.root, self.digest)).map_err(not_written)?;
            open.placed = true;
        }
        sync_folder(&self.folder.path(BLOBS)).map_err(not_written)?;
        *guard = None;
        drop(changing);
        self.folder.changed();
        Ok(())
    }
}

#[async_trait]
impl Staged for InFolder {
    fn left(&self) -> Vec<Range<u64>> {
        self.inner.file.left()
    }

    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError> {
        let Inner { folder, digest, file, .. } = &*self.inner;
        file.write_at(offset, chunks).await.map_err(|error| folder.not_written(*digest, &error))
    }

    async fn read_at(&self, offset: u64, most: usize) -> Result<Bytes, StoreError> {
        let read = self.inner.file.read_at(offset, most).await;
        read.map_err(|error| failed(self.inner.file.path(), &error))
    }

    async fn commit(&self, proof: Verified, remembered: &Remembered) -> Result<(), StoreError> {
        let (digest, size) = (self.inner.digest, self.inner.file.size());
        if proof.digest() != digest || proof.size() != size {
            let (proved, length) = (proof.digest(), proof.size());
            return Err(StoreError::Other(format!(
                "the proof is for {length} bytes of {proved}, staged were {size} of {digest}"
            )));
        }
        let (inner, remembered) = (Arc::clone(&self.inner), remembered.clone());
        let committed = tokio::task::spawn_blocking(move || inner.commit(&remembered)).await;
        committed.unwrap_or_else(|panicked| Err(StoreError::Other(format!("committing panicked: {panicked}"))))
    }

    async fn abandon(&self) {
        let inner = Arc::clone(&self.inner);
        let abandoned = tokio::task::spawn_blocking(move || {
            let mut open = inner.open();
            if open.as_ref().is_some_and(|open| !open.placed) {
                inner.file.remove();
            }
            *open = None;
        });
        // It panics nowhere; and then the file is swept later.
        let _ = abandoned.await;
    }
}
