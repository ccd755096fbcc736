//! Layers that an image lacks here, fetched in the background: layers of images that were pulled
//! before the agent ran, and base layers that containerd did not download because another image had
//! unpacked them. [`crate::decide::fill`] decides what is fetched when, and from where.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Retainer;
use super::from_registry::FromRegistry;
use crate::agent::progress::Progress;
use crate::agent::recover::{RecoverError, Recoverer};
use crate::agent::swarm::{Errand, Swarm};
use crate::decide::disk::{Lines, Need};
use crate::decide::fill::{Failure, Fills, Incomplete, Lack, SecretName, Source};
use crate::decide::plan::Plan;
use crate::decide::reserve::Reservation;
use crate::decide::retain::{self, RetainOptions};
use crate::metrics::Metrics;
use crate::oci::{Descriptor, Digest, Reference};
use crate::ports::{Imports, Pin, StoreError};

/// Layers of one image that are to come.
#[derive(Debug, Clone)]
pub(super) struct Lacking {
    /// The manifest.
    pub(super) manifest: Digest,
    /// A name of the image here.
    pub(super) reference: Reference,
    /// The target of the record of this name.
    pub(super) root: Digest,
    /// The layers with their sizes in bytes.
    pub(super) layers: BTreeMap<Digest, u64>,
}

/// The image that is fetched now, and where from.
pub(super) struct Chosen {
    pub(super) image: Lacking,
    facts: Incomplete,
    source: Source,
}

/// Fetches one image's layers at a time.
pub(super) struct Filler {
    recoverer: Arc<Recoverer>,
    healthy: watch::Receiver<Arc<BTreeSet<String>>>,
    rate: u64,
    metrics: Metrics,
    fills: Fills,
    /// The image under way, and the name that its claims are held under.
    running: Option<(Incomplete, Source, Reference)>,
    work: JoinSet<Result<(), Failure>>,
}

impl Filler {
    pub(super) fn new(
        recoverer: Arc<Recoverer>,
        healthy: watch::Receiver<Arc<BTreeSet<String>>>,
        options: &RetainOptions,
        metrics: Metrics,
    ) -> Self {
        let fills = Fills::new(options.fetch, now(), rand::random());
        let rate = options.fetch_rate;
        Self { recoverer, healthy, rate, metrics, fills, running: None, work: JoinSet::new() }
    }

    /// The image to fetch now, if any, and why the images lack layers. `fits` says whether layers
    /// of so many bytes have room. The fetch begins with [`Filler::start`], or ends with
    /// [`Filler::give_up`].
    pub(super) fn choose(
        &mut self,
        lacking: Vec<Lacking>,
        secrets: &BTreeMap<Reference, BTreeSet<SecretName>>,
        fits: impl Fn(u64) -> bool,
    ) -> (Option<Chosen>, BTreeMap<Lack, usize>) {
        let facts: Vec<_> = lacking.iter().map(|image| self.facts(image, secrets, &fits)).collect();
        let is_allowed =
            *self.recoverer.imports.borrow() == Imports::Allowed && !self.recoverer.rules.borrow().policy.kill_switch;
        let members = self.recoverer.resolver.holders.count() + 1;
        let next = match is_allowed {
            true => self.fills.next(&facts, members, now(), rand::random),
            false => None,
        };
        let mut reasons = BTreeMap::new();
        for image in &facts {
            *reasons.entry(self.fills.reason(image)).or_default() += 1;
        }
        let chosen = next.and_then(|(manifest, source)| {
            let mut images = lacking.into_iter().zip(facts);
            let (image, facts) = images.find(|(image, _)| image.manifest == manifest)?;
            Some(Chosen { image, facts, source })
        });
        (chosen, reasons)
    }

    fn facts(
        &self,
        image: &Lacking,
        secrets: &BTreeMap<Reference, BTreeSet<SecretName>>,
        fits: impl Fn(u64) -> bool,
    ) -> Incomplete {
        let Lacking { manifest, reference, root, layers } = image;
        let resolver = &self.recoverer.resolver;
        let registry = reference.repository().registry.clone();
        let is_held = layers.keys().all(|layer| resolver.holders.count_of_blob(*layer) > 0)
            && resolver.providers(reference, *root).is_ok();
        Incomplete {
            manifest: *manifest,
            secrets: secrets.get(reference).cloned().unwrap_or_default(),
            is_held,
            nodes: resolver.holders.count_of_blob(*manifest) + 1,
            is_healthy: self.healthy.borrow().contains(&registry),
            registry,
            fits: fits(bytes(layers)),
        }
    }

    /// Begins to fetch into the lease. `line` bytes of the disk stay free.
    pub(super) fn start(&mut self, chosen: Chosen, pin: Pin, line: u64) {
        let Chosen { image, facts, source } = chosen;
        let (name, layers) = (&image.reference, image.layers.len());
        tracing::info!(image = %name, layers, from = source.label(), "layers that are missing here are fetched");
        let (recoverer, claimed) = (Arc::clone(&self.recoverer), image.reference.clone());
        match source {
            Source::Peers => drop(self.work.spawn(async move {
                let fetched = from_peers(&recoverer, &image, &pin, line).await;
                recoverer.lead.retire(&image.reference).await;
                fetched
            })),
            Source::Registry => {
                let (secrets, rate, metrics) = (facts.secrets.clone(), self.rate, self.metrics.clone());
                self.work.spawn(async move {
                    let room = reserve(&recoverer, &image.layers, line).await?;
                    FromRegistry::new(&recoverer, &image, &pin, &room, rate, metrics).fetch(secrets).await
                });
            }
        }
        self.running = Some((facts, source, claimed));
    }

