//! Silent connections of containerd: the agent ends such connections if the options permit.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::pod_controller::{RunningController, failing_pod, reports};
use super::pod_needs::pending_pod;
use super::*;
use crate::decide::policy::RecoveryOptions;
use crate::decide::stalled_connections::{TcpConnection, TcpConnections};
use crate::model::{KubeletEvent, PodReportKind};
use crate::ports::{ConnectionsError, PullConnections};

/// The connections of a fake containerd: one is silent, the other is slow.
struct FakeConnections {
    open: Mutex<Vec<TcpConnection>>,
    /// Five seconds after the creation of the fake.
    silent_since: tokio::time::Instant,
    refuses: bool,
}

const SILENT: u64 = 1;
const SLOW: u64 = 2;

impl FakeConnections {
    fn new(refuses: bool) -> Arc<Self> {
        let connection = |cookie: u64, silent_for: u64| TcpConnection {
            local: SocketAddr::from(([10, 0, 0, 7], 40_000 + cookie as u16)),
            remote: SocketAddr::from(([192, 0, 2, 1], 443)),
            cookie,
            silent_for: Duration::from_secs(silent_for),
            unread: 0,
        };
        let open = Mutex::new(vec![connection(SILENT, 0), connection(SLOW, 1)]);
        Arc::new(Self { open, silent_since: tokio::time::Instant::now() + Duration::from_secs(5), refuses })
    }

    fn open(&self) -> Vec<u64> {
        let open = self.open.lock();
        open.iter().map(|connection| connection.cookie).collect()
    }
}

#[async_trait]
impl PullConnections for FakeConnections {
    async fn connections(&self) -> Result<TcpConnections, ConnectionsError> {
        let mut established = self.open.lock().clone();
        let silent = tokio::time::Instant::now().saturating_duration_since(self.silent_since);
        established
            .iter_mut()
            .filter(|connection| connection.cookie == SILENT)
            .for_each(|connection| connection.silent_for = silent);
        Ok(TcpConnections { established, listening: [].into() })
    }

    async fn end(&self, connection: &TcpConnection) -> Result<bool, ConnectionsError> {
        if self.refuses {
            return Err(std::io::Error::from_raw_os_error(1).into());
        }
        let mut open = self.open.lock();
        open.retain(|other| other.cookie != connection.cookie);
        Ok(true)
    }
}

const ENDS: RecoveryOptions = RecoveryOptions {
    dry_run: false,
    delete_pods: false,
    stalled_after: Some(Duration::from_secs(120)),
    end_stalled_pulls: true,
};

#[tokio::test(start_paused = true)]
async fn a_stalled_pull_is_ended_although_its_image_is_recovered() {
    let node = TestNode::new();
    let digest = node.add_provider(1, IMAGE, Behaviour::Honest).await.target.digest;
    let image = format!("r.test/shop/checkout@{digest}");
    let pod = pending_pod("p", &image);
    let message = format!("Pulling image \"{image}\"");
    node.cluster
        .put_kubelet_event(&pod.pod, KubeletEvent { reason: "Pulling".into(), container: Some("c".into()), message });
    let fake = FakeConnections::new(false);
    let controller = RunningController::start_with(&node, ENDS, Some(Arc::clone(&fake) as _));
    controller.send_pod(pod).await;
    tokio::time::sleep(Duration::from_secs(123)).await;
    let names = node.record_names().await;
    assert!(!names.is_empty() && fake.open() == [SILENT, SLOW], "{names:?}");
    controller.image_records_in.send_replace(Some(Arc::new(names.into_iter().map(|name| (name, digest)).collect())));
    tokio::time::sleep(Duration::from_secs(15)).await;
    assert_eq!(fake.open(), [SLOW]);
    controller.stop().await;
}

/// Lets a pod with a stalled pull wait for `seconds`. Returns the open connections, the kinds of
/// the pod's Events, and the metrics.
async fn wait_with_stalled_pull(
    seconds: u64,
    options: RecoveryOptions,
    fake: &Arc<FakeConnections>,
) -> (Vec<u64>, Vec<PodReportKind>, String) {
    let node = TestNode::new();
    let controller = RunningController::start_with(&node, options, Some(Arc::clone(fake) as _));
    let pod = pending_pod("p", IMAGE);
    let message = format!("Pulling image \"{IMAGE}\"");
    node.cluster
        .put_kubelet_event(&pod.pod, KubeletEvent { reason: "Pulling".into(), container: Some("c".into()), message });
    controller.send_pod(pod).await;
    // A second pod, without opt-in, waits because its pull fails for another reason.
    let not_opted_in = failing_pod("not-opted-in", "r.test/other:1", "pull QPS exceeded");
    controller.send_pod(crate::model::PodView { annotations: Default::default(), ..not_opted_in }).await;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let kinds = reports(&node).into_iter().filter(|(pod, _)| pod == "p").map(|(_, kind)| kind).collect();
    let metrics = String::from_utf8(node.metrics.render()).unwrap();
    controller.stop().await;
    (fake.open(), kinds, metrics)
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_ended_once_a_pod_has_waited_and_a_slow_connection_stays() {
    let fake = FakeConnections::new(false);
    let (open, kinds, _) = wait_with_stalled_pull(115, ENDS, &fake).await;
    assert_eq!((open, kinds), (vec![SILENT, SLOW], vec![]), "a pull may take a while");
    let (open, kinds, metrics) = wait_with_stalled_pull(600, ENDS, &fake).await;
    assert_eq!(open, [SLOW]);
    assert_eq!(kinds.iter().filter(|kind| **kind == PodReportKind::PullEnded).count(), 1, "{kinds:?}");
    assert!(metrics.contains("lighterman_stalled_connections_total{result=\"ended\"} 1"));
}

#[tokio::test(start_paused = true)]
async fn no_connection_is_ended_by_default_or_by_a_dry_run() {
    for options in [RecoveryOptions::default(), RecoveryOptions { dry_run: true, ..ENDS }] {
        let (open, kinds, _) = wait_with_stalled_pull(600, options, &FakeConnections::new(false)).await;
        assert_eq!(open, [SILENT, SLOW]);
        assert_eq!(kinds, [PodReportKind::Stalled], "one Event names the stalled pull");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_socket_destroy_is_counted_and_no_event_is_written() {
    let (open, kinds, metrics) = wait_with_stalled_pull(600, ENDS, &FakeConnections::new(true)).await;
    assert_eq!(open, [SILENT, SLOW]);
    assert_eq!(kinds, [PodReportKind::Stalled]);
    assert!(metrics.contains("lighterman_stalled_connections_total{result=\"failed\"}"));
}
