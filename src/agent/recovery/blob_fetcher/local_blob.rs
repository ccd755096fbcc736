//! Small blobs of this node's store: read, hashed, and replaced when their bytes are wrong.
//!
//! Documents, configs and small layers are hashed before their use. Larger layers are not: reading
//! gigabytes again for every image that shares a layer costs more than the check saves. A store
//! does not list blobs of a wrong size. A layer with wrong bytes shows when containerd unpacks the
//! layer, and is then hashed (`planning` in [`crate::agent::recovery::recover`]).

use bytes::Bytes;

use super::{BlobFetcher, RecoverError};
use crate::oci::{BlobProof, Descriptor, Digest, Hasher, MAX_DOCUMENT_BYTES};
use crate::ports::{BlobMetadata, Blobs, Pin, StoreError};

/// A small blob in this node's store.
pub(in crate::agent) enum LocalBlob {
    /// The store does not have the blob.
    Absent,
    /// Longer than [`MAX_DOCUMENT_BYTES`], and not read.
    TooLarge(u64),
    /// The bytes do not hash to the digest.
    Damaged,
    /// All bytes, verified.
    Whole(Bytes, BlobProof),
}

impl LocalBlob {
    /// Reads and hashes the blob.
    ///
    /// # Errors
    /// [`StoreError`]. An absent blob is no error.
    pub(in crate::agent) async fn read(store: &dyn Blobs, digest: Digest) -> Result<Self, StoreError> {
        let mut reader = match store.open(digest).await {
            Ok(reader) => reader,
            Err(StoreError::Absent(_)) => return Ok(Self::Absent),
            Err(error) => return Err(error),
        };
        let size = reader.size();
        if size > MAX_DOCUMENT_BYTES {
            return Ok(Self::TooLarge(size));
        }
        let mut bytes = Vec::new();
        let mut hasher = Hasher::default();
        while hasher.size() < size {
            let remaining = usize::try_from(size - hasher.size()).unwrap_or(usize::MAX);
            match reader.read_at(hasher.size(), remaining).await {
                Ok(read) if read.is_empty() => break,
                Ok(read) => {
                    hasher.update(&read);
                    bytes.extend_from_slice(&read);
                }
                Err(StoreError::Absent(_)) => return Ok(Self::Absent),
                Err(error) => return Err(error),
            }
        }
        Ok(hasher.verify(digest, size).map_or(Self::Damaged, |proof| Self::Whole(bytes.into(), proof)))
    }
}

impl BlobFetcher {
    /// Whether a blob of at most [`MAX_DOCUMENT_BYTES`] is here with wrong bytes.
    pub(super) async fn is_damaged(&self, blob: &Descriptor) -> Result<bool, RecoverError> {
        if blob.size > MAX_DOCUMENT_BYTES {
            return Ok(false);
        }
        let stored = LocalBlob::read(&*self.store, blob.digest).await.map_err(RecoverError::store("reading a blob"))?;
        Ok(matches!(stored, LocalBlob::Damaged))
    }

    /// Writes a blob that is wholly in memory. Wrong bytes of the same blob are discarded first,
    /// because the right bytes are at hand.
    pub(super) async fn write_whole(
        &self,
        bytes: Bytes,
        proof: BlobProof,
        pin: &Pin,
        metadata: &BlobMetadata,
    ) -> Result<(), RecoverError> {
        let store_error = RecoverError::store;
        let digest = proof.digest();
        let stored = LocalBlob::read(&*self.store, digest).await.map_err(store_error("reading a blob"))?;
        let was_damaged = matches!(stored, LocalBlob::Damaged);
        let mut sources = Vec::new();
        if was_damaged {
            tracing::warn!(%digest, "the bytes in the content store are wrong and are replaced");
            let blob = self.store.blob(digest).await.map_err(store_error("looking for a damaged blob"))?;
            sources = blob.map(|blob| blob.sources).unwrap_or_default();
            self.store.discard(digest, pin).await.map_err(store_error("discarding a damaged blob"))?;
        }
        let put = || self.store.put(bytes.clone(), proof, metadata, pin);
        self.retry_while_busy(digest, put).await.map_err(store_error("writing a blob"))?;
        for source in sources {
            let source_metadata = BlobMetadata { source: Some(source), children: Vec::new() };
            self.store.add_metadata(digest, &source_metadata).await.map_err(store_error("labeling a blob"))?;
        }
        // A store that kept the wrong bytes must not get an image record for them.
        if was_damaged && !matches!(LocalBlob::read(&*self.store, digest).await, Ok(LocalBlob::Whole(..))) {
            let source = StoreError::Other(format!("{digest} is still damaged after a second write; check the disk"));
            return Err(RecoverError::Store { doing: "replacing a damaged blob", source });
        }
        Ok(())
    }
}
