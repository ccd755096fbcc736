//! Silent connections of containerd are ended where the settings say so.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use super::needs::pending;
use super::salvaging::{Watch, failing, reports};
use super::*;
use crate::decide::rules::Manner;
use crate::decide::silence::{Connection, Connections};
use crate::ports::{ConnectionsError, KubeletEvent, PullConnections, ReportKind};

/// The connections of a containerd: one silent, one that crawls.
struct Fake {
    open: Mutex<Vec<Connection>>,
    /// The silence began five seconds after the pod did.
    silent_since: tokio::time::Instant,
    refuses: bool,
}

const SILENT: u64 = 1;
const CRAWLING: u64 = 2;

impl Fake {
    fn new(refuses: bool) -> Arc<Self> {
        let connection = |cookie: u64, silent_for: u64| Connection {
            local: SocketAddr::from(([10, 0, 0, 7], 40_000 + cookie as u16)),
            remote: SocketAddr::from(([192, 0, 2, 1], 443)),
            cookie,
            silent_for: Duration::from_secs(silent_for),
            unread: 0,
        };
        let open = Mutex::new(vec![connection(SILENT, 0), connection(CRAWLING, 1)]);
        Arc::new(Self { open, silent_since: tokio::time::Instant::now() + Duration::from_secs(5), refuses })
    }

    fn open(&self) -> Vec<u64> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().map(|connection| connection.cookie).collect()
    }
}

#[async_trait]
impl PullConnections for Fake {
    async fn connections(&self) -> Result<Connections, ConnectionsError> {
        let mut established = self.open.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let silent = tokio::time::Instant::now().saturating_duration_since(self.silent_since);
        established.iter_mut().filter(|it| it.cookie == SILENT).for_each(|it| it.silent_for = silent);
        Ok(Connections { established, listening: [].into() })
    }

    async fn end(&self, connection: &Connection) -> Result<bool, ConnectionsError> {
        if self.refuses {
            return Err(std::io::Error::from_raw_os_error(1).into());
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|other| other.cookie != connection.cookie);
        Ok(true)
    }
}

const ENDS: Manner = Manner {
    dry_run: false,
    delete_pods: false,
    stalled_after: Some(Duration::from_secs(120)),
    end_stalled_pulls: true,
};

#[tokio::test(start_paused = true)]
async fn a_pull_ends_although_its_image_has_come_from_a_peer_meanwhile() {
    let harbour = Harbour::new();
    let root = harbour.peer_with(1, IMAGE, Behaviour::Honest).await.root.digest;
    let image = format!("r.test/shop/checkout@{root}");
    let pod = pending("p", &image);
    let message = format!("Pulling image \"{image}\"");
    harbour
        .cluster
        .put_kubelet_event(&pod.pod, KubeletEvent { reason: "Pulling".into(), container: Some("c".into()), message });
    let fake = Fake::new(false);
    let watch = Watch::start_with(&harbour, ENDS, Some(Arc::clone(&fake) as _));
    watch.sees(pod).await;
    tokio::time::sleep(Duration::from_secs(123)).await;
    let names = harbour.record_names().await;
    assert!(!names.is_empty() && fake.open() == [SILENT, CRAWLING], "{names:?}");
    watch.names_in.send_replace(Some(Arc::new(names.into_iter().map(|name| (name, root)).collect())));
    tokio::time::sleep(Duration::from_secs(15)).await;
    assert_eq!(fake.open(), [CRAWLING]);
    watch.stop().await;
}

/// The open connections after a pod has waited for `seconds`, and the reasons of the Events.
async fn after(seconds: u64, manner: Manner, fake: &Arc<Fake>) -> (Vec<u64>, Vec<ReportKind>, String) {
    let harbour = Harbour::new();
    let watch = Watch::start_with(&harbour, manner, Some(Arc::clone(fake) as _));
    let pod = pending("p", IMAGE);
    let message = format!("Pulling image \"{IMAGE}\"");
    harbour
        .cluster
        .put_kubelet_event(&pod.pod, KubeletEvent { reason: "Pulling".into(), container: Some("c".into()), message });
    watch.sees(pod).await;
    // A pod whose pull fails for another reason waits as well, and is not opted in.
    let stranger = failing("stranger", "r.test/other:1", "pull QPS exceeded");
    watch.sees(crate::model::PodView { annotations: Default::default(), ..stranger }).await;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let kinds = reports(&harbour).into_iter().filter(|(pod, _)| pod == "p").map(|(_, kind)| kind).collect();
    let metrics = String::from_utf8(harbour.metrics.render()).unwrap();
    watch.stop().await;
    (fake.open(), kinds, metrics)
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_ended_once_a_pod_has_waited_and_a_crawling_one_stays() {
    let fake = Fake::new(false);
    let (open, kinds, _) = after(115, ENDS, &fake).await;
    assert_eq!((open, kinds), (vec![SILENT, CRAWLING], vec![]), "a pull may take a while");
    let (open, kinds, metrics) = after(600, ENDS, &fake).await;
    assert_eq!(open, [CRAWLING]);
    assert_eq!(kinds.iter().filter(|kind| **kind == ReportKind::PullEnded).count(), 1, "{kinds:?}");
    assert!(metrics.contains("lighterman_stalled_connections_total{result=\"ended\"} 1"));
}

#[tokio::test(start_paused = true)]
async fn no_connection_is_ended_by_default_or_by_a_dry_run() {
    for manner in [Manner::default(), Manner { dry_run: true, ..ENDS }] {
        let (open, kinds, _) = after(600, manner, &Fake::new(false)).await;
        assert_eq!(open, [SILENT, CRAWLING]);
        assert_eq!(kinds, [ReportKind::Stalled], "one Event says what the pod waits for");
    }
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_refuses_is_counted_and_no_event_says_that_a_pull_ended() {
    let (open, kinds, metrics) = after(600, ENDS, &Fake::new(true)).await;
    assert_eq!(open, [SILENT, CRAWLING]);
    assert_eq!(kinds, [ReportKind::Stalled]);
    assert!(metrics.contains("lighterman_stalled_connections_total{result=\"failed\"}"));
}
