//! Lists the blobs to fetch: the absent ones, and the ones with wrong bytes on this node.

use std::collections::HashSet;

use super::{RecoverError, Recoverer};
use crate::decide::plan::{FetchPlan, plan};
use crate::oci::{Descriptor, Digest, Hasher, MAX_DOCUMENT_BYTES, Manifest};
use crate::ports::{Blobs, Pin, StoreError};

/// Bytes hashed between two yields, a millisecond of work.
const HASH_CHUNK: usize = 1 << 20;

impl Recoverer {
    /// Plans the blobs of a manifest. Small blobs are hashed before their use. Large layers are
    /// hashed here, and only with `verify_layers`: reading gigabytes for every image that shares a
    /// layer costs more than the check saves.
    pub(super) async fn plan(
        &self,
        manifest: &Manifest,
        verify_layers: bool,
        pin: &Pin,
    ) -> Result<FetchPlan, RecoverError> {
        let mut present = HashSet::new();
        for blob in std::iter::once(&manifest.config).chain(&manifest.layers) {
            let is_present =
                self.store.blob(blob.digest).await.map_err(RecoverError::store("looking for blobs"))?.is_some();
            if is_present && !(verify_layers && self.discard_if_damaged(blob, pin).await?) {
                present.insert(blob.digest);
            }
        }
        Ok(plan(manifest, |digest| present.contains(&digest)))
    }

    /// Discards a large layer with wrong bytes if a peer has the blob. Returns whether the layer
    /// was discarded and has to be fetched.
    async fn discard_if_damaged(&self, blob: &Descriptor, pin: &Pin) -> Result<bool, RecoverError> {
        let digest = blob.digest;
        if blob.size <= MAX_DOCUMENT_BYTES {
            return Ok(false);
        }
        if is_whole(&*self.store, digest, blob.size).await.map_err(RecoverError::store("hashing a layer"))? {
            return Ok(false);
        }
        if self.resolver.inventory.all_providers(digest).is_empty() {
            tracing::warn!(%digest, "a layer in the content store has wrong bytes, and no peer has the right ones");
            return Ok(false);
        }
        tracing::warn!(%digest, "a layer in the content store has wrong bytes; a peer's replace them");
        self.store.discard(digest, pin).await.map_err(RecoverError::store("discarding a damaged layer"))?;
        Ok(true)
    }
}

/// Whether all bytes of a blob are here and hash to the digest.
async fn is_whole(store: &dyn Blobs, digest: Digest, size: u64) -> Result<bool, StoreError> {
    let mut reader = match store.open(digest).await {
        Ok(reader) => reader,
        Err(StoreError::Absent(_)) => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut hasher = Hasher::default();
    while hasher.size() < size {
        match reader.read_at(hasher.size(), HASH_CHUNK).await {
            Ok(bytes) if bytes.is_empty() => break,
            Ok(bytes) => hasher.update(&bytes),
            Err(StoreError::Absent(_)) => return Ok(false),
            Err(error) => return Err(error),
        }
        tokio::task::yield_now().await;
    }
    Ok(hasher.verify(digest, size).is_ok())
}
