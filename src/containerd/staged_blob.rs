//! A staged blob: a file of the agent until its proof, then a blob of containerd.
//!
//! The file lies in the agent's folder in the content store's root, because a hard link works only
//! within one mount. containerd walks `blobs/` and `ingest/` and ignores this folder. Where the
//! folder cannot be written, another folder serves, and the blob is sent through the content API.

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Mutex;

use super::ContainerdStore;
use super::adoption::{AdoptionError, IngestMode, STAGING_FOLDER};
use super::content::blocking;
use super::ingest::IngestSlot;
use super::writer::MESSAGE_SIZE;
use crate::files::{Leftover, StagingFile, create_staging_folder, is_locked, leftovers};
use crate::oci::{BlobProof, Digest};
use crate::ports::{BlobMetadata, Pin, STAGED_BLOB_LIFE, StagedBlob, StoreError};

/// Life of the lease under which a sweep finishes the commit of a killed process. The sweep deletes
/// the lease at once; the life matters after a kill in between. An earlier pin may still hold the
/// blob, and its recovery then finds the blob.
const SWEEP_LEASE_LIFE: Duration = Duration::from_secs(60);

pub(super) struct ContainerdStagedBlob {
    store: ContainerdStore,
    digest: Digest,
    pin: Pin,
    file: Arc<StagingFile>,
    /// `None` after the commit or `abandon`. Locked during the commit.
    open: Mutex<Option<IngestSlot>>,
}

impl ContainerdStore {
    pub(super) async fn begin_staged(
        &self,
        digest: Digest,
        size: u64,
        pin: &Pin,
    ) -> Result<ContainerdStagedBlob, StoreError> {
        let slot = IngestSlot::take(self, digest)?;
        // The pin first, then the lookup: the pin holds a blob that is found, and a blob that comes
        // later.
        self.add_to_pin(pin, "content".into(), digest.to_string()).await?;
        if self.find_blob(digest).await?.is_some() {
            return Err(StoreError::AlreadyExists(digest));
        }
        let path = self.staging_folder().await?.join(digest.hex());
        // The owner of the lock may be linking the file.
        let at = path.clone();
        if blocking(move || is_locked(&at).unwrap_or(false)).await? {
            return Err(StoreError::Busy(digest));
        }
        if let Some(linked) = self.size_if_linked(&path).await?
            && self.adopt_leftover(&slot, &path, linked, pin).await?
        {
            // The sweep retries a failed removal.
            blocking(move || std::fs::remove_file(path).unwrap_or_default()).await?;
            return Err(StoreError::AlreadyExists(digest));
        }
        let at = path.clone();
        let opened = blocking(move || StagingFile::open(&at, size)).await?;
        let file = Arc::new(opened.map_err(|error| staging_error(digest, &path, &error))?);
        Ok(ContainerdStagedBlob { store: self.clone(), digest, pin: pin.clone(), file, open: Mutex::new(Some(slot)) })
    }

    /// Folder for staging files: in the content store's root, else the configured folder.
    async fn staging_folder(&self) -> Result<PathBuf, StoreError> {
        let mut reason = None;
        for folder in self.staging_folders().await? {
            let made = folder.clone();
            match blocking(move || create_staging_folder(&made)).await? {
                Ok(()) => return Ok(folder),
                Err(error) => reason = Some(format!("{}: {error}", folder.display())),
            }
        }
        let reason = reason
            .unwrap_or_else(|| "containerd's content store cannot be seen, and no other staging folder is set".into());
        Err(StoreError::Other(format!("no folder for staged blobs: {reason}")))
    }

    /// Every folder that may have staging files, the preferred folder first.
    async fn staging_folders(&self) -> Result<Vec<PathBuf>, StoreError> {
        let in_root = self.content_root().await?.map(|root| root.join(STAGING_FOLDER));
        Ok(in_root.into_iter().chain(self.state.staging.clone()).collect())
    }

    async fn size_if_linked(&self, path: &Path) -> Result<Option<u64>, StoreError> {
        let path = path.to_owned();
        blocking(move || std::fs::symlink_metadata(path).ok().filter(|file| file.nlink() > 1).map(|file| file.len()))
            .await
    }

    /// Removes staging files that are too old, or whose blob exists.
    pub(super) async fn sweep_staged(&self) -> Result<(), StoreError> {
        for folder in self.staging_folders().await? {
            let at = folder.clone();
            let found = blocking(move || leftovers(&at)).await?;
            for leftover in found.map_err(|error| StoreError::Other(format!("{}: {error}", folder.display())))? {
                self.sweep_leftover(&folder, &leftover).await?;
            }
        }
        Ok(())
    }

