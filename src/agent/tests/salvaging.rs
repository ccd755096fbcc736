//! Pods of this node, from their failure to the nudge.

use std::time::Duration;

use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::advertise::NamesHere;
use crate::agent::notices::Notices;
use crate::agent::progress::Board;
use crate::agent::registries::Registries;
use crate::agent::salvage::{Parts, Salvager};
use crate::agent::tell::Tell;
use crate::decide::claim::zone_claim;
use crate::decide::rules::Manner;
use crate::model::{ContainerKind, ContainerView, Outage, PodRef, PodView, PullPolicy, Waiting};
use crate::ports::{Claims, PodEvent, PullConnections, ReportKind};

pub(super) const REFUSED: &str = "dial tcp 10.0.0.1:443: connect: connection refused";

/// A salvager at work.
pub(super) struct Watch {
    pods: mpsc::Sender<PodEvent>,
    pub(super) nudges: broadcast::Receiver<PodRef>,
    /// The images that the node is said to have.
    pub(super) names_in: watch::Sender<NamesHere>,
    /// What it found out about registries itself.
    pub(super) outages: watch::Receiver<Vec<Outage>>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Watch {
    pub(super) fn start(harbour: &Harbour) -> Self {
        Self::start_as(harbour, Manner::default())
    }

    pub(super) fn start_as(harbour: &Harbour, manner: Manner) -> Self {
        Self::start_with(harbour, manner, None)
    }

    pub(super) fn start_with(harbour: &Harbour, manner: Manner, connections: Option<Arc<dyn PullConnections>>) -> Self {
        let (names_in, names_here) = watch::channel(Some(Arc::default()));
        let (outages_in, outages) = watch::channel(Vec::new());
        let registry = Arc::clone(&harbour.registry) as _;
        let salvager = Salvager::new(Parts {
            recoverer: harbour.recoverer(),
            board: Board::default(),
            cluster: Arc::new(harbour.cluster.clone()),
            registries: Registries::new(harbour.holders.clone(), registry, true, outages_in, harbour.metrics.clone()),
            connections,
            notices: Notices::nowhere(harbour.metrics.clone()),
            names_here,
            rules: harbour.rules.subscribe(),
            manner,
            metrics: harbour.metrics.clone(),
        });
        let (pods, events) = mpsc::channel(8);
        let stop = CancellationToken::new();
        let running = tokio::spawn(salvager.run(events, stop.clone()));
        Self { pods, nudges: harbour.cluster.nudges(), names_in, outages, stop, running }
    }

    pub(super) async fn sees(&self, pod: PodView) {
        self.pods.send(PodEvent::Seen(Box::new(pod))).await.unwrap();
    }

    pub(super) async fn nudged(&mut self) -> String {
        tokio::time::timeout(Duration::from_secs(60), self.nudges.recv()).await.expect("a nudge").unwrap().name
    }

    /// Lets everything happen that happens by itself within a while.
    pub(super) async fn rest(&self) {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }

    pub(super) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(1), self.running).await.expect("it stops").unwrap();
    }
}

pub(super) fn failing(name: &str, image: &str, message: &str) -> PodView {
    let waiting = Waiting { reason: "ErrImagePull".into(), message: message.into() };
    let container = ContainerView {
        name: "c".into(),
        kind: ContainerKind::Ordinary,
        image: image.into(),
        pull_policy: PullPolicy::IfNotPresent,
        waiting: Some(waiting),
    };
    PodView {
        pod: PodRef { k8s_namespace: "shop".into(), name: name.into(), uid: format!("uid-{name}") },
        annotations: [("lighterman.dev/auto-salvage".to_owned(), "true".to_owned())].into(),
        containers: vec![container],
        image_volumes: Vec::new(),
        owner: None,
        is_static: false,
        priority: 0,
        pull_secrets: Vec::new(),
        ending: false,
    }
}

