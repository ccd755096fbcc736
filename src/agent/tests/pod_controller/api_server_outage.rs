//! The pod controller during an outage of the API server.

use super::*;
use crate::agent::pods::pod_notifier::PodNotifier;

#[tokio::test(start_paused = true)]
async fn a_pod_with_an_unreadable_namespace_is_reconciled_later() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.cluster.set_unavailable(true);
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    assert!(node.fetcher.served().is_empty(), "no recovery before the opt-in is known");
    node.cluster.set_unavailable(false);
    assert_eq!(controller.nudged().await, "p");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn frequent_events_do_not_delay_the_retry_of_an_undecided_pod() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.cluster.set_unavailable(true);
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    node.cluster.set_unavailable(false);
    for _ in 0..10 {
        node.add_provider(2, "r.test/shop/other:v1", Behaviour::Honest).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(controller.nudges.try_recv().unwrap().name, "p");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_nudge_is_retried_while_the_api_server_is_unavailable() {
    let node = TestNode::new();
    let notifier = PodNotifier::new(Arc::new(node.cluster.clone()), node.inventory.clone(), node.metrics.clone());
    let mut nudges = node.cluster.nudges();
    let pod = failing_pod("p", IMAGE, REFUSED).pod;
    node.cluster.set_unavailable(true);
    tokio::join!(notifier.nudge(&pod), async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        node.cluster.set_unavailable(false);
    });
    assert_eq!(nudges.try_recv().unwrap(), pod);
    assert!(node.has_metric(r#"lighterman_nudges_total{result="ok"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn an_event_is_retried_while_the_api_server_is_unavailable() {
    let node = TestNode::new();
    let notifier = PodNotifier::new(Arc::new(node.cluster.clone()), node.inventory.clone(), node.metrics.clone());
    let pod = failing_pod("p", IMAGE, REFUSED).pod;
    node.cluster.set_unavailable(true);
    tokio::join!(notifier.report(&pod, PodReportKind::Recovered, "recovered".into()), async {
        tokio::time::sleep(Duration::from_secs(60)).await;
        node.cluster.set_unavailable(false);
    });
    assert_eq!(reports(&node), [("p".to_owned(), PodReportKind::Recovered)]);
}

#[tokio::test(start_paused = true)]
async fn the_controller_stops_without_waiting_for_the_api_server() {
    let node = TestNode::new();
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, "403 Forbidden")).await;
    node.cluster.set_unavailable(true);
    controller.send_pod(failing_pod("q", IMAGE, REFUSED)).await;
    controller.settle().await;
    controller.stop().await;
}
