//! The main flow: from an image that a pod cannot pull to an image that the kubelet finds. Top to bottom.
//!
//! Who may be helped was decided before ([`crate::decide::pull_failure`]); the pods are told afterwards
//! ([`super::salvage`]). What happens to a single blob stands in [`super::bring`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::bring::{Bring, Brought};
use super::holders::Holders;
use super::lead::Lead;
use super::progress::Progress;
pub use super::recover_error::RecoverError;
use crate::decide::plan::{Limits, Plan, plan};
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Document, Manifest, Platform, Reference};
use crate::ports::{ChildKind, ContentStore, ImageRecord, Pin};

/// How long content is held against the collector should this agent die: longer than the largest image takes over
/// a slow link, short enough that the disk of a broken node is not kept full. A failed attempt leaves its pin to expire, so
/// that the next one finds what had already come.
const PIN_LIFE: Duration = Duration::from_secs(3600);

/// Recovers images on this node.
pub struct Recoverer {
    /// Where content is kept.
    pub store: Arc<dyn ContentStore>,
    /// Who holds what.
    pub holders: Holders,
    /// Gets single blobs.
    pub bring: Bring,
    /// Names the node that leads.
    pub lead: Lead,
    /// What one recovery may cost.
    pub limits: Limits,
    /// What runs here.
    pub platform: Platform,
    /// Blobs fetched at the same time for one image.
    pub blobs_at_once: usize,
}

/// An image that is here now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// Its index or manifest.
    pub root: Digest,
    /// Bytes that came.
    pub bytes: u64,
    /// Blobs that came.
    pub fetched: usize,
    /// Blobs that were here before.
    pub there: usize,
    /// How many bytes each provider sent.
    pub providers: BTreeMap<PeerId, u64>,
    /// From the decision until the runtime knew the image.
    pub took: Duration,
}

/// The documents of an image, the root first, and what runs here.
struct Image {
    root: Descriptor,
    documents: Vec<Brought>,
    manifest: Manifest,
}

