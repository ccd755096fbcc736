//! The images of this node: manifests with their layers, the records that lead to them, and the
//! pods that use them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::SystemTime;

use super::UsedImages;
use super::missing_layers::MissingLayers;
use crate::agent::recovery::blob_fetcher::LocalBlob;
use crate::decide::retain::{RetainCandidate, RetainFacts, RetainInterest};
use crate::oci::{Digest, Document, MAX_DOCUMENT_BYTES, Reference};
use crate::ports::{Blobs, ContentStore, LayerLeases, Origin, StoreError};

/// Manifests and indexes that are kept: 6 MiB at 30 layers each. A node has a few hundred. Further
/// images are not retained.
const MAX_DOCUMENTS: usize = 4096;

/// The images of this node.
#[derive(Default)]
pub(super) struct LocalImages {
    documents: HashMap<Digest, DocumentChildren>,
    images: BTreeMap<Digest, RetainFacts>,
    /// Blobs that are here.
    present: HashSet<Digest>,
    /// A name of each image, and the target of this name's record. The name that an opted-in pod
    /// uses has precedence.
    names: HashMap<Digest, (Reference, Digest)>,
    /// The image whose missing layers are being fetched.
    filling: Option<Digest>,
    /// Repositories that opted-in namespaces use, without the registry's port: containerd's label
    /// drops the port.
    repositories: BTreeSet<Origin>,
}

/// The pods that name records of an image.
#[derive(Default)]
struct RecordUse {
    opted_in: bool,
    undecided: bool,
}

/// Children of a document.
enum DocumentChildren {
    /// The manifests of an index, without attestations.
    Index(Vec<Digest>),
    /// The layers of an image with their sizes, without those that must not be distributed.
    Manifest(BTreeMap<Digest, u64>),
    /// Anything else.
    Other,
}

impl DocumentChildren {
    fn of(bytes: &[u8]) -> Self {
        match Document::parse(bytes) {
            Ok(Document::Index(index)) => {
                let manifests = index.manifests.iter().filter(|entry| !entry.attestation);
                Self::Index(manifests.map(|entry| entry.digest).collect())
            }
            Ok(Document::Manifest(manifest)) if !manifest.is_artifact() => {
                let layers = manifest.layers.iter().filter(|layer| !layer.is_foreign());
                Self::Manifest(layers.map(|layer| (layer.digest, layer.size)).collect())
            }
            Ok(Document::Manifest(_)) | Err(_) => Self::Other,
        }
    }
}

impl LocalImages {
    /// Records a newly committed blob. Returns `true` for an image's manifest.
    pub(super) async fn record_commit(
        &mut self,
        store: &dyn Blobs,
        digest: Digest,
        size: u64,
        now: SystemTime,
    ) -> Result<bool, StoreError> {
        self.present.insert(digest);
        let manifests: Vec<_> = self.images_with(digest).collect();
        let is_layer = !manifests.is_empty();
        for manifest in manifests {
            self.images.entry(manifest).or_default().last_arrival = Some(now);
        }
        if is_layer || size > MAX_DOCUMENT_BYTES {
            return Ok(false);
        }
        self.read_document(store, digest).await?;
        let is_manifest = matches!(self.documents.get(&digest), Some(DocumentChildren::Manifest(_)));
        if is_manifest {
            self.images.entry(digest).or_default().last_arrival = Some(now);
        }
        Ok(is_manifest)
    }

    /// Reads the manifests of new image records. Returns whether any was new.
    pub(super) async fn read_new_records(
        &mut self,
        store: &dyn ContentStore,
        now: SystemTime,
    ) -> Result<bool, StoreError> {
        let mut has_new = false;
        for record in store.images().await? {
            let image_digest = record.target.digest;
            if self.documents.contains_key(&image_digest) {
                continue;
            }
            self.read_document(store, image_digest).await?;
            let manifests = match self.documents.get(&image_digest) {
                Some(DocumentChildren::Index(manifests)) => manifests.clone(),
                _ => Vec::new(),
            };
            for manifest in manifests {
                self.read_document(store, manifest).await?;
            }
            for manifest in self.manifests_of(image_digest) {
                self.images.entry(manifest).or_default().last_arrival = Some(now);
                has_new = true;
            }
        }
        Ok(has_new)
    }

