//! Real meshes on loopback.

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

pub(super) use self::node::AllBut;
use self::node::{Doors, Node, Setting, soon};
use self::raw::Raw;
use super::*;
use crate::addresses::has_ipv6;
use crate::mesh::stack::BehaviourEvent;
use crate::model::{Gossip, Item, MAX_ITEMS};
use crate::oci::{Digest, Repository};

async fn two() -> (Node, Node) {
    let doors = Doors::default();
    let (a, b) = (Node::start(&doors).await, Node::start(&doors).await);
    doors.greet(a.id(), b.id()).await;
    a.until_up(b.id()).await;
    b.until_up(a.id()).await;
    (a, b)
}

fn blob(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

#[tokio::test]
async fn what_a_node_announces_and_withdraws_its_peers_know() {
    let (a, b) = two().await;
    let app = Repository { registry: "registry.test".into(), path: "team/app".into() };
    let root = blob("root");
    a.announce(root).await;
    a.mesh.announce(vec![ContentChange::Added(Item::Image(app.clone(), Some("v1".into()), root))]).await;
    b.until("the image is known", |table| table.providers(&app, root) == [a.id()]).await;
    assert_eq!(b.table.read(|table| table.tag(&app, "v1"))[&root], [a.id()]);
    a.mesh.announce(vec![ContentChange::Removed(Item::Blob(root))]).await;
    b.until("the blob is withdrawn", |table| table.holders(root).is_empty()).await;
}

#[tokio::test]
async fn a_newcomer_learns_everything_from_whom_it_meets_and_follows_from_there() {
    let (a, b) = two().await;
    for text in ["one", "two"] {
        a.announce(blob(text)).await;
        b.until_holds(a.id(), blob(text)).await;
    }
    let newcomer = Node::start(&a.doors).await;
    a.doors.greet(newcomer.id(), b.id()).await;
    newcomer.until_holds(a.id(), blob("one")).await;
    newcomer.until_holds(a.id(), blob("two")).await;
    for text in ["three", "four"] {
        a.announce(blob(text)).await;
        newcomer.until_holds(a.id(), blob(text)).await;
        b.until_holds(a.id(), blob(text)).await;
    }
    newcomer.announce(blob("mine")).await;
    a.until_holds(newcomer.id(), blob("mine")).await;
    assert_eq!(newcomer.items_of(a.id()), 4);
}

#[tokio::test]
async fn what_is_relayed_is_believed_for_its_publishers_signature() {
    let doors = Doors::default();
    let (a, b, c) = (Node::start(&doors).await, Node::start(&doors).await, Node::start(&doors).await);
    doors.part(a.id(), c.id());
    doors.greet(a.id(), b.id()).await;
    doors.greet(b.id(), c.id()).await;
    c.until_up(a.id()).await;
    a.until_up(c.id()).await;
    for text in ["first", "second"] {
        a.announce(blob(text)).await;
        c.until_holds(a.id(), blob(text)).await;
    }
    let neighbours = |status: MeshStatus| status.members.iter().filter(|one| one.neighbour).count();
    assert_eq!(neighbours(c.mesh.status().await.unwrap()), 1, "it has met the one in between alone");
    assert_eq!(c.holders(blob("first")), [a.id()]);
}

#[tokio::test]
async fn a_dismissed_peer_is_down_until_it_is_admitted_again() {
    let (a, b) = two().await;
    b.announce(blob("b")).await;
    a.until_holds(b.id(), blob("b")).await;
    a.mesh.dismiss(b.id()).await;
    a.until_alone().await;
    assert!(a.holders(blob("b")).is_empty());
    // The other side is turned away, which is no reason to take anybody for dead.
    a.doors.greet(a.id(), b.id()).await;
    a.until_holds(b.id(), blob("b")).await;
}

#[tokio::test]
async fn a_node_that_stops_is_down_and_comes_back_with_what_it_then_holds() {
    let (a, b) = two().await;
    let doors = a.doors.clone();
    b.announce(blob("before")).await;
    a.until_holds(b.id(), blob("before")).await;
    let id = b.id();
    let (identity, listen) = b.stop().await;
    a.until_alone().await;
    assert!(a.holders(blob("before")).is_empty());

    let b = Node::start_as(Setting { identity, listen, doors, ..Setting::default() }).await;
    assert_eq!(b.id(), id);
    b.announce(blob("after")).await;
    b.doors.greet(id, a.id()).await;
    a.until_holds(id, blob("after")).await;
    assert!(a.holders(blob("before")).is_empty(), "the new epoch begins with nothing");
    b.announce(blob("later")).await;
    a.until_holds(id, blob("later")).await;
}

#[tokio::test]
async fn who_leaves_says_so_before_the_connection_closes() {
    let (a, _b) = two().await;
    let mut witness = Raw::known_to(&a).await;
    let id = a.id();
    let stopped = tokio::spawn(a.stop());
    let farewell = witness
        .until("a farewell", |event| match event {
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(gossipsub::Event::Message { message, .. })) => {
                match crate::wire::decode(&message.data).unwrap() {
                    Gossip::Farewell(farewell) => Some(farewell),
                    _ => None,
                }
            }
            SwarmEvent::ConnectionClosed { .. } => panic!("without a word"),
            _ => None,
        })
        .await;
    assert_eq!(farewell.peer, id);
    witness.while_driven(stopped).await.unwrap();
}

