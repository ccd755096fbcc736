//! Layers that an image lacks here, fetched from peers: layers of images that were pulled before
//! the agent ran, and base layers that containerd did not download because another image had
//! unpacked them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::agent::progress::Progress;
use crate::agent::recover::{RecoverError, Recoverer};
use crate::agent::swarm::{Errand, Swarm};
use crate::decide::disk::{Lines, Need};
use crate::decide::plan::Plan;
use crate::oci::{Descriptor, Digest, Reference};
use crate::ports::{Imports, Pin};

/// Mean pause between two images. The pause is random, so that the nodes of a cluster do not fetch
/// the same image together.
const PAUSE: Duration = Duration::from_secs(60);

/// Pause before an image is tried again after its fetch failed.
const AGAIN: Duration = Duration::from_secs(30 * 60);

/// Images whose failed fetch is remembered; a node has a few hundred images.
const MAX_FAILED: usize = 1024;

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

/// Fetches one image's layers at a time.
pub(super) struct Filler {
    recoverer: Arc<Recoverer>,
    /// The image under way: its manifest, and the name that its claims are held under.
    running: Option<(Digest, Reference)>,
    work: JoinSet<Result<(), RecoverError>>,
    not_before: Instant,
    failed: HashMap<Digest, Instant>,
}

impl Filler {
    pub(super) fn new(recoverer: Arc<Recoverer>) -> Self {
        let work = JoinSet::new();
        Self { recoverer, running: None, work, not_before: Instant::now() + pause(), failed: HashMap::new() }
    }

    /// The first of these images that can be fetched now: peers have every missing layer, and know
    /// the image under the same repository.
    pub(super) fn choose(&mut self, lacking: impl Iterator<Item = Lacking>) -> Option<Lacking> {
        let now = Instant::now();
        self.failed.retain(|_, at| now.duration_since(*at) < AGAIN);
        let allowed =
            *self.recoverer.imports.borrow() == Imports::Allowed && !self.recoverer.rules.borrow().policy.kill_switch;
        if self.running.is_some() || now < self.not_before || !allowed {
            return None;
        }
        let (resolver, failed) = (&self.recoverer.resolver, &self.failed);
        let is_held = |layer: &Digest| !resolver.holders.of_blob(*layer).is_empty();
        let mut lacking = lacking;
        lacking.find(|image| {
            !failed.contains_key(&image.manifest)
                && resolver.providers(&image.reference, image.root).is_ok()
                && image.layers.keys().all(is_held)
        })
    }

    /// Begins to fetch into the lease. `line` bytes of the disk stay free.
    pub(super) fn start(&mut self, image: Lacking, pin: Pin, line: u64) {
        tracing::info!(image = %image.reference, layers = image.layers.len(), "layers that are missing here are fetched from peers");
        self.running = Some((image.manifest, image.reference.clone()));
        let recoverer = Arc::clone(&self.recoverer);
        self.work.spawn(async move {
            let fetched = fetch(&recoverer, &image, &pin, line).await;
            recoverer.lead.retire(&image.reference).await;
            fetched
        });
    }

    /// Ends the fetch under way and releases its claims.
    pub(super) async fn stop(mut self) {
        self.work.shutdown().await;
        if let Some((_, reference)) = self.running {
            self.recoverer.lead.retire(&reference).await;
        }
    }

    /// Waits for the end of the fetch under way; for ever without a fetch.
    pub(super) async fn ended(&mut self) {
        let Some(ended) = self.work.join_next().await else { return std::future::pending().await };
        let result = ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        let Some((manifest, _)) = self.running.take() else { return std::future::pending().await };
        self.not_before = Instant::now() + pause();
        if let Err(error) = result {
            tracing::info!(%manifest, %error, "layers that are missing here did not come; they are tried again later");
            if self.failed.len() < MAX_FAILED {
                self.failed.insert(manifest, Instant::now());
            }
        }
    }

    /// The image under way.
    pub(super) fn running(&self) -> Option<Digest> {
        self.running.as_ref().map(|(manifest, _)| *manifest)
    }
}

fn pause() -> Duration {
    PAUSE.mul_f64(2.0 * rand::random::<f64>())
}

/// One layer at a time, beside what pods wait for. The rate limit of downloads holds for this too.
async fn fetch(recoverer: &Recoverer, image: &Lacking, pin: &Pin, line: u64) -> Result<(), RecoverError> {
    let Lacking { manifest: _, reference, root, layers } = image;
    let bytes = layers.values().fold(0_u64, |sum, size| sum.saturating_add(*size));
    let before = recoverer.room.before_measuring();
    let disks = recoverer.store.disks().await.map_err(RecoverError::store("looking for room"))?;
    // These layers are unpacked already: they take room in the content store alone.
    let need = Need { download: bytes, unpack: 0 };
    let lines = Lines { min_free_bytes: line, collection_percent: 100, eviction_percent: 0 };
    let room = recoverer.room.reserve(need, before, disks, lines)?;
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
    Swarm::new(&recoverer.bring, &recoverer.lead, errand, 1).fetch(plan.missing.iter()).await.map(drop)
}
