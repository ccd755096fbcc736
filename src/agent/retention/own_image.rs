//! The images of the agent's own DaemonSet: protected while the DaemonSet names them, and fetched
//! from peers before the kubelet replaces the agent's pod. [`crate::decide::own_image`] decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::agent::recovery::progress::{Progress, RecoveryTracker};
use crate::agent::recovery::recover::Recoverer;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::control::{NextImageStatus, OwnImageStatus};
use crate::decide::own_image::{
    OwnImageSituation, OwnImageStep, OwnImageWait, OwnImages, Protection, ProtectionChange, own_image_step,
    protection_changes, read_interval,
};
use crate::metrics::Metrics;
use crate::model::{RecoveredImage, RecoveryOutcome};
use crate::oci::{Document, Reference};
use crate::ports::{ImageRecords, ImportPermission, OwnDaemonSet, ProtectedImages, StoreError};

/// Mean delay of the first read, and interval until the watch has shown the agent's own pod.
const FIRST_READ: Duration = Duration::from_secs(5);

/// Mean interval of lists of this node's image records, and so the delay of a fetch after a peer
/// provides the image. The delay is random, so that peers with some pieces exist when the last
/// nodes begin. A list of image records takes milliseconds.
const RECORD_PERIOD: Duration = Duration::from_secs(15);

/// Back-off after a failed attempt, and so the shortest interval of requests for a tag to the
/// registry.
const RETRY_DELAY: Duration = Duration::from_secs(5 * 60);

/// Ports of this task.
pub struct OwnImagePorts {
    /// Reads the DaemonSet.
    pub daemonset: Arc<dyn OwnDaemonSet>,
    /// Labels that exempt images from the kubelet's image collection.
    pub protected: Arc<dyn ProtectedImages>,
}

/// Protects and fetches the images of this agent's DaemonSet.
pub struct OwnImageController {
    ports: OwnImagePorts,
    recoverer: Arc<Recoverer>,
    tracker: RecoveryTracker,
    metrics: Metrics,
    dry_run: bool,
    status: watch::Sender<Option<OwnImageStatus>>,
    /// The images that stay here, for the retention of their layers.
    kept_references: watch::Sender<Arc<BTreeSet<Reference>>>,
    images: OwnImages,
    /// Failed attempts by image, at most one for each image of the template.
    failed_attempts: BTreeMap<Reference, FailedAttempt>,
    /// The fetch in progress, if any: one at a time.
    fetching: Option<Reference>,
    tasks: JoinSet<Result<RecoveredImage, OwnImageError>>,
}

struct FailedAttempt {
    at: Instant,
    reason: String,
}

/// Why an image was not fetched.
#[derive(Debug, thiserror::Error)]
enum OwnImageError {
    #[error("the registry did not resolve the tag: {0}")]
    TagUnresolved(String),
    #[error(transparent)]
    Recovery(#[from] RecoverError),
}

impl OwnImageController {
    /// Builds the task. `run` starts it.
    pub fn new(
        ports: OwnImagePorts,
        recoverer: Arc<Recoverer>,
        tracker: RecoveryTracker,
        metrics: Metrics,
        dry_run: bool,
        status: watch::Sender<Option<OwnImageStatus>>,
    ) -> Self {
        let images = OwnImages::default();
        let (failed_attempts, fetching, tasks) = (BTreeMap::new(), None, JoinSet::new());
        let kept_references = watch::Sender::default();
        Self {
            ports,
            recoverer,
            tracker,
            metrics,
            dry_run,
            status,
            kept_references,
            images,
            failed_attempts,
            fetching,
            tasks,
        }
    }

    /// The images that stay on this node.
    pub fn kept_references(&self) -> watch::Receiver<Arc<BTreeSet<Reference>>> {
        self.kept_references.subscribe()
    }

    /// Runs until stopped. Protections stay, because they serve the time without an agent.
    pub async fn run(mut self, stop: CancellationToken) {
        let (mut read_at, mut reconcile_at) =
            (Instant::now() + jittered(FIRST_READ), Instant::now() + jittered(FIRST_READ));
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep_until(read_at) => {
                    read_at = Instant::now() + jittered(self.read_daemonset().await);
                    reconcile_at = Instant::now();
                }
                Some(ended) = self.tasks.join_next() => {
                    self.on_fetched(ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
                    reconcile_at = Instant::now();
                }
                () = sleep_until(reconcile_at) => {
                    reconcile_at = Instant::now() + jittered(RECORD_PERIOD);
                    if let Err(error) = self.reconcile(&stop).await {
                        tracing::debug!(%error, "cannot read or write the records of the agent's own images");
                    }
                }
            }
        }
        while self.tasks.join_next().await.is_some() {}
    }

