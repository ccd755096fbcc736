//! Early recoveries: outages of registries, before a pull of the pod has failed.

use super::*;
use crate::decide::outage::RegistryOutages;
use crate::model::{Outage, OutageKind};
use crate::ports::RegistryError;

#[tokio::test(start_paused = true)]
async fn a_new_pod_gets_its_image_early_during_an_outage() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let mut controller = RunningController::start(&test_node);
    controller.send_pod(pending_pod("early", IMAGE)).await;
    controller.settle().await;
    assert!(test_node.record_names().await.is_empty(), "no evidence of an outage");
    controller
        .send_pod(PodView { annotations: Default::default(), ..failing_pod("not-opted-in", "r.test/other:1", REFUSED) })
        .await;
    controller.settle().await;
    assert!(controller.outages.borrow().is_empty(), "a pod without opt-in may name any registry");
    controller.send_pod(failing_pod("other", "r.test/other:1", REFUSED)).await;
    controller.settle().await;
    assert!(test_node.record_names().await.is_empty(), "one failed pull decides no tag");
    controller.send_pod(failing_pod("another", "r.test/another:1", REFUSED)).await;
    assert_eq!(controller.nudged().await, "early");
    assert!(test_node.record_names().await.contains(&IMAGE.to_owned()));
    let outages = controller.outages.borrow().clone();
    assert!(
        matches!(&outages[..], [outage] if outage.registry == "r.test" && outage.kind == OutageKind::Refused),
        "{outages:?}"
    );
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_peers_outage_suffices_for_a_digest_unless_the_registry_answers_this_node() {
    for (answers_here, is_digest, expected) in [(false, true, true), (true, true, false), (false, false, false)] {
        let test_node = TestNode::new();
        let digest = test_node.add_provider(1, IMAGE, Behaviour::Honest).await.target.digest;
        let image = if is_digest { format!("r.test/shop/checkout@{digest}") } else { IMAGE.to_owned() };
        if answers_here {
            test_node.registry.put_registry("r.test");
        }
        let controller = RunningController::start(&test_node);
        let outage = Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: 5 };
        test_node
            .inventory
            .apply(MeshEvent::Changed(peer(1), vec![InventoryChange::Added(InventoryItem::Outage(outage))]));
        // Time for a probe of the registry.
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        controller.send_pod(pending_pod("early", &image)).await;
        controller.settle().await;
        let is_recorded = !test_node.record_names().await.is_empty();
        assert_eq!(is_recorded, expected, "answers here: {answers_here}, digest: {is_digest}");
        assert!(controller.outages.borrow().is_empty(), "outages of peers are not announced as observed");
        controller.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_outage_of_a_single_peer_does_not_count_before_the_registry_is_probed() {
    for (peers, expected) in [(1, false), (2, true)] {
        let test_node = TestNode::new();
        test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
        test_node.add_provider(2, IMAGE, Behaviour::Honest).await;
        // The registry exists, and no probe has ended.
        test_node.registry.put_registry("r.test");
        for number in 1..=peers {
            let outage = Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: number.into() };
            test_node
                .inventory
                .apply(MeshEvent::Changed(peer(number), vec![InventoryChange::Added(InventoryItem::Outage(outage))]));
        }
        let reports = test_node.inventory.count_outage_reports("r.test");
        let is_down = RegistryOutages::default().counts_as_down("r.test", reports, std::time::Instant::now());
        assert_eq!(is_down, expected, "{peers}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_stops_answering_is_down() {
    let test_node = TestNode::new();
    let digest = test_node.add_provider(1, IMAGE, Behaviour::Honest).await.target.digest;
    test_node.registry.put_registry("r.test");
    let controller = RunningController::start(&test_node);
    controller.send_pod(pending_pod("first", "r.test/other:1")).await;
    controller.settle().await;
    let down = RegistryError::Down { registry: "r.test".into(), kind: OutageKind::TimedOut };
    test_node.registry.set_failure("r.test", Some(down));
    tokio::time::sleep(std::time::Duration::from_secs(40)).await;
    controller.send_pod(pending_pod("by tag", IMAGE)).await;
    controller.settle().await;
    assert!(test_node.record_names().await.is_empty(), "no pull has failed, so the kubelet tries the tag first");
    controller.send_pod(pending_pod("by digest", &format!("r.test/shop/checkout@{digest}"))).await;
    controller.settle().await;
    assert_eq!(test_node.record_names().await.len(), 1);
    controller.send_pod(failing_pod("failed", "r.test/other:1", REFUSED)).await;
    controller.settle().await;
    assert!(test_node.record_names().await.contains(&IMAGE.to_owned()), "a failed pull and a failed probe");
    assert_eq!(controller.outages.borrow().len(), 1);
    test_node.registry.set_failure("r.test", None);
    tokio::time::sleep(std::time::Duration::from_secs(30)).await;
    assert!(controller.outages.borrow().is_empty(), "the outage is over and withdrawn");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_local_image_and_an_always_pulled_image_are_not_recovered_early() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let controller = RunningController::start(&test_node);
    controller.send_pod(failing_pod("other", "r.test/other:1", REFUSED)).await;
    let mut always = pending_pod("always", IMAGE);
    always.containers[0].pull_policy = crate::model::PullPolicy::Always;
    controller.send_pod(always).await;
    controller.settle().await;
    assert!(test_node.record_names().await.is_empty());
    assert!(reports(&test_node).iter().all(|(pod, _)| pod == "other"), "no pull failed, so no Event is written");
    controller.image_records_in.send_replace(Some(Arc::new([(IMAGE.to_owned(), Digest::of(b"index"))].into())));
    controller.send_pod(pending_pod("here", IMAGE)).await;
    controller.settle().await;
    assert!(test_node.record_names().await.is_empty(), "the kubelet finds the recorded image");
    controller.stop().await;
}
