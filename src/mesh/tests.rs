//! Meshes over real TCP on loopback.

mod hostile;
mod node;
mod ranges;
mod raw;
mod versions;

use std::collections::BTreeSet;

use libp2p::gossipsub;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

pub(super) use self::node::DenyListAdmission;
use self::node::{MeshTestNode, NodeOptions, TestNetwork, within_deadline};
use self::raw::RawPeer;
use super::*;
use crate::addresses::has_ipv6;
use crate::mesh::stack::BehaviourEvent;
use crate::model::{Gossip, InventoryItem, MAX_ITEMS};
use crate::oci::{Digest, Repository};

async fn connected_pair() -> (MeshTestNode, MeshTestNode) {
    let network = TestNetwork::default();
    let (a, b) = (MeshTestNode::start(&network).await, MeshTestNode::start(&network).await);
    network.connect(a.id(), b.id()).await;
    a.until_up(b.id()).await;
    b.until_up(a.id()).await;
    (a, b)
}

fn blob(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

#[tokio::test]
async fn an_announced_blob_and_its_withdrawal_reach_the_peers() {
    let (a, b) = connected_pair().await;
    let app = Repository { registry: "registry.test".into(), path: "team/app".into() };
    let digest = blob("root");
    a.announce(digest).await;
    a.mesh.announce(vec![InventoryChange::Added(InventoryItem::Image(app.clone(), Some("v1".into()), digest))]).await;
    b.until("the image has a provider", |inventory| inventory.image_providers(&app, digest) == [a.id()]).await;
    assert_eq!(b.inventory.read(|inventory| inventory.tag(&app, "v1"))[&digest], [a.id()]);
    a.mesh.announce(vec![InventoryChange::Removed(InventoryItem::Blob(digest))]).await;
    b.until("the blob is withdrawn", |inventory| inventory.blob_providers(digest).is_empty()).await;
}

#[tokio::test]
async fn a_new_member_receives_the_whole_inventory_and_then_its_changes() {
    let (a, b) = connected_pair().await;
    for text in ["one", "two"] {
        a.announce(blob(text)).await;
        b.until_provides(a.id(), blob(text)).await;
    }
    let newcomer = MeshTestNode::start(&a.network).await;
    a.network.connect(newcomer.id(), b.id()).await;
    newcomer.until_provides(a.id(), blob("one")).await;
    newcomer.until_provides(a.id(), blob("two")).await;
    for text in ["three", "four"] {
        a.announce(blob(text)).await;
        newcomer.until_provides(a.id(), blob(text)).await;
        b.until_provides(a.id(), blob(text)).await;
    }
    newcomer.announce(blob("mine")).await;
    a.until_provides(newcomer.id(), blob("mine")).await;
    assert_eq!(newcomer.items_of(a.id()), 4);
}

#[tokio::test]
async fn a_relayed_entry_is_accepted_by_its_publishers_signature() {
    let network = TestNetwork::default();
    let (a, b, c) =
        (MeshTestNode::start(&network).await, MeshTestNode::start(&network).await, MeshTestNode::start(&network).await);
    network.block(a.id(), c.id());
    network.connect(a.id(), b.id()).await;
    network.connect(b.id(), c.id()).await;
    c.until_up(a.id()).await;
    a.until_up(c.id()).await;
    for text in ["first", "second"] {
        a.announce(blob(text)).await;
        c.until_provides(a.id(), blob(text)).await;
    }
    let neighbors = |status: MeshStatus| status.members.iter().filter(|member| member.neighbor).count();
    assert_eq!(
        neighbors(c.mesh.status().await.unwrap()),
        1,
        "the third node is connected to the node in between alone"
    );
    assert_eq!(c.providers(blob("first")), [a.id()]);
}

#[tokio::test]
async fn a_peer_whose_admission_is_revoked_is_down_until_it_is_admitted_again() {
    let (a, b) = connected_pair().await;
    b.announce(blob("b")).await;
    a.until_provides(b.id(), blob("b")).await;
    a.mesh.revoke_admission(b.id()).await;
    a.until_alone().await;
    assert!(a.providers(blob("b")).is_empty());
    // The peer rejects the dial, which is no reason to suspect the peer.
    a.network.connect(a.id(), b.id()).await;
    a.until_provides(b.id(), blob("b")).await;
}

#[tokio::test]
async fn a_restarted_node_is_listed_with_its_new_inventory_alone() {
    let (a, b) = connected_pair().await;
    let network = a.network.clone();
    b.announce(blob("before")).await;
    a.until_provides(b.id(), blob("before")).await;
    let id = b.id();
    let (identity, listen) = b.stop().await;
    a.until_alone().await;
    assert!(a.providers(blob("before")).is_empty());

    let b = MeshTestNode::start_with(NodeOptions { identity, listen, network, ..NodeOptions::default() }).await;
    assert_eq!(b.id(), id);
    b.announce(blob("after")).await;
    b.network.connect(id, a.id()).await;
    a.until_provides(id, blob("after")).await;
    assert!(a.providers(blob("before")).is_empty(), "the new epoch begins without entries");
    b.announce(blob("later")).await;
    a.until_provides(id, blob("later")).await;
}

#[tokio::test]
async fn a_stopping_agent_publishes_its_leave_message_before_its_connections_close() {
    let (a, _b) = connected_pair().await;
    let mut observer = RawPeer::introduced_to(&a).await;
    let id = a.id();
    let stopped = tokio::spawn(a.stop());
    let notice = observer
        .until("a leave message", |event| match event {
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(gossipsub::Event::Message { message, .. })) => {
                match crate::wire::decode(&message.data).unwrap() {
                    Gossip::Leave(notice) => Some(notice),
                    _ => None,
                }
            }
            SwarmEvent::ConnectionClosed { .. } => panic!("the connection closed without a leave message"),
            _ => None,
        })
        .await;
    assert_eq!(notice.peer, id);
    observer.while_driven(stopped).await.unwrap();
}

