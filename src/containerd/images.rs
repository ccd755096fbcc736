//! Image records.

use std::collections::HashMap;
use std::time::Duration;

use containerd_client::services::v1::{
    CreateImageRequest, DeleteImageRequest, GetImageRequest, Image, ListImagesRequest, UpdateImageRequest,
};
use containerd_client::tonic::{Code, Status};
use containerd_client::types;
use tokio::time::{Instant, sleep};

use super::ContainerdStore;
use crate::oci::{Descriptor, Digest};
use crate::ports::{ImageRecord, StoreError};
use crate::util::backoff::Backoff;

/// The CRI plugin sets this label when it has processed a record. Right afterwards the kubelet
/// finds the image.
const CRI_IMAGE_LABEL: &str = "io.cri-containerd.image";
const CRI_IMAGE_LABEL_VALUE: &str = "managed";
/// The only namespace that the CRI plugin reads.
const CRI_NAMESPACE: &str = "k8s.io";

/// The plugin takes a millisecond (measured), and longer on a busy node. A caller should not wait
/// longer for an image that is on the node.
const CRI_SYNC_DEADLINE: Duration = Duration::from_secs(2);
const CRI_POLL: Backoff = Backoff { first: Duration::from_millis(1), longest: Duration::from_millis(50) };

impl ContainerdStore {
    pub(super) async fn list_images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let request = self.client.request(ListImagesRequest { filters: Vec::new() });
        let listed = self.client.call(self.client.images().list(request)).await;
        let images = listed.map_err(|status| self.client.store_error(&status))?.images;
        Ok(images.into_iter().filter_map(record).collect())
    }

    /// containerd accepts a record with a missing target, so the target is looked up first. The
    /// caller's pin keeps the target.
    pub(super) async fn write_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        let digest = record.target.digest;
        self.find_blob(digest).await?.ok_or(StoreError::Absent(digest))?;
        let written = match self.create_image(record).await {
            Err(status) if status.code() == Code::AlreadyExists => self.update_image(record).await,
            created => created,
        };
        written.map_err(|status| self.client.store_error(&status))?;
        self.record_change();
        if self.is_visible_to_cri().await? && !self.wait_listed_by_cri(&record.name).await? {
            tracing::warn!(
                image = record.name,
                waited_s = CRI_SYNC_DEADLINE.as_secs(),
                "containerd's CRI plugin has not listed the image; pods may have to wait for the image"
            );
        }
        Ok(())
    }

    /// containerd 1 has no condition for a deletion, so the record is read first. A record that
    /// another process moves between the two calls is lost there, and the image is pulled again.
    /// containerd 2 compares the target itself.
    pub(super) async fn delete_image(&self, name: &str, target: Digest) -> Result<(), StoreError> {
        let to_store_error = |status: Status| self.client.store_error(&status);
        let has_target = |image: Image| record(image).is_some_and(|record| record.target.digest == target);
        let found = match self.get_image(name).await {
            Err(status) if status.code() == Code::NotFound => return Ok(()),
            found => found.map_err(to_store_error)?,
        };
        if !found.is_some_and(has_target) {
            return Ok(());
        }
        let target = Some(types::Descriptor { digest: target.to_string(), ..types::Descriptor::default() });
        let request = self.client.request(DeleteImageRequest { name: name.to_owned(), sync: false, target });
        match self.client.call(self.client.images().delete(request)).await {
            Err(status) if status.code() == Code::NotFound => return Ok(()),
            deleted => deleted.map_err(to_store_error)?,
        };
        self.record_change();
        if self.is_visible_to_cri().await? && !self.wait_dropped_by_cri(name).await? {
            tracing::warn!(
                image = name,
                waited_s = CRI_SYNC_DEADLINE.as_secs(),
                "containerd's CRI plugin still lists the removed image; the kubelet may not pull the image yet"
            );
        }
        Ok(())
    }

    async fn is_visible_to_cri(&self) -> Result<bool, StoreError> {
        Ok(self.client.namespace() == CRI_NAMESPACE && self.has_cri().await?)
    }

    pub(super) async fn get_image(&self, name: &str) -> Result<Option<Image>, Status> {
        let request = self.client.request(GetImageRequest { name: name.to_owned() });
        Ok(self.client.call(self.client.images().get(request)).await?.image)
    }

    async fn create_image(&self, record: &ImageRecord) -> Result<(), Status> {
        let image = Some(image(record));
        let request = self.client.request(CreateImageRequest { image, source_date_epoch: None });
        self.client.call(self.client.images().create(request)).await.map(|_| ())
    }

    /// Removes the plugin's label, which the plugin adds again once it has processed the new
    /// target. Other labels stay.
    async fn update_image(&self, record: &ImageRecord) -> Result<(), Status> {
        let mut update = UpdateImageRequest { image: Some(image(record)), update_mask: None, source_date_epoch: None };
        update.update_mask.get_or_insert_default().paths = vec!["target".into(), format!("labels.{CRI_IMAGE_LABEL}")];
        self.client.call(self.client.images().update(self.client.request(update))).await.map(|_| ())
    }

    /// Waits until the CRI plugin has labeled the record and lists the image. The plugin writes the
    /// label shortly before its own list.
    async fn wait_listed_by_cri(&self, name: &str) -> Result<bool, StoreError> {
        let is_listed = || async {
            let image = self.get_image(name).await?.unwrap_or_default();
            let labeled = image.labels.get(CRI_IMAGE_LABEL).is_some_and(|value| value == CRI_IMAGE_LABEL_VALUE);
            Ok(labeled && self.cri_has_image(name).await?)
        };
        poll_until(is_listed).await.map_err(|status| self.client.store_error(&status))
    }

    /// Waits until the image is gone from the CRI plugin's own list.
    async fn wait_dropped_by_cri(&self, name: &str) -> Result<bool, StoreError> {
        let is_dropped = || async { Ok(!self.cri_has_image(name).await?) };
        poll_until(is_dropped).await.map_err(|status| self.client.store_error(&status))
    }
}

/// Whether the condition becomes true within [`CRI_SYNC_DEADLINE`].
async fn poll_until<F: Future<Output = Result<bool, Status>>>(condition: impl Fn() -> F) -> Result<bool, Status> {
    let deadline = Instant::now() + CRI_SYNC_DEADLINE;
    let mut polls = 0;
    while Instant::now() < deadline {
        if condition().await? {
            return Ok(true);
        }
        sleep(CRI_POLL.wait(polls)).await;
        polls += 1;
    }
    Ok(false)
}

/// Without labels, so that an update removes the label that its mask names.
fn image(record: &ImageRecord) -> Image {
    let Descriptor { media_type, digest, size, platform: _, attestation: _ } = record.target.clone();
    let target = types::Descriptor {
        media_type,
        digest: digest.to_string(),
        size: size.cast_signed(),
        annotations: HashMap::new(),
    };
    Image { name: record.name.clone(), target: Some(target), ..Image::default() }
}

/// `None` for a digest of another algorithm (sha512) and for an invalid size.
fn record(image: Image) -> Option<ImageRecord> {
    let target = image.target?;
    let digest = target.digest.parse().ok()?;
    let size = target.size.try_into().ok()?;
    let target = Descriptor { media_type: target.media_type, digest, size, platform: None, attestation: false };
    Some(ImageRecord { name: image.name, target })
}