    /// Lists records and blobs, and updates all images.
    pub(super) async fn refresh(
        &mut self,
        store: &dyn ContentStore,
        leases: &dyn LayerLeases,
        used: &UsedImages,
        now: SystemTime,
    ) -> Result<(), StoreError> {
        let records = store.images().await?;
        let blobs = store.blobs().await?;
        self.present = blobs.iter().map(|blob| blob.digest).collect();
        self.documents.retain(|digest, _| self.present.contains(digest));
        self.repositories = used.opted_in.iter().map(|reference| Origin::of(reference.repository())).collect();
        let roots = records.iter().map(|record| record.target.digest);
        for digest in roots.chain(blobs.iter().filter(|blob| blob.has_children).map(|blob| blob.digest)) {
            self.read_document(store, digest).await?;
        }
        let names = |images: &BTreeSet<Reference>| images.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        let (opted_in, undecided) = (names(&used.opted_in), names(&used.undecided));
        let mut recorded: BTreeMap<Digest, RecordUse> = BTreeMap::new();
        self.names.clear();
        for record in &records {
            let name = record.name.parse::<Reference>().ok().filter(|name| name.to_string() == record.name);
            for manifest in self.manifests_of(record.target.digest) {
                let record_use = recorded.entry(manifest).or_default();
                record_use.opted_in |= opted_in.contains(&record.name);
                record_use.undecided |= undecided.contains(&record.name);
                if let Some(name) = name.clone().filter(|_| opted_in.contains(&record.name)) {
                    self.names.insert(manifest, (name, record.target.digest));
                } else if let Some(name) = name.clone() {
                    self.names.entry(manifest).or_insert((name, record.target.digest));
                }
            }
        }
        self.update_facts(&recorded, now);
        for (manifest, facts) in self.images.iter_mut().filter(|(_, facts)| facts.recorded.is_some()) {
            facts.keeps_layers = leases.has_layer_references(*manifest).await?;
        }
        Ok(())
    }

    fn update_facts(&mut self, recorded: &BTreeMap<Digest, RecordUse>, now: SystemTime) {
        for (manifest, children) in &self.documents {
            if matches!(children, DocumentChildren::Manifest(_)) {
                self.images.entry(*manifest).or_default();
            }
        }
        self.images.retain(|manifest, _| self.documents.contains_key(manifest));
        for (manifest, facts) in &mut self.images {
            match recorded.get(manifest) {
                Some(RecordUse { opted_in, undecided }) => {
                    facts.recorded = facts.recorded.or(Some(now));
                    (facts.used, facts.undecided) = (*opted_in, *undecided);
                    facts.last_use = if *opted_in { Some(now) } else { facts.last_use };
                }
                None => {
                    if facts.recorded.take().is_some() {
                        (facts.last_arrival, facts.last_use) = (None, None);
                    }
                    (facts.used, facts.undecided) = (false, false);
                }
            }
        }
    }

    /// Reads the repositories of manifests without a record.
    pub(super) async fn find_origins(&mut self, leases: &dyn LayerLeases) -> Result<(), StoreError> {
        let is_pulled = |facts: &RetainFacts| facts.recorded.is_none() && facts.last_arrival.is_some();
        for (manifest, facts) in self.images.iter_mut().filter(|(_, facts)| is_pulled(facts)) {
            let origins = leases.origins(*manifest).await?;
            facts.expected = origins.iter().any(|origin| self.repositories.contains(origin));
        }
        Ok(())
    }

    /// Records the last use that an earlier agent's lease names.
    pub(super) fn record_last_use(&mut self, manifest: Digest, last_use: Option<SystemTime>) {
        let facts = self.images.entry(manifest).or_default();
        facts.last_use = facts.last_use.max(last_use);
    }

    pub(super) fn last_use(&self, manifest: Digest) -> Option<SystemTime> {
        self.images.get(&manifest)?.last_use
    }

    /// The images that have this layer.
    pub(super) fn images_with(&self, layer: Digest) -> impl Iterator<Item = Digest> {
        self.documents.iter().filter_map(move |(manifest, children)| match children {
            DocumentChildren::Manifest(layers) if layers.contains_key(&layer) => Some(*manifest),
            _ => None,
        })
    }

    /// The images of interest with the layers that count.
    pub(super) fn candidates(&self, interest: impl Fn(&RetainFacts) -> Option<RetainInterest>) -> Vec<RetainCandidate> {
        let candidate = |(manifest, facts): (&Digest, &RetainFacts)| {
            let interest = interest(facts)?;
            let layers = self.counted_layers(*manifest).collect::<BTreeMap<_, _>>();
            let last_use = facts.last_use;
            (!layers.is_empty()).then_some(RetainCandidate { manifest: *manifest, layers, interest, last_use })
        };
        self.images.iter().filter_map(candidate).collect()
    }

