//! Recovers one image: the main flow, top to bottom. The input is a reference that a pod cannot
//! pull. The result is an image record that the kubelet finds.
//!
//! [`Recoverer::recover`] takes these steps in order:
//! 1. Check that the runtime permits imports (`check_imports`).
//! 2. Resolve the reference to a digest, and list the providers ([`Recoverer::find`]).
//! 3. Pin the content, so that containerd's collector keeps every blob that arrives
//!    (`recovery_pin`).
//! 4. Claim the image beside the next steps. The claim is advice, and no step waits for the claim
//!    ([`ClaimCoordinator`]).
//! 5. Fetch and parse the indexes and the manifest of this platform (`documents`).
//! 6. Plan: list the config and the layers that are missing or damaged here (`planning`).
//! 7. Check providers, transport and disk space before any config or layer is fetched
//!    (`reservations`).
//! 8. Fetch the missing blobs in pieces from all providers (`Swarm`). Unpack each layer as soon as
//!    the layer and all layers below are complete ([`LayerUnpacker`]).
//! 9. Write the image records. Cancellation has no effect from here on.
//! 10. Release the pin. The pin stays after a failure whose retry can reuse the content.
//!
//! Steps 1 to 7 refuse an image that cannot become complete, before layers cost bandwidth and disk
//! space.
//!
//! Not here: the verdict on the pod ([`crate::decide::pull_failure`]), the nudge and the Events
//! after a recovery ([`crate::agent::pods::pod_controller`]), and the fetch of a single blob
//! ([`crate::agent::recovery::blob_fetcher`]).

mod broken_record;
mod documents;
mod planning;
mod recovery_pin;
mod reservations;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::recovery_pin::RecoveryPin;
use crate::agent::recovery::blob_fetcher::{BlobFetcher, FetchedBlob};
use crate::agent::recovery::claim_coordinator::ClaimCoordinator;
use crate::agent::recovery::layer_unpacker::{LayerUnpacker, UnnamedImage};
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::reference_resolver::{RecoveryRequest, ReferenceResolver};
use crate::agent::recovery::swarm::{FetchJob, Swarm};
use crate::decide::disk_reservations::Reservations;
use crate::decide::plan::FetchPlan;
use crate::decide::policy::Policy;
use crate::decide::transport_choice::check_image;
use crate::model::{PeerId, RecoveredImage, ResolvedImage};
use crate::oci::{Descriptor, Digest, Document, Manifest, Platform, Reference};
use crate::ports::{ContentStore, ImageRecord, ImportPermission, StoreError};

/// Longest wait for the runtime's answer on imports. A runtime that answers at all needs
/// milliseconds.
const IMPORTS_TIMEOUT: Duration = Duration::from_secs(10);

/// Recovers images on this node.
pub struct Recoverer {
    /// Content store of this node's runtime.
    pub store: Arc<dyn ContentStore>,
    /// Resolves references to digests.
    pub resolver: ReferenceResolver,
    /// Fetches documents, and stages other blobs.
    pub blob_fetcher: Arc<BlobFetcher>,
    /// Claims recoveries with Leases.
    pub claims: Arc<ClaimCoordinator>,
    /// The current policy: budgets and disk floors.
    pub policy: watch::Receiver<Arc<Policy>>,
    /// Platform of this node.
    pub platform: Platform,
    /// Disk space that all recoveries of this node have reserved.
    pub reservations: Reservations,
    /// Whether the runtime permits imports into the store.
    pub imports: watch::Receiver<ImportPermission>,
    /// Unpacks layers before the runtime does; `None` leaves all layers to the runtime.
    pub layer_unpacker: Option<LayerUnpacker>,
}

/// The fetched documents of an image, the root first, and the manifest of this platform.
struct ImageDocuments {
    target: Descriptor,
    documents: Vec<FetchedBlob>,
    manifest: Manifest,
}

