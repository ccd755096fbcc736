//! Failed fetches over real meshes on loopback: the mesh suspects unreachable providers.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::admission::StaticAdmission;
use crate::agent::peers::udp_state::UdpState;
use crate::agent::recovery::peer_fetcher::PeerFetcher;
use crate::config::loopback;
use crate::identity::Identity;
use crate::mesh::{self, Mesh, SharedInventory};
use crate::model::Credential;
use crate::ports::{BlobSink, Dialer, FetchError, Fetcher, MembershipEvent, MeshCommands, NoPartialBlobs};
use crate::transfer::{self, Transfer, TransferDependencies};

/// Life of the verdicts and deadline of the test, far more than the test takes.
const LONG: Duration = Duration::from_secs(120);

/// The mesh and the transfer of one agent. No join task dials the peers that the mesh requests.
struct GossipNode {
    peer: Peer,
    mesh: Mesh,
    inventory: PeerInventory,
    transfer: Transfer,
    events: mpsc::Receiver<MembershipEvent>,
    _admitted: mpsc::Receiver<Peer>,
    _stop: DropGuard,
}

impl GossipNode {
    async fn start(identity: &Identity, admission: &Arc<StaticAdmission>) -> Self {
        let (node, shared_inventory, stop): (NodeName, _, _) =
            ("n".parse().unwrap(), SharedInventory::default(), CancellationToken::new());
        let config = mesh::Config { listen: loopback() };
        let started =
            mesh::start(config, node.clone(), identity, shared_inventory.clone(), admission.clone(), Metrics::new())
                .await;
        let (mesh, task, gossip) = started.unwrap();
        let config = transfer::Config {
            listen: loopback(),
            gossip_port: gossip.port(),
            node: node.clone(),
            concurrent_uploads: 1,
        };
        let (admitted_in, admitted) = mpsc::channel(8);
        let dependencies = TransferDependencies {
            admission: admission.clone(),
            store: Arc::new(MemoryStore::new()),
            partials: Arc::new(NoPartialBlobs),
            metrics: Metrics::new(),
            admitted_peers: admitted_in,
        };
        let transfer = Transfer::bind(config, identity, dependencies).unwrap();
        let peer = Peer { id: identity.peer_id(), node, zone: None, transfer: transfer.local_addr(), gossip };
        let (events_in, events) = mpsc::channel(64);
        tokio::spawn(task.run(events_in, stop.clone()));
        tokio::spawn(transfer.clone().run(stop.clone()));
        mesh.introduce(Credential::default(), peer.transfer, gossip, None).await;
        let inventory = PeerInventory::new(shared_inventory);
        Self { peer, mesh, inventory, transfer, events, _admitted: admitted, _stop: stop.drop_guard() }
    }

    async fn connect(&self, other: &Self) {
        self.mesh.admit(other.peer.clone(), LONG).await;
        other.mesh.admit(self.peer.clone(), LONG).await;
    }
}

struct DiscardingSink;

#[async_trait]
impl BlobSink for DiscardingSink {
    async fn append(&mut self, _: &[Bytes]) -> Result<(), StoreError> {
        Ok(())
    }
}

async fn fetch_from_an_unreachable_peer() {
    let identities = [Identity::generate(), Identity::generate(), Identity::generate()];
    let admission = Arc::new(StaticAdmission::new(identities.iter().map(Identity::peer_id)));
    let mut node = GossipNode::start(&identities[0], &admission).await;
    let (relay, theirs) =
        (GossipNode::start(&identities[1], &admission).await, GossipNode::start(&identities[2], &admission).await);
    // The two nodes are connected through the third alone, because the mesh does not suspect a
    // neighbor that has just answered a ping.
    node.connect(&relay).await;
    theirs.connect(&relay).await;
    let (peer, blob) = (theirs.peer.id, Digest::of(b"announced and absent"));
    theirs.mesh.announce(vec![InventoryChange::Added(InventoryItem::Blob(blob))]).await;
    let mut changes = node.inventory.changes();
    changes.wait_for(|_| node.inventory.blob_providers(blob) == [peer]).await.unwrap();

    let fetcher = PeerFetcher::new(node.transfer.clone(), node.mesh.clone(), UdpState::default(), Metrics::new());
    node.transfer.add_peer_address(&theirs.peer);
    let failed = fetcher.fetch(peer, blob, 1, &mut DiscardingSink).await;
    assert!(matches!(failed, Err(FetchError::Absent { .. })), "{failed:?}");
    // The mesh handles commands in order, so an earlier suspicion is in effect after the answer.
    node.mesh.status().await.unwrap();
    assert_eq!(node.inventory.blob_providers(blob), [peer], "a peer that answers is not suspected");

    // No agent answers at the peer's new address.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    node.transfer.remove_peer(peer);
    node.transfer.add_peer_address(&Peer { transfer: silent.local_addr().unwrap(), ..theirs.peer.clone() });
    let failed = fetcher.fetch(peer, blob, 1, &mut DiscardingSink).await;
    assert!(matches!(failed, Err(FetchError::Unreachable { .. })), "{failed:?}");
    // The peer is alive and refutes the suspicion soon, so the test waits for the event and not for
    // the state.
    while node.events.recv().await.expect("the mesh runs") != MembershipEvent::Down(peer) {}
}

#[tokio::test]
async fn an_unreachable_provider_is_suspected_and_a_provider_that_answers_with_an_error_stays() {
    tokio::time::timeout(LONG, fetch_from_an_unreachable_peer()).await.expect("the peer is not suspected in time");
}
