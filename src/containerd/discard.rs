//! Removing a blob whose bytes are wrong, so that it can be written again.
//!
//! containerd has no way to write over a blob: its record answers `AlreadyExists`, and without the record the file in the content store's
//! folder does: a commit finds it there, drops the bytes that came, and makes a record of the file as it is (content/local/writer.go,
//! `Commit`; the same in 1.6, 1.7 and 2). So the record is deleted, and then the collector is made to run, which removes the file. Snapshots
//! that were unpacked from the blob are not touched: nothing of theirs is in it.

use containerd_client::services::v1::DeleteContentRequest;
use containerd_client::tonic::Code;

use super::ContainerdStore;
use super::content::blocking;
use super::labels::gc_references;
use crate::files::blob_path;
use crate::oci::Digest;
use crate::ports::{Pin, StoreError};

impl ContainerdStore {
    /// What only this blob keeps alive must outlive the collection: the pin takes it first.
    pub(super) async fn discard_blob(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        let Some(info) = self.info(digest).await? else { return Ok(()) };
        for (kind, id) in gc_references(&info.labels) {
            self.add_to_pin(pin, kind, id).await?;
        }
        let delete = self.link.request(DeleteContentRequest { digest: digest.to_string() });
        match self.link.call(self.link.content().delete(delete)).await {
            Err(status) if status.code() != Code::NotFound => return Err(self.link.blob_error(digest, &status)),
            _ => {}
        }
        self.collect().await?;
        self.ensure_file_removed(digest).await
    }

    /// Another containerd namespace that has the blob keeps the file, and there it is wrong as well.
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
