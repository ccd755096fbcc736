//! An agent's mesh, with a stand-in for the rest of the agent and for the network between agents.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::super::*;
use crate::decide::inventory::Inventory;
use crate::model::InventoryItem;
use crate::oci::Digest;
use crate::ports::{AdmittedPeer, MembershipEvent, Rejection};

/// Far longer than any step here takes on a busy machine; a missing event ends the test.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// The life of an admission, longer than any test.
pub(super) const LIFE: Duration = Duration::from_secs(3600);

pub(super) async fn within_deadline<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("in time: {what}"))
}

/// Admits all peers except the listed ones.
#[derive(Default)]
pub(in crate::mesh) struct DenyListAdmission(pub(in crate::mesh) BTreeSet<PeerId>);

impl DenyListAdmission {
    /// The end of the verdicts, in some thousand years.
    pub(in crate::mesh) const UNTIL: Duration = Duration::from_secs(1 << 37);
}

#[async_trait]
impl Admission for DenyListAdmission {
    async fn credential(&self) -> Result<Credential, Rejection> {
        Ok(Credential::default())
    }

    fn credential_changes(&self) -> watch::Receiver<u64> {
        watch::channel(0).1
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        self.admit_relayed(peer, credential)
    }

    fn admit_relayed(&self, peer: PeerId, _: &Credential) -> Result<AdmittedPeer, Rejection> {
        if self.0.contains(&peer) {
            return Err(Rejection::Denied("the peer is on the deny list".into()));
        }
        Ok(AdmittedPeer { node: None, pod: None, valid_until: Self::UNTIL, is_in_grace: false })
    }
}

/// Stands for the QUIC side of all agents: two agents that may connect admit each other.
#[derive(Clone, Default)]
pub(super) struct TestNetwork(Arc<Mutex<BTreeMap<PeerId, TestEndpoint>>>);

#[derive(Clone)]
struct TestEndpoint {
    mesh: Mesh,
    peer: Peer,
    /// Peers to which connections are dropped.
    blocked: BTreeSet<PeerId>,
}

impl TestNetwork {
    pub(super) fn add(&self, mesh: &Mesh, peer: Peer) {
        self.0.lock().insert(peer.id, TestEndpoint { mesh: mesh.clone(), peer, blocked: BTreeSet::new() });
    }

    /// Drops all connections between two nodes. Their dials end without a report, because three
    /// failed dials are a suspicion, and an agent lists nothing of a member that it suspects.
    pub(super) fn block(&self, a: PeerId, b: PeerId) {
        let mut network = self.0.lock();
        for (one, other) in [(a, b), (b, a)] {
            network.get_mut(&one).unwrap().blocked.insert(other);
        }
    }

    pub(super) fn remove(&self, peer: PeerId) {
        self.0.lock().remove(&peer);
    }

    pub(super) async fn connect(&self, from: PeerId, to: PeerId) {
        let (ours, theirs) = {
            let network = self.0.lock();
            (network.get(&from).cloned(), network.get(&to).cloned())
        };
        let Some(ours) = ours else { return };
        match theirs {
            Some(_) if ours.blocked.contains(&to) => {}
            Some(theirs) => {
                theirs.mesh.admit(ours.peer, LIFE).await;
                ours.mesh.admit(theirs.peer, LIFE).await;
            }
            None => ours.mesh.report_unreachable(to).await,
        }
    }
}

/// A mesh under test, with a stand-in for the rest of its agent.
pub(super) struct MeshTestNode {
    pub(super) name: NodeName,
    pub(super) identity: Identity,
    pub(super) mesh: Mesh,
    pub(super) address: SocketAddr,
    pub(super) metrics: Metrics,
    pub(super) inventory: SharedInventory,
    pub(super) network: TestNetwork,
    /// Peers that came up, in order.
    pub(super) peers_up: Arc<Mutex<Vec<PeerId>>>,
    /// The node whose agent has the same key.
    pub(super) shared_key: watch::Receiver<Option<NodeName>>,
    pub(super) stop: CancellationToken,
    pub(super) task: JoinHandle<()>,
}

pub(super) struct NodeOptions {
    pub(super) name: NodeName,
    pub(super) identity: Identity,
    pub(super) listen: SocketAddr,
    pub(super) admission: DenyListAdmission,
    pub(super) limits: NeighborRateLimits,
    pub(super) versions: Versions,
    pub(super) network: TestNetwork,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            name: "node".parse().unwrap(),
            identity: Identity::generate(),
            listen: ([127, 0, 0, 1], 0).into(),
            admission: DenyListAdmission::default(),
            limits: NeighborRateLimits::DEFAULT,
            versions: Versions::GOSSIP,
            network: TestNetwork::default(),
        }
    }
}

