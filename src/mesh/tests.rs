//! Real meshes on loopback.

mod raw;

use std::collections::BTreeSet;
use std::future::Future;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::decide::inventory::Inventory;
use crate::model::{MAX_ITEMS, MeshEvent};
use crate::oci::{Digest, Repository};

/// Far more than any step here takes on a busy machine; what never happens ends a test anyway.
const DEADLINE: Duration = Duration::from_secs(60);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("in time: {what}"))
}

/// One agent's mesh, and what it told.
struct Node {
    identity: Identity,
    mesh: Mesh,
    address: SocketAddr,
    metrics: Metrics,
    events: mpsc::Receiver<MeshEvent>,
    inventory: Inventory,
    /// Who came up, in order.
    ups: Vec<PeerId>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Node {
    async fn start() -> Self {
        Self::restart(Identity::generate(), ([127, 0, 0, 1], 0).into()).await
    }

    async fn restart(identity: Identity, listen: SocketAddr) -> Self {
        let metrics = Metrics::new();
        let (mesh, task, address) = start(Config { listen }, &identity, metrics.clone()).await.unwrap();
        let (sender, events) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let task = tokio::spawn(task.run(sender, stop.clone()));
        Self { identity, mesh, address, metrics, events, inventory: Inventory::default(), ups: Vec::new(), stop, task }
    }

    fn id(&self) -> PeerId {
        self.identity.peer_id()
    }

    fn peer(&self) -> Peer {
        let node = "node".parse().unwrap();
        Peer { id: self.id(), node, transfer: self.address, gossip: self.address }
    }

    /// Takes what the mesh tells until something is so.
    async fn until(&mut self, what: &str, so: impl Fn(&Inventory) -> bool) {
        soon(what, async {
            while !so(&self.inventory) {
                let event = self.events.recv().await.expect("the mesh runs");
                self.take(event);
            }
        })
        .await;
    }

    fn take(&mut self, event: MeshEvent) {
        if let MeshEvent::Up(peer) = &event {
            self.ups.push(peer.id);
        }
        self.inventory.apply(event);
    }

    async fn until_up(&mut self, peer: PeerId) {
        self.until("the peer is up", |inventory| inventory.node_of(peer).is_some()).await;
    }

    async fn until_holds(&mut self, peer: PeerId, digest: Digest) {
        self.until("the blob is announced", |inventory| inventory.holders(digest).contains(&peer)).await;
    }

    async fn announce(&self, digest: Digest) {
        self.mesh.announce(vec![ContentChange::BlobAdded(digest)]).await;
    }

    async fn stop(self) -> (Identity, SocketAddr) {
        self.stop.cancel();
        soon("the mesh stops", self.task).await.unwrap();
        (self.identity, self.address)
    }

    fn has_refused(&self, reason: &str) -> bool {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        text.contains(&format!("gossip_rejected_total{{reason=\"{reason}\"}}"))
    }

    /// Nothing is told of a refusal, so the counters are looked at again and again.
    async fn until_refused(&mut self, reason: &str) {
        soon(reason, async {
            while !self.has_refused(reason) {
                if let Ok(event) = tokio::time::timeout(Duration::from_millis(50), self.events.recv()).await {
                    self.take(event.expect("the mesh runs"));
                }
            }
        })
        .await;
    }
}

async fn introduce(a: &Node, b: &Node) {
    a.mesh.admit(b.peer()).await;
    b.mesh.admit(a.peer()).await;
}

async fn two() -> (Node, Node) {
    let (mut a, mut b) = (Node::start().await, Node::start().await);
    introduce(&a, &b).await;
    a.until_up(b.id()).await;
    b.until_up(a.id()).await;
    (a, b)
}

fn blob(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

#[tokio::test]
async fn what_a_node_announces_and_withdraws_its_peers_know() {
    let (a, mut b) = two().await;
    let app = Repository { registry: "registry.test".into(), path: "team/app".into() };
    let root = blob("root");
    a.announce(root).await;
    a.mesh.announce(vec![ContentChange::Tagged(app.clone(), Some("v1".into()), root)]).await;
    b.until("the image is known", |inventory| inventory.providers(&app, root) == [a.id()]).await;
    assert_eq!(b.inventory.tag(&app, "v1")[&root], [a.id()]);
    a.mesh.announce(vec![ContentChange::BlobRemoved(root)]).await;
    b.until("the blob is withdrawn", |inventory| inventory.holders(root).is_empty()).await;
}

#[tokio::test]
async fn a_newcomer_takes_a_snapshot_and_follows_from_there() {
    let (a, mut b) = two().await;
    for text in ["one", "two"] {
        a.announce(blob(text)).await;
        b.until_holds(a.id(), blob(text)).await;
    }
    let mut newcomer = Node::start().await;
    introduce(&newcomer, &a).await;
    introduce(&newcomer, &b).await;
    newcomer.until_holds(a.id(), blob("one")).await;
    newcomer.until_holds(a.id(), blob("two")).await;
    for text in ["three", "four"] {
        a.announce(blob(text)).await;
        newcomer.until_holds(a.id(), blob(text)).await;
        b.until_holds(a.id(), blob(text)).await;
    }
    newcomer.announce(blob("mine")).await;
    b.until_holds(newcomer.id(), blob("mine")).await;
    assert_eq!(newcomer.inventory.items_of(a.id()), 4);
}

#[tokio::test]
async fn a_strangers_announcements_are_refused_when_another_relays_them() {
    let (mut a, mut b) = two().await;
    let mut stranger = Node::start().await;
    // Only b admits it.
    introduce(&b, &stranger).await;
    stranger.until_up(b.id()).await;
    stranger.announce(blob("smuggled")).await;
    b.until_holds(stranger.id(), blob("smuggled")).await;
    a.until_refused("unknown_author").await;
    b.announce(blob("honest")).await;
    a.until_holds(b.id(), blob("honest")).await;
    assert!(a.inventory.holders(blob("smuggled")).is_empty());
}

#[tokio::test]
async fn a_dismissed_peer_is_down_until_it_is_admitted_again() {
    let (mut a, mut b) = two().await;
    b.announce(blob("b")).await;
    a.until_holds(b.id(), blob("b")).await;
    a.mesh.dismiss(b.id()).await;
    a.until("it is down here", |inventory| inventory.peers().is_empty()).await;
    assert!(a.inventory.holders(blob("b")).is_empty());
    b.until("and there", |inventory| inventory.peers().is_empty()).await;
    a.mesh.admit(b.peer()).await;
    a.until_holds(b.id(), blob("b")).await;
}

#[tokio::test]
async fn a_node_that_stops_is_down_and_comes_back_with_what_it_then_holds() {
    let (mut a, b) = two().await;
    b.announce(blob("before")).await;
    a.until_holds(b.id(), blob("before")).await;
    let id = b.id();
    let (identity, address) = b.stop().await;
    a.until("it is down", |inventory| inventory.peers().is_empty()).await;
    assert!(a.inventory.holders(blob("before")).is_empty());

    // The same key and the same port: a dials it again by itself, and is asked to by nobody.
    let b = Node::restart(identity, address).await;
    assert_eq!(b.id(), id);
    b.announce(blob("after")).await;
    b.mesh.admit(a.peer()).await;
    a.until_holds(id, blob("after")).await;
    assert!(a.inventory.holders(blob("before")).is_empty(), "the new epoch begins with nothing");
    b.announce(blob("later")).await;
    a.until_holds(id, blob("later")).await;
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
    let (mut a, mut b) = (Node::start().await, Node::start().await);
    let (switch, cut) = watch::channel(false);
    let (to_b, proxy_b) = cuttable(b.address, cut.clone()).await;
    let (to_a, proxy_a) = cuttable(a.address, cut).await;
    a.mesh.admit(Peer { gossip: to_b, ..b.peer() }).await;
    b.mesh.admit(Peer { gossip: to_a, ..a.peer() }).await;
    b.announce(blob("b")).await;
    a.until_holds(b.id(), blob("b")).await;
    b.until_up(a.id()).await;

    switch.send(true).unwrap();
    a.until("b is down for a", |inventory| inventory.peers().is_empty()).await;
    b.until("a is down for b", |inventory| inventory.peers().is_empty()).await;
    switch.send(false).unwrap();
    a.until_holds(b.id(), blob("b")).await;
    proxy_a.abort();
    proxy_b.abort();
}

#[tokio::test]
async fn a_large_inventory_comes_in_one_piece() {
    let (a, mut b) = (Node::start().await, Node::start().await);
    let number = 60_000;
    assert!(number < MAX_ITEMS);
    let items: Vec<_> = (0..number).map(|n: usize| ContentChange::BlobAdded(Digest::of(&n.to_le_bytes()))).collect();
    a.mesh.announce(items).await;
    introduce(&a, &b).await;
    b.until("all is known", |inventory| inventory.items_of(a.id()) == number).await;
    // And as news to somebody who follows already, so much is not gossiped but taken as a snapshot again.
    let gone = (0..number).map(|n: usize| ContentChange::BlobRemoved(Digest::of(&n.to_le_bytes()))).collect();
    a.mesh.announce(gone).await;
    b.until("all is gone", |inventory| inventory.items_of(a.id()) == 0).await;
}

#[tokio::test]
async fn an_agent_that_is_slow_to_listen_can_still_speak() {
    let (a, mut b) = two().await;
    // The channel of events has four places and the task's own queue 64; b takes none of them meanwhile.
    for number in 0..200usize {
        let digest = Digest::of(&number.to_le_bytes());
        soon("a is not held up", a.announce(digest)).await;
        soon("b is not held up", b.announce(digest)).await;
        soon("b is not held up", b.mesh.admit(a.peer())).await;
    }
    b.until("nothing is lost", |inventory| inventory.items_of(a.id()) == 200).await;
}

#[tokio::test]
async fn everybody_knows_everything_in_a_mesh_of_five() {
    let mut nodes = Vec::new();
    for _ in 0..5 {
        nodes.push(Node::start().await);
    }
    for (i, a) in nodes.iter().enumerate() {
        for b in &nodes[i + 1..] {
            introduce(a, b).await;
        }
    }
    for (i, node) in nodes.iter().enumerate() {
        node.announce(blob(&i.to_string())).await;
    }
    let ids: BTreeSet<PeerId> = nodes.iter().map(Node::id).collect();
    for node in &mut nodes {
        let others = ids.iter().filter(|id| **id != node.id()).copied().collect::<Vec<_>>();
        node.until("all are known", |inventory| others.iter().all(|id| inventory.items_of(*id) == 1)).await;
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let a = Node::start().await;
    let error = start(Config { listen: a.address }, &Identity::generate(), Metrics::new()).await.err().unwrap();
    assert!(error.to_string().contains(&a.address.to_string()), "{error}");
}

#[tokio::test]
async fn all_interfaces_can_be_listened_on() {
    let listen = SocketAddr::from(([0, 0, 0, 0], 0));
    let (_, _, address) = start(Config { listen }, &Identity::generate(), Metrics::new()).await.unwrap();
    assert_eq!(address.ip(), listen.ip());
    assert_ne!(address.port(), 0);
}
