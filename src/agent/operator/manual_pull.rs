//! Images that a person on the node asks for. The same recovery as for a pod, without the pod: whoever may ask here is root on the node,
//! so nothing has to be opted in and the kill switch does not stop it; the registry and the repository must be the provider's all the same.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::progress::{Progress, RecoveryTracker};
use crate::agent::recovery::recover::Recoverer;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::recovered_image::{RecoveredImage, ResolvedImage};
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::metrics::{Metrics, RecoveryOutcome};
use crate::model::PeerId;
use crate::oci::Reference;
use crate::ports::{MAX_NAMES, PullFailure, PullProgress, PullRequest};

/// Pulls at the same time. They come besides the recoveries for pods, so they are few; who asks for more is told to come back.
const MAX_PULLS: usize = 2;

/// Often enough for a bar that moves.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// Pulls by hand.
pub struct ManualPuller {
    /// Does the work, for pods as well.
    pub recoverer: Arc<Recoverer>,
    /// Shows it.
    pub tracker: RecoveryTracker,
    /// Counts it.
    pub metrics: Metrics,
    /// The agent only decides and reports, whatever is asked.
    pub dry_run: bool,
}

impl ManualPuller {
    /// Takes requests until stopped. What is under way then is abandoned, and its client told so.
    pub async fn run(self, mut requests: mpsc::Receiver<PullRequest>, stop: CancellationToken) {
        let this = Arc::new(self);
        let mut pulls = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(joined) = pulls.join_next() => if let Err(error) = joined {
                    // A bug of ours: let the supervisor see it.
                    std::panic::resume_unwind(error.into_panic());
                },
                request = requests.recv() => match request {
                    Some(request) if pulls.len() < MAX_PULLS => {
                        pulls.spawn(Arc::clone(&this).pull(request, stop.clone()));
                    }
                    // The channel of a request that was just made has room.
                    Some(request) => drop(request.progress.try_send(busy_message())),
                    // The socket closes only when the agent stops.
                    None => { stop.cancelled().await; break }
                },
            }
        }
        while pulls.join_next().await.is_some() {}
    }

    async fn pull(self: Arc<Self>, request: PullRequest, stop: CancellationToken) {
        let PullRequest { reference, dry_run, progress } = request;
        let dry_run = dry_run || self.dry_run;
        let client_closed = stop.child_token();
        let work = self.pull_image(&reference, dry_run, &progress, &client_closed);
        tokio::pin!(work);
        let last = tokio::select! {
            last = &mut work => last,
            () = progress.closed() => {
                client_closed.cancel();
                work.await
            }
        };
        tracing::info!(%reference, dry_run, ?last, "pulled by hand");
        // Refused when nobody listens any more.
        let _ = progress.send(last).await;
        // Also when the agent stops: the Lease is a read and a delete away, which end within seconds.
        self.recoverer.claims.release_all(&reference).await;
    }

    /// Answers the last thing to say.
    async fn pull_image(
        &self,
        reference: &Reference,
        dry_run: bool,
        reports: &mpsc::Sender<PullProgress>,
        stop: &CancellationToken,
    ) -> PullProgress {
        let inventory = &self.recoverer.resolver.inventory;
        let request = RecoveryRequest::from(reference.clone());
        let resolved = match stop.run_until_cancelled(self.recoverer.find(&request)).await {
            Some(Ok(ResolvedImage { digest: root, providers, tag_note: _ })) => {
                let (providers, more_providers) = node_names(inventory, providers);
                PullProgress::Resolved { digest: root.to_string(), providers, more_providers }
            }
            Some(Err(error)) => {
                self.metrics.recovery_started();
                self.metrics.recovery_ended(error.outcome(), Duration::ZERO);
                return failed_message(inventory, &error);
            }
            None => return failed_message(inventory, &RecoverError::Abandoned),
        };
        if dry_run {
            return resolved;
        }
        let _ = reports.try_send(resolved);
        let began = Instant::now();
        self.metrics.recovery_started();
        let progress = self.tracker.begin(reference);
        let result = self.recover_and_report(&request, &progress, reports, stop).await;
        let outcome = match &result {
            Ok(recovered) if recovered.fetched == 0 => RecoveryOutcome::AlreadyHere,
            Ok(_) => RecoveryOutcome::Recovered,
            Err(error) => error.outcome(),
        };
        self.metrics.recovery_ended(outcome, began.elapsed());
        self.tracker.end(reference, result.as_ref().map(RecoveredImage::clone).map_err(RecoverError::to_string));
        match result {
            Ok(recovered) => done_message(inventory, recovered),
            Err(error) => failed_message(inventory, &error),
        }
    }

    /// The recovery, with word of it at intervals and at its end.
    async fn recover_and_report(
        &self,
        request: &RecoveryRequest,
        progress: &Progress,
        reports: &mpsc::Sender<PullProgress>,
        stop: &CancellationToken,
    ) -> Result<RecoveredImage, RecoverError> {
        let recovery = self.recoverer.recover(request, progress, stop);
        tokio::pin!(recovery);
        let mut interval = tokio::time::interval(REPORT_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = ReportedProgress::default();
        loop {
            tokio::select! {
                result = &mut recovery => {
                    report(progress, &mut before, reports);
                    return result;
                }
                _ = interval.tick() => report(progress, &mut before, reports),
            }
        }
    }
}