    /// Bytes of a layer in a lease of the image; `None` for a layer that does not count.
    pub(super) fn size_in(&self, manifest: Digest, layer: Digest) -> Option<u64> {
        self.counted_layers(manifest).find(|(digest, _)| *digest == layer).map(|(_, size)| size)
    }

    /// During a pull all layers of the image count. Afterwards only present layers count:
    /// containerd does not download a layer that was unpacked for an earlier image.
    fn counted_layers(&self, manifest: Digest) -> impl Iterator<Item = (Digest, u64)> {
        let is_pulled = self.images.get(&manifest).is_some_and(|facts| facts.recorded.is_none());
        let all = is_pulled || self.filling == Some(manifest);
        self.layers(manifest).filter(move |(layer, _)| all || self.present.contains(layer))
    }

    fn layers(&self, manifest: Digest) -> impl Iterator<Item = (Digest, u64)> {
        let layers = match self.documents.get(&manifest) {
            Some(DocumentChildren::Manifest(layers)) => Some(layers),
            _ => None,
        };
        layers.into_iter().flatten().map(|(layer, size)| (*layer, *size))
    }

    /// The number of wanted images with a record, and how many of them lack a layer.
    pub(super) fn count_incomplete(&self, interest: impl Fn(&RetainFacts) -> Option<RetainInterest>) -> (usize, usize) {
        // An image whose labels keep the layers is as wanted as any other image, and only needs no
        // lease.
        let is_wanted = |facts: &RetainFacts| {
            facts.recorded.is_some()
                && interest(&RetainFacts { keeps_layers: false, ..*facts }) == Some(RetainInterest::Wanted)
        };
        let wanted: Vec<_> = self.images.iter().filter(|(_, facts)| is_wanted(facts)).collect();
        let lacks = |manifest| self.layers(manifest).any(|(layer, _)| !self.present.contains(&layer));
        (wanted.len(), wanted.iter().filter(|(manifest, _)| lacks(**manifest)).count())
    }

    /// The wanted images that lack layers which a lease would hold.
    pub(super) fn incomplete_images(
        &self,
        interest: impl Fn(&RetainFacts) -> Option<RetainInterest>,
    ) -> impl Iterator<Item = MissingLayers> {
        self.images.iter().filter_map(move |(manifest, facts)| {
            let is_wanted = facts.recorded.is_some() && interest(facts) == Some(RetainInterest::Wanted);
            let (reference, image_digest) = self.names.get(manifest).filter(|_| is_wanted)?.clone();
            let layers: BTreeMap<_, _> =
                self.layers(*manifest).filter(|(layer, _)| !self.present.contains(layer)).collect();
            (!layers.is_empty()).then_some(MissingLayers { manifest: *manifest, reference, image_digest, layers })
        })
    }

    /// Counts all layers of the image from here on, because they are being fetched.
    pub(super) fn begin_fill(&mut self, manifest: Digest) {
        self.filling = Some(manifest);
    }

    /// Ends the fetch.
    pub(super) fn end_fill(&mut self) {
        self.filling = None;
    }

    /// The manifests that an image record leads to. Of an index only present manifests count: a
    /// pull fetches this platform's manifest.
    fn manifests_of(&self, image_digest: Digest) -> Vec<Digest> {
        match self.documents.get(&image_digest) {
            Some(DocumentChildren::Manifest(_)) => vec![image_digest],
            Some(DocumentChildren::Index(manifests)) => {
                let is_manifest =
                    |digest: &&Digest| matches!(self.documents.get(*digest), Some(DocumentChildren::Manifest(_)));
                manifests.iter().filter(is_manifest).copied().collect()
            }
            Some(DocumentChildren::Other) | None => Vec::new(),
        }
    }

    async fn read_document(&mut self, store: &dyn Blobs, digest: Digest) -> Result<(), StoreError> {
        if self.documents.contains_key(&digest) || self.documents.len() >= MAX_DOCUMENTS {
            return Ok(());
        }
        match LocalBlob::read(store, digest).await {
            Ok(LocalBlob::Whole(bytes, _)) => drop(self.documents.insert(digest, DocumentChildren::of(&bytes))),
            Ok(LocalBlob::Absent | LocalBlob::TooLarge(_) | LocalBlob::Damaged) => {}
            Err(error) if error.is_retryable() => return Err(error),
            Err(error) => tracing::debug!(%digest, %error, "a manifest cannot be read"),
        }
        Ok(())
    }
}