/// Forwards bytes between two nodes. While `cut` is true, the proxy drops bytes as a cut network
/// does: no reset, only silence.
async fn start_proxy(target: SocketAddr, is_blocked: watch::Receiver<bool>) -> (SocketAddr, JoinHandle<()>) {
    async fn pump(
        mut from: impl AsyncReadExt + Unpin,
        mut to: impl AsyncWriteExt + Unpin,
        is_blocked: watch::Receiver<bool>,
    ) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            if !*is_blocked.borrow() && to.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
        // The proxy drops the end of the stream too.
        if *is_blocked.borrow() {
            std::future::pending::<()>().await;
        }
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = tokio::spawn(async move {
        let mut pumps = JoinSet::new();
        loop {
            let (near, _) = listener.accept().await.unwrap();
            let Ok(far) = TcpStream::connect(target).await else { continue };
            let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
            pumps.spawn(pump(near_read, far_write, is_blocked.clone()));
            pumps.spawn(pump(far_read, near_write, is_blocked.clone()));
        }
    });
    (address, proxy)
}

#[tokio::test]
async fn a_silent_peer_is_down_and_up_again_when_its_messages_return() {
    let network = TestNetwork::default();
    let start_node =
        || MeshTestNode::start_unannounced(NodeOptions { network: network.clone(), ..NodeOptions::default() });
    let (a, b) = (start_node().await, start_node().await);
    let (switch, is_blocked) = watch::channel(false);
    let (to_b, proxy_b) = start_proxy(b.address, is_blocked.clone()).await;
    let (to_a, proxy_a) = start_proxy(a.address, is_blocked).await;
    a.introduce(to_a).await;
    b.introduce(to_b).await;
    network.connect(a.id(), b.id()).await;
    b.announce(blob("b")).await;
    a.until_provides(b.id(), blob("b")).await;
    b.until_up(a.id()).await;

    switch.send(true).unwrap();
    a.until_alone().await;
    b.until_alone().await;
    switch.send(false).unwrap();
    a.until_provides(b.id(), blob("b")).await;
    proxy_a.abort();
    proxy_b.abort();
}

#[tokio::test]
async fn a_large_inventory_arrives_as_one_snapshot() {
    let network = TestNetwork::default();
    let (a, b) = (MeshTestNode::start(&network).await, MeshTestNode::start(&network).await);
    let number = 60_000;
    assert!(number < MAX_ITEMS);
    let item = |n: usize| InventoryItem::Blob(Digest::of(&n.to_le_bytes()));
    a.mesh.announce((0..number).map(|n| InventoryChange::Added(item(n))).collect()).await;
    network.connect(a.id(), b.id()).await;
    b.until("all items have arrived", |inventory| inventory.items_of(a.id()) == number).await;
    // A follower gets a change of this size as a snapshot again, not by gossip.
    a.mesh.announce((0..number).map(|n| InventoryChange::Removed(item(n))).collect()).await;
    b.until("all items are withdrawn", |inventory| inventory.items_of(a.id()) == 0).await;
}

