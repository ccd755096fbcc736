//! Decisions about waiting pods: early recoveries, causes that only Events name, opt-in, the kill
//! switch, dry runs, and deletion.

mod early_recovery;
mod opt_in;

use super::pod_controller::{REFUSED, RunningController, failing_pod, reports};
use super::*;
use crate::decide::policy::RecoveryOptions;
use crate::model::{
    ContainerKind, ContainerView, ImageVolume, KubeletEvent, Owner, PodReportKind, PodView, WaitingState,
};

/// A new pod, whose containers the kubelet has not started yet.
pub(super) fn pending_pod(name: &str, image: &str) -> PodView {
    let mut pod = failing_pod(name, image, "");
    pod.containers[0].waiting = Some(WaitingState { reason: "ContainerCreating".into(), message: String::new() });
    pod
}

pub(super) fn waiting(reason: &str, message: &str) -> Option<WaitingState> {
    Some(WaitingState { reason: reason.into(), message: message.into() })
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_starts_late_reads_the_cause_from_the_pods_events() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let mut silent = failing_pod("p", IMAGE, "");
    silent.containers[0].waiting = waiting("ImagePullBackOff", &format!("Back-off pulling image \"{IMAGE}\""));
    let kubelet_event =
        |message: String| KubeletEvent { reason: "Failed".into(), container: Some("c".into()), message };
    test_node
        .cluster
        .put_kubelet_event(&silent.pod, kubelet_event(format!("Failed to pull image \"{IMAGE}\": {REFUSED}")));
    let mut controller = RunningController::start(&test_node);
    controller.send_pod(silent).await;
    assert_eq!(controller.nudged().await, "p");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_later_registry_failure_overrides_a_denial_from_the_events() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let mut silent = failing_pod("p", IMAGE, "");
    silent.containers[0].waiting = waiting("ImagePullBackOff", &format!("Back-off pulling image \"{IMAGE}\""));
    let message = format!("Failed to pull image \"{IMAGE}\": 403 Forbidden");
    let event = KubeletEvent { reason: "Failed".into(), container: Some("c".into()), message };
    test_node.cluster.put_kubelet_event(&silent.pod, event);
    let mut controller = RunningController::start(&test_node);
    controller.send_pod(silent.clone()).await;
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    assert_eq!(reports(&test_node), [("p".to_owned(), PodReportKind::NotRecoverable)]);
    assert!(test_node.record_names().await.is_empty());
    controller.send_pod(PodView { containers: failing_pod("p", IMAGE, REFUSED).containers, ..silent }).await;
    assert_eq!(controller.nudged().await, "p");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_missing_sandbox_image_is_classified_by_its_event_and_recovered() {
    const PAUSE: &str = "r.test/pause:3.8";
    let test_node = TestNode::new();
    test_node.add_provider(1, PAUSE, Behaviour::Honest).await;
    let pod = pending_pod("p", IMAGE);
    let message = format!(
        "Failed to create pod sandbox: failed to get sandbox image \"{PAUSE}\": failed to pull image \"{PAUSE}\": {REFUSED}"
    );
    let event = KubeletEvent { reason: "FailedCreatePodSandBox".into(), container: None, message };
    test_node.cluster.put_kubelet_event(&pod.pod, event);
    let mut controller = RunningController::start(&test_node);
    controller.send_pod(pod).await;
    assert_eq!(controller.nudged().await, "p");
    assert!(test_node.record_names().await.contains(&PAUSE.to_owned()));
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn images_of_all_container_kinds_and_of_volumes_are_recovered() {
    let test_node = TestNode::new();
    let names = ["r.test/init:1", "r.test/main:1", "r.test/debug:1", "r.test/model:1"];
    for (number, name) in (1..).zip(names) {
        test_node.add_provider(number, name, Behaviour::Honest).await;
    }
    let container = |name: &str, kind, image: &str, failed_image: &str| ContainerView {
        name: name.into(),
        kind,
        waiting: waiting("ErrImagePull", &format!("failed to pull image \"{failed_image}\": {REFUSED}")),
        ..failing_pod("p", image, "").containers.remove(0)
    };
    let mut pod = failing_pod("p", IMAGE, "");
    let policy = pod.containers[0].pull_policy;
    pod.image_volumes = vec![ImageVolume { name: "model".into(), image: names[3].into(), pull_policy: policy }];
    pod.containers = vec![
        container("init", ContainerKind::Init, names[0], names[0]),
        container("main", ContainerKind::Ordinary, names[1], names[1]),
        container("absent", ContainerKind::Ordinary, "r.test/absent:1", "r.test/absent:1"),
        container("debug", ContainerKind::Ephemeral, names[2], names[2]),
        container("reads", ContainerKind::Ordinary, "r.test/reads:1", names[3]),
    ];
    let controller = RunningController::start(&test_node);
    controller.send_pod(pod).await;
    controller.settle().await;
    let records = test_node.record_names().await;
    assert!(names.iter().all(|name| records.contains(&(*name).to_owned())), "{records:?}");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_reports_the_providers_and_fetches_nothing() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let controller = RunningController::start_with_options(
        &test_node,
        RecoveryOptions { dry_run: true, ..RecoveryOptions::default() },
    );
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
    assert_eq!(reports(&test_node), [("p".to_owned(), PodReportKind::DryRun)]);
    let note = &test_node.cluster.reports()[0].1.note;
    assert!(note.contains("node-1"), "{note}");
    assert_eq!(test_node.fetcher.request_count(peer(1)), 0);
    assert!(test_node.record_names().await.is_empty());
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_stuck_pod_is_deleted_only_if_deletion_is_allowed_and_its_owner_recreates_it() {
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web".into(), uid: "o".into() };
    let node = Owner { api_version: "v1".into(), kind: "Node".into(), ..owner.clone() };
    for (owner, is_static, allowed, expected) in [
        (Some(owner.clone()), false, true, 1),
        (Some(owner.clone()), false, false, 0),
        (None, false, true, 0),
        (Some(node), true, true, 0),
    ] {
        let test_node = TestNode::new();
        test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
        let controller = RunningController::start_with_options(
            &test_node,
            RecoveryOptions { delete_pods: allowed, ..RecoveryOptions::default() },
        );
        controller.send_pod(PodView { owner, is_static, ..failing_pod("p", IMAGE, REFUSED) }).await;
        tokio::time::sleep(std::time::Duration::from_secs(1800)).await;
        assert_eq!(test_node.cluster.deleted().len(), expected);
        controller.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_that_only_an_always_pull_needs_is_reported_once() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let controller = RunningController::start(&test_node);
    for (reason, message) in [("ErrImagePull", REFUSED), ("ImagePullBackOff", "Back-off"), ("ErrImagePull", REFUSED)] {
        let mut always = failing_pod("p", IMAGE, message);
        always.containers[0].pull_policy = crate::model::PullPolicy::Always;
        always.containers[0].waiting = waiting(reason, message);
        controller.send_pod(always).await;
    }
    controller.settle().await;
    assert_eq!(reports(&test_node), [("p".to_owned(), PodReportKind::NotRecoverable)]);
    assert_eq!(test_node.fetcher.request_count(peer(1)), 0);
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_kubelet_that_fails_after_the_recovery_is_nudged_once_more() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let mut controller = RunningController::start(&test_node);
    controller.send_pod(failing_pod("other", "r.test/other:1", REFUSED)).await;
    controller.send_pod(failing_pod("another", "r.test/another:1", REFUSED)).await;
    controller.send_pod(pending_pod("queued", IMAGE)).await;
    assert_eq!(controller.nudged().await, "queued");
    controller.settle().await;
    for reason in ["ErrImagePull", "ImagePullBackOff"] {
        let mut pod = failing_pod("queued", IMAGE, REFUSED);
        pod.containers[0].waiting = waiting(reason, REFUSED);
        controller.send_pod(pod).await;
    }
    assert_eq!(controller.nudged().await, "queued");
    controller.settle().await;
    assert!(controller.nudges.try_recv().is_err(), "no third nudge");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_runs_or_lacks_another_image_is_never_deleted() {
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web".into(), uid: "o".into() };
    let owned = |mut pod: PodView, more: Option<ContainerView>| {
        pod.containers.extend(more);
        PodView { owner: Some(owner.clone()), ..pod }
    };
    let other_container = |kind, image: &str, waiting| ContainerView {
        name: "beside".into(),
        kind,
        waiting,
        ..failing_pod("p", image, "").containers.remove(0)
    };
    let pull_failure = waiting("ErrImagePull", REFUSED);
    for (case, more) in [
        ("an init container runs", other_container(ContainerKind::Init, "r.test/init:1", None)),
        ("an ephemeral container exists", other_container(ContainerKind::Ephemeral, IMAGE, pull_failure.clone())),
        ("the other image has no provider", other_container(ContainerKind::Ordinary, "r.test/absent:1", pull_failure)),
    ] {
        let test_node = TestNode::new();
        test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
        let controller = RunningController::start_with_options(
            &test_node,
            RecoveryOptions { delete_pods: true, ..RecoveryOptions::default() },
        );
        controller.send_pod(owned(failing_pod("p", IMAGE, REFUSED), Some(more))).await;
        tokio::time::sleep(std::time::Duration::from_secs(600)).await;
        assert!(!test_node.record_names().await.is_empty());
        assert!(test_node.cluster.deleted().is_empty(), "{case}");
        controller.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_denial_applies_to_every_container_of_the_pod_with_that_image() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let controller = RunningController::start(&test_node);
    controller.send_pod(failing_pod("outage", "r.test/other:1", REFUSED)).await;
    controller.settle().await;
    let mut pod = failing_pod("p", IMAGE, "401 Unauthorized");
    let later = ContainerView { name: "later".into(), ..pending_pod("p", IMAGE).containers.remove(0) };
    pod.containers.push(later);
    controller.send_pod(pod).await;
    controller.settle().await;
    assert!(test_node.record_names().await.is_empty());
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_broken_image_without_a_provider_loses_its_record_only_if_its_registry_answers() {
    for answers in [true, false] {
        let test_node = TestNode::new();
        let image = put_image(&*test_node.store, &[IMAGE.to_owned()], &[3000, 200], 1).await.unwrap();
        test_node.store.remove_blob(image.blobs[1].digest);
        if answers {
            test_node.registry.put_registry("r.test");
        }
        let mut pod = failing_pod("p", IMAGE, "");
        pod.containers[0].waiting =
            waiting("CreateContainerError", "failed to unpack: content digest sha256:00: not found");
        let controller = RunningController::start(&test_node);
        controller.send_pod(pod).await;
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        assert!(!test_node.record_names().await.is_empty(), "a provider may return within two minutes");
        tokio::time::sleep(std::time::Duration::from_secs(600)).await;
        assert_eq!(test_node.record_names().await.is_empty(), answers);
        assert_eq!(reports(&test_node).iter().any(|(_, kind)| *kind == PodReportKind::RecordRemoved), answers);
        controller.stop().await;
    }
}
