//! Retains the layers of images on a node whose containerd discards layers after unpacking.
//!
//! containerd commits a manifest before the download of the first layer. At the manifest's event
//! the agent takes the image's lease and names every layer, also layers that have not come yet, so
//! no layer depends on the agent's speed. A lease for blobs of unknown images is therefore not
//! needed. Events are the fast path. A list of everything, every `TICK` and after image records
//! changed, is the truth.
//!
//! [`crate::decide::retain`] decides which images are retained. [`PodImages`] finds the images that
//! opted-in namespaces run.

mod fill;
mod from_registry;
mod here;
mod pods;
#[cfg(test)]
pub(super) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::fill::Filler;
use self::here::Here;
pub use self::pods::{PodImages, UsedImages};
use super::recover::Recoverer;
use crate::decide::disk::FileSystem;
use crate::decide::fill::Lack;
use crate::decide::retain::{
    Action, Candidate, Facts, LEASE_LIFE, Leased, RetainOptions, actions, allowed, bytes, interest,
};
use crate::metrics::Metrics;
use crate::oci::Digest;
use crate::ports::{ContentEvent, ContentStore, LayerLeases, Pin, RetainedStatus, StoreError};

/// Interval of the complete list, and so the delay until scarce free space is noticed. A list takes
/// milliseconds.
const TICK: Duration = Duration::from_secs(10);

/// Delay of the list after the pods' images changed: pods come in bursts.
const SETTLE: Duration = Duration::from_millis(200);

/// Delay until containerd has labelled a new manifest with the repository. The label precedes the
/// download of the layers.
const LABELLED: Duration = Duration::from_millis(100);

/// Delay after the store failed.
const RETRY: Duration = Duration::from_secs(2);

/// Layers named at the same time. containerd writes one after the other; more would only queue
/// there.
const NAMED_AT_ONCE: usize = 4;

/// Retains layers of one store.
pub struct Retainer {
    store: Arc<dyn ContentStore>,
    leases: Arc<dyn LayerLeases>,
    options: RetainOptions,
    used: watch::Receiver<Arc<UsedImages>>,
    metrics: Metrics,
    status: watch::Sender<Option<RetainedStatus>>,
    here: Here,
    held: BTreeMap<Digest, Held>,
    /// Leases that another one of the same image replaces.
    replaced: Vec<Pin>,
    /// The leases in `held` are those of the store.
    listed: bool,
    room: Option<FileSystem>,
    /// Fetches layers that are missing here; `None` where that is not wanted.
    filler: Option<Filler>,
    /// Why images lack layers, as far as the filler knows.
    reasons: BTreeMap<Lack, usize>,
}

/// The lease of one image.
struct Held {
    pin: Pin,
    expires: SystemTime,
    layers: BTreeSet<Digest>,
    /// Its labels say that the image was used.
    says_used: bool,
}

impl Retainer {
    /// Builds the task. `run` starts it.
    pub fn new(
        store: Arc<dyn ContentStore>,
        leases: Arc<dyn LayerLeases>,
        options: RetainOptions,
        used: watch::Receiver<Arc<UsedImages>>,
        metrics: Metrics,
        status: watch::Sender<Option<RetainedStatus>>,
    ) -> Self {
        Self {
            store,
            leases,
            options,
            used,
            metrics,
            status,
            here: Here::default(),
            held: BTreeMap::new(),
            replaced: Vec::new(),
            listed: false,
            room: None,
            filler: None,
            reasons: BTreeMap::new(),
        }
    }

    /// Fetches layers that are missing here as well: from peers, and from registries that are
    /// `healthy`, as far as the options permit.
    #[must_use]
    pub fn with_sources(self, recoverer: Arc<Recoverer>, healthy: watch::Receiver<Arc<BTreeSet<String>>>) -> Self {
        Self { filler: Some(Filler::new(recoverer, healthy, &self.options, self.metrics.clone())), ..self }
    }

