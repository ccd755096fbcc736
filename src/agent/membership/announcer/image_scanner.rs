//! Finds the whole images of this node, whose names can be announced.
//!
//! The index or manifest of every record is read and hashed once, because content never changes
//! under its digest.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::agent::recovery::blob_fetcher::LocalBlob;
use crate::decide::image_completeness::{DocumentNeeds, MissingContent, missing_content, missing_layers_cause};
use crate::model::{InventoryItem, MAX_ITEMS};
use crate::oci::{Digest, Document, MAX_INDEX_DEPTH, Reference, Repository, RootFs};
use crate::ports::{BlobInfo, Blobs, ContentStore, ImageRecord, Snapshots, StoreError};

/// Digests kept of all documents together, 8 MiB: four for each item that may be announced. A layer
/// of several images is one item. Images beyond the limit are not announced.
const MAX_DIGESTS: usize = 4 * MAX_ITEMS;

/// State of the scans of this node's images.
#[derive(Default)]
pub(super) struct ImageScanner {
    needs: HashMap<Digest, DocumentNeeds>,
    /// Digests in `needs`.
    digest_count: usize,
    /// Incomplete images and their reasons. A reason costs a call to every snapshotter, so a reason
    /// is kept until the image lacks something else.
    incomplete: HashMap<Digest, (MissingContent, String)>,
}

/// Result of a scan.
#[derive(Debug, Default)]
pub(super) struct ImageScan {
    /// Names of the whole images.
    pub(super) names: BTreeSet<InventoryItem>,
    /// Documents whose bytes do not match their digest.
    pub(super) damaged: HashSet<Digest>,
    /// Images that have a record and are whole for no platform.
    pub(super) incomplete: usize,
    /// Incomplete images by reason.
    pub(super) reasons: BTreeMap<String, usize>,
}

/// The names of an index or manifest.
#[derive(Default)]
struct ImageNames {
    has_record: bool,
    names: BTreeSet<(Repository, Option<String>)>,
}

/// Result of reading a document.
enum DocumentRead {
    Document(DocumentNeeds),
    Damaged,
    Absent,
}

impl ImageScanner {
    /// Scans all images.
    ///
    /// # Errors
    /// When the store cannot be reached.
    pub(super) async fn scan(
        &mut self,
        store: &dyn ContentStore,
        blobs: &[BlobInfo],
        records: &[ImageRecord],
    ) -> Result<ImageScan, StoreError> {
        let present: HashSet<_> = blobs.iter().map(|blob| blob.digest).collect();
        self.needs.retain(|digest, _| present.contains(digest));
        self.digest_count = self.needs.values().map(digests_of).sum();
        let mut scan = ImageScan::default();
        let mut incomplete = HashSet::new();
        for (image_digest, ImageNames { has_record, names }) in named_images(blobs, records) {
            self.read_tree(store, image_digest, &present, &mut scan.damaged).await?;
            match missing_content(image_digest, |digest| self.needs.get(&digest), |digest| present.contains(&digest)) {
                None => {
                    let name = |(repository, tag)| InventoryItem::Image(repository, tag, image_digest);
                    scan.names.extend(names.into_iter().map(name));
                }
                // An artifact is not an incomplete image.
                Some(MissingContent::NoImage) => {}
                Some(lack) if has_record => {
                    incomplete.insert(image_digest);
                    if self.incomplete.get(&image_digest).is_none_or(|(known, _)| *known != lack)
                        && let Some(reason) = reason(store, lack).await
                    {
                        let name = names.first().map(|(repository, _)| repository.to_string());
                        tracing::info!(digest = %image_digest, repository = name, %lack, reason, "an image is not announced");
                        self.incomplete.insert(image_digest, (lack, reason));
                    }
                }
                Some(_) => {}
            }
        }
        scan.incomplete = incomplete.len();
        self.incomplete.retain(|image_digest, _| incomplete.contains(image_digest));
        for (_, reason) in self.incomplete.values() {
            *scan.reasons.entry(reason.clone()).or_default() += 1;
        }
        Ok(scan)
    }

    /// Reads the root and the indexes and manifests below that are here, each once.
    async fn read_tree(
        &mut self,
        store: &dyn Blobs,
        image_digest: Digest,
        present: &HashSet<Digest>,
        damaged: &mut HashSet<Digest>,
    ) -> Result<(), StoreError> {
        let mut level = BTreeSet::from([image_digest]);
        for _ in 0..=MAX_INDEX_DEPTH {
            let mut nested = BTreeSet::new();
            for document in level {
                self.read_document(store, document, present, damaged).await?;
                if let Some(DocumentNeeds::AnyManifest(children)) = self.needs.get(&document) {
                    nested.extend(children.iter().filter(|child| present.contains(child)));
                }
            }
            level = nested;
        }
        Ok(())
    }