/// What was told last.
#[derive(Default)]
struct ReportedProgress {
    bytes: Option<u64>,
    unpacking: Option<(usize, usize)>,
}

/// Says what has changed since `before`. What the client has no room for is left out: the next report says more.
fn report(progress: &Progress, before: &mut ReportedProgress, reports: &mpsc::Sender<PullProgress>) {
    let blobs = progress.blobs();
    if !blobs.is_empty() {
        let (done, total) = progress.byte_totals();
        if before.bytes.is_none() {
            let _ = reports.try_send(PullProgress::Planned { missing_bytes: total, missing_blobs: blobs.len() });
        }
        if before.bytes.replace(done) != Some(done) {
            let _ = reports.try_send(PullProgress::Bytes { done, total });
        }
    }
    let unpacking = progress.unpacking();
    if let Some((layer, of)) = unpacking.filter(|_| unpacking != before.unpacking) {
        before.unpacking = unpacking;
        let _ = reports.try_send(PullProgress::Unpacking { layer, of });
    }
}

/// Nodes for people, and how many more there are.
pub(in crate::agent) fn node_names(
    inventory: &PeerInventory,
    peers: impl IntoIterator<Item = PeerId>,
) -> (Vec<String>, usize) {
    let mut peers = peers.into_iter();
    let names: Vec<_> = peers.by_ref().take(MAX_NAMES).map(|peer| inventory.node_of(peer)).collect();
    (names, peers.count())
}

fn done_message(inventory: &PeerInventory, recovered: RecoveredImage) -> PullProgress {
    let RecoveredImage { digest, bytes, fetched, present: there, providers, took, tag_note: _ } = recovered;
    PullProgress::Done {
        digest: digest.to_string(),
        bytes,
        fetched,
        there,
        milliseconds: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        from: node_names(inventory, providers.into_keys()).0,
    }
}

fn failed_message(inventory: &PeerInventory, error: &RecoverError) -> PullProgress {
    let (kind, retryable) = match error {
        RecoverError::NoProvider { .. }
        | RecoverError::OtherPlatforms { .. }
        | RecoverError::BlobsWithoutProvider { .. } => (PullFailure::NoProvider, true),
        RecoverError::ImportsRefused { .. } => (PullFailure::Closed, false),
        RecoverError::TagDisagreement { .. } => (PullFailure::Disagreement, false),
        RecoverError::NotDistributable { .. }
        | RecoverError::Document { .. }
        | RecoverError::NestedIndex { .. }
        | RecoverError::NoPlatform { .. } => (PullFailure::Unusable, false),
        RecoverError::OverLimit(_) | RecoverError::NoRoomToUnpack(_) => (PullFailure::OverLimit, false),
        RecoverError::NeedsUdp { .. } | RecoverError::Fetch { .. } => (PullFailure::FetchFailed, true),
        RecoverError::Store { .. } => (PullFailure::StoreFailed, true),
        RecoverError::Abandoned => (PullFailure::Abandoned, true),
    };
    let asked: Vec<_> = error.failed_peers().into_iter().map(|peer| inventory.node_of(peer)).collect();
    let asked = if asked.is_empty() { String::new() } else { format!(" (asked: {})", asked.join(", ")) };
    PullProgress::Failed { kind, message: format!("{error}{asked}"), retryable }
}

fn busy_message() -> PullProgress {
    PullProgress::Failed {
        kind: PullFailure::Busy,
        message: format!("{MAX_PULLS} images are being pulled by hand on this node"),
        retryable: true,
    }
}