    /// The chosen image has no lease to be fetched into.
    pub(super) fn give_up(&mut self, chosen: &Chosen) {
        self.fills.ended(&chosen.facts, Err(Failure::Local), now(), rand::random());
    }

    /// Ends the fetch under way and releases its claims.
    pub(super) async fn stop(mut self) {
        self.work.shutdown().await;
        if let Some((_, _, reference)) = self.running {
            self.recoverer.lead.retire(&reference).await;
        }
    }

    /// Waits for the end of the fetch under way; for ever without a fetch.
    pub(super) async fn ended(&mut self) {
        let Some(ended) = self.work.join_next().await else { return std::future::pending().await };
        let result = ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        let Some((image, source, _)) = self.running.take() else { return std::future::pending().await };
        self.metrics.layer_fetch_ended(source, result);
        self.fills.ended(&image, result.map(|()| source), now(), rand::random());
    }

    /// The image under way.
    pub(super) fn running(&self) -> Option<Digest> {
        self.fills.running()
    }
}

impl Retainer {
    /// Begins to fetch the layers that one image lacks, where the budget and the disk have room
    /// beside all retained layers.
    pub(super) async fn fill(&mut self, now: SystemTime) -> Result<(), StoreError> {
        let leased = self.leased();
        let retained = retain::bytes(leased.values().map(|lease| &lease.layers));
        let room = self.room.map(|room| (room.free, room.total));
        let allowed = retain::allowed(self.budget(), retained, room);
        let line = room.map_or(0, |(_, total)| retain::min_free(total));
        let fits = |missing: u64| {
            let on_disk = room.is_none_or(|(free, _)| free.saturating_sub(missing) >= line);
            on_disk && retained.saturating_add(missing) <= allowed
        };
        let Some(filler) = &mut self.filler else { return Ok(()) };
        let lacking =
            self.here.lacking_images(|facts: &retain::Facts| retain::interest(self.options.layers, facts, now));
        let used = Arc::clone(&self.used.borrow());
        let chosen;
        (chosen, self.reasons) = filler.choose(lacking.collect(), &used.pull_secrets, fits);
        let Some(chosen) = chosen else { return Ok(()) };
        let manifest = chosen.image.manifest;
        self.here.expect_all(manifest);
        let settled = self.settle(now).await;
        let pin = self.held.get(&manifest).map(|held| held.pin.clone());
        let Some(filler) = &mut self.filler else { return settled };
        match pin.filter(|_| settled.is_ok()) {
            Some(pin) => filler.start(chosen, pin, line),
            None => {
                filler.give_up(&chosen);
                self.here.expect_no_more();
            }
        }
        settled
    }
}

/// The clock that tests pause.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

fn bytes(layers: &BTreeMap<Digest, u64>) -> u64 {
    layers.values().fold(0, |sum, size| sum.saturating_add(*size))
}

/// Room for the layers beside every recovery. These layers are unpacked already: they take room in
/// the content store alone.
async fn reserve(recoverer: &Recoverer, layers: &BTreeMap<Digest, u64>, line: u64) -> Result<Reservation, Failure> {
    let before = recoverer.room.before_measuring();
    let looked = recoverer.store.disks().await.map_err(RecoverError::store("looking for room"));
    let need = Need { download: bytes(layers), unpack: 0 };
    let lines = Lines { min_free_bytes: line, collection_percent: 100, eviction_percent: 0 };
    let reserved = looked.and_then(|disks| Ok(recoverer.room.reserve(need, before, disks, lines)?));
    reserved.map_err(|error| {
        tracing::info!(%error, "layers that are missing here have no room; they are tried again later");
        Failure::Local
    })
}

/// One layer at a time, beside what pods wait for. The rate limit of downloads holds for this too.
async fn from_peers(recoverer: &Recoverer, image: &Lacking, pin: &Pin, line: u64) -> Result<(), Failure> {
    let Lacking { manifest: _, reference, root, layers } = image;
    let room = reserve(recoverer, layers, line).await?;
    let (progress, here) = (Progress::default(), watch::Sender::new(HashSet::new()));
    let errand = Errand { reference, root: *root, pin, progress: &progress, room: &room, here: &here };
    let blob = |(digest, size): (&Digest, &u64)| Descriptor {
        media_type: String::new(),
        digest: *digest,
        size: *size,
        platform: None,
        attestation: false,
    };
    let plan = Plan { there: Vec::new(), missing: layers.iter().map(blob).collect(), withheld: Vec::new() };
    progress.expect(&plan);
    let fetched = Swarm::new(&recoverer.bring, &recoverer.lead, errand, 1).fetch(plan.missing.iter()).await;
    fetched.map(drop).map_err(|error| {
        tracing::info!(image = %reference, %error, "layers that are missing here did not come from peers; they are tried again later");
        match error {
            RecoverError::Store { .. } => Failure::Local,
            _ => Failure::Peers,
        }
    })
}
