//! Nudges and deletions that the API server denies.

use std::io::Write;
use std::time::Duration;

use parking_lot::Mutex;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

use super::pod_controller::{REFUSED, RunningController, failing_pod, reports};
use super::pod_needs::waiting;
use super::*;
use crate::decide::policy::RecoveryOptions;
use crate::model::{Owner, PodReportKind, PodView};

/// The log of this thread. A paused clock needs a single-threaded runtime, so every task logs here.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> (Self, DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(log.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn lines_with(&self, text: &str) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().clone()).unwrap();
        log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test(start_paused = true)]
async fn a_denied_nudge_fails_no_recovery_and_is_logged_once() {
    let (log, _guard) = Log::start();
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.cluster.set_forbidden(true);
    let mut controller = RunningController::start(&node);
    for name in ["p", "q"] {
        controller.send_pod(failing_pod(name, IMAGE, REFUSED)).await;
    }
    controller.settle().await;
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
    assert!(node.has_metric(r#"lighterman_nudges_total{result="denied"} 2"#));
    let mut reported = reports(&node);
    reported.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(reported, ["p", "q"].map(|name| (name.to_owned(), PodReportKind::Recovered)));
    let lines = log.lines_with("denies the nudge");
    assert_eq!(lines.len(), 1, "{lines:?}");
    for part in ["WARN", "within 90 s", "podRightsWithoutPolicy", "pods is forbidden"] {
        assert!(lines[0].contains(part), "{part}: {}", lines[0]);
    }

    // The pods still wait after a minute and are nudged again, now with the right.
    node.cluster.set_forbidden(false);
    let mut nudged = [controller.nudged().await, controller.nudged().await];
    nudged.sort();
    assert_eq!(nudged, ["p", "q"]);
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_kubelet_without_a_nudge_does_not_count_as_verifying_credentials() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.cluster.set_forbidden(true);
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    // The kubelet enters its back-off just after the recovery, and checks again at its next sync.
    let mut backing_off = failing_pod("p", IMAGE, REFUSED);
    backing_off.containers[0].waiting = waiting("ImagePullBackOff", REFUSED);
    controller.send_pod(backing_off).await;
    tokio::time::sleep(Duration::from_secs(89)).await;
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="already_here"} 1"#));
    assert_eq!(reports(&node), [("p".to_owned(), PodReportKind::Recovered)]);
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_denied_deletion_is_logged_once_and_attempted_once_per_pod() {
    let (log, _guard) = Log::start();
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.cluster.set_forbidden(true);
    let controller = RunningController::start_with_options(
        &node,
        RecoveryOptions { delete_pods: true, ..RecoveryOptions::default() },
    );
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web".into(), uid: "o".into() };
    for name in ["p", "q"] {
        controller.send_pod(PodView { owner: Some(owner.clone()), ..failing_pod(name, IMAGE, REFUSED) }).await;
    }
    tokio::time::sleep(Duration::from_secs(1800)).await;
    assert!(node.has_metric(r#"lighterman_pod_deletions_total{result="denied"} 2"#));
    assert!(node.cluster.deleted().is_empty());
    let lines = log.lines_with("denies the deletion");
    assert_eq!(lines.len(), 1, "{lines:?}");
    controller.stop().await;
}