    async fn sweep_leftover(&self, folder: &Path, leftover: &Leftover) -> Result<(), StoreError> {
        let path = folder.join(&leftover.name);
        let digest = leftover.name.to_str().and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
        let mut is_removable = leftover.age > STAGED_BLOB_LIFE;
        let slot = match digest.map(|digest| IngestSlot::take(self, digest)) {
            Some(Err(_)) => return Ok(()),
            slot => slot.and_then(Result::ok),
        };
        let taken = path.clone();
        if blocking(move || is_locked(&taken).unwrap_or(true)).await? {
            return Ok(());
        }
        if let Some(slot) = &slot {
            is_removable |= self.find_blob(slot.digest()).await?.is_some();
            if !is_removable && let Some(size) = self.size_if_linked(&path).await? {
                let pin = self.create_lease(SWEEP_LEASE_LIFE).await?;
                let adopted = self.adopt_leftover(slot, &path, size, &pin).await;
                self.delete_lease(&pin, false).await?;
                is_removable = adopted?;
            }
        }
        match is_removable {
            // The next sweep retries a failed removal.
            true => blocking(move || std::fs::remove_file(path).unwrap_or_default()).await,
            false => Ok(()),
        }
    }
}

fn staging_error(digest: Digest, path: &Path, error: &io::Error) -> StoreError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full(digest),
        // Another process has the file, or a write of a dropped staged blob is still running.
        io::ErrorKind::WouldBlock => StoreError::Busy(digest),
        _ => StoreError::Other(format!("{}: {error}", path.display())),
    }
}

impl ContainerdStagedBlob {
    fn io_error(&self, error: &io::Error) -> StoreError {
        staging_error(self.digest, self.file.path(), error)
    }

    /// Links the file where possible, else sends the bytes: a link is only an optimization.
    async fn record(&self, slot: &IngestSlot, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let store = &self.store;
        let root = store.content_root().await?.filter(|root| self.file.path().starts_with(root.join(STAGING_FOLDER)));
        // containerd offers an empty blob at its end in any case, so its offer proves nothing.
        if let Some(root) = root.filter(|_| self.file.size() > 0)
            && store.ingest_mode().await? == Some(IngestMode::Linked)
        {
            match store.adopt(slot, &self.file, &root, &self.pin, metadata).await? {
                Ok(()) => return Ok(()),
                Err(AdoptionError(reason)) => store.record_adoption_error(reason).await,
            }
        }
        let read = async |offset| self.file.read_at(offset, MESSAGE_SIZE).await.map_err(|error| self.io_error(&error));
        store.send_blob(slot, self.file.size(), metadata, &self.pin, read).await
    }
}

#[async_trait]
impl StagedBlob for ContainerdStagedBlob {
    fn resumed_ranges(&self) -> Vec<Range<u64>> {
        self.file.resumed_ranges()
    }

    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError> {
        self.file.write_at(offset, chunks).await.map_err(|error| self.io_error(&error))
    }

    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        self.file.read_at(offset, limit).await.map_err(|error| self.io_error(&error))
    }

    async fn commit(&self, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let (digest, size) = (self.digest, self.file.size());
        if proof.digest() != digest || proof.size() != size {
            let (proved, length) = (proof.digest(), proof.size());
            return Err(StoreError::Other(format!(
                "the proof is for {length} bytes of {proved}, staged were {size} of {digest}"
            )));
        }
        let mut open = self.open.lock().await;
        let closed = || StoreError::Other(format!("{digest} is closed for writing"));
        let slot = open.as_ref().ok_or_else(closed)?;
        let file = Arc::clone(&self.file);
        blocking(move || file.seal()).await?.map_err(|error| self.io_error(&error))?;
        self.record(slot, metadata).await?;
        // After the record: this name kept the bytes until then.
        let file = Arc::clone(&self.file);
        blocking(move || file.remove()).await?;
        *open = None;
        self.store.record_change();
        Ok(())
    }

    async fn abandon(&self) {
        let mut open = self.open.lock().await;
        if open.is_some() {
            let file = Arc::clone(&self.file);
            // The task cannot panic; a later sweep would remove the file.
            let _ = blocking(move || file.remove()).await;
        }
        *open = None;
    }
}
