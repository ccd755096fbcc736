//! Notifications to a webhook: the nodes of a cluster send one for each image.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::pods::notifications::{NotificationQueue, NotificationSender, PendingNotification};
use crate::model::{PodRef, RecoveredImage};
use crate::ports::NotifyError;
use crate::testing::MemoryNotifier;

/// One node's notification task. All nodes of a test share the receiver.
struct NotifyingNode {
    queue: NotificationQueue,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl NotifyingNode {
    fn start(test_node: &TestNode, name: &str, receiver: &Arc<MemoryNotifier>) -> Self {
        let node: NodeName = name.parse().unwrap();
        let claims = Arc::new(test_node.cluster.claims_of(node.clone()));
        let (inventory, metrics) = (test_node.inventory.clone(), test_node.metrics.clone());
        let (sender, queue) = NotificationSender::new(Arc::clone(receiver) as _, claims, inventory, node, metrics);
        let stop = CancellationToken::new();
        let running = tokio::spawn(sender.run(stop.clone()));
        Self { queue, stop, running }
    }

    fn notify_of(&self, image: &str) {
        let reference: Reference = image.parse().unwrap();
        let (digest, took) = (Digest::of(image.as_bytes()), Duration::from_millis(1500));
        let providers = [(peer(1), 7)].into();
        let recovered = RecoveredImage { digest, bytes: 7, fetched: 2, present: 0, providers, took, tag_note: None };
        let pod = PodRef { k8s_namespace: "shop".into(), name: "p".into(), uid: "u".into() };
        self.queue.send(PendingNotification::recovered(&reference, &recovered, &[pod], "recovered from peers"));
    }

    async fn stop(self) {
        self.stop.cancel();
        self.running.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn nodes_that_recover_the_same_image_send_one_notification() {
    let (test_node, receiver) = (TestNode::new(), Arc::new(MemoryNotifier::default()));
    let nodes = ["a", "b", "c"].map(|name| NotifyingNode::start(&test_node, name, &receiver));
    for node in &nodes {
        node.notify_of(IMAGE);
        node.notify_of("r.test/other:1");
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let sent = receiver.sent();
    assert_eq!(sent.len(), 2, "{sent:?}");
    let message = sent.iter().find(|message| message.image == IMAGE).unwrap();
    assert_eq!((message.reason, message.milliseconds, message.bytes), ("ImageRecovered", 1500, 7));
    assert_eq!((&message.pods[..], message.note.as_str()), (&["shop/p".to_owned()][..], "recovered from peers"));
    assert!(test_node.has_metric(r#"lighterman_webhook_messages_total{result="left_to_another"} 4"#));
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn notifications_sent_without_an_api_server_have_the_same_id() {
    let (test_node, receiver) = (TestNode::new(), Arc::new(MemoryNotifier::default()));
    test_node.cluster.set_unavailable(true);
    let nodes = ["a", "b"].map(|name| NotifyingNode::start(&test_node, name, &receiver));
    nodes.iter().for_each(|node| node.notify_of(IMAGE));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let ids: Vec<_> = receiver.sent().into_iter().map(|message| message.id).collect();
    assert!(ids.len() == 2 && ids[0] == ids[1], "{ids:?}");
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_unavailable_receiver_is_retried_and_a_rejection_is_not() {
    let (test_node, receiver) = (TestNode::new(), Arc::new(MemoryNotifier::default()));
    let node = NotifyingNode::start(&test_node, "a", &receiver);
    receiver.set_failure(Some(NotifyError::Unavailable("503".into())));
    node.notify_of(IMAGE);
    tokio::time::sleep(Duration::from_secs(3)).await;
    receiver.set_failure(None);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(receiver.sent().len(), 1);
    receiver.set_failure(Some(NotifyError::Refused("400".into())));
    let before = receiver.attempts();
    node.notify_of("r.test/other:1");
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(receiver.attempts() - before, 1);
    assert!(test_node.has_metric(r#"lighterman_webhook_messages_total{result="failed"} 1"#));
    node.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_queue_is_bounded_while_the_receiver_is_unavailable() {
    let (test_node, receiver) = (TestNode::new(), Arc::new(MemoryNotifier::default()));
    receiver.set_failure(Some(NotifyError::Unavailable("503".into())));
    let node = NotifyingNode::start(&test_node, "a", &receiver);
    (0..100).for_each(|number| node.notify_of(&format!("r.test/image-{number}:1")));
    assert!(
        test_node.has_metric(r#"lighterman_webhook_messages_total{result="dropped"} 36"#),
        "64 of 100 notifications wait"
    );
    node.stop().await;
}

/// The number of Leases. Every Lease here is a claim on a notification.
fn leases(test_node: &TestNode) -> usize {
    test_node.cluster.leases().1.len()
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_releases_the_claim_on_an_unsent_notification() {
    let (test_node, receiver) = (TestNode::new(), Arc::new(MemoryNotifier::default()));
    receiver.set_failure(Some(NotifyError::Unavailable("503".into())));
    let stopped = NotifyingNode::start(&test_node, "a", &receiver);
    stopped.notify_of(IMAGE);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(leases(&test_node), 1);
    stopped.stop().await;
    assert_eq!(leases(&test_node), 0);
    receiver.set_failure(None);
    let other = NotifyingNode::start(&test_node, "b", &receiver);
    other.notify_of(IMAGE);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(receiver.sent().len(), 1);
    other.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_a_sent_notification_is_released_after_an_hour() {
    let (test_node, receiver) = (TestNode::new(), Arc::new(MemoryNotifier::default()));
    let [first, second] = ["a", "b"].map(|name| NotifyingNode::start(&test_node, name, &receiver));
    first.notify_of(IMAGE);
    tokio::time::sleep(Duration::from_secs(3590)).await;
    second.notify_of(IMAGE);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((receiver.sent().len(), leases(&test_node)), (1, 1));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(leases(&test_node), 0);
    // An agent that stops within the hour keeps the Lease. Without the Lease, another node would
    // repeat the notification.
    first.notify_of(IMAGE);
    tokio::time::sleep(Duration::from_secs(5)).await;
    first.stop().await;
    assert_eq!((receiver.sent().len(), leases(&test_node)), (2, 1));
    second.stop().await;
}
