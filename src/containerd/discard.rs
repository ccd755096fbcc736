//! Removes a blob with wrong bytes, so that the blob can be written again.
//!
//! containerd cannot overwrite a blob. A write of a recorded blob fails with `AlreadyExists`.
//! Without the record a commit finds the file in the content store's folder, drops the sent bytes,
//! and records the file as it is (content/local/writer.go, `Commit`; the same in 1.6, 1.7 and 2).
//! So the agent deletes the record and starts the collector, which removes the file. Snapshots of
//! the blob stay: the wrong bytes are not in them.

use containerd_client::services::v1::DeleteContentRequest;
use containerd_client::tonic::Code;

use super::ContainerdStore;
use super::content::blocking;
use super::labels::gc_references;
use crate::files::blob_path;
use crate::oci::Digest;
use crate::ports::{Pin, StoreError};

impl ContainerdStore {
    /// The pin takes the blob's children before the collection, so that they outlive the blob.
    pub(super) async fn discard_blob(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        let Some(info) = self.info(digest).await? else { return Ok(()) };
        for (kind, id) in gc_references(&info.labels) {
            self.add_to_pin(pin, kind, id).await?;
        }
        let delete = self.client.request(DeleteContentRequest { digest: digest.to_string() });
        match self.client.call(self.client.content().delete(delete)).await {
            Err(status) if status.code() != Code::NotFound => return Err(self.client.blob_error(digest, &status)),
            _ => {}
        }
        self.collect().await?;
        self.ensure_file_removed(digest).await
    }

    /// Another containerd namespace with the blob keeps the file, which is wrong there too.
    async fn ensure_file_removed(&self, digest: Digest) -> Result<(), StoreError> {
        let Some(root) = self.content_root().await? else { return Ok(()) };
        let path = blob_path(&root, digest);
        if blocking(move || path.exists()).await? {
            let reason = "another containerd namespace uses the same file; remove the blob there";
            return Err(StoreError::Other(format!("the damaged file of {digest} cannot be replaced: {reason}")));
        }
        Ok(())
    }
}