impl Recoverer {
    /// Brings the image here, or says why not. Stopped half-way it leaves nothing that anybody could mistake for an image.
    ///
    /// # Errors
    /// [`RecoverError`], which says whether to try again and what to tell.
    pub async fn recover(
        &self,
        reference: &Reference,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> Result<Recovered, RecoverError> {
        let began = Instant::now();
        let root = self.resolve(reference)?;
        let providers = self.providers(reference, root)?;
        let pin = self.store.pin(PIN_LIFE).await.map_err(RecoverError::store("pinning"))?;
        let work = async {
            let image = self.bring_image(reference, root, &providers, &pin, progress);
            tokio::pin!(image);
            // Beside it, and never waited for: the image may be here before the API server has answered.
            tokio::select! {
                biased;
                image = &mut image => image,
                () = self.lead.announce(reference, root) => image.await,
            }
        };
        let result = stop.run_until_cancelled(work).await.unwrap_or(Err(RecoverError::Abandoned));
        if matches!(result, Ok(_) | Err(RecoverError::Abandoned)) {
            // From here on the image record holds the content, or nobody wants it. Unreleased, the pin would expire by itself.
            if let Err(error) = self.store.release(pin).await {
                tracing::warn!(%reference, %error, "the pin is left to expire");
            }
        }
        result.map(|brought| summarise(root, &brought, began.elapsed()))
    }

    /// Whether a recovery that begins now finds whom to ask.
    pub(super) fn has_provider(&self, reference: &Reference) -> bool {
        self.resolve(reference).and_then(|root| self.providers(reference, root)).is_ok()
    }

    /// Which content the reference means: its own digest, else what every peer that knows the tag agrees on.
    fn resolve(&self, reference: &Reference) -> Result<Digest, RecoverError> {
        let meanings = match reference {
            Reference::Digest(_, digest) => return Ok(*digest),
            Reference::Tag(repository, tag) => self.holders.of_tag(repository, tag),
        };
        let mut digests = meanings.keys();
        match (digests.next(), digests.next()) {
            (Some(digest), None) => Ok(*digest),
            (None, _) => Err(RecoverError::NoProvider { reference: reference.clone() }),
            (Some(_), Some(_)) => Err(RecoverError::Disagreement {
                reference: reference.clone(),
                meanings: meanings.into_iter().map(|(digest, peers)| (digest, peers.len())).collect(),
            }),
        }
    }

    /// The peers that hold the image under the very repository that the pod names.
    fn providers(&self, reference: &Reference, root: Digest) -> Result<Vec<PeerId>, RecoverError> {
        let providers = self.holders.of_image(reference.repository(), root);
        if providers.is_empty() {
            return Err(RecoverError::NoProvider { reference: reference.clone() });
        }
        Ok(providers)
    }

    async fn bring_image(
        &self,
        reference: &Reference,
        root: Digest,
        providers: &[PeerId],
        pin: &Pin,
        progress: &Progress,
    ) -> Result<Vec<Brought>, RecoverError> {
        let image = self.bring_documents(reference, root, providers, pin).await?;
        let plan = self.plan(&image.manifest).await?;
        progress.expect(&plan.missing);
        let blobs = self.bring_blobs(reference, &plan, pin, progress).await?;
        self.record(reference, &image.root).await?;
        Ok(image.documents.into_iter().chain(blobs).collect())
    }

    /// The index, if there is one, and the manifest of this platform. Each is parsed before it is kept, because what it
    /// keeps alive is written with it.
    async fn bring_documents(
        &self,
        reference: &Reference,
        root: Digest,
        providers: &[PeerId],
        pin: &Pin,
    ) -> Result<Image, RecoverError> {
        let (document, brought) = self.bring.document(reference, root, providers, pin).await?;
        let root = brought.descriptor.clone();
        let index = match document {
            Document::Manifest(manifest) => return Ok(Image { root, documents: vec![brought], manifest }),
            Document::Index(index) => index,
        };
        let entry = index
            .select(&self.platform)
            .ok_or_else(|| RecoverError::NoPlatform { digest: root.digest, platform: self.platform.clone() })?;
        match self.bring.document(reference, entry.digest, providers, pin).await? {
            (Document::Manifest(manifest), child) => Ok(Image { root, documents: vec![brought, child], manifest }),
            (Document::Index(_), child) => Err(RecoverError::NestedIndex { digest: child.descriptor.digest }),
        }
    }

    /// What has to come, checked against the limits before a byte of it moves.
    async fn plan(&self, manifest: &Manifest) -> Result<Plan, RecoverError> {
        let mut there = std::collections::HashSet::new();
        for blob in std::iter::once(&manifest.config).chain(&manifest.layers) {
            if self.store.blob(blob.digest).await.map_err(RecoverError::store("looking for blobs"))?.is_some() {
                there.insert(blob.digest);
            }
        }
        let plan = plan(manifest, |digest| there.contains(&digest));
        let free = self.store.free_bytes().await.map_err(RecoverError::store("looking for room"))?;
        plan.check(self.limits, free)?;
        Ok(plan)
    }

    /// Every blob of the plan, several at once. Those that are there are held too, or the collector might take them now.
    async fn bring_blobs(
        &self,
        reference: &Reference,
        plan: &Plan,
        pin: &Pin,
        progress: &Progress,
    ) -> Result<Vec<Brought>, RecoverError> {
        let blobs = plan.there.iter().chain(&plan.missing);
        let brought: Vec<_> = blobs.map(|blob| self.bring.blob(reference, blob, pin, progress)).collect();
        stream::iter(brought).buffer_unordered(self.blobs_at_once).try_collect().await
    }

    /// Names the image, at the very end: a record is a promise that everything is there.
    async fn record(&self, reference: &Reference, root: &Descriptor) -> Result<(), RecoverError> {
        for name in reference.record_names(root.digest) {
            let record = ImageRecord { name, target: root.clone() };
            self.store.put_image(&record).await.map_err(RecoverError::store("writing the image record"))?;
        }
        Ok(())
    }
}

/// What an image's documents keep alive, by their place in the document.
pub(super) fn child_kind(document: &Document, position: usize) -> ChildKind {
    match document {
        Document::Index(_) => ChildKind::Manifest,
        Document::Manifest(_) if position == 0 => ChildKind::Config,
        Document::Manifest(_) => ChildKind::Layer,
    }
}

fn summarise(root: Digest, brought: &[Brought], took: Duration) -> Recovered {
    let mut recovered = Recovered { root, bytes: 0, fetched: 0, there: 0, providers: BTreeMap::new(), took };
    for Brought { descriptor, from } in brought {
        match from {
            Some(peer) => {
                recovered.fetched += 1;
                recovered.bytes += descriptor.size;
                *recovered.providers.entry(*peer).or_default() += descriptor.size;
            }
            None => recovered.there += 1,
        }
    }
    recovered
}
