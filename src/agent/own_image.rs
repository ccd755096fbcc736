//! The images of the agent's own DaemonSet: protected while they are named, and fetched from peers
//! before the kubelet replaces the agent's pod. [`crate::decide::own_image`] decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::progress::{Board, Progress};
use super::recover::{RecoverError, Recovered, Recoverer};
use super::resolve::Wanted;
use crate::decide::own_image::{Cause, Keep, OwnImages, Protection, Situation, Step, keep, read_interval, step};
use crate::metrics::{Metrics, Outcome};
use crate::oci::{Document, Reference};
use crate::ports::{ContentStore, Imports, NextImageStatus, OwnDaemonSet, OwnImageStatus, ProtectedImages, StoreError};

/// Mean delay of the first read, and interval until the watch has shown the agent's own pod.
const FIRST: Duration = Duration::from_secs(5);

/// Mean interval of looking at this node's image records, and so the delay of a fetch after a peer
/// provides the image. The delay is random, so that peers with some pieces exist when the last
/// nodes begin. A list of image records takes milliseconds.
const LOOK: Duration = Duration::from_secs(15);

/// Pause after a failed attempt. A registry is asked for a tag as rarely.
const AGAIN: Duration = Duration::from_secs(5 * 60);

/// Ports of this task.
pub struct OwnImagePorts {
    /// The DaemonSet.
    pub daemonset: Arc<dyn OwnDaemonSet>,
    /// Labels that the kubelet's image collection respects.
    pub protected: Arc<dyn ProtectedImages>,
}

/// Looks after the images of this agent's DaemonSet.
pub struct OwnImage {
    ports: OwnImagePorts,
    recoverer: Arc<Recoverer>,
    board: Board,
    metrics: Metrics,
    dry_run: bool,
    status: watch::Sender<Option<OwnImageStatus>>,
    /// The images that stay here, for the retention of their layers.
    named: watch::Sender<Arc<BTreeSet<Reference>>>,
    own: OwnImages,
    /// Failed attempts by image, at most as many as the template names images.
    failed: BTreeMap<Reference, Failed>,
    /// The fetch under way, if any: one at a time.
    fetching: Option<Reference>,
    work: JoinSet<Result<Recovered, NotFetched>>,
}

struct Failed {
    at: Instant,
    reason: String,
}

/// Why an image did not come.
#[derive(Debug, thiserror::Error)]
enum NotFetched {
    #[error("its registry does not say what the tag is: {0}")]
    NotSaid(String),
    #[error(transparent)]
    Recovery(#[from] RecoverError),
}

impl OwnImage {
    /// Builds the task. `run` starts it.
    pub fn new(
        ports: OwnImagePorts,
        recoverer: Arc<Recoverer>,
        board: Board,
        metrics: Metrics,
        dry_run: bool,
        status: watch::Sender<Option<OwnImageStatus>>,
    ) -> Self {
        let own = OwnImages::default();
        let (failed, fetching, work) = (BTreeMap::new(), None, JoinSet::new());
        let named = watch::Sender::default();
        Self { ports, recoverer, board, metrics, dry_run, status, named, own, failed, fetching, work }
    }

    /// The images that stay on this node.
    pub fn named(&self) -> watch::Receiver<Arc<BTreeSet<Reference>>> {
        self.named.subscribe()
    }

    /// Runs until stopped. Protections stay: they are for the time without an agent.
    pub async fn run(mut self, stop: CancellationToken) {
        let (mut read_at, mut look_at) = (Instant::now() + random(FIRST), Instant::now() + random(FIRST));
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep_until(read_at) => {
                    read_at = Instant::now() + random(self.read().await);
                    look_at = Instant::now();
                }
                Some(ended) = self.work.join_next() => {
                    self.on_fetched(ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
                    look_at = Instant::now();
                }
                () = sleep_until(look_at) => {
                    look_at = Instant::now() + random(LOOK);
                    if let Err(error) = self.look(&stop).await {
                        tracing::debug!(%error, "the records of the agent's own images cannot be read or written");
                    }
                }
            }
        }
        while self.work.join_next().await.is_some() {}
    }

