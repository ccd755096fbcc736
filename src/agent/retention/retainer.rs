//! Retains the layers of images on a node whose containerd discards layers after unpacking.
//!
//! containerd commits a manifest before the download of the first layer. At the manifest's event
//! the agent takes the image's lease and names every layer, also layers that have not arrived yet,
//! so no layer depends on the agent's speed. A lease for blobs of unknown images is therefore not
//! needed. Events are the fast path. A complete list, every `LIST_PERIOD` and after a change of
//! image records, corrects the state.
//!
//! [`crate::decide::retain`] decides which images are retained. [`PodImages`] finds the images that
//! opted-in namespaces run.

mod filler;
mod local_images;
mod missing_layers;
mod pod_images;
mod registry_fetch;
#[cfg(test)]
pub(in crate::agent) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::filler::Filler;
use self::local_images::LocalImages;
pub use self::pod_images::{PodImages, UsedImages};
use crate::agent::recovery::recover::Recoverer;
use crate::control::RetentionStatus;
use crate::decide::disk_floor::FileSystem;
use crate::decide::fill::UnfilledReason;
use crate::decide::retain::{
    LEASE_DURATION, LayerLease, LeaseAction, RetainCandidate, RetainFacts, RetainOptions, actions, allowed_bytes,
    distinct_bytes, interest,
};
use crate::metrics::Metrics;
use crate::oci::Digest;
use crate::ports::{ContentEvent, ContentStore, LayerLeases, Pin, StoreError};

/// Interval of the complete list, and so the delay until scarce free space is noticed. A list takes
/// milliseconds.
const LIST_PERIOD: Duration = Duration::from_secs(10);

/// Delay of the list after the pods' images changed: pods come in bursts.
const SETTLE_DELAY: Duration = Duration::from_millis(200);

/// Delay until containerd has labeled a new manifest with the repository. The label precedes the
/// download of the layers.
const LABEL_DELAY: Duration = Duration::from_millis(100);

/// Delay after the store failed.
const RETRY_DELAY: Duration = Duration::from_secs(2);

/// Layers named at the same time. containerd writes one after the other; more would only queue
/// there.
const MAX_CONCURRENT_ADDS: usize = 4;

/// Retains layers of one store.
pub struct Retainer {
    store: Arc<dyn ContentStore>,
    leases: Arc<dyn LayerLeases>,
    options: RetainOptions,
    used: watch::Receiver<Arc<UsedImages>>,
    metrics: Metrics,
    status: watch::Sender<Option<RetentionStatus>>,
    images: LocalImages,
    image_leases: BTreeMap<Digest, ImageLease>,
    /// Leases that a younger lease of the same image supersedes.
    superseded_leases: Vec<Pin>,
    /// `image_leases` matches the leases of the store.
    is_lease_list_known: bool,
    file_system: Option<FileSystem>,
    /// Fetches layers that are missing here; `None` where the options exclude that.
    filler: Option<Filler>,
    /// The filler's reasons why images lack layers.
    lack_reasons: BTreeMap<UnfilledReason, usize>,
}

/// The lease of one image.
struct ImageLease {
    pin: Pin,
    expires: SystemTime,
    layers: BTreeSet<Digest>,
    /// The lease's labels record a use of the image.
    records_use: bool,
}

impl Retainer {
    /// Builds the task. `run` starts it.
    pub fn new(
        store: Arc<dyn ContentStore>,
        leases: Arc<dyn LayerLeases>,
        options: RetainOptions,
        used: watch::Receiver<Arc<UsedImages>>,
        metrics: Metrics,
        status: watch::Sender<Option<RetentionStatus>>,
    ) -> Self {
        Self {
            store,
            leases,
            options,
            used,
            metrics,
            status,
            images: LocalImages::default(),
            image_leases: BTreeMap::new(),
            superseded_leases: Vec::new(),
            is_lease_list_known: false,
            file_system: None,
            filler: None,
            lack_reasons: BTreeMap::new(),
        }
    }

    /// Also fetches layers that are missing here, from peers and from `healthy` registries, as far
    /// as the options permit.
    #[must_use]
    pub fn with_filler(self, recoverer: Arc<Recoverer>, healthy: watch::Receiver<Arc<BTreeSet<String>>>) -> Self {
        Self { filler: Some(Filler::new(recoverer, healthy, &self.options, self.metrics.clone())), ..self }
    }

