//! Manual pulls: images that an operator requests on a node (`lighterman pull`).
//!
//! A manual pull is the recovery of a pod's image without the pod. Only root of the node may open
//! the socket, so a manual pull needs no opt-in and ignores the kill switch. The provider must
//! still have the image under the same registry and repository.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::failure_text::failure_text;
use crate::agent::recovery::progress::{Progress, RecoveryTracker};
use crate::agent::recovery::recover::Recoverer;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::control::{MAX_NAMES, PullFailure, PullProgress, PullRequest};
use crate::metrics::Metrics;
use crate::model::{PeerId, RecoveredImage, RecoveryOutcome, ResolvedImage};
use crate::oci::Reference;

/// Concurrent manual pulls: few, because these run besides the recoveries for pods. Further
/// requests get a retryable failure.
const MAX_PULLS: usize = 2;

/// Interval of progress reports, short enough for a smooth progress bar.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// Runs manual pulls.
pub struct ManualPuller {
    /// Recovers images, for pods as well.
    pub recoverer: Arc<Recoverer>,
    /// Publishes the progress.
    pub tracker: RecoveryTracker,
    /// Counters of recoveries.
    pub metrics: Metrics,
    /// Every pull is a dry run.
    pub dry_run: bool,
}

impl ManualPuller {
    /// Takes requests until stopped. Running pulls are then canceled, and their clients get a
    /// failure.
    pub async fn run(self, mut requests: mpsc::Receiver<PullRequest>, stop: CancellationToken) {
        let this = Arc::new(self);
        let mut pulls = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(joined) = pulls.join_next() => if let Err(error) = joined {
                    // A panic of a task is a bug, which the supervisor reports.
                    std::panic::resume_unwind(error.into_panic());
                },
                request = requests.recv() => match request {
                    Some(request) if pulls.len() < MAX_PULLS => {
                        pulls.spawn(Arc::clone(&this).pull(request, stop.clone()));
                    }
                    // The channel of a new request has room.
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
        tracing::info!(%reference, dry_run, ?last, "manual pull ended");
        // Fails when the client has closed the connection.
        let _ = progress.send(last).await;
        // Also when the agent stops: a release is one read and one delete of a Lease, and ends
        // within seconds.
        self.recoverer.claims.release_all(&reference).await;
    }

    /// Returns the last message for the client.
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
            Some(Ok(ResolvedImage { digest, providers, tag_note: _ })) => {
                let (providers, more_providers) = node_names(inventory, providers);
                PullProgress::Resolved { digest: digest.to_string(), providers, more_providers }
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

    /// Recovers the image, and reports progress at intervals and at the end.
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
        let mut last_report = ReportedProgress::default();
        loop {
            tokio::select! {
                result = &mut recovery => {
                    report(progress, &mut last_report, reports);
                    return result;
                }
                _ = interval.tick() => report(progress, &mut last_report, reports),
            }
        }
    }
}

/// Progress as reported last.
#[derive(Default)]
struct ReportedProgress {
    bytes: Option<u64>,
    unpacking: Option<(usize, usize)>,
}

/// Reports the changes since `before`. A report that the full channel refuses is dropped, because
/// the next report is more recent.
fn report(progress: &Progress, last_report: &mut ReportedProgress, reports: &mpsc::Sender<PullProgress>) {
    let blobs = progress.blobs();
    if !blobs.is_empty() {
        let (done, total) = progress.byte_totals();
        if last_report.bytes.is_none() {
            let _ = reports.try_send(PullProgress::Planned { missing_bytes: total, missing_blobs: blobs.len() });
        }
        if last_report.bytes.replace(done) != Some(done) {
            let _ = reports.try_send(PullProgress::Bytes { done, total });
        }
    }
    let unpacking = progress.unpacking();
    if let Some((layer, of)) = unpacking.filter(|_| unpacking != last_report.unpacking) {
        last_report.unpacking = unpacking;
        let _ = reports.try_send(PullProgress::Unpacking { layer, of });
    }
}

/// Names of nodes, and the number of further nodes.
pub(in crate::agent) fn node_names(
    inventory: &PeerInventory,
    peers: impl IntoIterator<Item = PeerId>,
) -> (Vec<String>, usize) {
    let mut peers = peers.into_iter();
    let names: Vec<_> = peers.by_ref().take(MAX_NAMES).map(|peer| inventory.node_of(peer)).collect();
    (names, peers.count())
}

fn done_message(inventory: &PeerInventory, recovered: RecoveredImage) -> PullProgress {
    let RecoveredImage { digest, bytes, fetched, present, providers, took, tag_note: _ } = recovered;
    PullProgress::Done {
        digest: digest.to_string(),
        bytes,
        fetched,
        there: present,
        milliseconds: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        from: node_names(inventory, providers.into_keys()).0,
    }
}

fn failed_message(inventory: &PeerInventory, error: &RecoverError) -> PullProgress {
    PullProgress::failed(error.class().pull_failure, failure_text(error, inventory))
}

fn busy_message() -> PullProgress {
    let message = format!("{MAX_PULLS} manual pulls run on this node already; retry when one has ended");
    PullProgress::failed(PullFailure::Busy, message)
}