    /// Reads the DaemonSet. Without an answer the last one counts. Returns the mean interval.
    async fn read(&mut self) -> Duration {
        match self.ports.daemonset.own_images().await {
            Ok(own) => {
                if own.template.is_some() && own.template != self.own.template {
                    let images = list(own.template.iter().flatten());
                    tracing::info!(images, "the agent's DaemonSet names these images");
                }
                self.own = own;
                self.failed.retain(|image, _| self.own.template.iter().flatten().any(|named| named == image));
                self.named.send_if_modified(|before| {
                    let named = self.own.named();
                    let changed = **before != named;
                    *before = Arc::new(named);
                    changed
                });
            }
            Err(error) => tracing::debug!(%error, "the agent's DaemonSet cannot be read"),
        }
        let agents = self.recoverer.resolver.holders.count() + 1;
        if self.own.current.is_empty() { FIRST } else { read_interval(agents) }
    }

    /// Looks at the image records of this node, and does what follows.
    async fn look(&mut self, stop: &CancellationToken) -> Result<(), StoreError> {
        let recorded = recorded(&*self.recoverer.store).await?;
        let protection = self.ports.protected.protected_images().await?;
        let protected = self.protect(&recorded, protection).await?;
        let missing = self.own.missing(&recorded);
        self.metrics.own_images(missing.len(), protected);
        let steps: BTreeMap<_, _> = missing.iter().map(|image| (image, step(image, self.situation(image)))).collect();
        let due = steps.iter().find(|(_, step)| matches!(step, Step::Fetch | Step::AskRegistry));
        if let Some((image, step)) = due.filter(|_| self.fetching.is_none()) {
            self.start((*image).clone(), *step, stop);
        }
        self.show(&recorded, &steps);
        Ok(())
    }

    /// Answers how many of the DaemonSet's images are protected now.
    async fn protect(&self, recorded: &BTreeSet<Reference>, protection: Protection) -> Result<usize, StoreError> {
        let mut protected = protection.all().intersection(&self.own.named()).count();
        for action in keep(&self.own, recorded, &protection).into_iter().filter(|_| !self.dry_run) {
            match action {
                Keep::Protect(image) => {
                    self.ports.protected.protect_image(&image).await?;
                    protected += 1;
                    tracing::info!(%image, "the agent's image is protected from the kubelet's image collection");
                }
                Keep::Release(image) => {
                    self.ports.protected.release_image(&image).await?;
                    tracing::info!(%image, "the agent's image is named no longer, and its protection ends");
                }
            }
        }
        Ok(protected)
    }

    fn situation(&self, image: &Reference) -> Situation {
        let resolver = &self.recoverer.resolver;
        Situation {
            is_switched_off: self.dry_run || self.recoverer.rules.borrow().policy.kill_switch,
            may_import: *self.recoverer.imports.borrow() == Imports::Allowed,
            is_provided: match image {
                Reference::Digest(_, root) => resolver.providers(image, *root).is_ok(),
                // The registry decides the tag's content.
                Reference::Tag(repository, tag) => !resolver.holders.of_tag(repository, tag).is_empty(),
            },
            is_backing_off: self.failed.get(image).is_some_and(|failed| failed.at.elapsed() < AGAIN),
        }
    }

    fn start(&mut self, image: Reference, step: Step, stop: &CancellationToken) {
        if !self.failed.contains_key(&image) {
            tracing::info!(%image, "the next image of the agent's DaemonSet is fetched from peers");
        }
        self.fetching = Some(image.clone());
        let (recoverer, metrics, stop) = (Arc::clone(&self.recoverer), self.metrics.clone(), stop.clone());
        let wanted = Wanted { pull_secrets: self.own.pull_secrets.clone(), ..Wanted::from(image) };
        let progress = self.board.begin(&wanted.reference);
        self.work.spawn(async move { fetch(&recoverer, &metrics, wanted, step, &progress, &stop).await });
    }

