//! What is in our own store: read, hashed, and replaced where its bytes are wrong.
//!
//! What is small is hashed before it is used: documents, configurations, little layers. Larger layers are not, because to read gigabytes
//! again for every image that shares them costs more than it saves. A store leaves out those whose size is wrong; one that is damaged inside
//! shows when containerd unpacks it, and is then hashed ([`crate::agent::recovery::recover`], `planning`).

use bytes::Bytes;

use super::{BlobFetcher, RecoverError};
use crate::oci::{BlobProof, Descriptor, Digest, Hasher, MAX_DOCUMENT_BYTES};
use crate::ports::{BlobMetadata, ContentStore, Pin, StoreError};

/// A small blob in our own store.
pub(in crate::agent) enum LocalBlob {
    /// It is not there.
    Absent,
    /// It is longer than [`MAX_DOCUMENT_BYTES`], and was not read.
    TooLarge(u64),
    /// Its bytes are not what its digest says.
    Damaged,
    /// All of it, proved.
    Whole(Bytes, BlobProof),
}

impl LocalBlob {
    /// Reads it and hashes it.
    ///
    /// # Errors
    /// As the store says; an absent blob is none.
    pub(in crate::agent) async fn read(store: &dyn ContentStore, digest: Digest) -> Result<Self, StoreError> {
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
            let left = usize::try_from(size - hasher.size()).unwrap_or(usize::MAX);
            match reader.read_at(hasher.size(), left).await {
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
    /// Whether a blob that is small enough to be hashed is here with wrong bytes.
    pub(super) async fn is_damaged(&self, blob: &Descriptor) -> Result<bool, RecoverError> {
        if blob.size > MAX_DOCUMENT_BYTES {
            return Ok(false);
        }
        let held = LocalBlob::read(&*self.store, blob.digest).await.map_err(RecoverError::store("reading a blob"))?;
        Ok(matches!(held, LocalBlob::Damaged))
    }

    /// Writes what is wholly in memory. What is here with wrong bytes makes room first, now that the right ones are at hand.
    pub(super) async fn write_whole(
        &self,
        bytes: Bytes,
        proof: BlobProof,
        pin: &Pin,
        remembered: &BlobMetadata,
    ) -> Result<(), RecoverError> {
        let failed = RecoverError::store;
        let digest = proof.digest();
        let held = LocalBlob::read(&*self.store, digest).await.map_err(failed("reading a blob"))?;
        let was_damaged = matches!(held, LocalBlob::Damaged);
        let mut sources = Vec::new();
        if was_damaged {
            tracing::warn!(%digest, "the bytes in the content store are wrong; they are replaced");
            let blob = self.store.blob(digest).await.map_err(failed("looking for a damaged blob"))?;
            sources = blob.map(|blob| blob.sources).unwrap_or_default();
            self.store.discard(digest, pin).await.map_err(failed("discarding a damaged blob"))?;
        }
        let create = || self.store.create(digest, proof.size(), pin);
        if let Some(mut writer) = self.open_for_writing(digest, remembered, create).await? {
            writer.append(&[bytes]).await.map_err(failed("writing a blob"))?;
            writer.commit(proof, remembered).await.map_err(failed("committing a blob"))?;
        }
        for source in sources {
            let also = BlobMetadata { source: Some(source), children: Vec::new() };
            self.store.add_metadata(digest, &also).await.map_err(failed("labelling a blob"))?;
        }
        // A store that keeps the old bytes after all must not be given an image record for them.
        if was_damaged && !matches!(LocalBlob::read(&*self.store, digest).await, Ok(LocalBlob::Whole(..))) {
            let source = StoreError::Other(format!("{digest} is damaged, and writing it again did not help"));
            return Err(RecoverError::Store { doing: "replacing a damaged blob", source });
        }
        Ok(())
    }
}
