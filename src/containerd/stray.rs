//! Files among containerd's blobs that no record names, where a blob is sent through the content API.
//!
//! A commit that finds the blob's file there throws away the bytes that were sent, makes a record of the file as it is, and reports success
//! (content/local/writer.go and metadata/content.go, `Commit`; the same in 1.7 and 2). Under the policy `isolated` nothing before the commit
//! shows that there is such a file. Power loss and other tools leave them.
//!
//! Where the files can be seen, a file without a record is hashed before the blob is sent, and removed when its bytes are wrong. What could
//! not be seen or removed is hashed once after the commit, and discarded by containerd itself.

use std::io;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::ContainerdStore;
use super::adoption::{WRONG, is_right, set_aside};
use super::content::blocking;
use super::reader::ApiReader;
use super::staging::STAGING;
use super::writer::{MESSAGE, Slot, Writer};
use crate::files::{blob_path, staging_folder};
use crate::oci::{Digest, Hasher, Verified};
use crate::ports::{BlobReader as _, BlobSink, BlobWriter, Pin, Remembered, StoreError};

/// A write through the content API whose result is the blob, whatever file was there.
pub(super) struct CheckedWriter {
    writer: Writer,
    store: ContainerdStore,
    digest: Digest,
    size: u64,
    pin: Pin,
    /// No file with wrong bytes was in the way when the write began.
    was_clear: bool,
}

/// What a commit has made a record of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Committed {
    /// The bytes that were sent.
    Blob,
    /// A file with other bytes. It was discarded, and the blob can be sent again.
    Stray,
}

impl ContainerdStore {
    pub(super) async fn begin_checked(
        &self,
        slot: Arc<Slot>,
        size: u64,
        pin: &Pin,
    ) -> Result<CheckedWriter, StoreError> {
        let digest = slot.digest();
        let was_clear = self.clear(digest).await?;
        let writer = self.begin_write_in(slot, size, pin).await?;
        Ok(CheckedWriter { writer, store: self.clone(), digest, size, pin: pin.clone(), was_clear })
    }

    /// Removes a file of the blob's name that no record of ours names and whose bytes are wrong. False where the file cannot be seen or removed.
    async fn clear(&self, digest: Digest) -> Result<bool, StoreError> {
        let Some(root) = self.content_root().await? else { return Ok(false) };
        let path = blob_path(&root, digest);
        let at = path.clone();
        // A blob with a record is not written: its file is not looked at here.
        if !blocking(move || at.exists()).await? || self.info(digest).await?.is_some() {
            return Ok(true);
        }
        match blocking(move || clear(&path, &root.join(STAGING), digest)).await? {
            Ok(()) => Ok(true),
            Err(error) => {
                tracing::debug!(%digest, %error, "a file that no record names cannot be checked or removed");
                Ok(false)
            }
        }
    }

    /// Whether containerd reads the blob's own bytes back.
    async fn reads_back(&self, digest: Digest, size: u64) -> Result<bool, StoreError> {
        let mut reader = ApiReader::new(self.link.clone(), digest, size);
        let mut hasher = Hasher::default();
        while hasher.size() < size {
            match reader.read_at(hasher.size(), MESSAGE).await {
                Ok(bytes) if bytes.is_empty() => return Ok(false),
                Ok(bytes) => hasher.update(&bytes),
                Err(error) if error.is_retryable() => return Err(error),
                // The file is shorter.
                Err(_) => return Ok(false),
            }
        }
        Ok(hasher.verify(digest, size).is_ok())
    }
}

fn clear(path: &Path, staging: &Path, digest: Digest) -> io::Result<()> {
    if is_right(path, digest)? {
        return Ok(());
    }
    staging_folder(staging)?;
    set_aside(path, &staging.join(digest.hex()).with_extension(WRONG), digest)
}

impl CheckedWriter {
    /// Commits, and says what became of it.
    pub(super) async fn finish(self, proof: &Verified, remembered: &Remembered) -> Result<Committed, StoreError> {
        let Self { writer, store, digest, size, pin, was_clear } = self;
        writer.commit(proof, remembered).await?;
        if was_clear && store.has_file(digest).await? || store.reads_back(digest, size).await? {
            return Ok(Committed::Blob);
        }
        tracing::warn!(%digest, "a file among containerd's blobs, which no record named, had other bytes; it is discarded");
        store.discard_blob(digest, &pin).await?;
        Ok(Committed::Stray)
    }
}

impl ContainerdStore {
    /// Whether the blob's file stands in the folder that is seen here. If not, the folder is another one than containerd's.
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
    async fn commit(self: Box<Self>, proof: Verified, remembered: &Remembered) -> Result<(), StoreError> {
        let digest = self.digest;
        match self.finish(&proof, remembered).await? {
            Committed::Blob => Ok(()),
            Committed::Stray => Err(StoreError::Other(format!(
                "a file of the name of {digest} had other bytes; it was removed, and the next try writes the blob"
            ))),
        }
    }
}
