//! Fetches layers that an image lacks here, in the background: layers of images that were pulled
//! before the agent ran, and base layers that containerd did not download because another image had
//! unpacked them. [`crate::decide::fill`] decides the time and the source of each fetch.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Retainer;
use super::missing_layers::MissingLayers;
use super::registry_fetch::RegistryFetch;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover::Recoverer;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::swarm::{FetchJob, Swarm};
use crate::decide::disk_floor::{DiskFloors, DiskNeed};
use crate::decide::disk_reservations::Reservation;
use crate::decide::fill::{FillFailure, FillScheduler, FillSource, IncompleteImage, SecretName, UnfilledReason};
use crate::decide::plan::FetchPlan;
use crate::decide::retain::{self, RetainOptions};
use crate::metrics::Metrics;
use crate::oci::{Descriptor, Digest, Reference};
use crate::ports::{ImportPermission, Pin, StoreError};
use crate::util::clock::now;

/// The image to fetch next, and the source.
pub(super) struct FillJob {
    pub(super) image: MissingLayers,
    facts: IncompleteImage,
    source: FillSource,
}

/// Fetches one image's layers at a time.
pub(super) struct Filler {
    recoverer: Arc<Recoverer>,
    healthy_registries: watch::Receiver<Arc<BTreeSet<String>>>,
    rate: u64,
    metrics: Metrics,
    schedule: FillScheduler,
    /// The image in progress, and the reference of its claims.
    current: Option<(IncompleteImage, FillSource, Reference)>,
    tasks: JoinSet<Result<(), FillFailure>>,
}

impl Filler {
    pub(super) fn new(
        recoverer: Arc<Recoverer>,
        healthy_registries: watch::Receiver<Arc<BTreeSet<String>>>,
        options: &RetainOptions,
        metrics: Metrics,
    ) -> Self {
        let schedule = FillScheduler::new(options.fetch, now(), rand::random());
        let rate = options.fetch_rate;
        Self { recoverer, healthy_registries, rate, metrics, schedule, current: None, tasks: JoinSet::new() }
    }

    /// Chooses the image to fetch now, if any, and counts the reasons why images lack layers.
    /// `fits` reports whether layers of so many bytes have room. The fetch begins with
    /// [`Filler::start`], or ends with [`Filler::reject`].
    pub(super) fn choose(
        &mut self,
        incomplete_images: Vec<MissingLayers>,
        secrets: &BTreeMap<Reference, BTreeSet<SecretName>>,
        fits: impl Fn(u64) -> bool,
    ) -> (Option<FillJob>, BTreeMap<UnfilledReason, usize>) {
        let facts: Vec<_> = incomplete_images.iter().map(|image| self.facts(image, secrets, &fits)).collect();
        let is_allowed = *self.recoverer.imports.borrow() == ImportPermission::Allowed
            && !self.recoverer.policy.borrow().opt_in.kill_switch;
        let members = self.recoverer.resolver.inventory.peer_count() + 1;
        let next = match is_allowed {
            true => self.schedule.start_next(&facts, members, now(), rand::random),
            false => None,
        };
        let mut reasons = BTreeMap::new();
        for image in &facts {
            *reasons.entry(self.schedule.unfilled_reason(image)).or_default() += 1;
        }
        let job = next.and_then(|(manifest, source)| {
            let mut images = incomplete_images.into_iter().zip(facts);
            let (image, facts) = images.find(|(image, _)| image.manifest == manifest)?;
            Some(FillJob { image, facts, source })
        });
        (job, reasons)
    }

    fn facts(
        &self,
        image: &MissingLayers,
        secrets: &BTreeMap<Reference, BTreeSet<SecretName>>,
        fits: impl Fn(u64) -> bool,
    ) -> IncompleteImage {
        let MissingLayers { manifest, reference, image_digest, layers } = image;
        let resolver = &self.recoverer.resolver;
        let registry = reference.repository().registry.clone();
        let has_providers = layers.keys().all(|layer| resolver.inventory.count_blob_providers(*layer) > 0)
            && resolver.providers(reference, *image_digest).is_ok();
        IncompleteImage {
            manifest: *manifest,
            secrets: secrets.get(reference).cloned().unwrap_or_default(),
            has_providers,
            nodes: resolver.inventory.count_blob_providers(*manifest) + 1,
            is_healthy: self.healthy_registries.borrow().contains(&registry),
            registry,
            fits: fits(total_bytes(layers)),
        }
    }

    /// Starts the fetch into the lease. `line` bytes of the disk stay free.
    pub(super) fn start(&mut self, job: FillJob, pin: Pin, min_free_bytes: u64) {
        let FillJob { image, facts, source } = job;
        let (name, layers) = (&image.reference, image.layers.len());
        tracing::info!(image = %name, layers, from = source.label(), "layers that are missing here are fetched");
        let (recoverer, claimed) = (Arc::clone(&self.recoverer), image.reference.clone());
        match source {
            FillSource::Peers => drop(self.tasks.spawn(async move {
                let fetched = fetch_from_peers(&recoverer, &image, &pin, min_free_bytes).await;
                recoverer.claims.release_all(&image.reference).await;
                fetched
            })),
            FillSource::Registry => {
                let (secrets, rate, metrics) = (facts.secrets.clone(), self.rate, self.metrics.clone());
                self.tasks.spawn(async move {
                    let reservation = reserve_space(&recoverer, &image.layers, min_free_bytes).await?;
                    RegistryFetch::new(&recoverer, &image, &pin, &reservation, rate, metrics).fetch(secrets).await
                });
            }
        }
        self.current = Some((facts, source, claimed));
    }

