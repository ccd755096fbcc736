//! A blob whose pieces come in any order: a file of our own until it is proved, then containerd's.
//!
//! The file lies in a folder of ours in the content store's own: only within one mount can a file be linked. containerd walks `blobs/` and
//! `ingest/` and leaves it alone. Where that folder cannot be written, another one does, and the blob is sent from there.

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
use super::adoption::{AdoptionError, IngestMode};
use super::content::blocking;
use super::stray::CommitOutcome;
use super::writer::{IngestSlot, MESSAGE_SIZE};
use crate::files::{Leftover, StagingFile, create_staging_folder, is_locked, leftovers};
use crate::oci::{BlobProof, Digest};
use crate::ports::{BlobMetadata, BlobSink, Pin, STAGED_BLOB_LIFE, StagedBlob, StoreError};

/// Our folder in the content store's root.
pub(super) const STAGING_FOLDER: &str = "lighterman-staging";

/// For the lease under which a commit is finished for nobody in particular: whoever wanted the blob may hold it still, and finds it then. It is
/// released at once; this is for a kill in between.
const SWEEP_LEASE_LIFE: Duration = Duration::from_secs(60);

pub(super) struct ContainerdStagedBlob {
    store: ContainerdStore,
    digest: Digest,
    pin: Pin,
    file: Arc<StagingFile>,
    /// Until it is a blob or is thrown away. Locked while it is committed.
    open: Mutex<Option<Arc<IngestSlot>>>,
}

impl ContainerdStore {
    pub(super) async fn begin_staged(
        &self,
        digest: Digest,
        size: u64,
        pin: &Pin,
    ) -> Result<ContainerdStagedBlob, StoreError> {
        let slot = IngestSlot::take(self, digest)?;
        // Before the look: what is found is held, and so is what comes.
        self.add_to_pin(pin, "content".into(), digest.to_string()).await?;
        if self.find_blob(digest).await?.is_some() {
            return Err(StoreError::AlreadyExists(digest));
        }
        let path = self.staging_folder().await?.join(digest.hex());
        // Whoever has it may be linking it right now.
        let at = path.clone();
        if blocking(move || is_locked(&at).unwrap_or(false)).await? {
            return Err(StoreError::Busy(digest));
        }
        if let Some(linked) = self.size_if_linked(&path).await?
            && self.adopt_leftover(&slot, &path, linked, pin).await?
        {
            // What cannot be removed is swept.
            blocking(move || std::fs::remove_file(path).unwrap_or_default()).await?;
            return Err(StoreError::AlreadyExists(digest));
        }
        let at = path.clone();
        let opened = blocking(move || StagingFile::open(&at, size)).await?;
        let file = Arc::new(opened.map_err(|error| staging_error(digest, &path, &error))?);
        Ok(ContainerdStagedBlob { store: self.clone(), digest, pin: pin.clone(), file, open: Mutex::new(Some(slot)) })
    }

    /// Where files are staged: in the content store's root, else in the folder that was configured.
    async fn staging_folder(&self) -> Result<PathBuf, StoreError> {
        let mut why = None;
        for folder in self.staging_folders().await? {
            let made = folder.clone();
            match blocking(move || create_staging_folder(&made)).await? {
                Ok(()) => return Ok(folder),
                Err(error) => why = Some(format!("{}: {error}", folder.display())),
            }
        }
        let why = why.unwrap_or_else(|| "containerd's content store cannot be seen, and no other folder is set".into());
        Err(StoreError::Other(format!("nowhere to stage a blob: {why}")))
    }

    /// All that may have something in them, the preferred one first.
    async fn staging_folders(&self) -> Result<Vec<PathBuf>, StoreError> {
        let in_root = self.content_root().await?.map(|root| root.join(STAGING_FOLDER));
        Ok(in_root.into_iter().chain(self.state.staging.clone()).collect())
    }

    async fn size_if_linked(&self, path: &Path) -> Result<Option<u64>, StoreError> {
        let path = path.to_owned();
        blocking(move || std::fs::symlink_metadata(path).ok().filter(|file| file.nlink() > 1).map(|file| file.len()))
            .await
    }

    /// Removes what was staged and not taken up again within its time, and what has become a blob.
    pub(super) async fn sweep_staged(&self) -> Result<(), StoreError> {
        for folder in self.staging_folders().await? {
            let at = folder.clone();
            let found = blocking(move || leftovers(&at)).await?;
            for left in found.map_err(|error| StoreError::Other(format!("{}: {error}", folder.display())))? {
                self.sweep_leftover(&folder, &left).await?;
            }
        }
        Ok(())
    }