    async fn read_document(
        &mut self,
        store: &dyn Blobs,
        digest: Digest,
        present: &HashSet<Digest>,
        damaged: &mut HashSet<Digest>,
    ) -> Result<(), StoreError> {
        if !present.contains(&digest) || self.needs.contains_key(&digest) || damaged.contains(&digest) {
            return Ok(());
        }
        match read_needs(store, digest).await? {
            DocumentRead::Document(needs) if self.digest_count + digests_of(&needs) <= MAX_DIGESTS => {
                self.digest_count += digests_of(&needs);
                self.needs.insert(digest, needs);
            }
            DocumentRead::Document(_) => {
                tracing::warn!(
                    %digest,
                    limit = MAX_DIGESTS,
                    "too many digests of images; images with this document are not announced"
                )
            }
            // Read again at the next scan, because the bytes may have been replaced by then.
            DocumentRead::Damaged => {
                tracing::warn!(
                    %digest,
                    "the bytes of a manifest do not match its digest; the manifest is not announced"
                );
                damaged.insert(digest);
            }
            DocumentRead::Absent => {}
        }
        Ok(())
    }
}

/// The reason why the image lacks this content; equal reasons have equal texts. `None` while the
/// store does not answer.
async fn reason(store: &dyn ContentStore, lack: MissingContent) -> Option<String> {
    let MissingContent::Layers { missing, of, config } = lack else { return Some(lack.to_string()) };
    let top = match LocalBlob::read(store, config).await.ok()? {
        LocalBlob::Whole(bytes, _) => RootFs::parse(&bytes).ok().and_then(|rootfs| rootfs.top_chain_id()),
        LocalBlob::Absent | LocalBlob::TooLarge(_) | LocalBlob::Damaged => None,
    };
    let snapshots = match top {
        Some(top) => store.snapshots(top).await,
        None => Ok(Snapshots::default()),
    };
    let snapshots = snapshots.inspect_err(|error| tracing::debug!(%error, "cannot read the snapshotters")).ok()?;
    let Snapshots { snapshotters, discards_layers } = snapshots;
    Some(format!("layers {}", missing_layers_cause(missing, of, &snapshotters, discards_layers)))
}

/// Digests kept of one document: the document's own, and those that the document names.
fn digests_of(needs: &DocumentNeeds) -> usize {
    1 + match needs {
        DocumentNeeds::AnyManifest(manifests) => manifests.len(),
        DocumentNeeds::Blobs { config: _, layers } => 1 + layers.len(),
        DocumentNeeds::NoImage => 0,
    }
}

/// Every index and manifest with an image record or a remembered source, with its names. Names that
/// are not references are useless to other nodes: image IDs, and names that users chose.
fn named_images(blobs: &[BlobInfo], records: &[ImageRecord]) -> BTreeMap<Digest, ImageNames> {
    let mut images: BTreeMap<Digest, ImageNames> = BTreeMap::new();
    for record in records {
        let digest = record.target.digest;
        let image = images.entry(digest).or_default();
        image.has_record = true;
        match record.name.parse() {
            Ok(Reference::Tag(repository, tag)) => image.names.insert((repository, Some(tag))),
            Ok(Reference::Digest(repository, named_digest)) if named_digest == digest => {
                image.names.insert((repository, None))
            }
            _ => false,
        };
    }
    for blob in blobs.iter().filter(|blob| blob.has_children && !blob.sources.is_empty()) {
        let names = blob.sources.iter().map(|repository| (repository.clone(), None));
        images.entry(blob.digest).or_default().names.extend(names);
    }
    images
}

/// Only an unreachable store is an error: one bad sector must not stop all announcements.
async fn read_needs(store: &dyn Blobs, digest: Digest) -> Result<DocumentRead, StoreError> {
    match LocalBlob::read(store, digest).await {
        Ok(LocalBlob::Whole(bytes, _)) => {
            let document = Document::parse(&bytes);
            Ok(DocumentRead::Document(document.map_or(DocumentNeeds::NoImage, |document| DocumentNeeds::of(&document))))
        }
        Ok(LocalBlob::TooLarge(_)) => Ok(DocumentRead::Document(DocumentNeeds::NoImage)),
        Ok(LocalBlob::Absent) => Ok(DocumentRead::Absent),
        Err(error) if error.is_retryable() => Err(error),
        Ok(LocalBlob::Damaged) => Ok(DocumentRead::Damaged),
        Err(error) => {
            tracing::debug!(%digest, %error, "a manifest cannot be read");
            Ok(DocumentRead::Damaged)
        }
    }
}
