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

use std::future::ready;
use std::io;
use std::path::Path;

use bytes::Bytes;

use super::ContainerdStore;
use super::adoption::{STAGING_FOLDER, WRONG_EXTENSION, has_digest, remove_wrong_file};
use super::content::blocking;
use super::ingest::IngestSlot;
use super::reader::ApiReader;
use super::writer::MESSAGE_SIZE;
use crate::files::{blob_path, create_staging_folder};
use crate::oci::{BlobProof, Digest, Hasher};
use crate::ports::{BlobMetadata, BlobReader as _, Pin, StoreError, verify_document};

impl ContainerdStore {
    /// Sends a document, which the pin holds through its name: a renewal during the write includes
    /// the blob.
    pub(super) async fn send_document(
        &self,
        bytes: Bytes,
        proof: BlobProof,
        metadata: &BlobMetadata,
        pin: &Pin,
    ) -> Result<(), StoreError> {
        verify_document(&bytes, proof)?;
        self.add_to_pin(pin, "content".into(), proof.digest().to_string()).await?;
        let slot = IngestSlot::take(self, proof.digest())?;
        let read = |offset| {
            let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
            ready(Ok(bytes.slice(begin..bytes.len().min(begin + MESSAGE_SIZE))))
        };
        self.send_blob(&slot, proof.size(), metadata, pin, read).await
    }

    /// Sends a blob, and once more after a stray file with other bytes was discarded. The result is
    /// never a stray file. An existing blob only gets the metadata.
    pub(super) async fn send_blob<F: Future<Output = Result<Bytes, StoreError>>>(
        &self,
        slot: &IngestSlot,
        size: u64,
        metadata: &BlobMetadata,
        pin: &Pin,
        read: impl Fn(u64) -> F,
    ) -> Result<(), StoreError> {
        let digest = slot.digest();
        for _ in 0..2 {
            let is_stray_free = self.remove_stray(digest).await?;
            match self.send_once(slot, size, metadata, pin, &read).await {
                Err(StoreError::AlreadyExists(_)) => return self.add_labels(digest, metadata).await,
                sent => sent?,
            }
            if is_stray_free && self.has_file(digest).await? || self.is_intact(digest, size).await? {
                return Ok(());
            }
            tracing::warn!(%digest, "containerd made a record of a stray file with other bytes; the file is discarded");
            self.discard_blob(digest, pin).await?;
        }
        Err(StoreError::Other(format!("containerd keeps other bytes than were sent for {digest}")))
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

    /// Whether the visible folder has the blob's file. A missing file means that containerd uses
    /// another folder.
    async fn has_file(&self, digest: Digest) -> Result<bool, StoreError> {
        let Some(root) = self.content_root().await? else { return Ok(false) };
        blocking(move || blob_path(&root, digest).exists()).await
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