    async fn sweep_leftover(&self, folder: &Path, left: &Leftover) -> Result<(), StoreError> {
        let path = folder.join(&left.name);
        let digest = left.name.to_str().and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
        let mut is_over = left.age > STAGED_BLOB_LIFE;
        let slot = match digest.map(|digest| IngestSlot::take(self, digest)) {
            Some(Err(_)) => return Ok(()),
            slot => slot.and_then(Result::ok),
        };
        let taken = path.clone();
        if blocking(move || is_locked(&taken).unwrap_or(true)).await? {
            return Ok(());
        }
        if let Some(slot) = &slot {
            is_over |= self.find_blob(slot.digest()).await?.is_some();
            if !is_over && let Some(size) = self.size_if_linked(&path).await? {
                let pin = self.create_lease(SWEEP_LEASE_LIFE).await?;
                let finished = self.adopt_leftover(slot, &path, size, &pin).await;
                self.delete_lease(&pin, false).await?;
                is_over = finished?;
            }
        }
        match is_over {
            // What cannot be removed is tried again at the next sweep.
            true => blocking(move || std::fs::remove_file(path).unwrap_or_default()).await,
            false => Ok(()),
        }
    }
}

fn staging_error(digest: Digest, path: &Path, error: &io::Error) -> StoreError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full(digest),
        // Another process has it, or what a dropped one had begun to write is not over yet.
        io::ErrorKind::WouldBlock => StoreError::Busy(digest),
        _ => StoreError::Other(format!("{}: {error}", path.display())),
    }
}

impl ContainerdStagedBlob {
    fn io_error(&self, error: &io::Error) -> StoreError {
        staging_error(self.digest, self.file.path(), error)
    }

    /// Linked where that works, else sent: the first is an optimisation, the second always works.
    async fn record(
        &self,
        slot: &Arc<IngestSlot>,
        proof: BlobProof,
        remembered: &BlobMetadata,
    ) -> Result<(), StoreError> {
        let store = &self.store;
        let root = store.content_root().await?.filter(|root| self.file.path().starts_with(root.join(STAGING_FOLDER)));
        // An empty blob begins at its end in any case, so nothing is known of it.
        if let Some(root) = root.filter(|_| self.file.size() > 0)
            && store.ingest_mode().await? == Some(IngestMode::Linked)
        {
            match store.adopt(slot, &self.file, &root, &self.pin, remembered).await? {
                Ok(()) => return Ok(()),
                Err(AdoptionError(why)) => store.record_adoption_error(why).await,
            }
        }
        self.send(slot, proof, remembered).await
    }

    /// Once more where a file with other bytes was in the way; that one is gone then.
    async fn send(
        &self,
        slot: &Arc<IngestSlot>,
        proof: BlobProof,
        remembered: &BlobMetadata,
    ) -> Result<(), StoreError> {
        for _ in 0..2 {
            let mut writer = match self.store.begin_checked_write(Arc::clone(slot), self.file.size(), &self.pin).await {
                Err(StoreError::AlreadyExists(digest)) => return self.store.add_labels(digest, remembered).await,
                writer => writer?,
            };
            let mut offset = 0;
            while offset < self.file.size() {
                let bytes = self.file.read_at(offset, MESSAGE_SIZE).await.map_err(|error| self.io_error(&error))?;
                offset += bytes.len() as u64;
                writer.append(&[bytes]).await?;
            }
            if writer.finish(&proof, remembered).await? == CommitOutcome::Blob {
                return Ok(());
            }
        }
        Err(StoreError::Other(format!("containerd keeps other bytes than were sent for {}", self.digest)))
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

    async fn read_at(&self, offset: u64, most: usize) -> Result<Bytes, StoreError> {
        self.file.read_at(offset, most).await.map_err(|error| self.io_error(&error))
    }

    async fn commit(&self, proof: BlobProof, remembered: &BlobMetadata) -> Result<(), StoreError> {
        let (digest, size) = (self.digest, self.file.size());
        if proof.digest() != digest || proof.size() != size {
            let (proved, length) = (proof.digest(), proof.size());
            return Err(StoreError::Other(format!(
                "the proof is for {length} bytes of {proved}, staged were {size} of {digest}"
            )));
        }
        let mut open = self.open.lock().await;
        let closed = || StoreError::Other(format!("{digest} is not being written any more"));
        let slot = open.as_ref().ok_or_else(closed)?;
        let file = Arc::clone(&self.file);
        blocking(move || file.seal()).await?.map_err(|error| self.io_error(&error))?;
        self.record(slot, proof, remembered).await?;
        // Only now: as long as there was no record, this name kept the file.
        let file = Arc::clone(&self.file);
        blocking(move || file.remove()).await?;
        *open = None;
        self.store.changed();
        Ok(())
    }

    async fn abandon(&self) {
        let mut open = self.open.lock().await;
        if open.is_some() {
            let file = Arc::clone(&self.file);
            // It panics nowhere; and then the file is swept later.
            let _ = blocking(move || file.remove()).await;
        }
        *open = None;
    }
}