    /// Retains until stopped. The leases stay, and the next agent finds them.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut events = self.leases.content_events();
        let mut due = Instant::now();
        loop {
            // Events come first: containerd collects a newly committed layer when the layer's pull
            // ends.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                event = events.recv() => due = due.min(match event {
                    Ok(ContentEvent::Committed { digest, size }) => self.on_committed(digest, size).await,
                    Ok(ContentEvent::Records) => self.on_records().await,
                    Ok(ContentEvent::Missed) | Err(broadcast::error::RecvError::Lagged(_)) => {
                        self.is_lease_list_known = false;
                        Instant::now()
                    }
                    // The store sends as long as it exists.
                    Err(broadcast::error::RecvError::Closed) => {
                        stop.cancelled().await;
                        break;
                    }
                }),
                Ok(()) = self.used.changed() => due = due.min(Instant::now() + SETTLE_DELAY),
                () = fill_ended(&mut self.filler) => {
                    self.images.end_fill();
                    due = Instant::now();
                }
                () = sleep_until(due) => due = Instant::now() + self.list().await,
            }
        }
        if let Some(filler) = self.filler {
            filler.stop().await;
        }
    }

    /// Takes an image's lease when the manifest arrives, and updates the lease when a layer arrives
    /// that no lease names. Returns the time of the next list.
    async fn on_committed(&mut self, digest: Digest, size: u64) -> Instant {
        let now = SystemTime::now();
        let is_manifest = match self.images.record_commit(&*self.store, digest, size, now).await {
            Ok(is_manifest) => is_manifest,
            Err(error) => return self.on_failure("reading a manifest", &error),
        };
        let is_leased = |manifest| self.image_leases.get(&manifest).is_some_and(|held| held.layers.contains(&digest));
        if !is_manifest && self.images.images_with(digest).all(is_leased) {
            return Instant::now() + LIST_PERIOD;
        }
        match self.apply_decisions(now).await {
            Ok(()) => Instant::now() + if is_manifest { LABEL_DELAY } else { LIST_PERIOD },
            Err(error) => self.on_failure("taking a lease", &error),
        }
    }

    /// Takes the lease on an image without an event. Before containerd 2.1 the record is a pull's
    /// first event, and the pull's own lease ends right after: a complete list would be too late.
    async fn on_records(&mut self) -> Instant {
        let now = SystemTime::now();
        match self.images.read_new_records(&*self.store, now).await {
            Ok(false) => Instant::now(),
            Ok(true) => match self.apply_decisions(now).await {
                Ok(()) => Instant::now(),
                Err(error) => self.on_failure("taking a lease", &error),
            },
            Err(error) => self.on_failure("reading a manifest", &error),
        }
    }

    fn on_failure(&mut self, doing: &str, error: &StoreError) -> Instant {
        tracing::warn!(%error, doing, "layers are not retained now; the agent retries");
        self.is_lease_list_known = false;
        Instant::now() + RETRY_DELAY
    }

    /// Compares leases, images and disk. Returns the delay until the next list.
    async fn list(&mut self) -> Duration {
        let now = SystemTime::now();
        match self.reconcile(now).await {
            Ok(()) => LIST_PERIOD,
            Err(error) => {
                self.on_failure("listing content", &error);
                RETRY_DELAY
            }
        }
    }

    async fn reconcile(&mut self, now: SystemTime) -> Result<(), StoreError> {
        if !self.is_lease_list_known {
            self.list_leases().await?;
        }
        let used = Arc::clone(&self.used.borrow_and_update());
        self.images.refresh(&*self.store, &*self.leases, &used, now).await?;
        self.file_system = self.store.disks().await?.content;
        self.apply_decisions(now).await?;
        self.start_fill(now).await?;
        self.publish_status();
        Ok(())
    }

    /// Reads the leases of an earlier agent. Of two leases of one image, the younger stays.
    async fn list_leases(&mut self) -> Result<(), StoreError> {
        (self.image_leases, self.superseded_leases) = (BTreeMap::new(), Vec::new());
        for lease in self.leases.layer_leases().await? {
            self.images.record_last_use(lease.manifest, lease.last_use);
            let records_use = lease.last_use.is_some();
            let image_lease = ImageLease { pin: lease.pin, expires: lease.expires, layers: lease.layers, records_use };
            match self.image_leases.get_mut(&lease.manifest) {
                Some(older) if older.expires < image_lease.expires => {
                    self.superseded_leases.push(std::mem::replace(older, image_lease).pin);
                }
                Some(_) => self.superseded_leases.push(image_lease.pin),
                None => drop(self.image_leases.insert(lease.manifest, image_lease)),
            }
        }
        self.is_lease_list_known = true;
        Ok(())
    }

    async fn apply_decisions(&mut self, now: SystemTime) -> Result<(), StoreError> {
        if !self.is_lease_list_known {
            return Ok(());
        }
        self.images.find_origins(&*self.leases).await?;
        let candidates = self.candidates(now);
        let leased = self.leased();
        let retained = distinct_bytes(leased.values().map(|lease| &lease.layers));
        let room = self.file_system.map(|room| (room.free, room.total));
        let budget = self.budget();
        let allowed = allowed_bytes(budget, retained, room);
        let mut steps = actions(&candidates, &leased, allowed, now).into_iter().peekable();
        while let Some(step) = steps.next() {
            // Where free space is short, the last release waits for the collector, so that the next
            // measurement shows the freed space.
            let is_last_release = !matches!(steps.peek(), Some(LeaseAction::Release(_)));
            self.apply(step, allowed < budget && is_last_release, now).await?;
        }
        for pin in std::mem::take(&mut self.superseded_leases) {
            self.leases.end_lease(pin, false).await?;
        }
        if allowed < budget {
            // The collector has run. Without a new measurement, the next decision would release the
            // same bytes again.
            self.file_system = self.store.disks().await?.content;
        }
        Ok(())
    }

    fn candidates(&self, now: SystemTime) -> Vec<RetainCandidate> {
        self.images.candidates(|facts: &RetainFacts| interest(self.options.layers, facts, now))
    }

    /// The leases with those of their layers that are here or are being fetched.
    fn leased(&self) -> BTreeMap<Digest, LayerLease> {
        let sized = |(manifest, lease): (&Digest, &ImageLease)| {
            let layers =
                lease.layers.iter().filter_map(|layer| Some((*layer, self.images.size_in(*manifest, *layer)?)));
            (
                *manifest,
                LayerLease { layers: layers.collect(), expires: lease.expires, is_marked_used: lease.records_use },
            )
        };
        self.image_leases.iter().map(sized).collect()
    }

    fn budget(&self) -> u64 {
        self.options.bytes.limit_on(self.file_system.map(|room| room.total))
    }

    async fn apply(&mut self, action: LeaseAction, collect: bool, now: SystemTime) -> Result<(), StoreError> {
        match action {
            LeaseAction::Release(manifest) => {
                if let Some(lease) = self.image_leases.remove(&manifest) {
                    tracing::info!(%manifest, layers = lease.layers.len(), "layers are released");
                    self.leases.end_lease(lease.pin, collect).await?;
                }
            }
            LeaseAction::Retain(manifest, layers) => {
                if !self.image_leases.contains_key(&manifest) {
                    let lease = self.new_lease(manifest, now).await?;
                    tracing::info!(%manifest, layers = layers.len(), "layers are retained");
                    self.image_leases.insert(manifest, lease);
                }
                self.add_layers(manifest, layers).await?;
            }
            // The running fetch writes into this lease.
            LeaseAction::Renew(manifest) if self.filler.as_ref().and_then(Filler::running) == Some(manifest) => {}
            LeaseAction::Renew(manifest) => {
                let fresh = self.new_lease(manifest, now).await?;
                let Some(old) = self.image_leases.insert(manifest, fresh) else { return Ok(()) };
                self.add_layers(manifest, old.layers).await?;
                self.leases.end_lease(old.pin, false).await?;
            }
        }
        Ok(())
    }

    async fn new_lease(&self, manifest: Digest, now: SystemTime) -> Result<ImageLease, StoreError> {
        let expires = now + LEASE_DURATION;
        let last_use = self.images.last_use(manifest);
        let pin = self.leases.lease_layers(manifest, last_use, expires).await?;
        Ok(ImageLease { pin, expires, layers: BTreeSet::new(), records_use: last_use.is_some() })
    }

    /// Names the layers in the image's lease, the smallest first, because small layers arrive
    /// first.
    async fn add_layers(&mut self, manifest: Digest, layers: BTreeSet<Digest>) -> Result<(), StoreError> {
        let Some(lease) = self.image_leases.get_mut(&manifest) else { return Ok(()) };
        let pin = lease.pin.clone();
        let mut ordered: Vec<_> = layers.into_iter().collect();
        ordered.sort_by_key(|layer| self.images.size_in(manifest, *layer));
        let leases = &self.leases;
        let additions = ordered.into_iter().map(|layer| {
            let pin = &pin;
            async move { leases.add_layer(pin, layer).await.map(|()| layer) }
        });
        let added: Vec<_> = stream::iter(additions).buffer_unordered(MAX_CONCURRENT_ADDS).try_collect().await?;
        lease.layers.extend(added);
        Ok(())
    }

    fn publish_status(&mut self) {
        let leased = self.leased();
        let now = SystemTime::now();
        let (wanted, lacking) =
            self.images.count_incomplete(|facts: &RetainFacts| interest(self.options.layers, facts, now));
        let mut reasons = self.lack_reasons.clone();
        let known = reasons.values().sum();
        let others = lacking.saturating_sub(known);
        if others > 0 {
            *reasons.entry(UnfilledReason::NotFetched).or_default() += others;
        }
        let status = RetentionStatus {
            bytes: distinct_bytes(leased.values().map(|lease| &lease.layers)),
            budget: self.budget(),
            images: leased.len(),
            wanted,
            lacking,
            lacking_reasons: reasons.iter().map(|(reason, images)| (reason.to_string(), *images)).collect(),
        };
        self.metrics.layers_retained(status.bytes, status.images, status.lacking, &reasons);
        self.status.send_replace(Some(status));
    }
}

/// The end of a fetch; never, where no fetch runs.
async fn fill_ended(filler: &mut Option<Filler>) {
    match filler {
        Some(filler) => filler.wait().await,
        None => std::future::pending().await,
    }
}
