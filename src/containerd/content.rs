//! Lists, opens and labels blobs.

use std::io;
use std::path::Path;

use containerd_client::services::v1::{Info, InfoRequest, ListContentRequest, UpdateRequest};
use containerd_client::tonic::{Code, Status};
use tokio::task::spawn_blocking;

use super::ContainerdStore;
use super::client::{MESSAGE_DEADLINE, with_deadline};
use super::labels::{has_children, missing_labels, sources};
use super::reader::ApiReader;
use crate::files::{FileReader, blob_path};
use crate::oci::Digest;
use crate::ports::{BlobInfo, BlobMetadata, BlobReader, StoreError};

impl ContainerdStore {
    pub(super) async fn find_blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        let Some(blob) = self.info(digest).await?.as_ref().and_then(blob_info) else { return Ok(None) };
        let file = match self.content_root().await? {
            Some(root) => {
                let (digest, size) = (blob.digest, blob.size);
                blocking(move || BlobFile::of(&root, digest, size)).await?
            }
            None => BlobFile::NotVisible,
        };
        let whole = match file {
            BlobFile::Whole => true,
            BlobFile::OtherSize => false,
            BlobFile::NotVisible => self.is_readable(&blob).await?,
        };
        Ok(whole.then_some(blob))
    }

    pub(super) async fn list_blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        let to_store_error = |status: Status| self.client.store_error(&status);
        let request = self.client.request(ListContentRequest { filters: Vec::new() });
        let mut answers = self.client.call(self.client.content().list(request)).await.map_err(to_store_error)?;
        let mut blobs = Vec::new();
        while let Some(answer) = with_deadline(MESSAGE_DEADLINE, answers.message()).await.map_err(to_store_error)? {
            blobs.extend(answer.info.iter().filter_map(blob_info));
        }
        self.without_damaged(blobs).await
    }

    pub(super) async fn open_blob(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        let blob = self.find_blob(digest).await?.ok_or(StoreError::Absent(digest))?;
        if let Some(root) = self.content_root().await? {
            match FileReader::open(&root, digest).await {
                Ok(reader) => return Ok(Box::new(reader)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::debug!(%digest, %error, "reading the blob through containerd instead of from its file")
                }
            }
        }
        Ok(Box::new(ApiReader::new(self.client.clone(), digest, blob.size)))
    }

    /// Adds labels; other labels stay.
    pub(super) async fn add_labels(&self, digest: Digest, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let _guard = self.state.label_lock.lock().await;
        let info = self.info(digest).await?.ok_or(StoreError::Absent(digest))?;
        let labels = missing_labels(&info.labels, metadata);
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Info::default() };
        let mut update = UpdateRequest { info: Some(info), update_mask: None };
        update.update_mask.get_or_insert_default().paths = paths;
        let updated = self.client.call(self.client.content().update(self.client.request(update))).await;
        updated.map(|_| ()).map_err(|status| self.client.blob_error(digest, &status))
    }

    pub(super) async fn info(&self, digest: Digest) -> Result<Option<Info>, StoreError> {
        let request = self.client.request(InfoRequest { digest: digest.to_string() });
        match self.client.call(self.client.content().info(request)).await {
            Ok(answer) => Ok(answer.info),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.client.blob_error(digest, &status)),
        }
    }

    /// containerd lists records. Drops blobs without a complete file, where the files can be seen.
    async fn without_damaged(&self, blobs: Vec<BlobInfo>) -> Result<Vec<BlobInfo>, StoreError> {
        let Some(root) = self.content_root().await? else { return Ok(blobs) };
        let check_files = move || {
            let (mut whole, mut not_visible) = (Vec::new(), Vec::new());
            for blob in blobs {
                match BlobFile::of(&root, blob.digest, blob.size) {
                    BlobFile::Whole => whole.push(blob),
                    BlobFile::NotVisible => not_visible.push(blob),
                    BlobFile::OtherSize => {}
                }
            }
            (whole, not_visible)
        };
        let (mut whole, not_visible) = blocking(check_files).await?;
        let mut not_visible = not_visible.into_iter();
        while let Some(blob) = not_visible.next() {
            if self.is_readable(&blob).await? {
                // The folder is not containerd's, so the remaining files need not be there either.
                whole.push(blob);
                whole.extend(not_visible.by_ref());
            }
        }
        Ok(whole)
    }

    /// Whether containerd can read the blob's last byte. A file that is too long passes.
    async fn is_readable(&self, blob: &BlobInfo) -> Result<bool, StoreError> {
        let Some(last) = blob.size.checked_sub(1) else { return Ok(true) };
        match ApiReader::new(self.client.clone(), blob.digest, blob.size).read_at(last, 1).await {
            Ok(bytes) => Ok(!bytes.is_empty()),
            Err(error) if error.is_retryable() => Err(error),
            Err(error) => {
                tracing::debug!(digest = %blob.digest, %error, "containerd has a record of the blob, but not its bytes");
                Ok(false)
            }
        }
    }
}

/// State of a blob's file.
enum BlobFile {
    /// The size equals the record's. The bytes are not verified.
    Whole,
    /// The size differs from the record's.
    OtherSize,
    /// The file is missing, or the folder is not containerd's.
    NotVisible,
}

impl BlobFile {
    fn of(root: &Path, digest: Digest, size: u64) -> Self {
        match std::fs::metadata(blob_path(root, digest)) {
            Ok(file) if file.len() == size => Self::Whole,
            Ok(_) => Self::OtherSize,
            Err(_) => Self::NotVisible,
        }
    }
}

/// `None` for digests of other algorithms (sha512).
fn blob_info(info: &Info) -> Option<BlobInfo> {
    Some(BlobInfo {
        digest: info.digest.parse().ok()?,
        size: info.size.try_into().ok()?,
        sources: sources(&info.labels),
        has_children: has_children(&info.labels),
    })
}

pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StoreError> {
    spawn_blocking(work).await.map_err(|panicked| StoreError::Other(format!("a file operation panicked: {panicked}")))
}
