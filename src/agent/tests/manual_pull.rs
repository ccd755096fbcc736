//! Manual pulls: requests of `lighterman pull`.

use std::time::Duration;

use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::operator::manual_pull::ManualPuller;
use crate::agent::pods::pod_notifier::PodNotifier;
use crate::agent::recovery::progress::{Progress, RecoveryTracker};
use crate::control::{PullFailure, PullProgress, PullRequest};

struct ManualPullClient {
    requests: mpsc::Sender<PullRequest>,
    tracker: RecoveryTracker,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl ManualPullClient {
    fn start(node: &TestNode) -> Self {
        let (requests, receiver) = mpsc::channel(8);
        let (tracker, stop) = (RecoveryTracker::default(), CancellationToken::new());
        let manual_puller = ManualPuller {
            recoverer: Arc::new(node.recoverer()),
            tracker: tracker.clone(),
            metrics: node.metrics.clone(),
            dry_run: false,
        };
        let running = tokio::spawn(manual_puller.run(receiver, stop.clone()));
        Self { requests, tracker, stop, running }
    }

    async fn pull(&self, name: &str, dry_run: bool) -> mpsc::Receiver<PullProgress> {
        let (progress, reports) = mpsc::channel(16);
        let reference = name.parse().unwrap();
        self.requests.send(PullRequest { reference, dry_run, progress }).await.unwrap();
        reports
    }

    async fn wait_for_recoveries(&self, recoveries: usize) {
        let reached = async {
            while self.tracker.running().len() != recoveries {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(reached).await;
    }
}

/// Fails after an hour of paused time, which passes at once when every task waits.
async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(3600), work).await.expect("the work ends within an hour")
}

async fn all(reports: mpsc::Receiver<PullProgress>) -> Vec<PullProgress> {
    within(ReceiverStream::new(reports).collect()).await
}

fn failure(reports: &[PullProgress]) -> (PullFailure, bool) {
    let Some(PullProgress::Failed { kind, retryable, .. }) = reports.last() else { panic!("{reports:?}") };
    (*kind, *retryable)
}

#[tokio::test(start_paused = true)]
async fn a_manual_pull_reports_each_step() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let reports = all(ManualPullClient::start(&node).pull(IMAGE, false).await).await;
    let digest = image.target.digest.to_string();
    let blobs: u64 = image.blobs.iter().map(|blob| blob.size).sum();
    let resolved =
        PullProgress::Resolved { digest: digest.clone(), providers: vec!["node-1".into()], more_providers: 0 };
    assert_eq!(reports[..2], [resolved, PullProgress::Planned { missing_bytes: blobs, missing_blobs: 4 }]);
    assert_eq!(reports[reports.len() - 2], PullProgress::Bytes { done: blobs, total: blobs });
    let Some(PullProgress::Done { bytes, fetched, there, from, .. }) = reports.last() else { panic!("{reports:?}") };
    assert_eq!((*bytes, *fetched, *there, &from[..]), (image.bytes(), 5, 0, &["node-1".to_owned()][..]));
    let by_digest = format!("r.test/shop/checkout@{digest}");
    assert_eq!(node.record_names().await, [IMAGE.to_owned(), by_digest]);
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn a_manual_dry_run_resolves_the_image_and_fetches_nothing() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let reports = all(ManualPullClient::start(&node).pull(IMAGE, true).await).await;
    assert!(matches!(reports[..], [PullProgress::Resolved { .. }]), "{reports:?}");
    assert!(blobs_of(&*node.store).await.is_empty() && node.fetcher.request_count(peer(1)) == 0);
}

#[tokio::test(start_paused = true)]
async fn a_manual_pull_by_digest_needs_a_provider_of_the_repository() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let invented = format!("evil.test/shop/checkout@{}", image.target.digest);
    let reports = all(ManualPullClient::start(&node).pull(&invented, false).await).await;
    assert_eq!(failure(&reports), (PullFailure::NoProvider, true));
}

#[tokio::test(start_paused = true)]
async fn a_failed_manual_pull_names_the_providers() {
    let node = TestNode::new();
    node.add_provider(3, IMAGE, Behaviour::Corrupts).await;
    let reports = all(ManualPullClient::start(&node).pull(IMAGE, false).await).await;
    assert_eq!(failure(&reports), (PullFailure::FetchFailed, true));
    let Some(PullProgress::Failed { message, .. }) = reports.last() else { unreachable!() };
    assert!(message.contains("node-3"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_manual_pull_and_an_event_have_the_same_text_for_the_same_failure() {
    let node = TestNode::new();
    node.add_provider(3, IMAGE, Behaviour::Corrupts).await;
    let reports = all(ManualPullClient::start(&node).pull(IMAGE, false).await).await;
    let Some(PullProgress::Failed { message, .. }) = reports.last() else { panic!("{reports:?}") };
    let notifier = PodNotifier::new(Arc::new(node.cluster.clone()), node.inventory.clone(), node.metrics.clone());
    let request = IMAGE.parse::<Reference>().unwrap().into();
    let recovered = node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await;
    let error = recovered.unwrap_err();
    assert!(message.ends_with(". Failed at: node-3"), "{message}");
    assert_eq!(notifier.failed_note(&error), format!("{message}. The agent retries."));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_disconnects_cancels_its_pull() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let client = ManualPullClient::start(&node);
    let reports = client.pull(IMAGE, false).await;
    client.wait_for_recoveries(1).await;
    drop(reports);
    client.wait_for_recoveries(0).await;
    assert_eq!(node.store.pins(), 0);
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="abandoned"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn a_third_concurrent_manual_pull_is_rejected_as_busy() {
    let node = TestNode::new();
    let other = "r.test/shop/basket:v1";
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    node.add_provider(2, other, Behaviour::Hangs).await;
    let client = ManualPullClient::start(&node);
    let first = client.pull(IMAGE, false).await;
    let _second = client.pull(other, false).await;
    client.wait_for_recoveries(2).await;
    assert_eq!(failure(&all(client.pull(IMAGE, true).await).await), (PullFailure::Busy, true));
    drop(first);
    client.wait_for_recoveries(1).await;
    tokio::task::yield_now().await;
    assert!(matches!(all(client.pull(IMAGE, true).await).await[..], [PullProgress::Resolved { .. }]));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_reports_the_pull_as_abandoned() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let client = ManualPullClient::start(&node);
    let reports = client.pull(IMAGE, false).await;
    client.wait_for_recoveries(1).await;
    client.stop.cancel();
    assert_eq!(failure(&all(reports).await), (PullFailure::Abandoned, true));
    within(client.running).await.unwrap();
}
