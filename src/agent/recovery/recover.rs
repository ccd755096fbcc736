//! The main flow: from an image that a pod cannot pull to an image that the kubelet finds. Top to bottom.
//!
//! Who may be helped was decided before ([`crate::decide::pull_failure`]); the pods are told afterwards
//! ([`crate::agent::pods::pod_controller`]). What happens to a single blob stands in [`crate::agent::recovery::blob_fetcher`].

mod broken_record;
mod documents;
mod planning;
mod recovery_pin;
mod reservations;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::recovery_pin::RecoveryPin;
use crate::agent::recovery::blob_fetcher::{BlobFetcher, FetchedBlob};
use crate::agent::recovery::claim_coordinator::ClaimCoordinator;
use crate::agent::recovery::layer_unpacker::{LayerUnpacker, UnnamedImage};
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::recovered_image::{RecoveredImage, ResolvedImage};
use crate::agent::recovery::reference_resolver::{RecoveryRequest, ReferenceResolver};
use crate::agent::recovery::swarm::{FetchJob, Swarm};
use crate::decide::disk_reservations::Reservations;
use crate::decide::plan::FetchPlan;
use crate::decide::policy::Policy;
use crate::decide::transport_choice::check_image;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Document, Manifest, Platform, Reference};
use crate::ports::{ContentStore, ImageRecord, ImportPermission};

/// Longest wait for a runtime to say whether images may be imported; the first look takes milliseconds where it answers at all.
const IMPORTS_TIMEOUT: Duration = Duration::from_secs(10);

/// Recovers images on this node.
pub struct Recoverer {
    /// Where content is kept.
    pub store: Arc<dyn ContentStore>,
    /// Reads references.
    pub resolver: ReferenceResolver,
    /// Gets single blobs.
    pub blob_fetcher: Arc<BlobFetcher>,
    /// Names the node that leads.
    pub claims: Arc<ClaimCoordinator>,
    /// What one recovery may cost, as of now.
    pub policy: watch::Receiver<Arc<Policy>>,
    /// What runs here.
    pub platform: Platform,
    /// Room on the disk, shared by the recoveries of this node.
    pub reservations: Reservations,
    /// Whether anything may be brought into this store.
    pub imports: watch::Receiver<ImportPermission>,
    /// Unpacks layers before the runtime would; `None` where that is the runtime's business alone.
    pub layer_unpacker: Option<LayerUnpacker>,
}

/// The documents of an image, the root first, and what runs here.
struct ImageDocuments {
    target: Descriptor,
    documents: Vec<FetchedBlob>,
    manifest: Manifest,
}