pub(super) fn reports(harbour: &Harbour) -> Vec<(String, ReportKind)> {
    harbour.cluster.reports().into_iter().map(|(pod, report)| (pod.name, report.kind)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_failing_pod_gets_its_image_a_nudge_and_an_event() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    assert_eq!(watch.nudged().await, "p");
    watch.rest().await;
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::Salvaged)]);
    let note = harbour.cluster.reports()[0].1.note.clone();
    assert!(note.contains("node-1") && note.contains(IMAGE), "who and what: {note}");
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pods_that_want_one_image_share_one_recovery_and_are_all_nudged() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::BusyFor(1)).await;
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.sees(failing("q", IMAGE, REFUSED)).await;
    let mut nudged = [watch.nudged().await, watch.nudged().await];
    nudged.sort();
    assert_eq!(nudged, ["p", "q"]);
    assert_eq!(harbour.fetcher.served().len(), 5, "each blob once");
    watch.sees(failing("late", IMAGE, REFUSED)).await;
    assert_eq!(watch.nudged().await, "late", "its failure was on the way when the image came");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_without_opt_in_is_left_alone() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let watch = Watch::start(&harbour);
    let mut pod = failing("p", IMAGE, REFUSED);
    pod.annotations.clear();
    watch.sees(pod).await;
    watch.rest().await;
    assert!(harbour.fetcher.served().is_empty() && reports(&harbour).is_empty());
    assert!(harbour.counted(r#"lighterman_pod_image_failures_total{verdict="not_opted_in"} 1"#));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_denied_pull_is_told_once_and_never_bypassed() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let watch = Watch::start(&harbour);
    for message in ["403 Forbidden", "Back-off pulling image", REFUSED, "403 Forbidden"] {
        watch.sees(failing("p", IMAGE, message)).await;
    }
    watch.rest().await;
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::NotActionable)]);
    assert!(harbour.fetcher.served().is_empty());
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_provider_the_pod_is_told_once_and_served_when_one_appears() {
    let harbour = Harbour::new();
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::NoProvider)]);
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    assert_eq!(watch.nudged().await, "p");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_others_announce_meanwhile_is_no_reason_to_try_again() {
    let harbour = Harbour::new();
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    for other in 1..=20 {
        harbour.peer_with(other, "r.test/shop/other:v1", Behaviour::Honest).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="no_provider"} 1"#));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_goes_away_ends_its_recovery() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let watch = Watch::start(&harbour);
    let pod = failing("p", IMAGE, REFUSED);
    watch.sees(pod.clone()).await;
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 1"));
    watch.pods.send(PodEvent::Gone(pod.pod)).await.unwrap();
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 0"));
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="abandoned"} 1"#));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_made_again_while_its_recovery_is_being_stopped_is_served_by_one_new_recovery() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let mut watch = Watch::start(&harbour);
    let old = failing("old", IMAGE, REFUSED);
    watch.sees(old.clone()).await;
    watch.rest().await;
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    // Both are in the queue before the salvager runs again.
    watch.pods.try_send(PodEvent::Gone(old.pod)).unwrap();
    watch.pods.try_send(PodEvent::Seen(Box::new(failing("new", IMAGE, REFUSED)))).unwrap();
    assert_eq!(watch.nudged().await, "new");
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 0"));
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="abandoned"} 1"#));
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
    assert_eq!(reports(&harbour), [("new".to_owned(), ReportKind::Salvaged)]);
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_container_that_goes_on_while_another_one_waits_is_told_of_all_the_same() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.store.name_slowly(Duration::from_millis(100));
    let watch = Watch::start(&harbour);
    let mut pod = failing("p", IMAGE, REFUSED);
    pod.containers.extend(failing("p", "r.test/nobody/has:1", REFUSED).containers);
    pod.containers[1].name = "other".into();
    watch.sees(pod.clone()).await;
    while harbour.record_names().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    pod.containers[0].waiting = None;
    watch.sees(pod).await;
    watch.rest().await;
    let told = reports(&harbour);
    assert!(told.contains(&("p".to_owned(), ReportKind::Salvaged)), "{told:?}");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pods_missing_from_a_new_list_are_gone() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    watch.pods.send(PodEvent::Synced(Vec::new())).await.unwrap();
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 0"));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_namespace_cannot_be_read_is_decided_on_later() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.cluster.set_away(true);
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    assert!(harbour.fetcher.served().is_empty(), "not without knowing that it opted in");
    harbour.cluster.set_away(false);
    assert_eq!(watch.nudged().await, "p");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_node_that_leads_is_named_by_a_lease_until_its_recovery_ends() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let watch = Watch::start(&harbour);
    let pod = failing("p", IMAGE, REFUSED);
    watch.sees(pod.clone()).await;
    watch.rest().await;
    let claims = harbour.cluster.claims_of("somebody".parse().unwrap());
    let lease = claims.read(image.root.digest).await.unwrap().expect("a Lease");
    assert_eq!(lease.holder.as_deref(), Some("here"));
    watch.pods.send(PodEvent::Gone(pod.pod)).await.unwrap();
    watch.rest().await;
    assert_eq!(claims.read(image.root.digest).await.unwrap(), None);
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_in_a_recovery_releases_its_lease() {
    for zone in [None, Some("a".parse::<Zone>().unwrap())] {
        let harbour = Harbour { zone: zone.clone(), ..Harbour::new() };
        let store = Arc::new(MemoryStore::new());
        let image = put_image(&*store, &[IMAGE.into()], &[3000, 200, 10], 7).await.unwrap();
        // The documents come, and no piece of a layer.
        harbour.announce_in(Some("b".parse().unwrap()), 1, store, Behaviour::HangsAfter(0)).await;
        let claim = zone.map_or(image.root.digest, |zone| zone_claim(image.root.digest, &zone));
        let watch = Watch::start(&harbour);
        watch.sees(failing("p", IMAGE, REFUSED)).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        let claims = harbour.cluster.claims_of("somebody".parse().unwrap());
        assert!(claims.read(claim).await.unwrap().is_some(), "a Lease");
        watch.stop().await;
        assert_eq!(claims.read(claim).await.unwrap(), None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_decided_on_later_although_something_else_happens_all_the_time() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.cluster.set_away(true);
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    harbour.cluster.set_away(false);
    for _ in 0..10 {
        harbour.peer_with(2, "r.test/shop/other:v1", Behaviour::Honest).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(watch.nudges.try_recv().unwrap().name, "p");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_failure_after_the_image_came_once_is_counted_and_told_anew() {
    let harbour = Harbour::new();
    let watch = Watch::start(&harbour);
    let denied = failing("p", IMAGE, "403 Forbidden");
    let mut runs = denied.clone();
    runs.containers[0].waiting = None;
    for pod in [denied.clone(), denied.clone(), runs, denied] {
        watch.sees(pod).await;
        watch.rest().await;
    }
    assert_eq!(reports(&harbour).len(), 2);
    assert!(harbour.counted(r#"lighterman_pod_image_failures_total{verdict="denied"} 2"#));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_appears_is_asked_at_once_and_not_after_the_back_off() {
    let harbour = Harbour::new();
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    // By now the back-off is half a minute or more.
    tokio::time::sleep(Duration::from_secs(100)).await;
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let appeared = tokio::time::Instant::now();
    watch.nudged().await;
    assert!(appeared.elapsed() < Duration::from_secs(1), "{:?}", appeared.elapsed());
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_denied_after_all_ends_its_recovery() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    watch.sees(failing("p", IMAGE, "403 Forbidden")).await;
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 0"));
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::NotActionable)]);
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_being_deleted_is_not_helped_any_more() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    watch.sees(PodView { ending: true, ..failing("p", IMAGE, REFUSED) }).await;
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 0"));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn claims_are_given_back_when_the_recovery_has_ended() {
    // The provider outranks this node for about every other key. It is busy at first: a claim is not waited for.
    let mut written = 0;
    for number in 1..=8 {
        let harbour = Harbour::new();
        harbour.peer_with(number, IMAGE, Behaviour::BusyFor(2)).await;
        let mut watch = Watch::start(&harbour);
        watch.sees(failing("p", IMAGE, REFUSED)).await;
        watch.nudged().await;
        watch.rest().await;
        let (writes, held) = harbour.cluster.leases();
        written += writes;
        assert!(held.is_empty(), "{held:?}");
        watch.stop().await;
    }
    assert!(written > 0);
}

#[tokio::test(start_paused = true)]
async fn a_nudge_is_tried_again_while_the_api_server_is_away_for_a_moment() {
    let harbour = Harbour::new();
    let tell = Tell::new(Arc::new(harbour.cluster.clone()), harbour.holders.clone(), harbour.metrics.clone());
    let mut nudges = harbour.cluster.nudges();
    let pod = failing("p", IMAGE, REFUSED).pod;
    harbour.cluster.set_away(true);
    tokio::join!(tell.nudge(&pod), async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        harbour.cluster.set_away(false);
    });
    assert_eq!(nudges.try_recv().unwrap(), pod);
    assert!(harbour.counted(r#"lighterman_nudges_total{result="ok"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn each_failed_attempt_is_told_and_an_image_that_was_here_is_not() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Lies).await;
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(reports(&harbour).len() > 1);
    assert!(reports(&harbour).iter().all(|(_, kind)| *kind == ReportKind::Failed));
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    watch.nudged().await;
    watch.rest().await;
    let told = reports(&harbour).len();
    // A minute later the pod still waits, so it is looked at again: everything is here.
    watch.nudged().await;
    watch.rest().await;
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="already_here"} 1"#));
    assert_eq!(reports(&harbour).len(), told);
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_event_that_cannot_be_written_now_is_written_later() {
    let harbour = Harbour::new();
    let tell = Tell::new(Arc::new(harbour.cluster.clone()), harbour.holders.clone(), harbour.metrics.clone());
    let pod = failing("p", IMAGE, REFUSED).pod;
    harbour.cluster.set_away(true);
    tokio::join!(tell.report(&pod, ReportKind::Salvaged, "it came".into()), async {
        tokio::time::sleep(Duration::from_secs(60)).await;
        harbour.cluster.set_away(false);
    });
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::Salvaged)]);
}

#[tokio::test(start_paused = true)]
async fn stopping_does_not_wait_for_an_api_server_that_is_away() {
    let harbour = Harbour::new();
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, "403 Forbidden")).await;
    harbour.cluster.set_away(true);
    watch.sees(failing("q", IMAGE, REFUSED)).await;
    watch.rest().await;
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn stopping_abandons_what_is_under_way() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    watch.stop().await;
    assert!(harbour.record_names().await.is_empty());
}
