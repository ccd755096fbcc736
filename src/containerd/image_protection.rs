//! Image records that the kubelet does not collect.
//!
//! CRI reports an image as pinned when any record of the image has the label
//! `io.cri-containerd.pinned=pinned` (containerd 1.7 and later, `internal/cri/labels`). The
//! kubelet's image collection skips pinned images (`pkg/kubelet/images/image_gc_manager.go`). A
//! lease would not help: it holds content alone, and the kubelet removes the record. A pull of the
//! same name through CRI replaces every label of the record, so the caller checks at intervals.

use std::collections::HashMap;

use async_trait::async_trait;
use containerd_client::services::v1::{Image, ListImagesRequest, UpdateImageRequest};
use containerd_client::tonic::{Code, Status};

use super::ContainerdStore;
use crate::decide::own_image::Protection;
use crate::oci::Reference;
use crate::ports::{ProtectedImages, StoreError};

/// The label that CRI reads.
const PINNED: &str = "io.cri-containerd.pinned";
const PINNED_VALUE: &str = "pinned";
/// Marks a record whose label [`PINNED`] is this program's.
const PROTECTS_LABEL: &str = "lighterman.dev/protects";
const PROTECTS_VALUE: &str = "own-image";

impl ContainerdStore {
    /// Writes both labels; an empty value removes a label. The mask leaves other labels and the
    /// target unchanged. The request has a target all the same: containerd 1.7 to 2.4 read the
    /// target before the mask (`services/images/helpers.go`), and crash without a target.
    async fn label_protection(&self, record: Image, pinned: &str, protects: &str) -> Result<(), Status> {
        let Image { name, target, .. } = record;
        let labels =
            HashMap::from([(PINNED.to_owned(), pinned.to_owned()), (PROTECTS_LABEL.to_owned(), protects.to_owned())]);
        let image = Some(Image { name, labels, target: Some(target.unwrap_or_default()), ..Image::default() });
        let mut update = UpdateImageRequest { image, update_mask: None, source_date_epoch: None };
        update.update_mask.get_or_insert_default().paths =
            [PINNED, PROTECTS_LABEL].map(|label| format!("labels.{label}")).into();
        self.client.call(self.client.images().update(self.client.request(update))).await?;
        self.record_change();
        Ok(())
    }

    /// `None` without a record of this name.
    async fn image_record(&self, name: &str) -> Result<Option<Image>, StoreError> {
        match self.get_image(name).await {
            Err(status) if status.code() == Code::NotFound => Ok(None),
            found => found.map_err(|status| self.client.store_error(&status)),
        }
    }
}

#[async_trait]
impl ProtectedImages for ContainerdStore {
    async fn protected_images(&self) -> Result<Protection, StoreError> {
        let filters = vec![format!("labels.\"{PINNED}\"=={PINNED_VALUE}")];
        let request = self.client.request(ListImagesRequest { filters });
        let listed = self.client.call(self.client.images().list(request)).await;
        let images = listed.map_err(|status| self.client.store_error(&status))?.images;
        let mut protection = Protection::default();
        for image in images {
            // This program marks only names that are references.
            let Ok(name) = image.name.parse::<Reference>() else { continue };
            let is_ours = image.labels.get(PROTECTS_LABEL).is_some_and(|value| value == PROTECTS_VALUE);
            if is_ours {
                protection.ours.insert(name)
            } else {
                protection.others.insert(name)
            };
        }
        Ok(protection)
    }

    async fn protect_image(&self, image: &Reference) -> Result<(), StoreError> {
        let name = image.to_string();
        let record = self.image_record(&name).await?;
        let record = record.ok_or_else(|| StoreError::Other(format!("no image record {name} exists to protect")))?;
        if record.labels.contains_key(PINNED) {
            return Ok(());
        }
        let labeled = self.label_protection(record, PINNED_VALUE, PROTECTS_VALUE).await;
        labeled.map_err(|status| self.client.store_error(&status))
    }

    async fn release_image(&self, image: &Reference) -> Result<(), StoreError> {
        let record = self.image_record(&image.to_string()).await?;
        let Some(record) = record.filter(|record| record.labels.contains_key(PROTECTS_LABEL)) else { return Ok(()) };
        match self.label_protection(record, "", "").await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            labeled => labeled.map_err(|status| self.client.store_error(&status)),
        }
    }
}
