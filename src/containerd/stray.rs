//! Stray files: files in containerd's blob folder without a record, where a blob is sent through
//! the content API.
//!
//! A commit that finds a file of the blob's name drops the sent bytes, makes a record of the file
//! and reports success (content/local/writer.go and metadata/content.go, `Commit`; the same in 1.7
//! and 2). Under the policy `isolated` containerd shows no such file before the commit. Power loss
//! and other tools leave stray files.
//!
//! Where files can be seen, the agent hashes a stray file before the blob is sent, and removes a
//! file with wrong bytes. Where they cannot be seen or removed, the agent reads the blob back once
//! after the commit, and lets containerd discard wrong bytes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::ContainerdStore;
use super::adoption::{STAGING_FOLDER, WRONG_EXTENSION, has_digest, remove_wrong_file};
use super::content::blocking;
use super::ingest::IngestSlot;
use super::reader::ApiReader;
use super::writer::{ApiWriter, MESSAGE_SIZE};
use crate::files::{blob_path, create_staging_folder};
use crate::oci::{BlobProof, Digest, Hasher};
use crate::ports::{BlobMetadata, BlobReader as _, BlobSink, BlobWriter, Pin, StoreError};

/// A write through the content API that never leaves a stray file as the blob.
pub(super) struct CheckedWriter {
    writer: ApiWriter,
    store: ContainerdStore,
    digest: Digest,
    size: u64,
    pin: Pin,
    /// No stray file was left at the start of the write.
    is_stray_free: bool,
}

/// Result of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommitOutcome {
    /// The blob has the sent bytes.
    Blob,
    /// The blob had a stray file's bytes, which containerd has discarded. The blob can be sent
    /// again.
    Stray,
}

impl ContainerdStore {
    pub(super) async fn begin_checked_write(
        &self,
        slot: Arc<IngestSlot>,
        size: u64,
        pin: &Pin,
    ) -> Result<CheckedWriter, StoreError> {
        let digest = slot.digest();
        let is_stray_free = self.remove_stray(digest).await?;
        let writer = self.begin_write(slot, size, pin).await?;
        Ok(CheckedWriter { writer, store: self.clone(), digest, size, pin: pin.clone(), is_stray_free })
    }

    /// Removes a stray file with wrong bytes. Returns `false` when the file cannot be seen or
    /// removed.
    async fn remove_stray(&self, digest: Digest) -> Result<bool, StoreError> {
        let Some(root) = self.content_root().await? else { return Ok(false) };
        let path = blob_path(&root, digest);
        let at = path.clone();
        // A blob with a record is not written, so its file is not hashed.
        if !blocking(move || at.exists()).await? || self.info(digest).await?.is_some() {
            return Ok(true);
        }
        match blocking(move || remove_wrong_stray(&path, &root.join(STAGING_FOLDER), digest)).await? {
            Ok(()) => Ok(true),
            Err(error) => {
                tracing::debug!(%digest, %error, "a stray file cannot be checked or removed");
                Ok(false)
            }
        }
    }

    /// Whether containerd returns the blob's own bytes.
    async fn is_intact(&self, digest: Digest, size: u64) -> Result<bool, StoreError> {
        let mut reader = ApiReader::new(self.client.clone(), digest, size);
        let mut hasher = Hasher::default();
        while hasher.size() < size {
            match reader.read_at(hasher.size(), MESSAGE_SIZE).await {
                Ok(bytes) if bytes.is_empty() => return Ok(false),
                Ok(bytes) => hasher.update(&bytes),
                Err(error) if error.is_retryable() => return Err(error),
                // The file is shorter than the blob.
                Err(_) => return Ok(false),
            }
        }
        Ok(hasher.verify(digest, size).is_ok())
    }
}

fn remove_wrong_stray(path: &Path, staging: &Path, digest: Digest) -> io::Result<()> {
    if has_digest(path, digest)? {
        return Ok(());
    }
    create_staging_folder(staging)?;
    remove_wrong_file(path, &staging.join(digest.hex()).with_extension(WRONG_EXTENSION), digest)
}

impl CheckedWriter {
    /// Commits the blob and verifies the result.
    pub(super) async fn finish(self, proof: &BlobProof, metadata: &BlobMetadata) -> Result<CommitOutcome, StoreError> {
        let Self { writer, store, digest, size, pin, is_stray_free } = self;
        writer.commit(proof, metadata).await?;
        if is_stray_free && store.has_file(digest).await? || store.is_intact(digest, size).await? {
            return Ok(CommitOutcome::Blob);
        }
        tracing::warn!(%digest, "containerd made a record of a stray file with other bytes; the file is discarded");
        store.discard_blob(digest, &pin).await?;
        Ok(CommitOutcome::Stray)
    }
}

impl ContainerdStore {
    /// Whether the visible folder has the blob's file. A missing file means that containerd uses
    /// another folder.
    async fn has_file(&self, digest: Digest) -> Result<bool, StoreError> {
        let Some(root) = self.content_root().await? else { return Ok(false) };
        blocking(move || blob_path(&root, digest).exists()).await
    }
}

#[async_trait]
impl BlobSink for CheckedWriter {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        self.writer.append(chunks).await
    }
}

#[async_trait]
impl BlobWriter for CheckedWriter {
    async fn commit(self: Box<Self>, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let digest = self.digest;
        match self.finish(&proof, metadata).await? {
            CommitOutcome::Blob => Ok(()),
            CommitOutcome::Stray => Err(StoreError::Other(format!(
                "a stray file with the name of {digest} had other bytes and was removed; a retry writes the blob"
            ))),
        }
    }
}