/// Passes bytes between two nodes until told to swallow them, as a network does that is cut: no reset, only silence.
async fn cuttable(target: SocketAddr, cut: watch::Receiver<bool>) -> (SocketAddr, JoinHandle<()>) {
    async fn pump(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, cut: watch::Receiver<bool>) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            if !*cut.borrow() && to.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
        // The end is swallowed as well.
        if *cut.borrow() {
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
            pumps.spawn(pump(near_read, far_write, cut.clone()));
            pumps.spawn(pump(far_read, near_write, cut.clone()));
        }
    });
    (address, proxy)
}

#[tokio::test]
async fn a_peer_that_falls_silent_without_a_word_is_down_and_up_again_when_it_is_heard() {
    let doors = Doors::default();
    let silent = || Node::start_silent(Setting { doors: doors.clone(), ..Setting::default() });
    let (a, b) = (silent().await, silent().await);
    let (switch, cut) = watch::channel(false);
    let (to_b, proxy_b) = cuttable(b.address, cut.clone()).await;
    let (to_a, proxy_a) = cuttable(a.address, cut).await;
    a.introduce(to_a).await;
    b.introduce(to_b).await;
    doors.greet(a.id(), b.id()).await;
    b.announce(blob("b")).await;
    a.until_holds(b.id(), blob("b")).await;
    b.until_up(a.id()).await;

    switch.send(true).unwrap();
    a.until_alone().await;
    b.until_alone().await;
    switch.send(false).unwrap();
    a.until_holds(b.id(), blob("b")).await;
    proxy_a.abort();
    proxy_b.abort();
}

#[tokio::test]
async fn a_large_inventory_comes_in_one_piece() {
    let doors = Doors::default();
    let (a, b) = (Node::start(&doors).await, Node::start(&doors).await);
    let number = 60_000;
    assert!(number < MAX_ITEMS);
    let item = |n: usize| Item::Blob(Digest::of(&n.to_le_bytes()));
    a.mesh.announce((0..number).map(|n| ContentChange::Added(item(n))).collect()).await;
    doors.greet(a.id(), b.id()).await;
    b.until("all is known", |table| table.items_of(a.id()) == number).await;
    // And as news to somebody who follows already, so much is not gossiped but taken as a snapshot again.
    a.mesh.announce((0..number).map(|n| ContentChange::Removed(item(n))).collect()).await;
    b.until("all is gone", |table| table.items_of(a.id()) == 0).await;
}

