//! Pods of this node, from the failed pull to the nudge.

mod api_server_outage;
mod recovery_end;

use std::time::Duration;

use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::membership::announcer::RecordTargets;
use crate::agent::pods::notifications::NotificationQueue;
use crate::agent::pods::pod_controller::{PodController, PodControllerParts};
use crate::agent::pods::registry_health::RegistryHealth;
use crate::agent::recovery::progress::RecoveryTracker;
use crate::decide::policy::RecoveryOptions;
use crate::model::{
    ContainerKind, ContainerView, Outage, PodEvent, PodRef, PodReportKind, PodView, PullPolicy, WaitingState,
};
use crate::ports::PullConnections;

pub(super) const REFUSED: &str = "dial tcp 10.0.0.1:443: connect: connection refused";

pub(super) struct RunningController {
    pods: mpsc::Sender<PodEvent>,
    pub(super) nudges: broadcast::Receiver<PodRef>,
    /// The image records of this node, as the announcer publishes them.
    pub(super) image_records_in: watch::Sender<RecordTargets>,
    /// Outages that the controller observed.
    pub(super) outages: watch::Receiver<Vec<Outage>>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl RunningController {
    pub(super) fn start(node: &TestNode) -> Self {
        Self::start_with_options(node, RecoveryOptions::default())
    }

    pub(super) fn start_with_options(node: &TestNode, options: RecoveryOptions) -> Self {
        Self::start_with(node, options, None)
    }

    pub(super) fn start_with(
        node: &TestNode,
        options: RecoveryOptions,
        connections: Option<Arc<dyn PullConnections>>,
    ) -> Self {
        let (image_records_in, image_records) = watch::channel(Some(Arc::default()));
        let (outages_in, outages) = watch::channel(Vec::new());
        let registry = Arc::clone(&node.registry) as _;
        let controller = PodController::new(PodControllerParts {
            recoverer: Arc::new(node.recoverer()),
            tracker: RecoveryTracker::default(),
            cluster: Arc::new(node.cluster.clone()),
            registries: RegistryHealth::new(node.inventory.clone(), registry, true, outages_in, node.metrics.clone()),
            connections,
            notifications: NotificationQueue::disabled(node.metrics.clone()),
            image_records,
            policy: node.policy.subscribe(),
            options,
            metrics: node.metrics.clone(),
        });
        let (pods, events) = mpsc::channel(8);
        let stop = CancellationToken::new();
        let running = tokio::spawn(controller.run(events, stop.clone()));
        Self { pods, nudges: node.cluster.nudges(), image_records_in, outages, stop, running }
    }

    pub(super) async fn send_pod(&self, pod: PodView) {
        self.pods.send(PodEvent::Applied(Box::new(pod))).await.unwrap();
    }

    pub(super) async fn nudged(&mut self) -> String {
        tokio::time::timeout(Duration::from_secs(60), self.nudges.recv()).await.expect("a nudge").unwrap().name
    }

    /// Lets half a second of paused time pass, so every task runs until it waits for longer.
    pub(super) async fn settle(&self) {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }

    pub(super) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(1), self.running).await.expect("the controller stops").unwrap();
    }
}

pub(super) fn failing_pod(name: &str, image: &str, message: &str) -> PodView {
    let waiting = WaitingState { reason: "ErrImagePull".into(), message: message.into() };
    let container = ContainerView {
        name: "c".into(),
        kind: ContainerKind::Ordinary,
        image: image.into(),
        pull_policy: PullPolicy::IfNotPresent,
        waiting: Some(waiting),
    };
    PodView {
        pod: PodRef { k8s_namespace: "shop".into(), name: name.into(), uid: format!("uid-{name}") },
        annotations: [("lighterman.dev/recover".to_owned(), "true".to_owned())].into(),
        containers: vec![container],
        image_volumes: Vec::new(),
        owner: None,
        is_static: false,
        priority: 0,
        pull_secrets: Vec::new(),
        is_ending: false,
    }
}

