//! Blobs: which are there, how to read them, what is remembered about them.

use std::io;
use std::path::Path;
use std::sync::Arc;

use containerd_client::services::v1::{Info, InfoRequest, ListContentRequest, UpdateRequest};
use containerd_client::tonic::{Code, Status};
use tokio::task::spawn_blocking;

use super::ContainerdStore;
use super::labels::additions;
use super::link::within;
use super::reader::ApiReader;
use super::writer::MESSAGE_DEADLINE;
use crate::files::{FileReader, blob_path};
use crate::oci::Digest;
use crate::ports::{BlobInfo, BlobReader, Remembered, StoreError};

impl ContainerdStore {
    pub(super) async fn find_blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        let Some(info) = self.info(digest).await? else { return Ok(None) };
        Ok(self.without_damaged(blob_info(&info).into_iter().collect()).await?.pop())
    }

    pub(super) async fn list_blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        let failed = |status: Status| self.link.failed(&status);
        let request = self.link.request(ListContentRequest { filters: Vec::new() });
        let mut answers = self.link.call(self.link.content().list(request)).await.map_err(failed)?;
        let mut blobs = Vec::new();
        while let Some(answer) = within(MESSAGE_DEADLINE, answers.message()).await.map_err(failed)? {
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
                Err(error) => tracing::debug!(%digest, %error, "reading through containerd instead of from its file"),
            }
        }
        Ok(Box::new(ApiReader::new(self.link.clone(), digest, blob.size)))
    }

    /// Adds labels and touches no other.
    pub(super) async fn add_labels(&self, digest: Digest, remembered: &Remembered) -> Result<(), StoreError> {
        let _alone = self.state.remembering.lock().await;
        let info = self.info(digest).await?.ok_or(StoreError::Absent(digest))?;
        let labels = additions(&info.labels, remembered);
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Info::default() };
        let mut update = UpdateRequest { info: Some(info), update_mask: None };
        update.update_mask.get_or_insert_default().paths = paths;
        let updated = self.link.call(self.link.content().update(self.link.request(update))).await;
        updated.map(|_| ()).map_err(|status| self.link.failed_for(digest, &status))
    }

    pub(super) async fn free_bytes_of_root(&self) -> Result<Option<u64>, StoreError> {
        let Some(root) = self.content_root().await? else { return Ok(None) };
        let stat = blocking(move || nix::sys::statvfs::statvfs(&*root)).await?;
        let stat = stat.map_err(|errno| StoreError::Other(format!("free space for containerd's content: {errno}")))?;
        Ok(Some(stat.blocks_available() * stat.fragment_size()))
    }

    async fn info(&self, digest: Digest) -> Result<Option<Info>, StoreError> {
        let request = self.link.request(InfoRequest { digest: digest.to_string() });
        match self.link.call(self.link.content().info(request)).await {
            Ok(answer) => Ok(answer.info),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.link.failed_for(digest, &status)),
        }
    }

    /// containerd answers from its records. Where the files can be seen, those with a file of another size are left out.
    async fn without_damaged(&self, blobs: Vec<BlobInfo>) -> Result<Vec<BlobInfo>, StoreError> {
        let Some(root) = self.content_root().await? else { return Ok(blobs) };
        blocking(move || blobs.into_iter().filter(|blob| !is_damaged(&root, blob)).collect()).await
    }
}

/// A file that is not there is none that we can see: the mount may be another one.
fn is_damaged(root: &Arc<Path>, blob: &BlobInfo) -> bool {
    let damaged = std::fs::metadata(blob_path(root, blob.digest)).is_ok_and(|file| file.len() != blob.size);
    if damaged {
        tracing::warn!(digest = %blob.digest, "containerd's file of this blob has another size than it says; remove the blob");
    }
    damaged
}

/// `None` for digests that we have no name for (sha512).
fn blob_info(info: &Info) -> Option<BlobInfo> {
    Some(BlobInfo { digest: info.digest.parse().ok()?, size: info.size.try_into().ok()? })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StoreError> {
    spawn_blocking(work).await.map_err(|panicked| StoreError::Other(format!("a file operation panicked: {panicked}")))
}
