//! Joining on a network in memory under a paused clock: no test here opens a socket.

use parking_lot::Mutex;
use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::agent::membership::joiner::{DnsResolver, Joiner};
use crate::agent::membership::udp_watch::UdpWatch;
use crate::ports::{DialError, Dialer, MembershipEvent};
use crate::testing::{MemoryDialer, MemoryMesh};

pub(super) const BOOTSTRAP_NAME: &str = "lighterman-peers.lighterman.svc:4701";
pub(super) const POD_RESOLV_CONF: &str =
    "nameserver 10.96.0.10\nsearch lighterman.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n";
const PORT: u16 = 4701;

/// The joiner dials within this time of its start: the longest start delay, and a dial.
const JOINED: Duration = Duration::from_secs(5);
const MINUTE: Duration = Duration::from_secs(60);

/// Resolves every name to the same addresses, and records the names.
#[derive(Default)]
pub(super) struct MemoryResolver {
    /// `None` while no DNS server answers.
    answer: Mutex<Option<Vec<SocketAddr>>>,
    names: Mutex<Vec<String>>,
}

#[async_trait]
impl DnsResolver for MemoryResolver {
    fn resolv_conf(&self) -> String {
        POD_RESOLV_CONF.to_owned()
    }

    async fn resolve(&self, name: &str) -> Option<Vec<SocketAddr>> {
        self.names.lock().push(name.to_owned());
        self.answer.lock().clone()
    }
}

impl MemoryResolver {
    pub(super) fn set_answer(&self, answer: Option<Vec<SocketAddr>>) {
        *self.answer.lock() = answer;
    }

    /// Removes the recorded names, and returns them.
    pub(super) fn take_names(&self) -> Vec<String> {
        std::mem::take(&mut *self.names.lock())
    }
}

/// The node of a joiner: its network, its mesh and its file of peers.
pub(super) struct JoiningNode {
    pub(super) resolver: Arc<MemoryResolver>,
    pub(super) dialer: Arc<MemoryDialer>,
    folder: tempfile::TempDir,
}

/// A running joiner.
pub(super) struct RunningJoiner {
    pub(super) mesh: Arc<MemoryMesh>,
    inventory: PeerInventory,
    stop: CancellationToken,
    joiner: JoinHandle<()>,
    /// Applies the events of the mesh to the inventory, as a real mesh does before each event.
    _inventory_writer: AbortOnDropHandle<()>,
    _admitted: mpsc::Sender<Peer>,
}

impl JoiningNode {
    pub(super) fn new() -> Self {
        Self { resolver: Arc::default(), dialer: Arc::default(), folder: tempfile::tempdir().unwrap() }
    }

    /// A node whose DNS lists these seeds.
    fn with_seeds(seeds: impl IntoIterator<Item = u8>) -> Self {
        let node = Self::new();
        node.resolver.set_answer(Some(seeds.into_iter().map(address).collect()));
        node
    }

    pub(super) fn start(&self) -> RunningJoiner {
        let (mesh_events_in, mut mesh_events) = mpsc::channel(64);
        let (events_in, events) = mpsc::channel(64);
        let (admitted_in, admitted) = mpsc::channel(1);
        let (mesh, inventory) = (Arc::new(MemoryMesh::new(mesh_events_in)), PeerInventory::default());
        let written = inventory.clone();
        let inventory_writer = AbortOnDropHandle::new(tokio::spawn(async move {
            while let Some(event) = mesh_events.recv().await {
                match &event {
                    MembershipEvent::Up(peer) => written.apply(MeshEvent::Up(peer.clone())),
                    MembershipEvent::Down(peer) => written.apply(MeshEvent::Down(*peer)),
                    MembershipEvent::Handshake(_) | MembershipEvent::SharedKey(_) => {}
                }
                let _ = events_in.send(event).await;
            }
        }));
        let joiner = Joiner {
            bootstrap_names: vec![BOOTSTRAP_NAME.to_owned()],
            resolver: self.resolver.clone(),
            peers_file: self.folder.path().join("peers.json"),
            dialer: self.dialer.clone(),
            transfer_port: PORT,
            mesh: mesh.clone(),
            mesh_status: mesh.clone(),
            inventory: inventory.clone(),
            metrics: Metrics::new(),
            bootstrap_addresses: watch::channel(Vec::new()).0,
            shared_key: watch::channel(None).0,
        };
        let stop = CancellationToken::new();
        let joiner = tokio::spawn(joiner.run(admitted, events, stop.clone()));
        RunningJoiner { mesh, inventory, stop, joiner, _inventory_writer: inventory_writer, _admitted: admitted_in }
    }

