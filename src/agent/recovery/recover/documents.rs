//! The documents between an image's name and the manifest of this platform. Each document is
//! parsed, then committed with the GC labels of its children.

use super::{FetchedBlob, ImageDocuments, RecoverError, Recoverer};
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Document, Index, MAX_INDEX_DEPTH, Manifest, Platform, Reference};
use crate::ports::{FetchError, Pin};

impl Recoverer {
    /// Fetches the indexes, if any, and the manifest of this platform.
    ///
    /// containerd follows one entry of each index, an index inside an index too
    /// (`images.Manifest`). The bound here is [`MAX_INDEX_DEPTH`].
    pub(super) async fn fetch_documents(
        &self,
        reference: &Reference,
        image_digest: Digest,
        providers: &[PeerId],
        pin: &Pin,
    ) -> Result<ImageDocuments, RecoverError> {
        let (mut document, fetched) = self.blob_fetcher.document(reference, image_digest, providers, pin).await?;
        let target = fetched.descriptor.clone();
        let mut documents = vec![fetched];
        let (mut indexes, mut has_platform) = (0, true);
        loop {
            let index = match document {
                Document::Manifest(manifest) => {
                    if !has_platform {
                        self.check_config(reference, &target, &manifest, providers).await?;
                    }
                    return Ok(ImageDocuments { target, documents, manifest });
                }
                Document::Index(index) => index,
            };
            indexes += 1;
            if indexes > MAX_INDEX_DEPTH {
                let innermost = documents.last().map_or(target.digest, |blob| blob.descriptor.digest);
                return Err(RecoverError::NestedIndex { digest: innermost });
            }
            let entry = self.select(&target, &index)?;
            if let Some(sized) = index.select_for_size(&self.platform).filter(|sized| sized.digest != entry.digest) {
                documents.extend(self.fetch_sized_documents(reference, sized, providers, pin).await?);
            }
            has_platform = entry.platform.is_some();
            let fetched = self.blob_fetcher.document(reference, entry.digest, providers, pin).await;
            let (child, fetched) = fetched.map_err(|error| self.name_other_platforms(reference, providers, error))?;
            // The runtime trusts the media type in the index, and refuses a document of another
            // type.
            child
                .check_media_type(&entry.media_type)
                .map_err(|source| RecoverError::Document { digest: entry.digest, source })?;
            documents.push(fetched);
            document = child;
        }
    }

    /// Fetches the documents of another platform that CRI reads to compute the size of an image
    /// whose own entry names no platform. CRI reads none of their configs and layers. Without these
    /// documents the kubelet's own pull fails too (`get image compressed resource size`, seen on
    /// containerd 1.7, 2.3 and 2.4).
    async fn fetch_sized_documents(
        &self,
        reference: &Reference,
        entry: &Descriptor,
        providers: &[PeerId],
        pin: &Pin,
    ) -> Result<Vec<FetchedBlob>, RecoverError> {
        let (mut documents, mut digest) = (Vec::new(), entry.digest);
        for _ in 0..=MAX_INDEX_DEPTH {
            let (document, fetched) = match self.blob_fetcher.document(reference, digest, providers, pin).await {
                Err(RecoverError::Fetch { digest, attempts }) if is_absent_everywhere(&attempts) => {
                    return Err(RecoverError::BlobsWithoutProvider {
                        reference: reference.clone(),
                        blobs: vec![digest],
                    });
                }
                result => result?,
            };
            documents.push(fetched);
            match document {
                Document::Manifest(_) => return Ok(documents),
                Document::Index(index) => match index.select_for_size(&self.platform) {
                    Some(entry) => digest = entry.digest,
                    None => return Ok(documents),
                },
            }
        }
        Err(RecoverError::NestedIndex { digest })
    }

    /// Verifies the platform in the config of a manifest that an index names without a platform.
    /// containerd tries no second entry, so one config is read for an image.
    async fn check_config(
        &self,
        reference: &Reference,
        target: &Descriptor,
        manifest: &Manifest,
        providers: &[PeerId],
    ) -> Result<(), RecoverError> {
        let digest = manifest.config.digest;
        let config = self.blob_fetcher.peek(digest, providers).await;
        let config = config.map_err(|error| self.name_other_platforms(reference, providers, error))?;
        let offered: Platform = serde_json::from_slice(&config)
            .map_err(|source| RecoverError::Document { digest, source: source.into() })?;
        match self.platform.preference(&offered) {
            Some(_) => Ok(()),
            None => Err(self.no_platform(target)),
        }
    }

    /// Replaces the error when no provider of the image has the document of this platform: the
    /// providers run the image on other platforms.
    fn name_other_platforms(&self, reference: &Reference, providers: &[PeerId], error: RecoverError) -> RecoverError {
        match error {
            RecoverError::Fetch { digest, attempts } if !providers.is_empty() && is_absent_everywhere(&attempts) => {
                RecoverError::OtherPlatforms {
                    reference: reference.clone(),
                    platform: Box::new(self.platform.clone()),
                    digest,
                }
            }
            error => error,
        }
    }

    fn no_platform(&self, target: &Descriptor) -> RecoverError {
        RecoverError::NoPlatform { digest: target.digest, platform: self.platform.clone() }
    }

    /// The entry of the index that the runtime of this node selects.
    fn select<'a>(&self, target: &Descriptor, index: &'a Index) -> Result<&'a Descriptor, RecoverError> {
        index.select(&self.platform).ok_or_else(|| self.no_platform(target))
    }
}

/// Whether every asked peer lacks the blob.
fn is_absent_everywhere(attempts: &[FetchError]) -> bool {
    attempts.iter().all(|error| matches!(error, FetchError::Absent { .. }))
}