    /// Retains until stopped. The leases stay: the next agent finds them.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut events = self.leases.content_events();
        let mut due = Instant::now();
        loop {
            // Events first: a layer that is committed now is collected when its pull ends.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                event = events.recv() => due = due.min(match event {
                    Ok(ContentEvent::Committed { digest, size }) => self.on_committed(digest, size).await,
                    Ok(ContentEvent::Records) => self.on_records().await,
                    Ok(ContentEvent::Missed) | Err(broadcast::error::RecvError::Lagged(_)) => {
                        self.listed = false;
                        Instant::now()
                    }
                    // The store sends as long as it exists.
                    Err(broadcast::error::RecvError::Closed) => {
                        stop.cancelled().await;
                        break;
                    }
                }),
                Ok(()) = self.used.changed() => due = due.min(Instant::now() + SETTLE),
                () = filled(&mut self.filler) => {
                    self.here.expect_no_more();
                    due = Instant::now();
                }
                () = sleep_until(due) => due = Instant::now() + self.list().await,
            }
        }
        if let Some(filler) = self.filler {
            filler.stop().await;
        }
    }

    /// Takes the lease on an image when the manifest comes, and again when a layer comes that no
    /// lease names. Returns the time of the next list.
    async fn on_committed(&mut self, digest: Digest, size: u64) -> Instant {
        let now = SystemTime::now();
        let is_manifest = match self.here.committed(&*self.store, digest, size, now).await {
            Ok(is_manifest) => is_manifest,
            Err(error) => return self.failed("reading a manifest", &error),
        };
        let held = |manifest| self.held.get(&manifest).is_some_and(|held| held.layers.contains(&digest));
        if !is_manifest && self.here.images_with(digest).all(held) {
            return Instant::now() + TICK;
        }
        match self.settle(now).await {
            Ok(()) => Instant::now() + if is_manifest { LABELLED } else { TICK },
            Err(error) => self.failed("taking a lease", &error),
        }
    }

    /// Takes the lease on an image that no event announced. Before containerd 2.1 the record is a
    /// pull's first event, and the pull's own lease ends right after: no time for a list.
    async fn on_records(&mut self) -> Instant {
        let now = SystemTime::now();
        match self.here.recorded(&*self.store, now).await {
            Ok(false) => Instant::now(),
            Ok(true) => match self.settle(now).await {
                Ok(()) => Instant::now(),
                Err(error) => self.failed("taking a lease", &error),
            },
            Err(error) => self.failed("reading a manifest", &error),
        }
    }

    fn failed(&mut self, doing: &str, error: &StoreError) -> Instant {
        tracing::warn!(%error, doing, "layers are not retained now; trying again");
        self.listed = false;
        Instant::now() + RETRY
    }

    /// Compares everything. Returns the delay until the next list.
    async fn list(&mut self) -> Duration {
        let now = SystemTime::now();
        match self.compare(now).await {
            Ok(()) => TICK,
            Err(error) => {
                self.failed("listing content", &error);
                RETRY
            }
        }
    }

    async fn compare(&mut self, now: SystemTime) -> Result<(), StoreError> {
        if !self.listed {
            self.list_leases().await?;
        }
        let used = Arc::clone(&self.used.borrow_and_update());
        self.here.list(&*self.store, &*self.leases, &used, now).await?;
        self.room = self.store.disks().await?.content;
        self.settle(now).await?;
        self.fill(now).await?;
        self.show();
        Ok(())
    }

    /// Reads the leases of an earlier agent. Of two leases of one image the younger stays.
    async fn list_leases(&mut self) -> Result<(), StoreError> {
        (self.held, self.replaced) = (BTreeMap::new(), Vec::new());
        for lease in self.leases.layer_leases().await? {
            self.here.remember_use(lease.manifest, lease.last_use);
            let says_used = lease.last_use.is_some();
            let held = Held { pin: lease.pin, expires: lease.expires, layers: lease.layers, says_used };
            match self.held.get_mut(&lease.manifest) {
                Some(older) if older.expires < held.expires => {
                    self.replaced.push(std::mem::replace(older, held).pin);
                }
                Some(_) => self.replaced.push(held.pin),
                None => drop(self.held.insert(lease.manifest, held)),
            }
        }
        self.listed = true;
        Ok(())
    }

    /// Decides and acts.
    async fn settle(&mut self, now: SystemTime) -> Result<(), StoreError> {
        if !self.listed {
            return Ok(());
        }
        self.here.find_sources(&*self.leases).await?;
        let candidates = self.candidates(now);
        let leased = self.leased();
        let retained = bytes(leased.values().map(|lease| &lease.layers));
        let room = self.room.map(|room| (room.free, room.total));
        let budget = self.budget();
        let allowed = allowed(budget, retained, room);
        let mut steps = actions(&candidates, &leased, allowed, now).into_iter().peekable();
        while let Some(step) = steps.next() {
            // Where the disk is short, the last release waits for the collector: the next
            // measurement then shows the freed space.
            let is_last_release = !matches!(steps.peek(), Some(Action::Release(_)));
            self.act(step, allowed < budget && is_last_release, now).await?;
        }
        for pin in std::mem::take(&mut self.replaced) {
            self.leases.end_lease(pin, false).await?;
        }
        if allowed < budget {
            // The collector has run. Without a new measurement the next decision would release the
            // same bytes again.
            self.room = self.store.disks().await?.content;
        }
        Ok(())
    }

    fn candidates(&self, now: SystemTime) -> Vec<Candidate> {
        self.here.candidates(|facts: &Facts| interest(self.options.layers, facts, now))
    }

    /// The leases with those of their layers that are here or on their way.
    fn leased(&self) -> BTreeMap<Digest, Leased> {
        let sized = |(manifest, held): (&Digest, &Held)| {
            let layers = held.layers.iter().filter_map(|layer| Some((*layer, self.here.size_in(*manifest, *layer)?)));
            (*manifest, Leased { layers: layers.collect(), expires: held.expires, says_used: held.says_used })
        };
        self.held.iter().map(sized).collect()
    }

    fn budget(&self) -> u64 {
        self.options.bytes.on(self.room.map(|room| room.total))
    }

    async fn act(&mut self, action: Action, collect: bool, now: SystemTime) -> Result<(), StoreError> {
        match action {
            Action::Release(manifest) => {
                if let Some(held) = self.held.remove(&manifest) {
                    tracing::info!(%manifest, layers = held.layers.len(), "layers are released");
                    self.leases.end_lease(held.pin, collect).await?;
                }
            }
            Action::Retain(manifest, layers) => {
                if !self.held.contains_key(&manifest) {
                    let held = self.new_lease(manifest, now).await?;
                    tracing::info!(%manifest, layers = layers.len(), "layers are retained");
                    self.held.insert(manifest, held);
                }
                self.name(manifest, layers).await?;
            }
            // The fetch under way writes into this lease.
            Action::Renew(manifest) if self.filler.as_ref().and_then(Filler::running) == Some(manifest) => {}
            Action::Renew(manifest) => {
                let fresh = self.new_lease(manifest, now).await?;
                let Some(old) = self.held.insert(manifest, fresh) else { return Ok(()) };
                self.name(manifest, old.layers).await?;
                self.leases.end_lease(old.pin, false).await?;
            }
        }
        Ok(())
    }

    async fn new_lease(&self, manifest: Digest, now: SystemTime) -> Result<Held, StoreError> {
        let expires = now + LEASE_LIFE;
        let last_use = self.here.last_use(manifest);
        let pin = self.leases.lease_layers(manifest, last_use, expires).await?;
        Ok(Held { pin, expires, layers: BTreeSet::new(), says_used: last_use.is_some() })
    }

    /// Names the layers in the image's lease, the smallest first: those come first.
    async fn name(&mut self, manifest: Digest, layers: BTreeSet<Digest>) -> Result<(), StoreError> {
        let Some(held) = self.held.get_mut(&manifest) else { return Ok(()) };
        let pin = held.pin.clone();
        let mut ordered: Vec<_> = layers.into_iter().collect();
        ordered.sort_by_key(|layer| self.here.size_in(manifest, *layer));
        let leases = &self.leases;
        let naming = ordered.into_iter().map(|layer| {
            let pin = &pin;
            async move { leases.add_layer(pin, layer).await.map(|()| layer) }
        });
        let named: Vec<_> = stream::iter(naming).buffer_unordered(NAMED_AT_ONCE).try_collect().await?;
        held.layers.extend(named);
        Ok(())
    }

    fn show(&mut self) {
        let leased = self.leased();
        let now = SystemTime::now();
        let (wanted, lacking) = self.here.lacking(|facts: &Facts| interest(self.options.layers, facts, now));
        let mut reasons = self.reasons.clone();
        let known = reasons.values().sum();
        let others = lacking.saturating_sub(known);
        if others > 0 {
            *reasons.entry(Lack::NotFetched).or_default() += others;
        }
        let status = RetainedStatus {
            bytes: bytes(leased.values().map(|lease| &lease.layers)),
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

/// The end of a fetch; never, where none runs.
async fn filled(filler: &mut Option<Filler>) {
    match filler {
        Some(filler) => filler.ended().await,
        None => std::future::pending().await,
    }
}
