//! Ends of recoveries: cancellations, and the release of Leases.

use super::*;
use crate::decide::claim::zone_claim;
use crate::ports::Claims;

#[tokio::test(start_paused = true)]
async fn a_deleted_pod_cancels_its_recovery() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let controller = RunningController::start(&node);
    let pod = failing_pod("p", IMAGE, REFUSED);
    controller.send_pod(pod.clone()).await;
    controller.settle().await;
    assert!(node.has_metric("lighterman_recoveries_running 1"));
    controller.pods.send(PodEvent::Deleted(pod.pod)).await.unwrap();
    controller.settle().await;
    assert!(node.has_metric("lighterman_recoveries_running 0"));
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="abandoned"} 1"#));
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_recreated_during_the_cancellation_gets_one_new_recovery() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let mut controller = RunningController::start(&node);
    let old = failing_pod("old", IMAGE, REFUSED);
    controller.send_pod(old.clone()).await;
    controller.settle().await;
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    // Both events are in the channel before the controller runs again.
    controller.pods.try_send(PodEvent::Deleted(old.pod)).unwrap();
    controller.pods.try_send(PodEvent::Applied(Box::new(failing_pod("new", IMAGE, REFUSED)))).unwrap();
    assert_eq!(controller.nudged().await, "new");
    controller.settle().await;
    assert!(node.has_metric("lighterman_recoveries_running 0"));
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="abandoned"} 1"#));
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
    assert_eq!(reports(&node), [("new".to_owned(), PodReportKind::Recovered)]);
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pods_missing_from_a_new_list_are_removed() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    controller.pods.send(PodEvent::Synced(Vec::new())).await.unwrap();
    controller.settle().await;
    assert!(node.has_metric("lighterman_recoveries_running 0"));
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_later_denial_cancels_the_recovery() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    controller.send_pod(failing_pod("p", IMAGE, "403 Forbidden")).await;
    controller.settle().await;
    assert!(node.has_metric("lighterman_recoveries_running 0"));
    assert_eq!(reports(&node), [("p".to_owned(), PodReportKind::NotRecoverable)]);
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_recovery_of_a_terminating_pod_is_cancelled() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    controller.send_pod(PodView { is_ending: true, ..failing_pod("p", IMAGE, REFUSED) }).await;
    controller.settle().await;
    assert!(node.has_metric("lighterman_recoveries_running 0"));
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_controller_cancels_running_recoveries_when_it_stops() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    controller.settle().await;
    controller.stop().await;
    assert!(node.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_a_recovery_is_released_at_its_end() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let controller = RunningController::start(&node);
    let pod = failing_pod("p", IMAGE, REFUSED);
    controller.send_pod(pod.clone()).await;
    controller.settle().await;
    let claims = node.cluster.claims_of("other-node".parse().unwrap());
    let lease = claims.read(image.target.digest).await.unwrap().expect("the recovery holds a Lease");
    assert_eq!(lease.holder.as_deref(), Some("here"));
    controller.pods.send(PodEvent::Deleted(pod.pod)).await.unwrap();
    controller.settle().await;
    assert_eq!(claims.read(image.target.digest).await.unwrap(), None);
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_in_a_recovery_releases_its_lease() {
    for zone in [None, Some("a".parse::<Zone>().unwrap())] {
        let node = TestNode { zone: zone.clone(), ..TestNode::new() };
        let store = Arc::new(MemoryStore::new());
        let image = put_image(&*store, &[IMAGE.into()], &[3000, 200, 10], 7).await.unwrap();
        // The peer sends the manifest, and hangs before the first piece.
        node.announce_store_in_zone(Some("b".parse().unwrap()), 1, store, Behaviour::HangsAfter(0)).await;
        let claim = zone.map_or(image.target.digest, |zone| zone_claim(image.target.digest, &zone));
        let controller = RunningController::start(&node);
        controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        let claims = node.cluster.claims_of("other-node".parse().unwrap());
        assert!(claims.read(claim).await.unwrap().is_some(), "the recovery holds a Lease");
        controller.stop().await;
        assert_eq!(claims.read(claim).await.unwrap(), None);
    }
}

#[tokio::test(start_paused = true)]
async fn claims_are_released_when_the_recovery_has_ended() {
    // The provider outranks this node for about half of the keys, so some of the eight recoveries
    // write a Lease. No recovery waits for its claim, so a busy provider makes the recovery last
    // until the claim is written.
    let mut written = 0;
    for number in 1..=8 {
        let node = TestNode::new();
        node.add_provider(number, IMAGE, Behaviour::BusyFor(2)).await;
        let mut controller = RunningController::start(&node);
        controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
        controller.nudged().await;
        controller.settle().await;
        let (writes, held) = node.cluster.leases();
        written += writes;
        assert!(held.is_empty(), "{held:?}");
        controller.stop().await;
    }
    assert!(written > 0);
}
