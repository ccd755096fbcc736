//! The last resort: removes an image record, so that the kubelet pulls the image again.

use super::{RecoverError, Recoverer};
use crate::agent::recovery::blob_fetcher::LocalBlob;
use crate::oci::{Digest, Document, MAX_INDEX_DEPTH, Reference, RootFs};
use crate::ports::Snapshots;

impl Recoverer {
    /// Removes the records of an image whose missing content is on no node. The kubelet then pulls
    /// the image from the registry. Returns false when the records stay: no record exists, or a
    /// snapshotter has the image unpacked and new pods still start from the snapshot.
    ///
    /// # Errors
    /// [`RecoverError::Store`].
    pub(in crate::agent) async fn remove_broken_record(&self, reference: &Reference) -> Result<bool, RecoverError> {
        let Some(target) = self.recorded_target(reference).await? else { return Ok(false) };
        let snapshotters = self.snapshots_of(target).await?.snapshotters;
        if !snapshotters.is_empty() {
            tracing::warn!(
                %reference,
                snapshotters = snapshotters.join(", "),
                "a broken image keeps its record, because a snapshotter has the image unpacked"
            );
            return Ok(false);
        }
        for name in reference.record_names(target) {
            self.store.remove_image(&name, target).await.map_err(RecoverError::store("removing an image record"))?;
        }
        Ok(true)
    }

    /// The snapshotters that have the image unpacked. The runtime finds a snapshot through the
    /// image's config, so an image without its documents counts as not unpacked.
    async fn snapshots_of(&self, image_digest: Digest) -> Result<Snapshots, RecoverError> {
        let Some(config) = self.local_config(image_digest).await? else { return Ok(Snapshots::default()) };
        let Some(bytes) = self.read_local(config).await? else { return Ok(Snapshots::default()) };
        let top = RootFs::parse(&bytes).ok().and_then(|rootfs| rootfs.top_chain_id());
        let Some(top) = top else { return Ok(Snapshots::default()) };
        self.store.snapshots(top).await.map_err(RecoverError::store("looking for snapshots"))
    }

    /// The digest of this platform's config, from the documents of this node.
    async fn local_config(&self, image_digest: Digest) -> Result<Option<Digest>, RecoverError> {
        let mut digest = image_digest;
        for _ in 0..=MAX_INDEX_DEPTH {
            let Some(bytes) = self.read_local(digest).await? else { return Ok(None) };
            match Document::parse(&bytes) {
                Ok(Document::Manifest(manifest)) => return Ok(Some(manifest.config.digest)),
                Ok(Document::Index(index)) => match index.select(&self.platform) {
                    Some(entry) => digest = entry.digest,
                    None => return Ok(None),
                },
                Err(_) => return Ok(None),
            }
        }
        Ok(None)
    }

    async fn read_local(&self, digest: Digest) -> Result<Option<bytes::Bytes>, RecoverError> {
        match LocalBlob::read(&*self.store, digest).await.map_err(RecoverError::store("reading a document"))? {
            LocalBlob::Whole(bytes, _) => Ok(Some(bytes)),
            LocalBlob::Absent | LocalBlob::TooLarge(_) | LocalBlob::Damaged => Ok(None),
        }
    }
}
