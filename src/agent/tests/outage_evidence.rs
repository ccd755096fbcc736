//! Evidence of a registry's outage, and the recoveries that an outage permits.

use std::collections::BTreeMap;

use super::pod_controller::{REFUSED, RunningController, failing_pod, reports};
use super::pod_needs::{pending_pod, waiting};
use super::*;
use crate::model::{KubeletEvent, PodReportKind};
use crate::ports::{ImageRecords, RegistryError};

/// Messages of the kubelet that are no evidence of an outage: faults of the node, and wrong bytes
/// from a registry.
const NO_OUTAGE: [&str; 4] = [
    "failed to pull and unpack image \"r.test/other:1\": failed to extract layer sha256:44: unexpected EOF",
    "rpc error: code = Unavailable desc = error reading from server: EOF",
    "failed to pull and unpack image \"r.test/other:1\": failed commit on ref \"layer-sha256:44\": unexpected commit digest sha256:45, \
     expected sha256:44: failed precondition",
    "pull QPS exceeded",
];

#[tokio::test(start_paused = true)]
async fn a_fault_of_this_node_is_no_outage_of_a_registry_and_decides_no_tag() {
    for message in NO_OUTAGE {
        let node = TestNode::new();
        node.add_provider(1, IMAGE, Behaviour::Honest).await;
        let controller = RunningController::start(&node);
        controller.send_pod(failing_pod("one", "r.test/other:1", message)).await;
        controller.send_pod(failing_pod("two", "r.test/other:2", message)).await;
        controller.send_pod(pending_pod("early", IMAGE)).await;
        controller.settle().await;
        assert!(node.record_names().await.is_empty(), "{message}");
        assert!(controller.outages.borrow().is_empty(), "nothing is announced: {message}");
        controller.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_pull_through_containerd_ends_the_outage_and_a_recovery_does_not() {
    outage_ends_with(|mut records| {
        records.insert("r.test/pulled:1".to_owned(), Digest::of(b"pulled"));
        records
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_pull_that_moves_a_recovered_tag_ends_the_outage() {
    outage_ends_with(|mut records| {
        records.insert("r.test/other:1".to_owned(), Digest::of(b"moved"));
        records
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_tag_is_not_recovered_early_after_a_mirror_answered_a_pull() {
    let absent =
        "failed to pull and unpack image \"r.test/other:2\": failed to resolve image: r.test/other:2: not found";
    for (is_answered, is_early) in [(false, true), (true, false)] {
        let node = TestNode::new();
        node.add_provider(1, IMAGE, Behaviour::Honest).await;
        let controller = RunningController::start(&node);
        controller.image_records_in.send_replace(Some(Arc::default()));
        controller.send_pod(failing_pod("one", "r.test/other:1", REFUSED)).await;
        controller.send_pod(failing_pod("two", "r.test/other:2", REFUSED)).await;
        controller.settle().await;
        if is_answered {
            controller.send_pod(failing_pod("two", "r.test/other:2", absent)).await;
            controller.settle().await;
        }
        controller.send_pod(pending_pod("early", IMAGE)).await;
        controller.settle().await;
        assert_eq!(node.record_names().await.contains(&IMAGE.to_owned()), is_early);
        assert_eq!(controller.outages.borrow().len(), 1, "other hosts of the registry may still be down");
        controller.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_pull_is_as_old_as_the_status_even_when_the_api_server_answers_late() {
    for (delay, is_early) in [(1, true), (20, false)] {
        let node = TestNode::new();
        node.add_provider(1, IMAGE, Behaviour::Honest).await;
        let controller = RunningController::start(&node);
        controller.image_records_in.send_replace(Some(Arc::default()));
        node.cluster.delay_namespaces(std::time::Duration::from_secs(delay));
        controller.send_pod(failing_pod("one", "r.test/other:1", REFUSED)).await;
        controller.send_pod(failing_pod("two", "r.test/other:2", REFUSED)).await;
        tokio::time::sleep(std::time::Duration::from_secs(delay)).await;
        node.cluster.delay_namespaces(std::time::Duration::ZERO);
        controller.settle().await;
        controller.send_pod(pending_pod("early", IMAGE)).await;
        controller.settle().await;
        assert_eq!(node.record_names().await.contains(&IMAGE.to_owned()), is_early, "{delay} s");
        controller.stop().await;
    }
}

/// Recovers an image in an outage, which does not end the outage. Then `pulled` changes the records
/// of containerd, which ends the outage.
async fn outage_ends_with(pulled: impl FnOnce(BTreeMap<String, Digest>) -> BTreeMap<String, Digest>) {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.add_provider(2, "r.test/other:1", Behaviour::Honest).await;
    let controller = RunningController::start(&node);
    controller.settle().await;
    controller.image_records_in.send_replace(Some(Arc::default()));
    for (pod, image) in [("one", "r.test/other:1"), ("two", "r.test/other:2")] {
        controller.send_pod(failing_pod(pod, image, REFUSED)).await;
    }
    controller.settle().await;
    let records = node.store.images().await.unwrap();
    let recovered: BTreeMap<_, _> = records.into_iter().map(|record| (record.name, record.target.digest)).collect();
    assert!(recovered.contains_key("r.test/other:1"));
    controller.image_records_in.send_replace(Some(Arc::new(recovered.clone())));
    controller.settle().await;
    assert_eq!(controller.outages.borrow().len(), 1, "the agent itself wrote these records");
    controller.image_records_in.send_replace(Some(Arc::new(pulled(recovered))));
    controller.settle().await;
    assert!(controller.outages.borrow().is_empty(), "a pull succeeded");
    controller.send_pod(pending_pod("early", IMAGE)).await;
    controller.settle().await;
    assert!(!node.record_names().await.contains(&IMAGE.to_owned()), "the kubelet tries first");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_unclassified_kubelet_message_is_reported_once_with_its_text() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let controller = RunningController::start(&node);
    for reason in ["ErrImagePull", "ImagePullBackOff", "ErrImagePull"] {
        let mut pod = failing_pod("p", IMAGE, "");
        pod.containers[0].waiting = waiting(reason, "the moon is in the wrong house");
        controller.send_pod(pod).await;
    }
    controller.settle().await;
    let reports = node.cluster.reports();
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert_eq!(reports[0].1.kind, PodReportKind::Unclassified);
    assert!(reports[0].1.note.contains("the moon is in the wrong house"), "{}", reports[0].1.note);
    assert!(node.record_names().await.is_empty());
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_event_of_a_tag_names_the_digest_the_outage_and_that_the_registry_was_not_asked() {
    let node = TestNode::new();
    let digest = node.add_provider(1, IMAGE, Behaviour::Honest).await.target.digest;
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    assert_eq!(controller.nudged().await, "p");
    controller.settle().await;
    let note = node.cluster.reports()[0].1.note.clone();
    for text in [digest.to_string().as_str(), "its registry was not asked", "has failed since "] {
        assert!(note.contains(text), "{text}: {note}");
    }
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_gets_only_images_of_the_repositories_that_its_namespace_lists() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.add_provider(2, "r.test/bank/vault:1", Behaviour::Honest).await;
    let listed = [("lighterman.dev/allow", "true"), ("lighterman.dev/repositories", "r.test/shop/*")];
    node.cluster.put_namespace("shop", &listed);
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("thief", "r.test/bank/vault:1", REFUSED)).await;
    controller.send_pod(failing_pod("honest", IMAGE, REFUSED)).await;
    controller.settle().await;
    let names = node.record_names().await;
    assert!(names.contains(&IMAGE.to_owned()) && !names.iter().any(|name| name.contains("vault")), "{names:?}");
    assert!(reports(&node).contains(&("thief".to_owned(), PodReportKind::NotRecoverable)));
    controller.stop().await;
}

/// An Event of the kubelet about the pod's only container.
fn kubelet_event(message: String) -> KubeletEvent {
    KubeletEvent { reason: "Pulling".into(), container: Some("c".into()), message }
}

#[tokio::test(start_paused = true)]
async fn a_stalled_pull_is_reported_once_and_recovers_an_image_by_digest() {
    for (is_digest, expected) in [(true, true), (false, false)] {
        let node = TestNode::new();
        let digest = node.add_provider(1, IMAGE, Behaviour::Honest).await.target.digest;
        let image = if is_digest { format!("r.test/shop/checkout@{digest}") } else { IMAGE.to_owned() };
        let pod = pending_pod("p", &image);
        node.cluster.put_kubelet_event(&pod.pod, kubelet_event(format!("Pulling image \"{image}\"")));
        let controller = RunningController::start(&node);
        controller.send_pod(pod).await;
        tokio::time::sleep(std::time::Duration::from_secs(110)).await;
        assert!(node.record_names().await.is_empty() && reports(&node).is_empty(), "a pull may take a while");
        tokio::time::sleep(std::time::Duration::from_secs(600)).await;
        assert_eq!(!node.record_names().await.is_empty(), expected, "{image}");
        let stalled = reports(&node).iter().filter(|(_, kind)| *kind == PodReportKind::Stalled).count();
        assert_eq!(stalled, 1, "{image}: {:?}", reports(&node));
        controller.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_waits_after_its_pull_gets_no_event_of_a_stalled_pull() {
    let node = TestNode::new();
    let digest = node.add_provider(1, IMAGE, Behaviour::Honest).await.target.digest;
    let image = format!("r.test/shop/checkout@{digest}");
    let pod = pending_pod("p", &image);
    node.cluster.put_kubelet_event(&pod.pod, kubelet_event(format!("Pulling image \"{image}\"")));
    node.cluster.put_kubelet_event(&pod.pod, kubelet_event(format!("Successfully pulled image \"{image}\" in 2s")));
    let controller = RunningController::start(&node);
    controller.send_pod(pod).await;
    tokio::time::sleep(std::time::Duration::from_secs(600)).await;
    assert!(node.record_names().await.is_empty() && reports(&node).is_empty());
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_kubelet_that_verifies_credentials_is_reported_once_and_not_nudged_again() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    assert_eq!(controller.nudged().await, "p");
    // The image is on the node, and the kubelet continues to pull.
    for reason in ["ImagePullBackOff", "ErrImagePull"].repeat(10) {
        tokio::time::sleep(std::time::Duration::from_secs(30)).await;
        let mut pod = failing_pod("p", IMAGE, REFUSED);
        pod.containers[0].waiting = waiting(reason, REFUSED);
        controller.send_pod(pod).await;
    }
    let kinds: Vec<_> = reports(&node).into_iter().map(|(_, kind)| kind).collect();
    assert_eq!(kinds, [PodReportKind::Recovered, PodReportKind::NotRecoverable]);
    let note = node.cluster.reports()[1].1.note.clone();
    assert!(note.contains("verifies the pod's credentials"), "{note}");
    assert!(controller.nudges.try_recv().is_err(), "another nudge would not help");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_registry_of_local_images_is_probed_before_its_outage() {
    for has_images in [true, false] {
        let node = TestNode::new();
        node.add_provider(1, IMAGE, Behaviour::Honest).await;
        node.registry.put_registry("r.test");
        let controller = RunningController::start(&node);
        let names = if has_images { vec!["r.test/here:1".to_owned()] } else { Vec::new() };
        let records = names.into_iter().map(|name| (name, Digest::of(b"here"))).collect();
        controller.image_records_in.send_replace(Some(Arc::new(records)));
        controller.settle().await;
        let down = RegistryError::Down { registry: "r.test".into(), kind: crate::model::OutageKind::TimedOut };
        node.registry.set_failure("r.test", Some(down));
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        // A pod without opt-in is evidence about registries that have answered this agent.
        let not_opted_in = failing_pod("not-opted-in", "r.test/other:1", REFUSED);
        controller.send_pod(crate::model::PodView { annotations: Default::default(), ..not_opted_in }).await;
        controller.send_pod(pending_pod("early", IMAGE)).await;
        tokio::time::sleep(std::time::Duration::from_secs(15)).await;
        assert_eq!(node.record_names().await.contains(&IMAGE.to_owned()), has_images);
        controller.stop().await;
    }
}

const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);

#[tokio::test(start_paused = true)]
async fn a_registry_that_never_answered_is_probed_every_ten_minutes() {
    let node = TestNode::new();
    node.registry.put_registry("r.test");
    let down = RegistryError::Down { registry: "r.test".into(), kind: crate::model::OutageKind::TimedOut };
    node.registry.set_failure("r.test", Some(down));
    let controller = RunningController::start(&node);
    controller.image_records_in.send_replace(Some(Arc::new([(IMAGE.to_owned(), Digest::of(b"here"))].into())));
    tokio::time::sleep(HOUR - std::time::Duration::from_secs(10)).await;
    assert_eq!(node.registry.pings("r.test"), 6);
    assert!(controller.outages.borrow().is_empty(), "a registry that never answered is not down");
    node.registry.set_failure("r.test", None);
    tokio::time::sleep(2 * HOUR).await;
    assert_eq!(node.registry.pings("r.test"), 7, "one answer is enough");
}