    /// Reads the DaemonSet. A failed read keeps the earlier result. Returns the mean interval.
    async fn read_daemonset(&mut self) -> Duration {
        match self.ports.daemonset.own_images().await {
            Ok(own_images) => {
                if own_images.template.is_some() && own_images.template != self.images.template {
                    let images = join_references(own_images.template.iter().flatten());
                    tracing::info!(images, "the agent's DaemonSet names these images");
                }
                self.images = own_images;
                self.failed_attempts
                    .retain(|image, _| self.images.template.iter().flatten().any(|named| named == image));
                self.kept_references.send_if_modified(|before| {
                    let references = self.images.named();
                    let changed = **before != references;
                    *before = Arc::new(references);
                    changed
                });
            }
            Err(error) => tracing::debug!(%error, "cannot read the agent's DaemonSet"),
        }
        let agents = self.recoverer.resolver.inventory.peer_count() + 1;
        if self.images.current.is_empty() { FIRST_READ } else { read_interval(agents) }
    }

    /// Compares the image records of this node with the DaemonSet, and acts on the difference.
    async fn reconcile(&mut self, stop: &CancellationToken) -> Result<(), StoreError> {
        let recorded = recorded_references(&*self.recoverer.store).await?;
        let protection = self.ports.protected.protected_images().await?;
        let protected = self.protect(&recorded, protection).await?;
        let missing = self.images.missing(&recorded);
        self.metrics.own_images(missing.len(), protected);
        let steps: BTreeMap<_, _> =
            missing.iter().map(|image| (image, own_image_step(image, self.situation(image)))).collect();
        let due = steps.iter().find(|(_, step)| matches!(step, OwnImageStep::Fetch | OwnImageStep::AskRegistry));
        if let Some((image, step)) = due.filter(|_| self.fetching.is_none()) {
            self.start_fetch((*image).clone(), *step, stop);
        }
        self.publish_status(&recorded, &steps);
        Ok(())
    }

    /// Updates the protections. Returns the number of protected images of the DaemonSet.
    async fn protect(&self, recorded: &BTreeSet<Reference>, protection: Protection) -> Result<usize, StoreError> {
        let mut protected = protection.all().intersection(&self.images.named()).count();
        for action in protection_changes(&self.images, recorded, &protection).into_iter().filter(|_| !self.dry_run) {
            match action {
                ProtectionChange::Protect(image) => {
                    self.ports.protected.protect_image(&image).await?;
                    protected += 1;
                    tracing::info!(%image, "the agent's image is protected from the kubelet's image collection");
                }
                ProtectionChange::Release(image) => {
                    self.ports.protected.release_image(&image).await?;
                    tracing::info!(%image, "the DaemonSet no longer names this image, and the image's protection ends");
                }
            }
        }
        Ok(protected)
    }

    fn situation(&self, image: &Reference) -> OwnImageSituation {
        let resolver = &self.recoverer.resolver;
        OwnImageSituation {
            is_switched_off: self.dry_run || self.recoverer.policy.borrow().opt_in.kill_switch,
            may_import: *self.recoverer.imports.borrow() == ImportPermission::Allowed,
            has_provider: match image {
                Reference::Digest(_, digest) => resolver.providers(image, *digest).is_ok(),
                // The registry decides the tag's content.
                Reference::Tag(repository, tag) => !resolver.inventory.tag_digests(repository, tag).is_empty(),
            },
            is_backing_off: self.failed_attempts.get(image).is_some_and(|failed| failed.at.elapsed() < RETRY_DELAY),
        }
    }

    fn start_fetch(&mut self, image: Reference, step: OwnImageStep, stop: &CancellationToken) {
        if !self.failed_attempts.contains_key(&image) {
            tracing::info!(%image, "the next image of the agent's DaemonSet is fetched from peers");
        }
        self.fetching = Some(image.clone());
        let (recoverer, metrics, stop) = (Arc::clone(&self.recoverer), self.metrics.clone(), stop.clone());
        let request =
            RecoveryRequest { pull_secrets: self.images.pull_secrets.clone(), ..RecoveryRequest::from(image) };
        let progress = self.tracker.begin(&request.reference);
        self.tasks.spawn(async move { fetch(&recoverer, &metrics, request, step, &progress, &stop).await });
    }