impl Recoverer {
    /// Brings the image here, or says why not. Stopped half-way it leaves nothing that anybody could mistake for an image.
    ///
    /// # Errors
    /// [`RecoverError`], which says whether to try again and what to tell.
    pub async fn recover(
        &self,
        request: &RecoveryRequest,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> Result<RecoveredImage, RecoverError> {
        let began = Instant::now();
        let found = stop.run_until_cancelled(self.find(request)).await.unwrap_or(Err(RecoverError::Abandoned));
        let ResolvedImage { digest, providers, tag_note } = found?;
        progress.set_resolved(digest, providers.len());
        let pinned = RecoveryPin::new(Arc::clone(&self.store)).await?;
        let reference = &request.reference;
        let work = async {
            let image = self.fetch_image(request, digest, &providers, &pinned, progress);
            tokio::pin!(image);
            // Beside it, and never waited for: the image may be here before the API server has answered.
            tokio::select! {
                biased;
                image = &mut image => image,
                // Where there are zones, those who fetch from others claim to.
                () = self.claims.try_claim_image(reference, digest), if self.blob_fetcher.zone().is_none() => image.await,
            }
        };
        let work = pinned.renew_during(reference, work);
        let fetched = stop.run_until_cancelled(work).await.unwrap_or(Err(RecoverError::Abandoned));
        let result = match fetched {
            // Not stopped any more: a kubelet that finds the first of the names may start the pod before the second is written.
            Ok((root, fetched)) => {
                progress.mark_recorded();
                self.record(reference, &root).await.map(|()| fetched)
            }
            Err(error) => Err(error),
        };
        if !result.as_ref().is_err_and(RecoverError::is_content_reusable) {
            // From here on the image record holds the content, or nobody wants it. Unreleased, the pin would expire by itself.
            pinned.release(reference).await;
        }
        result.map(|fetched| RecoveredImage { tag_note, ..summarise(digest, &fetched, began.elapsed()) })
    }

    /// What a recovery would begin with: which content the reference means, and who has it. Nothing is written.
    ///
    /// # Errors
    /// [`RecoverError`] where a recovery would not begin.
    pub async fn find(&self, request: &RecoveryRequest) -> Result<ResolvedImage, RecoverError> {
        self.check_imports().await?;
        // What this node calls so already is what its pods run: it is mended, never turned into something else.
        if let Some(digest) = self.recorded_target(&request.reference).await? {
            let providers = self.resolver.providers(&request.reference, digest).unwrap_or_default();
            return Ok(ResolvedImage { digest, providers, tag_note: None });
        }
        let (digest, tag_note) = self.resolver.resolve(request, &self.blob_fetcher).await?;
        let providers = self.resolver.providers(&request.reference, digest)?;
        Ok(ResolvedImage { digest, providers, tag_note })
    }

    /// What this node's own record of the name points at.
    async fn recorded_target(&self, reference: &Reference) -> Result<Option<Digest>, RecoverError> {
        let name = reference.to_string();
        let records = self.store.images().await.map_err(RecoverError::store("listing images"))?;
        // containerd 1.7 records whatever a registry answered, also a page for people. That names no image.
        let named = records
            .into_iter()
            .find(|record| record.name == name && Document::is_document_type(&record.target.media_type));
        Ok(named.map(|record| record.target.digest))
    }

    /// Waits a moment where it is not known yet, as when the agent has just started: what is not known is not allowed.
    async fn check_imports(&self) -> Result<(), RecoverError> {
        let mut imports = self.imports.clone();
        let known = imports.wait_for(|imports| *imports != ImportPermission::Unknown);
        let refused = match tokio::time::timeout(IMPORTS_TIMEOUT, known).await {
            Ok(Ok(imports)) => match &*imports {
                ImportPermission::Refused(reason) => Some(reason.clone()),
                ImportPermission::Allowed | ImportPermission::Unknown => None,
            },
            Ok(Err(_)) | Err(_) => Some("the runtime has not said yet whether it verifies images".to_owned()),
        };
        refused.map_or(Ok(()), |reason| Err(RecoverError::ImportsRefused { reason }))
    }

    /// All of the image but its names, its layers unpacked where that can be done here: with a name and without that, the runtime would do the
    /// same work beside us.
    async fn fetch_image(
        &self,
        request: &RecoveryRequest,
        root: Digest,
        providers: &[PeerId],
        pinned: &RecoveryPin,
        progress: &Progress,
    ) -> Result<(Descriptor, Vec<FetchedBlob>), RecoverError> {
        let (reference, pin) = (&request.reference, pinned.pin());
        let image = self.fetch_documents(reference, root, providers, pin).await?;
        let plan = self.plan(&image.manifest, request.verify_layers, pin).await?;
        self.check_providers(reference, &plan)?;
        self.check_transport(reference, &plan)?;
        let reservation = self.reserve(&plan).await?;
        progress.set_plan(&plan);
        let complete_blobs = watch::Sender::new(HashSet::new());
        let job = FetchJob {
            reference,
            image_digest: root,
            pin,
            progress,
            reservation: &reservation,
            complete_blobs: &complete_blobs,
        };
        let fetching = self.fetch_blobs(job, &plan);
        // An image that is whole and has its name may be being unpacked by the runtime just now.
        let is_unfinished = !plan.missing.is_empty() || self.recorded_target(reference).await?.is_none();
        let layers = self.layer_reservation(&reservation);
        let blobs = match &self.layer_unpacker {
            Some(unpacking) if is_unfinished => {
                let complete_blobs = complete_blobs.subscribe();
                let image = UnnamedImage {
                    reference,
                    manifest: &image.manifest,
                    pin,
                    progress,
                    reservation: layers,
                    complete_blobs,
                };
                unpacking.fetch_and_unpack(fetching, image, || pinned.remaining()).await?
            }
            Some(_) => fetching.await?,
            None => {
                let blobs = fetching.await?;
                if is_unfinished {
                    layers.check_unpack(&image.manifest.layers).await?;
                }
                blobs
            }
        };
        Ok((image.target, image.documents.into_iter().chain(blobs).collect()))
    }

    /// Nothing is fetched of an image that cannot become whole: a layer may be one that must not be given on, and a blob that nobody holds
    /// may be one that every node unpacked and discarded.
    fn check_providers(&self, reference: &Reference, plan: &FetchPlan) -> Result<(), RecoverError> {
        if let Some(layer) = plan.withheld.first() {
            return Err(RecoverError::NotDistributable { reference: reference.clone(), layer: layer.digest });
        }
        let has_provider = |blob: &&Descriptor| !self.resolver.inventory.all_providers(blob.digest).is_empty();
        let unprovided: Vec<_> =
            plan.missing.iter().filter(|blob| !has_provider(blob)).map(|blob| blob.digest).collect();
        match unprovided.is_empty() {
            true => Ok(()),
            false => Err(RecoverError::BlobsWithoutProvider { reference: reference.clone(), blobs: unprovided }),
        }
    }

    /// While UDP is blocked only small images come, over TCP. Nothing of another image is fetched.
    fn check_transport(&self, reference: &Reference, plan: &FetchPlan) -> Result<(), RecoverError> {
        if !self.resolver.inventory.udp().is_blocked() {
            return Ok(());
        }
        let refused = |source| RecoverError::NeedsUdp { reference: reference.clone(), source: Box::new(source) };
        check_image(&plan.missing).map_err(refused)
    }

    /// Every blob of the plan, in pieces from everybody. Those that are there are held too, or the collector might take them now.
    async fn fetch_blobs(&self, job: FetchJob<'_>, plan: &FetchPlan) -> Result<Vec<FetchedBlob>, RecoverError> {
        let max_blobs = self.policy.borrow().budgets.concurrent_blobs;
        let swarm = Swarm::new(&self.blob_fetcher, &self.claims, job, max_blobs);
        swarm.fetch(plan.present.iter().chain(&plan.missing)).await
    }

    /// Names the image, at the very end: a record is a promise that everything is there.
    async fn record(&self, reference: &Reference, root: &Descriptor) -> Result<(), RecoverError> {
        if self.recorded_target(reference).await?.is_some_and(|named| named != root.digest) {
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

fn summarise(digest: Digest, blobs: &[FetchedBlob], took: Duration) -> RecoveredImage {
    let mut recovered =
        RecoveredImage { digest, bytes: 0, fetched: 0, present: 0, providers: BTreeMap::new(), took, tag_note: None };
    for FetchedBlob { descriptor: _, from } in blobs {
        match from {
            Some(shares) => {
                recovered.fetched += 1;
                recovered.bytes += shares.values().sum::<u64>();
                shares.iter().for_each(|(peer, bytes)| *recovered.providers.entry(*peer).or_default() += bytes);
            }
            None => recovered.present += 1,
        }
    }
    recovered
}
