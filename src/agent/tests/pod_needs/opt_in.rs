//! Opt-ins of pods and owners, and the kill switch.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_owner_can_opt_in_for_its_pods() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web".into(), uid: "o".into() };
    let opted_in = [("lighterman.dev/recover".to_owned(), "true".to_owned())].into();
    test_node.cluster.put_owners("shop", &owner, vec![Default::default(), opted_in]);
    let owned = PodView { annotations: Default::default(), owner: Some(owner), ..failing_pod("p", IMAGE, REFUSED) };
    let mut controller = RunningController::start(&test_node);
    let ignored = [("lighterman.dev/ignore".to_owned(), "true".to_owned())].into();
    controller.send_pod(PodView { annotations: ignored, ..owned.clone() }).await;
    controller.settle().await;
    assert!(test_node.record_names().await.is_empty(), "the pod's own annotation wins");
    controller.send_pod(owned).await;
    assert_eq!(controller.nudged().await, "p");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_invalid_annotation_is_counted_once_and_permits_nothing() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let invalid = [("lighterman.dev/recover".to_owned(), "yes".to_owned())].into();
    let controller = RunningController::start(&test_node);
    for name in ["p", "p", "q"] {
        controller.send_pod(PodView { annotations: Clone::clone(&invalid), ..failing_pod(name, IMAGE, REFUSED) }).await;
    }
    controller.settle().await;
    assert!(test_node.has_metric("lighterman_invalid_annotations_total 1"));
    assert!(test_node.record_names().await.is_empty());
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_new_policy_applies_at_once_to_waiting_pods() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    test_node.change_policy(|policy| policy.opt_in.kill_switch = true);
    let mut controller = RunningController::start(&test_node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    assert!(test_node.record_names().await.is_empty());
    test_node.change_policy(|policy| policy.opt_in.kill_switch = false);
    assert_eq!(controller.nudged().await, "p");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_kill_switch_cancels_running_recoveries() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let controller = RunningController::start(&test_node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    assert!(test_node.has_metric("lighterman_recoveries_running 1"));
    test_node.change_policy(|policy| policy.opt_in.kill_switch = true);
    controller.settle().await;
    assert!(test_node.has_metric("lighterman_recoveries_running 0"));
    assert_eq!(test_node.store.pins(), 0);
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_kill_switch_cancels_recoveries_without_an_api_server() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let controller = RunningController::start(&test_node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    test_node.cluster.set_unavailable(true);
    test_node.change_policy(|policy| policy.opt_in.kill_switch = true);
    controller.settle().await;
    assert!(test_node.has_metric("lighterman_recoveries_running 0"));
    controller.stop().await;
}