impl Recoverer {
    /// Recovers the image. A canceled recovery writes no image record, because the records come
    /// last and are never canceled.
    ///
    /// # Errors
    /// [`RecoverError`], which determines the retry, the metric and the Event.
    pub async fn recover(
        &self,
        request: &RecoveryRequest,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> Result<RecoveredImage, RecoverError> {
        let began = Instant::now();
        let resolved = stop.run_until_cancelled(self.find(request)).await.unwrap_or(Err(RecoverError::Abandoned));
        let ResolvedImage { digest, providers, tag_note } = resolved?;
        progress.set_resolved(digest, providers.len());
        let recovery_pin = RecoveryPin::new(Arc::clone(&self.store) as _).await?;
        let reference = &request.reference;
        let work = async {
            let image = self.fetch_image(request, digest, &providers, &recovery_pin, progress);
            tokio::pin!(image);
            // The claim runs beside the download: the image may be here before the API server has
            // answered.
            tokio::select! {
                biased;
                image = &mut image => image,
                // With a zone, the swarm claims the image for the zone instead.
                () = self.claims.try_claim_image(reference, digest),
                    if self.blob_fetcher.zone().is_none() => image.await,
            }
        };
        let work = recovery_pin.renew_during(reference, work);
        let fetched = stop.run_until_cancelled(work).await.unwrap_or(Err(RecoverError::Abandoned));
        let result = match fetched {
            // Not canceled from here on: a kubelet that finds the first record may start the pod
            // before the second record is written.
            Ok((target, fetched)) => {
                progress.mark_recorded();
                self.record(reference, &target).await.map(|()| fetched)
            }
            Err(error) => Err(error),
        };
        if !result.as_ref().is_err_and(|error| error.class().is_content_reusable) {
            // The image record holds the content now, or no retry can reuse the content. A pin that
            // is not released expires.
            recovery_pin.release(reference).await;
        }
        result.map(|fetched| RecoveredImage { tag_note, ..summarize(digest, &fetched, began.elapsed()) })
    }

    /// The result that a recovery begins with: the digest of the reference, and the digest's
    /// providers. Writes nothing.
    ///
    /// # Errors
    /// [`RecoverError`] when a recovery cannot begin.
    pub async fn find(&self, request: &RecoveryRequest) -> Result<ResolvedImage, RecoverError> {
        self.check_imports().await?;
        // The digest of an existing image record stays, because pods of this node run that content.
        // The recovery repairs the image and never changes the record's target.
        if let Some(digest) = self.recorded_target(&request.reference).await? {
            let providers = self.resolver.providers(&request.reference, digest).unwrap_or_default();
            return Ok(ResolvedImage { digest, providers, tag_note: None });
        }
        let (digest, tag_note) = self.resolver.resolve(request, &self.blob_fetcher).await?;
        let providers = self.resolver.providers(&request.reference, digest)?;
        Ok(ResolvedImage { digest, providers, tag_note })
    }

    /// The target of this node's image record for the reference.
    async fn recorded_target(&self, reference: &Reference) -> Result<Option<Digest>, RecoverError> {
        let name = reference.to_string();
        let records = self.store.images().await.map_err(RecoverError::store("listing images"))?;
        // containerd 1.7 records any answer of a registry, an HTML page too. Such a record is no
        // image.
        let recorded = records
            .into_iter()
            .find(|record| record.name == name && Document::is_document_type(&record.target.media_type));
        Ok(recorded.map(|record| record.target.digest))
    }

    /// Checks that the runtime permits imports. Shortly after the agent's start the answer may be
    /// missing, so the check waits. A missing answer is a failure of the store, which is retried.
    async fn check_imports(&self) -> Result<(), RecoverError> {
        let mut imports = self.imports.clone();
        let known = imports.wait_for(|imports| *imports != ImportPermission::Unknown);
        match tokio::time::timeout(IMPORTS_TIMEOUT, known).await {
            Ok(Ok(imports)) => match &*imports {
                ImportPermission::Refused(reason) => Err(RecoverError::ImportsRefused { reason: reason.clone() }),
                ImportPermission::Allowed | ImportPermission::Unknown => Ok(()),
            },
            Ok(Err(_)) | Err(_) => {
                let text = "no answer yet; check that containerd runs on this node".to_owned();
                let doing = "asking whether containerd verifies images";
                Err(RecoverError::Store { doing, source: StoreError::Unavailable(text) })
            }
        }
    }

    /// Fetches the whole image, and unpacks the layers where this node can. Only the image records
    /// are missing afterward. With a record before the unpacking, the runtime would unpack the same
    /// layers at the same time.
    async fn fetch_image(
        &self,
        request: &RecoveryRequest,
        image_digest: Digest,
        providers: &[PeerId],
        recovery_pin: &RecoveryPin,
        progress: &Progress,
    ) -> Result<(Descriptor, Vec<FetchedBlob>), RecoverError> {
        let (reference, pin) = (&request.reference, recovery_pin.pin());
        let image = self.fetch_documents(reference, image_digest, providers, pin).await?;
        let plan = self.plan(&image.manifest, request.verify_layers, pin).await?;
        self.check_providers(reference, &plan)?;
        self.check_transport(reference, &plan)?;
        let reservation = self.reserve(&plan).await?;
        progress.set_plan(&plan);
        let complete_blobs = watch::Sender::new(HashSet::new());
        let job = FetchJob {
            reference,
            image_digest,
            pin,
            progress,
            reservation: &reservation,
            complete_blobs: &complete_blobs,
        };
        let fetching = self.fetch_blobs(job, &plan);
        // The runtime may be unpacking a complete image with a record right now, so the runtime
        // keeps that work.
        let is_unfinished = !plan.missing.is_empty() || self.recorded_target(reference).await?.is_none();
        let layers = self.layer_reservation(&reservation);
        let blobs = match &self.layer_unpacker {
            Some(layer_unpacker) if is_unfinished => {
                let complete_blobs = complete_blobs.subscribe();
                let image = UnnamedImage {
                    reference,
                    manifest: &image.manifest,
                    pin,
                    progress,
                    reservation: layers,
                    complete_blobs,
                };
                layer_unpacker.fetch_and_unpack(fetching, image, || recovery_pin.remaining()).await?
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

    /// Refuses an image that cannot become complete, before any layer is fetched. The license of a
    /// missing layer may forbid distribution. A blob without a provider is often a layer that every
    /// node discarded after unpacking.
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

    /// While UDP is blocked, only small images come, over TCP. Of a larger image nothing is
    /// fetched.
    fn check_transport(&self, reference: &Reference, plan: &FetchPlan) -> Result<(), RecoverError> {
        if !self.resolver.inventory.udp().is_blocked() {
            return Ok(());
        }
        let needs_udp = |source| RecoverError::NeedsUdp { reference: reference.clone(), source: Box::new(source) };
        check_image(&plan.missing).map_err(needs_udp)
    }

    /// Fetches the missing blobs of the plan in pieces. The present blobs are pinned, because the
    /// collector may remove an unpinned blob before the image record exists.
    async fn fetch_blobs(&self, job: FetchJob<'_>, plan: &FetchPlan) -> Result<Vec<FetchedBlob>, RecoverError> {
        let max_blobs = self.policy.borrow().budgets.concurrent_blobs;
        let swarm = Swarm::new(&self.blob_fetcher, &self.claims, job, max_blobs);
        swarm.fetch(plan.present.iter().chain(&plan.missing)).await
    }

    /// Writes the image records, last of all: a record promises that all content is here.
    async fn record(&self, reference: &Reference, target: &Descriptor) -> Result<(), RecoverError> {
        if self.recorded_target(reference).await?.is_some_and(|recorded| recorded != target.digest) {
            // The kubelet's own pull was faster, and the registry's answer is newer than the
            // peers'.
            tracing::info!(%reference, "a pull recorded other content under this name meanwhile; the record stays");
            return Ok(());
        }
        for name in reference.record_names(target.digest) {
            let record = ImageRecord { name, target: target.clone() };
            self.store.put_image(&record).await.map_err(RecoverError::store("writing the image record"))?;
        }
        Ok(())
    }
}

fn summarize(digest: Digest, blobs: &[FetchedBlob], took: Duration) -> RecoveredImage {
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
