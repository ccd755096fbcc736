//! Which of this node's images are whole, so that their names can be told.
//!
//! Every record's index or manifest is read and hashed once: content never changes under its digest.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::agent::bring::Held;
use crate::decide::wholeness::{Lack, Needs, absence, lack};
use crate::model::{Item, MAX_ITEMS};
use crate::oci::{Digest, Document, MAX_INDEX_DEPTH, Reference, Repository, RootFs};
use crate::ports::{BlobInfo, ContentStore, ImageRecord, Snapshots, StoreError};

/// Most digests that are kept of all documents together, 8 MiB: four for each item that may be announced, and a layer that several
/// images share is one item. Images beyond that are not announced.
const MAX_KEPT: usize = 4 * MAX_ITEMS;

/// What is known of this node's images.
#[derive(Default)]
pub(super) struct Images {
    known: HashMap<Digest, Needs>,
    /// Digests in `known`.
    kept: usize,
    /// Incomplete images and the reason of each. A reason costs a call to every snapshotter, so
    /// the reason is kept until the image lacks something else.
    lacking: HashMap<Digest, (Lack, String)>,
}

/// What a look at the images tells.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// The names of what is whole.
    pub(super) names: BTreeSet<Item>,
    /// Documents whose bytes are not what their digest says.
    pub(super) damaged: HashSet<Digest>,
    /// Images that have a record and are not whole for anybody.
    pub(super) incomplete: usize,
    /// How many of them for which reason.
    pub(super) reasons: BTreeMap<String, usize>,
}

/// What is known of an index or manifest, and by which names.
#[derive(Default)]
struct Root {
    has_record: bool,
    names: BTreeSet<(Repository, Option<String>)>,
}

/// What reading a document gave.
enum Read {
    Document(Needs),
    Damaged,
    Gone,
}

impl Images {
    /// Looks at every image.
    ///
    /// # Errors
    /// When the store cannot be reached.
    pub(super) async fn look(
        &mut self,
        store: &dyn ContentStore,
        blobs: &[BlobInfo],
        records: &[ImageRecord],
    ) -> Result<Looked, StoreError> {
        let there: HashSet<_> = blobs.iter().map(|blob| blob.digest).collect();
        self.known.retain(|digest, _| there.contains(digest));
        self.kept = self.known.values().map(kept).sum();
        let mut looked = Looked::default();
        let mut lacking = HashSet::new();
        for (root, Root { has_record, names }) in roots(blobs, records) {
            self.learn(store, root, &there, &mut looked.damaged).await?;
            match lack(root, |digest| self.known.get(&digest), |digest| there.contains(&digest)) {
                None => {
                    let name = |(repository, tag)| Item::Image(repository, tag, root);
                    looked.names.extend(names.into_iter().map(name));
                }
                // An artifact is no image that lacks something.
                Some(Lack::NoImage) => {}
                Some(lack) if has_record => {
                    lacking.insert(root);
                    if self.lacking.get(&root).is_none_or(|(known, _)| *known != lack)
                        && let Some(reason) = reason(store, lack).await
                    {
                        let name = names.first().map(|(repository, _)| repository.to_string());
                        tracing::info!(digest = %root, repository = name, %lack, reason, "an image is not announced");
                        self.lacking.insert(root, (lack, reason));
                    }
                }
                Some(_) => {}
            }
        }
        looked.incomplete = lacking.len();
        self.lacking.retain(|root, _| lacking.contains(root));
        for (_, reason) in self.lacking.values() {
            *looked.reasons.entry(reason.clone()).or_default() += 1;
        }
        Ok(looked)
    }

    /// Reads the root, and what is there of the manifests and indexes in it, each once.
    async fn learn(
        &mut self,
        store: &dyn ContentStore,
        root: Digest,
        there: &HashSet<Digest>,
        damaged: &mut HashSet<Digest>,
    ) -> Result<(), StoreError> {
        let mut level = BTreeSet::from([root]);
        for _ in 0..=MAX_INDEX_DEPTH {
            let mut nested = BTreeSet::new();
            for document in level {
                self.learn_one(store, document, there, damaged).await?;
                if let Some(Needs::OneManifest(children)) = self.known.get(&document) {
                    nested.extend(children.iter().filter(|child| there.contains(child)));
                }
            }
            level = nested;
        }
        Ok(())
    }

