//! The exclusive right to write a blob, and the write of a document: to a file in `ingest/`, which
//! is renamed once the file is complete and on disk.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::MutexGuard;

use super::{BLOBS, Folder, INGEST, io_error, write_synced};
use crate::files::{blob_path, sync_folder};
use crate::oci::Digest;
use crate::ports::{BlobMetadata, StoreError};

/// Exclusive right to write a blob.
pub(super) struct WriteSlot {
    folder: Arc<Folder>,
    digest: Digest,
}

impl WriteSlot {
    pub(super) fn take(folder: &Arc<Folder>, digest: Digest) -> Result<Self, StoreError> {
        let slot = || Self { folder: Arc::clone(folder), digest };
        folder.writing().insert(digest).then(slot).ok_or(StoreError::Busy(digest))
    }
}

impl Drop for WriteSlot {
    fn drop(&mut self) {
        self.folder.writing().remove(&self.digest);
    }
}

impl Folder {
    /// Writes a verified document, or adds the metadata to an existing blob. The metadata comes
    /// before the rename: a visible blob has both.
    pub(super) fn put(&self, slot: &WriteSlot, bytes: &[u8], metadata: &BlobMetadata) -> Result<(), StoreError> {
        let (digest, staged) = (slot.digest, self.staging_path(slot.digest));
        let not_written = |error| {
            // The next opening of the folder sweeps a file that stays.
            let _ = fs::remove_file(&staged);
            self.write_error(digest, &error)
        };
        let is_absent = self.blob(digest)?.is_none();
        if is_absent {
            write_synced(&staged, bytes).map_err(not_written)?;
        }
        let folder_guard = self.lock();
        self.add_metadata(&folder_guard, digest, metadata)?;
        if is_absent {
            fs::rename(&staged, blob_path(&self.root, digest)).map_err(not_written)?;
            sync_folder(&self.path(BLOBS)).map_err(not_written)?;
        }
        drop(folder_guard);
        self.record_change();
        Ok(())
    }

    fn writing(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.writing.lock()
    }

    fn staging_path(&self, digest: Digest) -> PathBuf {
        self.path(INGEST).join(digest.hex())
    }

    pub(super) fn write_error(&self, digest: Digest, error: &io::Error) -> StoreError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full(digest),
            // A write of a dropped staged blob is still running on a blocking thread.
            io::ErrorKind::WouldBlock => StoreError::Busy(digest),
            _ => io_error(&self.staging_path(digest), error),
        }
    }
}