    /// Dials of this seed's address so far.
    fn dials_of(&self, number: u8) -> usize {
        self.dialer.dials().iter().filter(|(_, dialed)| *dialed == address(number)).count()
    }
}

impl RunningJoiner {
    fn members(&self) -> Vec<PeerId> {
        self.mesh.members().into_keys().collect()
    }

    pub(super) async fn stop(self) {
        self.stop.cancel();
        self.joiner.await.unwrap();
    }
}

/// The address of a seed, from a range that no machine has.
pub(super) fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, number], PORT))
}

pub(super) fn seed(number: u8) -> Peer {
    let (node, address) = (format!("node-{number}").parse().unwrap(), address(number));
    Peer { id: peer(number), node, zone: None, transfer: address, gossip: address }
}

fn ids<const N: usize>(numbers: [u8; N]) -> Vec<PeerId> {
    let mut ids = numbers.map(peer);
    ids.sort_unstable();
    ids.to_vec()
}

#[tokio::test(start_paused = true)]
async fn a_node_without_peers_joins_through_the_addresses_of_dns() {
    let node = JoiningNode::with_seeds([1, 2, 3]);
    (1..=3).for_each(|number| node.dialer.put(address(number), Ok(seed(number))));
    let running = node.start();
    sleep(JOINED).await;
    assert_eq!(running.members(), ids([1, 2, 3]));
    assert!(running.mesh.members().values().all(|life| *life == MemoryDialer::VERDICT_LIFE));
    assert_eq!(running.inventory.peer_count(), 3);
    assert!(node.resolver.take_names().contains(&"lighterman-peers.lighterman.svc.cluster.local.:4701".to_owned()));
    sleep(60 * MINUTE).await;
    assert_eq!(node.dialer.dials().len(), 3, "connected peers are not dialed again");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn this_agent_is_not_dialed() {
    let node = JoiningNode::new();
    let own_address = SocketAddr::from(([127, 0, 0, 1], PORT));
    node.resolver.set_answer(Some(vec![own_address, address(1)]));
    node.dialer.put(address(1), Err(DialError::OwnAddress(address(1))));
    let running = node.start();
    sleep(10 * MINUTE).await;
    let dialed: Vec<_> = node.dialer.dials().into_iter().map(|(_, address)| address).collect();
    assert_eq!(dialed, [address(1)], "one dial shows that this agent answers at the other address");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_failing_seed_is_dialed_less_often_until_the_seed_answers() {
    let node = JoiningNode::with_seeds([1]);
    let refused = DialError::Unreachable { address: address(1), silent: false, reason: "refused".into() };
    node.dialer.put(address(1), Err(refused));
    let running = node.start();
    sleep(Duration::from_secs(10)).await;
    let early = node.dials_of(1);
    assert!((8..=14).contains(&early), "about one dial a second after the start: {early}");
    sleep(60 * MINUTE).await;
    let before = node.dials_of(1);
    sleep(MINUTE).await;
    let late = node.dials_of(1) - before;
    assert!((5..=8).contains(&late), "about six dials a minute later on: {late}");
    assert_eq!(running.members(), []);

    node.dialer.put(address(1), Ok(seed(1)));
    sleep(Duration::from_secs(11)).await;
    assert_eq!(running.members(), ids([1]));
    let joined = node.dials_of(1);
    sleep(10 * MINUTE).await;
    assert_eq!(node.dials_of(1), joined);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_joiner_without_an_answer_from_dns_asks_again_after_growing_pauses() {
    let node = JoiningNode::new();
    let running = node.start();
    sleep(Duration::from_secs(10)).await;
    let early = node.resolver.take_names().len();
    assert!((8..=13).contains(&early), "about one query a second after the start: {early}");
    sleep(60 * MINUTE).await;
    node.resolver.take_names();
    sleep(60 * MINUTE).await;
    let late = node.resolver.take_names().len();
    assert!((3..=5).contains(&late), "about four queries an hour later on: {late}");

    node.dialer.put(address(1), Ok(seed(1)));
    node.resolver.set_answer(Some(vec![address(1)]));
    sleep(20 * MINUTE).await;
    assert_eq!(running.members(), ids([1]));
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_restarted_node_dials_the_peers_of_its_file_while_dns_is_down() {
    let node = JoiningNode::with_seeds([1, 2]);
    (1..=2).for_each(|number| node.dialer.put(address(number), Ok(seed(number))));
    let before = node.start();
    sleep(JOINED).await;
    before.stop().await;
    assert_eq!(node.dialer.dials().len(), 2);

    node.resolver.set_answer(None);
    let after = node.start();
    sleep(JOINED).await;
    assert_eq!(after.members(), ids([1, 2]));
    after.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_peers_of_the_file_are_dialed_before_the_addresses_of_dns() {
    let node = JoiningNode::with_seeds([1]);
    node.dialer.put(address(1), Ok(seed(1)));
    let before = node.start();
    sleep(JOINED).await;
    before.stop().await;

    // The file's peer is gone, and DNS lists another agent.
    node.dialer.remove(address(1));
    node.dialer.put(address(2), Ok(seed(2)));
    node.resolver.set_answer(Some(vec![address(2)]));
    let after = node.start();
    sleep(JOINED).await;
    let dialed: Vec<_> = node.dialer.dials().into_iter().map(|(_, address)| address).collect();
    assert_eq!(dialed[..3], [address(1), address(1), address(2)]);
    assert_eq!(after.members(), ids([2]));
    after.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_mesh_receives_the_failure_of_each_requested_handshake() {
    let node = JoiningNode::new();
    let rejected = DialError::Rejected { peer: peer(1), address: address(1), reason: "the token has expired".into() };
    node.dialer.put(address(1), Err(rejected));
    // Another agent answers at the address of the second peer, and no agent at the third address.
    node.dialer.put(address(2), Ok(seed(9)));
    node.dialer.put(address(4), Ok(seed(4)));
    let running = node.start();
    for number in 1..=4 {
        running.mesh.send(MembershipEvent::Handshake(seed(number))).await;
    }
    sleep(JOINED).await;
    assert_eq!((running.mesh.rejected(), running.mesh.unreachable()), (ids([1, 2]), ids([3])));
    assert_eq!(running.members(), ids([4]));
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stays_down_is_forgotten() {
    let node = JoiningNode::with_seeds([1, 2]);
    (1..=2).for_each(|number| node.dialer.put(address(number), Ok(seed(number))));
    let running = node.start();
    sleep(JOINED).await;
    node.dialer.remove(address(1));
    running.mesh.send(MembershipEvent::Down(peer(1))).await;
    sleep(9 * MINUTE).await;
    assert_eq!(running.members(), ids([1, 2]), "a node restarts within ten minutes");
    sleep(2 * MINUTE).await;
    assert_eq!(running.members(), ids([2]));
    assert_eq!(node.dialer.peers(), [seed(2)]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_joiner_ends_the_dials_in_progress() {
    let node = JoiningNode::with_seeds([1, 2, 3]);
    let running = node.start();
    while node.dialer.dials().is_empty() {
        sleep(Duration::from_millis(10)).await;
    }
    let stopped = Instant::now();
    running.stop().await;
    assert_eq!(stopped.elapsed(), Duration::ZERO, "no dial is awaited");
    assert_eq!(Arc::strong_count(&node.dialer), 1, "no task is left with the dialer");
}

#[tokio::test(start_paused = true)]
async fn blocked_udp_shows_until_a_peer_answers_over_udp() {
    let dialer = Arc::new(MemoryDialer::default());
    (1..=3).for_each(|number| dialer.put(address(number), Ok(seed(number))));
    dialer.set_udp_blocked(true);
    let (inventory, (ready_in, mut ready)) = (PeerInventory::default(), watch::channel(true));
    let watch = UdpWatch {
        prober: dialer.clone(),
        transfer_port: PORT,
        mesh_status: Arc::new(MemoryMesh::new(mpsc::channel(1).0)),
        inventory: inventory.clone(),
        bootstrap_addresses: watch::channel((1..=3).map(address).collect()).1,
        ready: ready_in,
        metrics: Metrics::new(),
    };
    let stop = CancellationToken::new();
    let running = tokio::spawn(watch.run(stop.clone()));
    tokio::time::timeout(MINUTE, ready.wait_for(|ready| !ready)).await.expect("within a minute").unwrap();
    let status = inventory.udp().status();
    assert_eq!((status.blocked_since.is_some(), status.port, status.nodes), (true, PORT, 3));
    sleep(10 * MINUTE).await;
    assert!(!*ready.borrow());

    dialer.set_udp_blocked(false);
    tokio::time::timeout(MINUTE, ready.wait_for(|ready| *ready)).await.expect("within a minute").unwrap();
    assert_eq!(inventory.udp().status().blocked_since, None);
    stop.cancel();
    running.await.unwrap();
}