    async fn learn_one(
        &mut self,
        store: &dyn ContentStore,
        digest: Digest,
        there: &HashSet<Digest>,
        damaged: &mut HashSet<Digest>,
    ) -> Result<(), StoreError> {
        if !there.contains(&digest) || self.known.contains_key(&digest) || damaged.contains(&digest) {
            return Ok(());
        }
        match read(store, digest).await? {
            Read::Document(needs) if self.kept + kept(&needs) <= MAX_KEPT => {
                self.kept += kept(&needs);
                self.known.insert(digest, needs);
            }
            Read::Document(_) => tracing::warn!(%digest, limit = MAX_KEPT, "more images than can be looked at"),
            // Read again next time: it may have been replaced by then.
            Read::Damaged => {
                tracing::warn!(%digest, "the bytes of a manifest are not what its digest says; it is not announced");
                damaged.insert(digest);
            }
            Read::Gone => {}
        }
        Ok(())
    }
}

/// Why the image lacks that, in the same words for the same reason. `None` when the store does not
/// answer now.
async fn reason(store: &dyn ContentStore, lack: Lack) -> Option<String> {
    let Lack::Layers { missing, of, config } = lack else { return Some(lack.to_string()) };
    let top = match Held::read(store, config).await.ok()? {
        Held::Whole(bytes, _) => RootFs::parse(&bytes).ok().and_then(|rootfs| rootfs.top()),
        Held::Absent | Held::TooLarge(_) | Held::Damaged => None,
    };
    let snapshots = match top {
        Some(top) => store.snapshots(top).await,
        None => Ok(Snapshots::default()),
    };
    let snapshots = snapshots.inspect_err(|error| tracing::debug!(%error, "snapshotters cannot be asked")).ok()?;
    let Snapshots { snapshotters, discards_layers } = snapshots;
    Some(format!("layers {}", absence(missing, of, &snapshotters, discards_layers)))
}

/// Digests kept of one document: its own, and those that it names.
fn kept(needs: &Needs) -> usize {
    1 + match needs {
        Needs::OneManifest(manifests) => manifests.len(),
        Needs::Blobs { config: _, layers } => 1 + layers.len(),
        Needs::NoImage => 0,
    }
}

/// Every index and manifest that a record names, or that is remembered to come from somewhere, with its names. Those that are no
/// references (image IDs, what people chose) mean nothing to another node.
fn roots(blobs: &[BlobInfo], records: &[ImageRecord]) -> BTreeMap<Digest, Root> {
    let mut roots: BTreeMap<Digest, Root> = BTreeMap::new();
    for record in records {
        let digest = record.target.digest;
        let root = roots.entry(digest).or_default();
        root.has_record = true;
        match record.name.parse() {
            Ok(Reference::Tag(repository, tag)) => root.names.insert((repository, Some(tag))),
            Ok(Reference::Digest(repository, named)) if named == digest => root.names.insert((repository, None)),
            _ => false,
        };
    }
    for blob in blobs.iter().filter(|blob| blob.has_children && !blob.sources.is_empty()) {
        let names = blob.sources.iter().map(|repository| (repository.clone(), None));
        roots.entry(blob.digest).or_default().names.extend(names);
    }
    roots
}

/// Only a store that cannot be reached is an error: one bad sector must not keep everything else from being announced.
async fn read(store: &dyn ContentStore, digest: Digest) -> Result<Read, StoreError> {
    match Held::read(store, digest).await {
        Ok(Held::Whole(bytes, _)) => {
            let document = Document::parse(&bytes);
            Ok(Read::Document(document.map_or(Needs::NoImage, |document| Needs::of(&document))))
        }
        Ok(Held::TooLarge(_)) => Ok(Read::Document(Needs::NoImage)),
        Ok(Held::Absent) => Ok(Read::Gone),
        Err(error) if error.is_retryable() => Err(error),
        Ok(Held::Damaged) => Ok(Read::Damaged),
        Err(error) => {
            tracing::debug!(%digest, %error, "a manifest cannot be read");
            Ok(Read::Damaged)
        }
    }
}
