//! Writes a blob to a file in `ingest/`, and renames the file once it is complete and on disk.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, IoSlice, Write};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::MutexGuard;

use super::{BLOBS, Folder, INGEST, io_error};
use crate::files::{blob_path, sync_folder};
use crate::oci::{BlobProof, Digest};
use crate::ports::{BlobMetadata, BlobSink, BlobWriter, StoreError};

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

pub(super) struct LayoutWriter {
    folder: Arc<Folder>,
    digest: Digest,
    size: u64,
    file: File,
    written: u64,
    /// Dropped after [`Drop::drop`] removed the file.
    _slot: WriteSlot,
}

impl LayoutWriter {
    pub(super) fn begin(folder: Arc<Folder>, digest: Digest, size: u64) -> Result<Self, StoreError> {
        let slot = WriteSlot::take(&folder, digest)?;
        match File::create(folder.staging_path(digest)) {
            Ok(file) => Ok(Self { folder, digest, size, file, written: 0, _slot: slot }),
            Err(error) => Err(folder.write_error(digest, &error)),
        }
    }

    /// Syncs the bytes, writes the metadata, then renames the file: a visible blob has both.
    fn finish(&self, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let not_written = |error| self.folder.write_error(self.digest, &error);
        self.file.sync_all().map_err(not_written)?;
        let folder_guard = self.folder.lock();
        self.folder.add_metadata(&folder_guard, self.digest, metadata)?;
        fs::rename(self.folder.staging_path(self.digest), blob_path(&self.folder.root, self.digest))
            .map_err(not_written)?;
        sync_folder(&self.folder.path(BLOBS)).map_err(not_written)
    }
}

impl Folder {
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

#[async_trait]
impl BlobSink for LayoutWriter {
    /// Inline: a batch of 256 KiB and more goes to the page cache faster than to another thread
    /// (measured).
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        self.written += chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        if self.written > self.size {
            return Err(StoreError::Other(format!("more than {} bytes for {}", self.size, self.digest)));
        }
        write_all(&mut self.file, chunks).map_err(|error| self.folder.write_error(self.digest, &error))
    }
}

/// The standard library's `write_all_vectored`, which is not stable yet.
fn write_all(file: &mut File, chunks: &[Bytes]) -> io::Result<()> {
    let mut slices: Vec<_> = chunks.iter().map(|chunk| IoSlice::new(chunk)).collect();
    let mut rest = &mut slices[..];
    // Drops empty slices at the front: a write of empty slices returns 0, like a full disk.
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match file.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut rest, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[async_trait]
impl BlobWriter for LayoutWriter {
    async fn commit(self: Box<Self>, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        if proof.digest() != self.digest || proof.size() != self.written {
            return Err(StoreError::Other(format!(
                "the proof is for {} bytes of {}, written were {} of {}",
                proof.size(),
                proof.digest(),
                self.written,
                self.digest
            )));
        }
        let metadata = metadata.clone();
        let finished = tokio::task::spawn_blocking(move || {
            self.finish(&metadata)?;
            self.folder.record_change();
            Ok(())
        });
        finished.await.unwrap_or_else(|panicked| Err(StoreError::Other(format!("committing panicked: {panicked}"))))
    }
}

impl Drop for LayoutWriter {
    fn drop(&mut self) {
        // A committed file is gone already. The next opening of the folder sweeps a file that
        // stays.
        let _ = fs::remove_file(self.folder.staging_path(self.digest));
    }
}