#[tokio::test]
async fn five_nodes_that_dialed_one_have_the_inventory_of_all() {
    let network = TestNetwork::default();
    let mut nodes = Vec::new();
    for _ in 0..5 {
        nodes.push(MeshTestNode::start(&network).await);
    }
    for node in &nodes[1..] {
        network.connect(node.id(), nodes[0].id()).await;
    }
    for (i, node) in nodes.iter().enumerate() {
        node.announce(blob(&i.to_string())).await;
    }
    let ids: BTreeSet<PeerId> = nodes.iter().map(MeshTestNode::id).collect();
    for node in &nodes {
        let others: Vec<_> = ids.iter().filter(|id| **id != node.id()).collect();
        node.until("all nodes' items have arrived", |inventory| others.iter().all(|id| inventory.items_of(**id) == 1))
            .await;
    }
}

#[tokio::test]
async fn the_status_lists_members_and_counts_messages() {
    let (a, b) = connected_pair().await;
    b.announce(blob("b")).await;
    a.until_provides(b.id(), blob("b")).await;
    let status = a.mesh.status().await.unwrap();
    assert_eq!((status.peer_id, status.alive, status.neighbors), (a.id().to_string(), 1, 1));
    assert_eq!((status.members[0].items, status.members[0].release.as_str()), (1, env!("CARGO_PKG_VERSION")));
    assert!(status.messages_in > 0);
    assert!(!a.has_counted("lighterman_mesh_received_bytes_total 0\n"), "bytes are counted");
    let mesh = a.mesh.clone();
    a.stop().await;
    assert!(mesh.status().await.is_none());
}

#[tokio::test]
async fn the_error_names_a_port_that_is_taken() {
    let a = MeshTestNode::start(&TestNetwork::default()).await;
    let admission = Arc::new(DenyListAdmission::default());
    let config = Config { listen: a.address };
    let identity = Identity::generate();
    let started =
        start(config, "node".parse().unwrap(), &identity, SharedInventory::default(), admission, Metrics::new()).await;
    let error = started.err().unwrap();
    assert!(error.to_string().contains(&a.address.to_string()), "{error}");
}

#[tokio::test]
async fn a_mesh_listens_on_all_interfaces() {
    // Without IPv6 the agent listens on 0.0.0.0.
    let kinds = if has_ipv6() { &["0.0.0.0:0", "[::]:0"][..] } else { &["0.0.0.0:0"] };
    for everywhere in kinds {
        let listen: SocketAddr = everywhere.parse().unwrap();
        let node = MeshTestNode::start_unannounced(NodeOptions { listen, ..NodeOptions::default() }).await;
        assert_eq!(node.address.ip(), listen.ip());
        assert_ne!(node.address.port(), 0);
    }
}

#[tokio::test]
async fn two_nodes_with_one_key_detect_each_other_and_the_node_that_keeps_the_key_is_followed_again() {
    // Gossip reaches a second connection of one PeerId only after the first has closed, so the two
    // are neighbors of two different nodes, as in a large cluster.
    let [near_older, near_younger] = [TestNetwork::default(), TestNetwork::default()];
    let named = |name: &str, identity: Identity, network: &TestNetwork| NodeOptions {
        name: name.parse().unwrap(),
        identity,
        network: network.clone(),
        ..NodeOptions::default()
    };
    let key = Identity::generate();
    let [first, second] = [MeshTestNode::start(&near_older).await, MeshTestNode::start(&near_younger).await];
    near_older.add(&second.mesh, second.peer());
    near_younger.add(&first.mesh, first.peer());
    near_older.connect(first.id(), second.id()).await;
    first.until_up(second.id()).await;

    let mut older = MeshTestNode::start_with(named("older", key.clone(), &near_older)).await;
    near_older.block(key.peer_id(), second.id());
    near_older.connect(key.peer_id(), first.id()).await;
    older.announce(blob("before")).await;
    second.until_provides(key.peer_id(), blob("before")).await;

    let mut younger = MeshTestNode::start_with(named("younger", key.clone(), &near_younger)).await;
    near_younger.block(key.peer_id(), first.id());
    near_younger.connect(key.peer_id(), second.id()).await;
    for (node, other) in [(&mut older, "younger"), (&mut younger, "older")] {
        let found = within_deadline(other, node.shared_key.wait_for(Option::is_some)).await.unwrap();
        assert_eq!(found.as_ref().unwrap().as_str(), other);
    }
    // The younger node restarts with a new key.
    younger.stop().await;
    let younger = MeshTestNode::start_with(named("younger", Identity::generate(), &near_younger)).await;
    near_younger.connect(younger.id(), second.id()).await;
    older.announce(blob("after")).await;
    for node in [&first, &second, &younger] {
        node.until_provides(key.peer_id(), blob("after")).await;
    }
}