    fn on_fetched(&mut self, result: Result<Recovered, NotFetched>) {
        let Some(image) = self.fetching.take() else { return };
        match &result {
            Ok(Recovered { root, bytes, fetched, took, .. }) => {
                self.failed.remove(&image);
                tracing::info!(%image, %root, bytes, fetched, ?took, "the next image of the agent's DaemonSet is on this node");
            }
            Err(error) => {
                let failed = Failed { at: Instant::now(), reason: error.to_string() };
                if self.failed.get(&image).is_none_or(|before| before.reason != failed.reason) {
                    tracing::info!(%image, %error, "the next image of the agent's DaemonSet did not come; another attempt follows");
                }
                self.failed.insert(image.clone(), failed);
            }
        }
        self.board.end(&image, result.map_err(|error| error.to_string()));
    }

    fn show(&self, recorded: &BTreeSet<Reference>, steps: &BTreeMap<&Reference, Step>) {
        let next = self.own.template.iter().flatten().filter(|image| !self.own.current.contains(image));
        let next = next.map(|image| NextImageStatus {
            image: image.to_string(),
            missing: (!recorded.contains(image)).then(|| self.why_missing(image, steps.get(image).copied())),
        });
        self.status.send_replace(Some(OwnImageStatus {
            current: self.own.current.iter().map(ToString::to_string).collect(),
            next: next.collect(),
            is_template_known: self.own.template.is_some(),
        }));
    }

    fn why_missing(&self, image: &Reference, step: Option<Step>) -> String {
        if self.fetching.as_ref() == Some(image) {
            return "being fetched".into();
        }
        match step {
            Some(Step::Wait(Cause::SwitchedOff)) => "recoveries are switched off".into(),
            Some(Step::Wait(Cause::NoImports)) => "nothing may be imported into this node's containerd".into(),
            Some(Step::Wait(Cause::NoProvider)) => "no peer provides this image".into(),
            Some(Step::Wait(Cause::BackingOff)) => {
                self.failed.get(image).map_or_else(|| "another attempt follows".into(), |failed| failed.reason.clone())
            }
            Some(Step::Fetch | Step::AskRegistry) | None => "another image is being fetched".into(),
        }
    }
}

/// The recovery. The registry names the content of a tag just before.
async fn fetch(
    recoverer: &Recoverer,
    metrics: &Metrics,
    mut wanted: Wanted,
    step: Step,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<Recovered, NotFetched> {
    if let (Step::AskRegistry, Reference::Tag(repository, tag)) = (step, &wanted.reference) {
        let asked = stop.run_until_cancelled(recoverer.resolver.ask(&wanted, repository, tag)).await;
        let answer = asked.ok_or(RecoverError::Abandoned)?;
        wanted.root = Some(answer.map_err(NotFetched::NotSaid)?);
    }
    metrics.recovery_started();
    let began = Instant::now();
    let result = recoverer.recover(&wanted, progress, stop).await;
    let outcome = match &result {
        Ok(recovered) if recovered.fetched == 0 => Outcome::AlreadyHere,
        Ok(_) => Outcome::Recovered,
        Err(error) => error.outcome(),
    };
    metrics.recovery_ended(outcome, began.elapsed());
    stop.run_until_cancelled(recoverer.lead.retire(&wanted.reference)).await;
    result.map_err(NotFetched::Recovery)
}

/// The names of images here. containerd 1.7 records whatever a registry answered; that is no image.
async fn recorded(store: &dyn ContentStore) -> Result<BTreeSet<Reference>, StoreError> {
    let records = store.images().await?.into_iter();
    let images = records.filter(|record| Document::is_called(&record.target.media_type));
    Ok(images.filter_map(|record| record.name.parse().ok()).collect())
}

/// Half to one and a half of the mean.
fn random(mean: Duration) -> Duration {
    mean.mul_f64(0.5 + rand::random::<f64>())
}

fn list<'a>(images: impl Iterator<Item = &'a Reference>) -> String {
    images.map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
