//! The main flow: from an image that a pod cannot pull to an image that the kubelet finds. Top to bottom.
//!
//! Who may be helped was decided before ([`crate::decide::pull_failure`]); the pods are told afterwards
//! ([`super::salvage`]). What happens to a single blob stands in [`super::bring`].

mod documents;
mod give_up;
mod pinned;
mod planning;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::pinned::Pinned;
use super::bring::{Bring, Brought};
use super::lead::Lead;
use super::progress::Progress;
pub use super::recover_error::RecoverError;
use super::resolve::{Resolver, Wanted};
use super::swarm::{Errand, Swarm};
use super::unpack::{Unfinished, Unpacking};
use crate::decide::plan::Plan;
use crate::decide::reserve::Reservations;
use crate::decide::rules::Rules;
use crate::decide::way::check_image;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Document, Manifest, Platform, Reference};
use crate::ports::{ChildKind, ContentStore, ImageRecord, Imports};

/// Longest wait for a runtime to say whether images may be imported; the first look takes milliseconds where it answers at all.
const IMPORTS_WAIT: Duration = Duration::from_secs(10);

/// Recovers images on this node.
pub struct Recoverer {
    /// Where content is kept.
    pub store: Arc<dyn ContentStore>,
    /// Reads references.
    pub resolver: Resolver,
    /// Gets single blobs.
    pub bring: Arc<Bring>,
    /// Names the node that leads.
    pub lead: Arc<Lead>,
    /// What one recovery may cost, as of now.
    pub rules: watch::Receiver<Arc<Rules>>,
    /// What runs here.
    pub platform: Platform,
    /// Room on the disk, shared by the recoveries of this node.
    pub room: Reservations,
    /// Whether anything may be brought into this store.
    pub imports: watch::Receiver<Imports>,
    /// Unpacks layers before the runtime would; `None` where that is the runtime's business alone.
    pub unpacking: Option<Unpacking>,
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
    /// What to tell where a tag was decided without its registry.
    pub settled: Option<String>,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its index or manifest.
    pub root: Digest,
    /// The peers that hold it under the name that was asked for.
    pub providers: Vec<PeerId>,
    /// What to tell where a tag was decided without its registry.
    pub settled: Option<String>,
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
        wanted: &Wanted,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> Result<Recovered, RecoverError> {
        let began = Instant::now();
        let found = stop.run_until_cancelled(self.find(wanted)).await.unwrap_or(Err(RecoverError::Abandoned));
        let Found { root, providers, settled } = found?;
        progress.found(root, providers.len());
        let pinned = Pinned::new(Arc::clone(&self.store)).await?;
        let reference = &wanted.reference;
        let work = async {
            let image = self.bring_image(wanted, root, &providers, &pinned, progress);
            tokio::pin!(image);
            // Beside it, and never waited for: the image may be here before the API server has answered.
            tokio::select! {
                biased;
                image = &mut image => image,
                // Where there are zones, those who fetch from others claim to.
                () = self.lead.announce(reference, root), if self.bring.zone().is_none() => image.await,
            }
        };
        let work = pinned.during(reference, work);
        let brought = stop.run_until_cancelled(work).await.unwrap_or(Err(RecoverError::Abandoned));
        let result = match brought {
            // Not stopped any more: a kubelet that finds the first of the names may start the pod before the second is written.
            Ok((root, brought)) => {
                progress.name();
                self.record(reference, &root).await.map(|()| brought)
            }
            Err(error) => Err(error),
        };
        if !result.as_ref().is_err_and(RecoverError::leaves_content_for_later) {
            // From here on the image record holds the content, or nobody wants it. Unreleased, the pin would expire by itself.
            pinned.release(reference).await;
        }
        result.map(|brought| Recovered { settled, ..summarise(root, &brought, began.elapsed()) })
    }

    /// What a recovery would begin with: which content the reference means, and who has it. Nothing is written.
    ///
    /// # Errors
    /// [`RecoverError`] where a recovery would not begin.
    pub async fn find(&self, wanted: &Wanted) -> Result<Found, RecoverError> {
        self.check_imports().await?;
        // What this node calls so already is what its pods run: it is mended, never turned into something else.
        if let Some(root) = self.named_here(&wanted.reference).await? {
            let providers = self.resolver.providers(&wanted.reference, root).unwrap_or_default();
            return Ok(Found { root, providers, settled: None });
        }
        let (root, settled) = self.resolver.resolve(wanted, &self.bring).await?;
        let providers = self.resolver.providers(&wanted.reference, root)?;
        Ok(Found { root, providers, settled })
    }

    /// What this node's own record of the name points at.
    async fn named_here(&self, reference: &Reference) -> Result<Option<Digest>, RecoverError> {
        let name = reference.to_string();
        let records = self.store.images().await.map_err(RecoverError::store("listing images"))?;
        // containerd 1.7 records whatever a registry answered, also a page for people. That names no image.
        let named =
            records.into_iter().find(|record| record.name == name && Document::is_called(&record.target.media_type));
        Ok(named.map(|record| record.target.digest))
    }