    /// Ends the chosen fetch, because the image has no lease.
    pub(super) fn reject(&mut self, job: &FillJob) {
        self.schedule.record_end(&job.facts, Err(FillFailure::Local), now(), rand::random());
    }

    /// Cancels the running fetch and releases its claims.
    pub(super) async fn stop(mut self) {
        self.tasks.shutdown().await;
        if let Some((_, _, reference)) = self.current {
            self.recoverer.claims.release_all(&reference).await;
        }
    }

    /// Waits for the end of the running fetch; forever without a fetch.
    pub(super) async fn wait(&mut self) {
        let Some(ended) = self.tasks.join_next().await else { return std::future::pending().await };
        let result = ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        let Some((image, source, _)) = self.current.take() else { return std::future::pending().await };
        self.metrics.layer_fetch_ended(source, result);
        self.schedule.record_end(&image, result.map(|()| source), now(), rand::random());
    }

    /// The image in progress.
    pub(super) fn running(&self) -> Option<Digest> {
        self.schedule.in_flight()
    }
}

impl Retainer {
    /// Starts the fetch of one image's missing layers, where budget and disk have room besides all
    /// retained layers.
    pub(super) async fn start_fill(&mut self, now: SystemTime) -> Result<(), StoreError> {
        let leased = self.leased();
        let retained = retain::distinct_bytes(leased.values().map(|lease| &lease.layers));
        let room = self.file_system.map(|room| (room.free, room.total));
        let allowed = retain::allowed_bytes(self.budget(), retained, room);
        let min_free_bytes = room.map_or(0, |(_, total)| retain::min_free(total));
        let fits = |missing: u64| {
            let on_disk = room.is_none_or(|(free, _)| free.saturating_sub(missing) >= min_free_bytes);
            on_disk && retained.saturating_add(missing) <= allowed
        };
        let Some(filler) = &mut self.filler else { return Ok(()) };
        let incomplete_images = self
            .images
            .incomplete_images(|facts: &retain::RetainFacts| retain::interest(self.options.layers, facts, now));
        let used = Arc::clone(&self.used.borrow());
        let job;
        (job, self.lack_reasons) = filler.choose(incomplete_images.collect(), &used.pull_secrets, fits);
        let Some(job) = job else { return Ok(()) };
        let manifest = job.image.manifest;
        self.images.begin_fill(manifest);
        let applied = self.apply_decisions(now).await;
        let pin = self.image_leases.get(&manifest).map(|lease| lease.pin.clone());
        let Some(filler) = &mut self.filler else { return applied };
        match pin.filter(|_| applied.is_ok()) {
            Some(pin) => filler.start(job, pin, min_free_bytes),
            None => {
                filler.reject(&job);
                self.images.end_fill();
            }
        }
        applied
    }
}

fn total_bytes(layers: &BTreeMap<Digest, u64>) -> u64 {
    layers.values().fold(0, |sum, size| sum.saturating_add(*size))
}

/// Reserves room for the layers, besides every recovery. These layers are unpacked already, so only
/// the content store needs room.
async fn reserve_space(
    recoverer: &Recoverer,
    layers: &BTreeMap<Digest, u64>,
    min_free_bytes: u64,
) -> Result<Reservation, FillFailure> {
    let measurement = recoverer.reservations.begin_measurement();
    let measured = recoverer.store.disks().await.map_err(RecoverError::store("measuring the disks"));
    let need = DiskNeed { download: total_bytes(layers), unpack: 0 };
    let floors = DiskFloors { min_free_bytes, image_gc_percent: 100, eviction_percent: 0 };
    let reserved = measured.and_then(|disks| Ok(recoverer.reservations.reserve(need, measurement, disks, floors)?));
    reserved.map_err(|error| {
        tracing::info!(%error, "no room for the layers that are missing here; another attempt follows");
        FillFailure::Local
    })
}

/// Fetches one layer at a time, besides the recoveries of pods. The rate limit of downloads
/// applies.
async fn fetch_from_peers(
    recoverer: &Recoverer,
    image: &MissingLayers,
    pin: &Pin,
    min_free_bytes: u64,
) -> Result<(), FillFailure> {
    let MissingLayers { manifest: _, reference, image_digest, layers } = image;
    let reservation = reserve_space(recoverer, layers, min_free_bytes).await?;
    let (progress, complete_blobs) = (Progress::default(), watch::Sender::new(HashSet::new()));
    let job = FetchJob {
        reference,
        image_digest: *image_digest,
        pin,
        progress: &progress,
        reservation: &reservation,
        complete_blobs: &complete_blobs,
    };
    let blob = |(digest, size): (&Digest, &u64)| Descriptor {
        media_type: String::new(),
        digest: *digest,
        size: *size,
        platform: None,
        attestation: false,
    };
    let plan = FetchPlan { present: Vec::new(), missing: layers.iter().map(blob).collect(), withheld: Vec::new() };
    progress.set_plan(&plan);
    let fetched = Swarm::new(&recoverer.blob_fetcher, &recoverer.claims, job, 1).fetch(plan.missing.iter()).await;
    fetched.map(drop).map_err(|error| {
        tracing::info!(
            image = %reference, %error,
            "peers did not supply the layers that are missing here; another attempt follows"
        );
        match error {
            RecoverError::Store { .. } => FillFailure::Local,
            _ => FillFailure::Peers,
        }
    })
}