#[tokio::test]
async fn everybody_knows_everything_in_a_mesh_of_five_that_met_one() {
    let doors = Doors::default();
    let mut nodes = Vec::new();
    for _ in 0..5 {
        nodes.push(Node::start(&doors).await);
    }
    for node in &nodes[1..] {
        doors.greet(node.id(), nodes[0].id()).await;
    }
    for (i, node) in nodes.iter().enumerate() {
        node.announce(blob(&i.to_string())).await;
    }
    let ids: BTreeSet<PeerId> = nodes.iter().map(Node::id).collect();
    for node in &nodes {
        let others: Vec<_> = ids.iter().filter(|id| **id != node.id()).collect();
        node.until("all are known", |table| others.iter().all(|id| table.items_of(**id) == 1)).await;
    }
}

#[tokio::test]
async fn the_status_tells_who_is_there_and_what_was_said() {
    let (a, b) = two().await;
    b.announce(blob("b")).await;
    a.until_holds(b.id(), blob("b")).await;
    let status = a.mesh.status().await.unwrap();
    assert_eq!((status.peer_id, status.alive, status.neighbours), (a.id().to_string(), 1, 1));
    assert_eq!((status.members[0].items, status.members[0].release.as_str()), (1, env!("CARGO_PKG_VERSION")));
    assert!(status.messages_in > 0);
    assert!(!a.has_counted("lighterman_mesh_received_bytes_total 0\n"), "bytes are counted");
    let mesh = a.mesh.clone();
    a.stop().await;
    assert!(mesh.status().await.is_none());
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let a = Node::start(&Doors::default()).await;
    let admission = Arc::new(AllBut::default());
    let config = Config { listen: a.address };
    let identity = Identity::generate();
    let started = start(config, "node".parse().unwrap(), &identity, Table::default(), admission, Metrics::new()).await;
    let error = started.err().unwrap();
    assert!(error.to_string().contains(&a.address.to_string()), "{error}");
}

#[tokio::test]
async fn all_interfaces_can_be_listened_on() {
    // Without IPv6 the agent listens on 0.0.0.0.
    let kinds = if has_ipv6() { &["0.0.0.0:0", "[::]:0"][..] } else { &["0.0.0.0:0"] };
    for everywhere in kinds {
        let listen: SocketAddr = everywhere.parse().unwrap();
        let node = Node::start_silent(Setting { listen, ..Setting::default() }).await;
        assert_eq!(node.address.ip(), listen.ip());
        assert_ne!(node.address.port(), 0);
    }
}

#[tokio::test]
async fn two_nodes_with_one_key_hear_of_each_other_and_the_one_that_keeps_it_is_followed_again() {
    // Gossip reaches a second connection of one PeerId only after the first has closed, so the two are
    // neighbours of two different nodes, as in a cluster of many.
    let [near_older, near_younger] = [Doors::default(), Doors::default()];
    let named = |name: &str, identity: Identity, doors: &Doors| Setting {
        name: name.parse().unwrap(),
        identity,
        doors: doors.clone(),
        ..Setting::default()
    };
    let key = Identity::generate();
    let [first, second] = [Node::start(&near_older).await, Node::start(&near_younger).await];
    near_older.open(&second.mesh, second.peer());
    near_younger.open(&first.mesh, first.peer());
    near_older.greet(first.id(), second.id()).await;
    first.until_up(second.id()).await;

    let mut older = Node::start_as(named("older", key.clone(), &near_older)).await;
    near_older.part(key.peer_id(), second.id());
    near_older.greet(key.peer_id(), first.id()).await;
    older.announce(blob("before")).await;
    second.until_holds(key.peer_id(), blob("before")).await;

    let mut younger = Node::start_as(named("younger", key.clone(), &near_younger)).await;
    near_younger.part(key.peer_id(), first.id());
    near_younger.greet(key.peer_id(), second.id()).await;
    for (node, other) in [(&mut older, "younger"), (&mut younger, "older")] {
        let found = soon(other, node.shared_key.wait_for(Option::is_some)).await.unwrap();
        assert_eq!(found.as_ref().unwrap().as_str(), other);
    }
    // The younger one starts again with a new key.
    younger.stop().await;
    let younger = Node::start_as(named("younger", Identity::generate(), &near_younger)).await;
    near_younger.greet(younger.id(), second.id()).await;
    older.announce(blob("after")).await;
    for node in [&first, &second, &younger] {
        node.until_holds(key.peer_id(), blob("after")).await;
    }
}