pub(super) fn reports(node: &TestNode) -> Vec<(String, PodReportKind)> {
    node.cluster.reports().into_iter().map(|(pod, report)| (pod.name, report.kind)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_failing_pod_gets_its_image_a_nudge_and_an_event() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    assert_eq!(controller.nudged().await, "p");
    controller.settle().await;
    assert_eq!(reports(&node), [("p".to_owned(), PodReportKind::Recovered)]);
    let note = node.cluster.reports()[0].1.note.clone();
    assert!(note.contains("node-1") && note.contains(IMAGE), "the note names node and image: {note}");
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pods_with_the_same_image_share_a_recovery_and_are_all_nudged() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::BusyFor(1)).await;
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.send_pod(failing_pod("q", IMAGE, REFUSED)).await;
    let mut nudged = [controller.nudged().await, controller.nudged().await];
    nudged.sort();
    assert_eq!(nudged, ["p", "q"]);
    assert_eq!(node.fetcher.served().len(), 5, "each blob is fetched once");
    controller.send_pod(failing_pod("late", IMAGE, REFUSED)).await;
    assert_eq!(controller.nudged().await, "late", "a failure reported after the recovery gets a nudge");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_without_opt_in_is_left_alone() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let controller = RunningController::start(&node);
    let mut pod = failing_pod("p", IMAGE, REFUSED);
    pod.annotations.clear();
    controller.send_pod(pod).await;
    controller.settle().await;
    assert!(node.fetcher.served().is_empty() && reports(&node).is_empty());
    assert!(node.has_metric(r#"lighterman_image_pull_failures_total{verdict="not_opted_in"} 1"#));
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_denied_pull_is_reported_once_and_never_bypassed() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let controller = RunningController::start(&node);
    for message in ["403 Forbidden", "Back-off pulling image", REFUSED, "403 Forbidden"] {
        controller.send_pod(failing_pod("p", IMAGE, message)).await;
    }
    controller.settle().await;
    assert_eq!(reports(&node), [("p".to_owned(), PodReportKind::NotRecoverable)]);
    assert!(node.fetcher.served().is_empty());
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_without_a_provider_gets_one_event_and_its_image_when_a_provider_appears() {
    let node = TestNode::new();
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    assert_eq!(reports(&node), [("p".to_owned(), PodReportKind::NoProvider)]);
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    assert_eq!(controller.nudged().await, "p");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn announcements_of_other_images_start_no_retry() {
    let node = TestNode::new();
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    for other in 1..=20 {
        node.add_provider(other, "r.test/shop/other:v1", Behaviour::Honest).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="no_provider"} 1"#));
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_container_that_starts_while_another_container_waits_gets_its_event() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.store.set_record_delay(Duration::from_millis(100));
    let controller = RunningController::start(&node);
    let mut pod = failing_pod("p", IMAGE, REFUSED);
    pod.containers.extend(failing_pod("p", "r.test/shop/absent:1", REFUSED).containers);
    pod.containers[1].name = "other".into();
    controller.send_pod(pod.clone()).await;
    while node.record_names().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    pod.containers[0].waiting = None;
    controller.send_pod(pod).await;
    controller.settle().await;
    let reported = reports(&node);
    assert!(reported.contains(&("p".to_owned(), PodReportKind::Recovered)), "{reported:?}");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_failure_after_the_container_has_run_is_counted_and_reported_anew() {
    let node = TestNode::new();
    let controller = RunningController::start(&node);
    let denied = failing_pod("p", IMAGE, "403 Forbidden");
    let mut runs = denied.clone();
    runs.containers[0].waiting = None;
    for pod in [denied.clone(), denied.clone(), runs, denied] {
        controller.send_pod(pod).await;
        controller.settle().await;
    }
    assert_eq!(reports(&node).len(), 2);
    assert!(node.has_metric(r#"lighterman_image_pull_failures_total{verdict="denied"} 2"#));
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_new_provider_starts_the_recovery_without_back_off() {
    let node = TestNode::new();
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    // By now the back-off lasts half a minute or more.
    tokio::time::sleep(Duration::from_secs(100)).await;
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let appeared = tokio::time::Instant::now();
    controller.nudged().await;
    assert!(appeared.elapsed() < Duration::from_secs(1), "{:?}", appeared.elapsed());
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn each_failed_attempt_is_reported_and_a_present_image_is_not() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Corrupts).await;
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(reports(&node).len() > 1);
    assert!(reports(&node).iter().all(|(_, kind)| *kind == PodReportKind::Failed));
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    controller.nudged().await;
    controller.settle().await;
    let reported = reports(&node).len();
    // A minute later the pod still waits, so the recovery starts again and finds every blob.
    controller.nudged().await;
    controller.settle().await;
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="already_here"} 1"#));
    assert_eq!(reports(&node).len(), reported);
    controller.stop().await;
}