    /// Waits a moment where it is not known yet, as when the agent has just started: what is not known is not allowed.
    async fn check_imports(&self) -> Result<(), RecoverError> {
        let mut imports = self.imports.clone();
        let known = imports.wait_for(|imports| *imports != Imports::NotKnown);
        let refused = match tokio::time::timeout(IMPORTS_WAIT, known).await {
            Ok(Ok(imports)) => match &*imports {
                Imports::Refused(reason) => Some(reason.clone()),
                Imports::Allowed | Imports::NotKnown => None,
            },
            Ok(Err(_)) | Err(_) => Some("the runtime has not said yet whether it verifies images".to_owned()),
        };
        refused.map_or(Ok(()), |reason| Err(RecoverError::Closed { reason }))
    }

    /// All of the image but its names, its layers unpacked where that can be done here: with a name and without that, the runtime would do the
    /// same work beside us.
    async fn bring_image(
        &self,
        wanted: &Wanted,
        root: Digest,
        providers: &[PeerId],
        pinned: &Pinned,
        progress: &Progress,
    ) -> Result<(Descriptor, Vec<Brought>), RecoverError> {
        let (reference, pin) = (&wanted.reference, pinned.pin());
        let image = self.bring_documents(reference, root, providers, pin).await?;
        let plan = self.plan(&image.manifest, wanted.in_doubt, pin).await?;
        self.check_held(reference, &plan)?;
        self.check_way(reference, &plan)?;
        let room = self.reserve(&plan).await?;
        progress.expect(&plan);
        let here = watch::Sender::new(HashSet::new());
        let errand = Errand { reference, root, pin, progress, room: &room, here: &here };
        let bringing = self.bring_blobs(errand, &plan);
        // An image that is whole and has its name may be being unpacked by the runtime just now.
        let is_unfinished = !plan.missing.is_empty() || self.named_here(reference).await?.is_none();
        let layers = self.layer_room(&room);
        let blobs = match &self.unpacking {
            Some(unpacking) if is_unfinished => {
                let here = here.subscribe();
                let image = Unfinished { reference, manifest: &image.manifest, pin, progress, room: layers, here };
                unpacking.beside(bringing, image, || pinned.left()).await?
            }
            Some(_) => bringing.await?,
            None => {
                let blobs = bringing.await?;
                if is_unfinished {
                    layers.check(&image.manifest.layers).await?;
                }
                blobs
            }
        };
        Ok((image.root, image.documents.into_iter().chain(blobs).collect()))
    }

    /// Nothing is fetched of an image that cannot become whole: a layer may be one that must not be given on, and a blob that nobody holds
    /// may be one that every node unpacked and discarded.
    fn check_held(&self, reference: &Reference, plan: &Plan) -> Result<(), RecoverError> {
        if let Some(layer) = plan.withheld.first() {
            return Err(RecoverError::NotDistributable { reference: reference.clone(), layer: layer.digest });
        }
        let is_held = |blob: &&Descriptor| !self.resolver.holders.sources(blob.digest).is_empty();
        let lacking: Vec<_> = plan.missing.iter().filter(|blob| !is_held(blob)).map(|blob| blob.digest).collect();
        match lacking.is_empty() {
            true => Ok(()),
            false => Err(RecoverError::NotHeld { reference: reference.clone(), blobs: lacking }),
        }
    }

    /// While UDP is blocked only small images come, over TCP. Nothing of another image is fetched.
    fn check_way(&self, reference: &Reference, plan: &Plan) -> Result<(), RecoverError> {
        if !self.resolver.holders.udp().is_blocked() {
            return Ok(());
        }
        let refused = |source| RecoverError::NeedsUdp { reference: reference.clone(), source: Box::new(source) };
        check_image(&plan.missing).map_err(refused)
    }

    /// Every blob of the plan, in pieces from everybody. Those that are there are held too, or the collector might take them now.
    async fn bring_blobs(&self, errand: Errand<'_>, plan: &Plan) -> Result<Vec<Brought>, RecoverError> {
        let at_once = self.rules.borrow().budgets.concurrent_blobs;
        let swarm = Swarm::new(&self.bring, &self.lead, errand, at_once);
        swarm.fetch(plan.there.iter().chain(&plan.missing)).await
    }

    /// Names the image, at the very end: a record is a promise that everything is there.
    async fn record(&self, reference: &Reference, root: &Descriptor) -> Result<(), RecoverError> {
        if self.named_here(reference).await?.is_some_and(|named| named != root.digest) {
            // The kubelet's own pull was faster, and the registry's word is newer than the peers'.
            tracing::info!(%reference, "the name was given to other content meanwhile; it stays");
            return Ok(());
        }
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
    let mut recovered =
        Recovered { root, bytes: 0, fetched: 0, there: 0, providers: BTreeMap::new(), took, settled: None };
    for Brought { descriptor: _, from } in brought {
        match from {
            Some(shares) => {
                recovered.fetched += 1;
                recovered.bytes += shares.values().sum::<u64>();
                shares.iter().for_each(|(peer, bytes)| *recovered.providers.entry(*peer).or_default() += bytes);
            }
            None => recovered.there += 1,
        }
    }
    recovered
}
