//! What people outside the cluster are told, and how often.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::notices::{Messenger, Notice, Notices};
use crate::agent::recover::Recovered;
use crate::model::PodRef;
use crate::ports::NotifyError;
use crate::testing::MemoryNotifier;

/// One node's messages, to a receiver that nodes share.
struct Node {
    notices: Notices,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Node {
    fn start(harbour: &Harbour, name: &str, receiver: &Arc<MemoryNotifier>) -> Self {
        let node: NodeName = name.parse().unwrap();
        let claims = Arc::new(harbour.cluster.claims_of(node.clone()));
        let (holders, metrics) = (harbour.holders.clone(), harbour.metrics.clone());
        let (messenger, notices) = Messenger::new(Arc::clone(receiver) as _, claims, holders, node, metrics);
        let stop = CancellationToken::new();
        let running = tokio::spawn(messenger.run(stop.clone()));
        Self { notices, stop, running }
    }

    fn tells(&self, image: &str) {
        let reference: Reference = image.parse().unwrap();
        let (root, took) = (Digest::of(image.as_bytes()), Duration::from_millis(1500));
        let providers = [(peer(1), 7)].into();
        let recovered = Recovered { root, bytes: 7, fetched: 2, there: 0, providers, took, settled: None };
        let pod = PodRef { k8s_namespace: "shop".into(), name: "p".into(), uid: "u".into() };
        self.notices.send(Notice::recovered(&reference, &recovered, &[pod], "it came"));
    }

    async fn stop(self) {
        self.stop.cancel();
        self.running.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn nodes_that_recover_the_same_image_send_one_message() {
    let (harbour, receiver) = (Harbour::new(), Arc::new(MemoryNotifier::default()));
    let nodes = ["a", "b", "c"].map(|name| Node::start(&harbour, name, &receiver));
    for node in &nodes {
        node.tells(IMAGE);
        node.tells("r.test/other:1");
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let sent = receiver.sent();
    assert_eq!(sent.len(), 2, "{sent:?}");
    let message = sent.iter().find(|message| message.image == IMAGE).unwrap();
    assert_eq!((message.reason, message.milliseconds, message.bytes), ("ImageSalvaged", 1500, 7));
    assert_eq!((&message.pods[..], message.note.as_str()), (&["shop/p".to_owned()][..], "it came"));
    assert!(harbour.counted(r#"lighterman_notifications_total{result="left_to_another"} 4"#));
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn without_an_api_server_every_node_sends_and_the_copies_have_one_id() {
    let (harbour, receiver) = (Harbour::new(), Arc::new(MemoryNotifier::default()));
    harbour.cluster.set_away(true);
    let nodes = ["a", "b"].map(|name| Node::start(&harbour, name, &receiver));
    nodes.iter().for_each(|node| node.tells(IMAGE));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let ids: Vec<_> = receiver.sent().into_iter().map(|message| message.id).collect();
    assert!(ids.len() == 2 && ids[0] == ids[1], "{ids:?}");
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_is_away_is_tried_again_and_one_that_refuses_is_not() {
    let (harbour, receiver) = (Harbour::new(), Arc::new(MemoryNotifier::default()));
    let node = Node::start(&harbour, "a", &receiver);
    receiver.set_failure(Some(NotifyError::Unavailable("503".into())));
    node.tells(IMAGE);
    tokio::time::sleep(Duration::from_secs(3)).await;
    receiver.set_failure(None);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(receiver.sent().len(), 1);
    receiver.set_failure(Some(NotifyError::Refused("400".into())));
    let before = receiver.attempts();
    node.tells("r.test/other:1");
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(receiver.attempts() - before, 1);
    assert!(harbour.counted(r#"lighterman_notifications_total{result="failed"} 1"#));
    node.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_is_away_for_long_costs_a_bounded_queue() {
    let (harbour, receiver) = (Harbour::new(), Arc::new(MemoryNotifier::default()));
    receiver.set_failure(Some(NotifyError::Unavailable("503".into())));
    let node = Node::start(&harbour, "a", &receiver);
    (0..100).for_each(|number| node.tells(&format!("r.test/image-{number}:1")));
    assert!(harbour.counted(r#"lighterman_notifications_total{result="dropped"} 36"#), "64 wait");
    node.stop().await;
}

/// The Leases of the cluster are on messages alone here.
fn leases(harbour: &Harbour) -> usize {
    harbour.cluster.leases().1.len()
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_before_its_message_is_sent_leaves_the_message_to_another() {
    let (harbour, receiver) = (Harbour::new(), Arc::new(MemoryNotifier::default()));
    receiver.set_failure(Some(NotifyError::Unavailable("503".into())));
    let stopped = Node::start(&harbour, "a", &receiver);
    stopped.tells(IMAGE);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(leases(&harbour), 1);
    stopped.stop().await;
    assert_eq!(leases(&harbour), 0);
    receiver.set_failure(None);
    let other = Node::start(&harbour, "b", &receiver);
    other.tells(IMAGE);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(receiver.sent().len(), 1);
    other.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_a_sent_message_stays_for_an_hour_and_is_released_then() {
    let (harbour, receiver) = (Harbour::new(), Arc::new(MemoryNotifier::default()));
    let [first, second] = ["a", "b"].map(|name| Node::start(&harbour, name, &receiver));
    first.tells(IMAGE);
    tokio::time::sleep(Duration::from_secs(3590)).await;
    second.tells(IMAGE);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((receiver.sent().len(), leases(&harbour)), (1, 1));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(leases(&harbour), 0);
    // An agent that stops within the hour leaves the Lease, or its successor would repeat the message.
    first.tells(IMAGE);
    tokio::time::sleep(Duration::from_secs(5)).await;
    first.stop().await;
    assert_eq!((receiver.sent().len(), leases(&harbour)), (2, 1));
    second.stop().await;
}