    fn on_fetched(&mut self, result: Result<RecoveredImage, OwnImageError>) {
        let Some(image) = self.fetching.take() else { return };
        match &result {
            Ok(RecoveredImage { digest, bytes, fetched, took, .. }) => {
                self.failed_attempts.remove(&image);
                tracing::info!(
                    %image, %digest, bytes, fetched, ?took,
                    "the next image of the agent's DaemonSet is on this node"
                );
            }
            Err(error) => {
                let failed = FailedAttempt { at: Instant::now(), reason: error.to_string() };
                if self.failed_attempts.get(&image).is_none_or(|before| before.reason != failed.reason) {
                    tracing::info!(
                        %image, %error,
                        "the next image of the agent's DaemonSet could not be fetched; another attempt follows"
                    );
                }
                self.failed_attempts.insert(image.clone(), failed);
            }
        }
        self.tracker.end(&image, result.map_err(|error| error.to_string()));
    }

    fn publish_status(&self, recorded: &BTreeSet<Reference>, steps: &BTreeMap<&Reference, OwnImageStep>) {
        let next = self.images.template.iter().flatten().filter(|image| !self.images.current.contains(image));
        let next = next.map(|image| NextImageStatus {
            image: image.to_string(),
            missing: (!recorded.contains(image)).then(|| self.missing_reason(image, steps.get(image).copied())),
        });
        self.status.send_replace(Some(OwnImageStatus {
            current: self.images.current.iter().map(ToString::to_string).collect(),
            next: next.collect(),
            is_template_known: self.images.template.is_some(),
        }));
    }

    fn missing_reason(&self, image: &Reference, step: Option<OwnImageStep>) -> String {
        if self.fetching.as_ref() == Some(image) {
            return "being fetched".into();
        }
        match step {
            Some(OwnImageStep::Wait(OwnImageWait::SwitchedOff)) => "recoveries are switched off".into(),
            Some(OwnImageStep::Wait(OwnImageWait::NoImports)) => {
                "nothing may be imported into this node's containerd".into()
            }
            Some(OwnImageStep::Wait(OwnImageWait::NoProvider)) => "no peer provides this image".into(),
            Some(OwnImageStep::Wait(OwnImageWait::BackingOff)) => self
                .failed_attempts
                .get(image)
                .map_or_else(|| "another attempt follows".into(), |failed| failed.reason.clone()),
            Some(OwnImageStep::Fetch | OwnImageStep::AskRegistry) | None => "another image is being fetched".into(),
        }
    }
}

/// Recovers the image. For a tag, the registry names the digest immediately before.
async fn fetch(
    recoverer: &Recoverer,
    metrics: &Metrics,
    mut request: RecoveryRequest,
    step: OwnImageStep,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<RecoveredImage, OwnImageError> {
    if let (OwnImageStep::AskRegistry, Reference::Tag(repository, tag)) = (step, &request.reference) {
        let resolved = stop.run_until_cancelled(recoverer.resolver.registry_digest(&request, repository, tag)).await;
        let answer = resolved.ok_or(RecoverError::Abandoned)?;
        request.resolved_digest = Some(answer.map_err(OwnImageError::TagUnresolved)?);
    }
    metrics.recovery_started();
    let began = Instant::now();
    let result = recoverer.recover(&request, progress, stop).await;
    let outcome = match &result {
        Ok(recovered) if recovered.fetched == 0 => RecoveryOutcome::AlreadyHere,
        Ok(_) => RecoveryOutcome::Recovered,
        Err(error) => error.outcome(),
    };
    metrics.recovery_ended(outcome, began.elapsed());
    stop.run_until_cancelled(recoverer.claims.release_all(&request.reference)).await;
    result.map_err(OwnImageError::Recovery)
}

/// References of this node's images. containerd 1.7 also records other answers of a registry, which
/// are not images.
async fn recorded_references(store: &dyn ImageRecords) -> Result<BTreeSet<Reference>, StoreError> {
    let records = store.images().await?.into_iter();
    let images = records.filter(|record| Document::is_document_type(&record.target.media_type));
    Ok(images.filter_map(|record| record.name.parse().ok()).collect())
}

/// A random duration between 0.5 and 1.5 of the mean.
fn jittered(mean: Duration) -> Duration {
    mean.mul_f64(0.5 + rand::random::<f64>())
}

fn join_references<'a>(images: impl Iterator<Item = &'a Reference>) -> String {
    images.map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