impl MeshTestNode {
    pub(super) async fn start(network: &TestNetwork) -> Self {
        Self::start_with(NodeOptions { network: network.clone(), ..NodeOptions::default() }).await
    }

    pub(super) async fn start_with(options: NodeOptions) -> Self {
        let node = Self::start_unannounced(options).await;
        node.introduce(node.address).await;
        node
    }

    /// Starts a node that does not introduce itself yet.
    pub(super) async fn start_unannounced(options: NodeOptions) -> Self {
        Self::start_serving(options, None).await
    }

    /// Starts a node with a range server.
    pub(super) async fn start_serving(options: NodeOptions, server: Option<Arc<dyn RangeServer>>) -> Self {
        let NodeOptions { name, identity, listen, admission, limits, versions, network } = options;
        let (shared_in, shared_key) = watch::channel(None);
        let (metrics, inventory) = (Metrics::new(), SharedInventory::default());
        let (mesh, task, address) = start_with_options(
            Config { listen },
            name.clone(),
            &identity,
            inventory.clone(),
            Arc::new(admission),
            metrics.clone(),
            MeshOptions { rate_limits: limits, versions },
        )
        .await
        .unwrap();
        let task = server.into_iter().fold(task, MeshTask::with_range_server);
        let (sender, mut events) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let peers_up = Arc::new(Mutex::new(Vec::new()));
        let (me, up_events, known) = (identity.peer_id(), Arc::clone(&peers_up), network.clone());
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    MembershipEvent::Up(peer) => up_events.lock().push(peer.id),
                    MembershipEvent::Down(_) => {}
                    MembershipEvent::Handshake(peer) => known.connect(me, peer.id).await,
                    MembershipEvent::SharedKey(node) => drop(shared_in.send_replace(Some(node))),
                }
            }
        });
        let task = tokio::spawn(task.run(sender, stop.clone()));
        Self { name, identity, mesh, address, metrics, inventory, network, peers_up, shared_key, stop, task }
    }

    /// Introduces the node with the address where peers can dial.
    pub(super) async fn introduce(&self, gossip: SocketAddr) {
        self.network.add(&self.mesh, Peer { gossip, ..self.peer() });
        self.mesh.introduce(Credential::default(), self.address, gossip, None).await;
    }

    pub(super) fn id(&self) -> PeerId {
        self.identity.peer_id()
    }

    pub(super) fn peer(&self) -> Peer {
        Peer { id: self.id(), node: self.name.clone(), zone: None, transfer: self.address, gossip: self.address }
    }

    /// Waits until the inventory satisfies `so`.
    pub(super) async fn until(&self, what: &str, condition: impl Fn(&Inventory) -> bool) {
        let mut changes = self.inventory.changes();
        within_deadline(what, changes.wait_for(|_| self.inventory.read(&condition))).await.unwrap();
    }

    pub(super) async fn until_up(&self, peer: PeerId) {
        self.until("the peer is up", |inventory| inventory.peers().iter().any(|one| one.id == peer)).await;
    }

    pub(super) async fn until_alone(&self) {
        self.until("all peers are down", |inventory| inventory.peers().is_empty()).await;
    }

    pub(super) async fn until_provides(&self, peer: PeerId, digest: Digest) {
        self.until("the blob is announced", |inventory| inventory.blob_providers(digest).contains(&peer)).await;
    }

    pub(super) fn items_of(&self, peer: PeerId) -> usize {
        self.inventory.read(|inventory| inventory.items_of(peer))
    }

    pub(super) fn providers(&self, digest: Digest) -> Vec<PeerId> {
        self.inventory.read(|inventory| inventory.blob_providers(digest))
    }

    pub(super) async fn announce(&self, digest: Digest) {
        self.mesh.announce(vec![InventoryChange::Added(InventoryItem::Blob(digest))]).await;
    }

    pub(super) async fn stop(self) -> (Identity, SocketAddr) {
        self.network.remove(self.id());
        self.stop.cancel();
        within_deadline("the mesh stops", self.task).await.unwrap();
        (self.identity, self.address)
    }

    pub(super) fn has_counted(&self, line: &str) -> bool {
        String::from_utf8(self.metrics.render()).unwrap().contains(line)
    }

    pub(super) fn has_counted_rejection(&self, reason: &str) -> bool {
        self.has_counted(&format!("gossip_rejected_total{{reason=\"{reason}\"}}"))
    }

    pub(super) fn has_counted_fault(&self, fault: &str) -> bool {
        self.has_counted(&format!("peer_faults_total{{fault=\"{fault}\"}}"))
    }

    /// Counters have no notification, so the test polls.
    pub(super) async fn until_counted(&self, what: &str, has: impl Fn(&Self) -> bool) {
        within_deadline(what, async {
            while !has(self) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}
