//! What pods turn out to need: before anything failed, where the cause is not in sight, and by whose permission.

use super::salvaging::{REFUSED, Watch, failing, reports};
use super::*;
use crate::agent::registries::Registries;
use crate::decide::rules::Manner;
use crate::model::{ContainerKind, ContainerView, ImageVolume, Outage, OutageKind, Owner, PodView, Waiting};
use crate::ports::{KubeletEvent, RegistryError, ReportKind};

/// A pod that the kubelet has not come to yet.
pub(super) fn pending(name: &str, image: &str) -> PodView {
    let mut pod = failing(name, image, "");
    pod.containers[0].waiting = Some(Waiting { reason: "ContainerCreating".into(), message: String::new() });
    pod
}

pub(super) fn waiting(reason: &str, message: &str) -> Option<Waiting> {
    Some(Waiting { reason: reason.into(), message: message.into() })
}

#[tokio::test(start_paused = true)]
async fn a_new_pod_gets_its_image_before_the_kubelet_fails_once_the_registry_is_known_to_be_down() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let mut watch = Watch::start(&harbour);
    watch.sees(pending("early", IMAGE)).await;
    watch.rest().await;
    assert!(harbour.record_names().await.is_empty(), "nobody knows of an outage");
    watch.sees(PodView { annotations: Default::default(), ..failing("stranger", "r.test/other:1", REFUSED) }).await;
    watch.rest().await;
    assert!(watch.outages.borrow().is_empty(), "anybody could name registries");
    watch.sees(failing("other", "r.test/other:1", REFUSED)).await;
    watch.rest().await;
    assert!(harbour.record_names().await.is_empty(), "one failed pull decides no tag");
    watch.sees(failing("another", "r.test/another:1", REFUSED)).await;
    assert_eq!(watch.nudged().await, "early");
    assert!(harbour.record_names().await.contains(&IMAGE.to_owned()));
    let told = watch.outages.borrow().clone();
    assert!(
        matches!(&told[..], [outage] if outage.registry == "r.test" && outage.kind == OutageKind::Refused),
        "{told:?}"
    );
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_a_peer_knows_of_a_registry_is_enough_for_a_digest_unless_it_answers_here() {
    for (answers_here, is_digest, expected) in [(false, true, true), (true, true, false), (false, false, false)] {
        let harbour = Harbour::new();
        let root = harbour.peer_with(1, IMAGE, Behaviour::Honest).await.root.digest;
        let image = if is_digest { format!("r.test/shop/checkout@{root}") } else { IMAGE.to_owned() };
        if answers_here {
            harbour.registry.put_registry("r.test");
        }
        let watch = Watch::start(&harbour);
        let outage = Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: 5 };
        harbour.holders.apply(MeshEvent::Changed(peer(1), vec![ContentChange::Added(Item::Outage(outage))]));
        // Time to ask the registry.
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        watch.sees(pending("early", &image)).await;
        watch.rest().await;
        let is_here = !harbour.record_names().await.is_empty();
        assert_eq!(is_here, expected, "it answers here: {answers_here}, a digest: {is_digest}");
        assert!(watch.outages.borrow().is_empty(), "hearsay is not passed on as seen");
        watch.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_answered_before_and_does_not_now_is_down() {
    let harbour = Harbour::new();
    let root = harbour.peer_with(1, IMAGE, Behaviour::Honest).await.root.digest;
    harbour.registry.put_registry("r.test");
    let watch = Watch::start(&harbour);
    watch.sees(pending("first", "r.test/other:1")).await;
    watch.rest().await;
    let down = RegistryError::Down { registry: "r.test".into(), kind: OutageKind::TimedOut };
    harbour.registry.set_failure("r.test", Some(down));
    tokio::time::sleep(std::time::Duration::from_secs(40)).await;
    watch.sees(pending("by tag", IMAGE)).await;
    watch.rest().await;
    assert!(harbour.record_names().await.is_empty(), "no pull has failed, so the kubelet tries the tag first");
    watch.sees(pending("by digest", &format!("r.test/shop/checkout@{root}"))).await;
    watch.rest().await;
    assert_eq!(harbour.record_names().await.len(), 1);
    watch.sees(failing("failed", "r.test/other:1", REFUSED)).await;
    watch.rest().await;
    assert!(harbour.record_names().await.contains(&IMAGE.to_owned()), "a failed pull and a question without an answer");
    assert_eq!(watch.outages.borrow().len(), 1);
    harbour.registry.set_failure("r.test", None);
    tokio::time::sleep(std::time::Duration::from_secs(30)).await;
    assert!(watch.outages.borrow().is_empty(), "it is back, and peers are told");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_image_that_is_here_or_that_is_always_pulled_is_not_brought_early() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("other", "r.test/other:1", REFUSED)).await;
    let mut always = pending("always", IMAGE);
    always.containers[0].pull_policy = crate::model::PullPolicy::Always;
    watch.sees(always).await;
    watch.rest().await;
    assert!(harbour.record_names().await.is_empty());
    assert!(reports(&harbour).iter().all(|(pod, _)| pod == "other"), "nothing has failed, so nothing is said");
    watch.names_in.send_replace(Some(Arc::new([(IMAGE.to_owned(), Digest::of(b"index"))].into())));
    watch.sees(pending("here", IMAGE)).await;
    watch.rest().await;
    assert!(harbour.record_names().await.is_empty(), "the kubelet will find it");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_starts_in_the_middle_finds_the_cause_in_the_pods_events() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let mut silent = failing("p", IMAGE, "");
    silent.containers[0].waiting = waiting("ImagePullBackOff", &format!("Back-off pulling image \"{IMAGE}\""));
    let said = |message: String| KubeletEvent { reason: "Failed".into(), container: Some("c".into()), message };
    harbour.cluster.put_kubelet_event(&silent.pod, said(format!("Failed to pull image \"{IMAGE}\": {REFUSED}")));
    let mut watch = Watch::start(&harbour);
    watch.sees(silent).await;
    assert_eq!(watch.nudged().await, "p");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_denial_among_the_events_ends_with_a_later_failure_of_the_registry() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let mut silent = failing("p", IMAGE, "");
    silent.containers[0].waiting = waiting("ImagePullBackOff", &format!("Back-off pulling image \"{IMAGE}\""));
    let message = format!("Failed to pull image \"{IMAGE}\": 403 Forbidden");
    let event = KubeletEvent { reason: "Failed".into(), container: Some("c".into()), message };
    harbour.cluster.put_kubelet_event(&silent.pod, event);
    let mut watch = Watch::start(&harbour);
    watch.sees(silent.clone()).await;
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::NotActionable)]);
    assert!(harbour.record_names().await.is_empty());
    watch.sees(PodView { containers: failing("p", IMAGE, REFUSED).containers, ..silent }).await;
    assert_eq!(watch.nudged().await, "p");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_missing_sandbox_image_is_recognised_by_its_event_and_brought() {
    const PAUSE: &str = "r.test/pause:3.8";
    let harbour = Harbour::new();
    harbour.peer_with(1, PAUSE, Behaviour::Honest).await;
    let pod = pending("p", IMAGE);
    let message = format!(
        "Failed to create pod sandbox: failed to get sandbox image \"{PAUSE}\": failed to pull image \"{PAUSE}\": {REFUSED}"
    );
    let event = KubeletEvent { reason: "FailedCreatePodSandBox".into(), container: None, message };
    harbour.cluster.put_kubelet_event(&pod.pod, event);
    let mut watch = Watch::start(&harbour);
    watch.sees(pod).await;
    assert_eq!(watch.nudged().await, "p");
    assert!(harbour.record_names().await.contains(&PAUSE.to_owned()));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_container_and_a_volumes_image_are_looked_at_and_none_hides_another() {
    let harbour = Harbour::new();
    let names = ["r.test/init:1", "r.test/main:1", "r.test/debug:1", "r.test/model:1"];
    for (number, name) in (1..).zip(names) {
        harbour.peer_with(number, name, Behaviour::Honest).await;
    }
    let container = |name: &str, kind, image: &str, about: &str| ContainerView {
        name: name.into(),
        kind,
        waiting: waiting("ErrImagePull", &format!("failed to pull image \"{about}\": {REFUSED}")),
        ..failing("p", image, "").containers.remove(0)
    };
    let mut pod = failing("p", IMAGE, "");
    let policy = pod.containers[0].pull_policy;
    pod.image_volumes = vec![ImageVolume { name: "model".into(), image: names[3].into(), pull_policy: policy }];
    pod.containers = vec![
        container("init", ContainerKind::Init, names[0], names[0]),
        container("main", ContainerKind::Ordinary, names[1], names[1]),
        container("nobody", ContainerKind::Ordinary, "r.test/nobody:1", "r.test/nobody:1"),
        container("debug", ContainerKind::Ephemeral, names[2], names[2]),
        container("reads", ContainerKind::Ordinary, "r.test/reads:1", names[3]),
    ];
    let watch = Watch::start(&harbour);
    watch.sees(pod).await;
    watch.rest().await;
    let records = harbour.record_names().await;
    assert!(names.iter().all(|name| records.contains(&(*name).to_owned())), "{records:?}");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_owner_can_opt_in_for_its_pods() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web".into(), uid: "o".into() };
    let yes = [("lighterman.dev/auto-salvage".to_owned(), "true".to_owned())].into();
    harbour.cluster.put_owners("shop", &owner, vec![Default::default(), yes]);
    let owned = PodView { annotations: Default::default(), owner: Some(owner), ..failing("p", IMAGE, REFUSED) };
    let mut watch = Watch::start(&harbour);
    let ignored = [("lighterman.dev/ignore".to_owned(), "true".to_owned())].into();
    watch.sees(PodView { annotations: ignored, ..owned.clone() }).await;
    watch.rest().await;
    assert!(harbour.record_names().await.is_empty(), "the pod's own word wins");
    watch.sees(owned).await;
    assert_eq!(watch.nudged().await, "p");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_odd_annotation_is_counted_once_and_permits_nothing() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let odd = [("lighterman.dev/auto-salvage".to_owned(), "yes".to_owned())].into();
    let watch = Watch::start(&harbour);
    for name in ["p", "p", "q"] {
        watch.sees(PodView { annotations: Clone::clone(&odd), ..failing(name, IMAGE, REFUSED) }).await;
    }
    watch.rest().await;
    assert!(harbour.counted("lighterman_odd_annotations_total 1"));
    assert!(harbour.record_names().await.is_empty());
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn new_rules_are_in_force_at_once_for_pods_that_wait_already() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.rule(|rules| rules.policy.kill_switch = true);
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    assert!(harbour.record_names().await.is_empty());
    harbour.rule(|rules| rules.policy.kill_switch = false);
    assert_eq!(watch.nudged().await, "p");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_kill_switch_ends_what_is_under_way() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 1"));
    harbour.rule(|rules| rules.policy.kill_switch = true);
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 0"));
    assert_eq!(harbour.store.pins(), 0);
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_tells_where_the_image_could_come_from_and_moves_nothing() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let watch = Watch::start_as(&harbour, Manner { dry_run: true, ..Manner::default() });
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::DryRun)]);
    let note = &harbour.cluster.reports()[0].1.note;
    assert!(note.contains("node-1"), "{note}");
    assert_eq!(harbour.fetcher.times_asked(peer(1)), 0);
    assert!(harbour.record_names().await.is_empty());
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_stays_stuck_is_deleted_only_where_that_is_allowed_and_it_is_made_again() {
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web".into(), uid: "o".into() };
    let node = Owner { api_version: "v1".into(), kind: "Node".into(), ..owner.clone() };
    for (owner, is_static, allowed, expected) in [
        (Some(owner.clone()), false, true, 1),
        (Some(owner.clone()), false, false, 0),
        (None, false, true, 0),
        (Some(node), true, true, 0),
    ] {
        let harbour = Harbour::new();
        harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
        let watch = Watch::start_as(&harbour, Manner { delete_pods: allowed, ..Manner::default() });
        watch.sees(PodView { owner, is_static, ..failing("p", IMAGE, REFUSED) }).await;
        tokio::time::sleep(std::time::Duration::from_secs(1800)).await;
        assert_eq!(harbour.cluster.deleted().len(), expected);
        watch.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_only_always_would_pull_is_told_exactly_once() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let watch = Watch::start(&harbour);
    for (reason, message) in [("ErrImagePull", REFUSED), ("ImagePullBackOff", "Back-off"), ("ErrImagePull", REFUSED)] {
        let mut always = failing("p", IMAGE, message);
        always.containers[0].pull_policy = crate::model::PullPolicy::Always;
        always.containers[0].waiting = waiting(reason, message);
        watch.sees(always).await;
    }
    watch.rest().await;
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::NotActionable)]);
    assert_eq!(harbour.fetcher.times_asked(peer(1)), 0);
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_kubelet_that_fails_after_the_image_has_come_is_nudged_once_more() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("other", "r.test/other:1", REFUSED)).await;
    watch.sees(failing("another", "r.test/another:1", REFUSED)).await;
    watch.sees(pending("queued", IMAGE)).await;
    assert_eq!(watch.nudged().await, "queued");
    watch.rest().await;
    for reason in ["ErrImagePull", "ImagePullBackOff"] {
        let mut pod = failing("queued", IMAGE, REFUSED);
        pod.containers[0].waiting = waiting(reason, REFUSED);
        watch.sees(pod).await;
    }
    assert_eq!(watch.nudged().await, "queued");
    watch.rest().await;
    assert!(watch.nudges.try_recv().is_err(), "once is enough");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_kill_switch_ends_what_is_under_way_also_without_an_api_server() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    harbour.cluster.set_away(true);
    harbour.rule(|rules| rules.policy.kill_switch = true);
    watch.rest().await;
    assert!(harbour.counted("lighterman_recoveries_running 0"));
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_runs_or_lacks_another_image_is_never_deleted() {
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web".into(), uid: "o".into() };
    let owned = |mut pod: PodView, more: Option<ContainerView>| {
        pod.containers.extend(more);
        PodView { owner: Some(owner.clone()), ..pod }
    };
    let beside = |kind, image: &str, waiting| ContainerView {
        name: "beside".into(),
        kind,
        waiting,
        ..failing("p", image, "").containers.remove(0)
    };
    let lacks = waiting("ErrImagePull", REFUSED);
    for (what, more) in [
        ("an init container runs", beside(ContainerKind::Init, "r.test/init:1", None)),
        ("somebody debugs it", beside(ContainerKind::Ephemeral, IMAGE, lacks.clone())),
        ("nobody has the other image", beside(ContainerKind::Ordinary, "r.test/nobody:1", lacks)),
    ] {
        let harbour = Harbour::new();
        harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
        let watch = Watch::start_as(&harbour, Manner { delete_pods: true, ..Manner::default() });
        watch.sees(owned(failing("p", IMAGE, REFUSED), Some(more))).await;
        tokio::time::sleep(std::time::Duration::from_secs(600)).await;
        assert!(!harbour.record_names().await.is_empty());
        assert!(harbour.cluster.deleted().is_empty(), "{what}");
        watch.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_peers_word_alone_does_not_make_an_outage_where_the_registry_was_not_asked() {
    for (peers, expected) in [(1, false), (2, true)] {
        let harbour = Harbour::new();
        harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
        harbour.peer_with(2, IMAGE, Behaviour::Honest).await;
        // It takes long to answer.
        harbour.registry.put_registry("r.test");
        for number in 1..=peers {
            let outage = Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: number.into() };
            harbour.holders.apply(MeshEvent::Changed(peer(number), vec![ContentChange::Added(Item::Outage(outage))]));
        }
        let down = Registries::new(
            harbour.holders.clone(),
            Arc::clone(&harbour.registry) as _,
            true,
            watch::channel(Vec::new()).0,
            harbour.metrics.clone(),
        );
        assert_eq!(down.is_down("r.test", std::time::Instant::now()), expected, "{peers}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_denial_for_one_container_holds_for_another_that_waits_for_the_same_image() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("outage", "r.test/other:1", REFUSED)).await;
    watch.rest().await;
    let mut pod = failing("p", IMAGE, "401 Unauthorized");
    let later = ContainerView { name: "later".into(), ..pending("p", IMAGE).containers.remove(0) };
    pod.containers.push(later);
    watch.sees(pod).await;
    watch.rest().await;
    assert!(harbour.record_names().await.is_empty());
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_broken_image_that_nobody_can_mend_is_given_up_only_where_its_registry_answers() {
    for answers in [true, false] {
        let harbour = Harbour::new();
        let here = put_image(&*harbour.store, &[IMAGE.to_owned()], &[3000, 200], 1).await.unwrap();
        harbour.store.lose(here.blobs[1].digest);
        if answers {
            harbour.registry.put_registry("r.test");
        }
        let mut pod = failing("p", IMAGE, "");
        pod.containers[0].waiting =
            waiting("CreateContainerError", "failed to unpack: content digest sha256:00: not found");
        let watch = Watch::start(&harbour);
        watch.sees(pod).await;
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        assert!(!harbour.record_names().await.is_empty(), "a node that holds it may come back");
        tokio::time::sleep(std::time::Duration::from_secs(600)).await;
        assert_eq!(harbour.record_names().await.is_empty(), answers);
        assert_eq!(reports(&harbour).iter().any(|(_, kind)| *kind == ReportKind::Removed), answers);
        watch.stop().await;
    }
}
