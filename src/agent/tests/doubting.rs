//! Real meshes and doors on loopback: what a fetch that fails tells the mesh.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::admission::StaticAdmission;
use crate::agent::doubting::Doubting;
use crate::agent::udp_watch::UdpState;
use crate::config::loopback;
use crate::identity::Identity;
use crate::mesh::{self, Mesh, MeshNews, Table};
use crate::model::Credential;
use crate::ports::{BlobSink, FetchError, Fetcher, NoPartials};
use crate::transfer::{self, Surroundings, Transfer};

/// Far more than this takes, for the verdicts and for the test.
const LONG: Duration = Duration::from_secs(120);

/// A mesh and a door, and nobody who greets whom the mesh would like to meet.
struct Node {
    peer: Peer,
    mesh: Mesh,
    holders: Holders,
    transfer: Transfer,
    news: mpsc::Receiver<MeshNews>,
    _joined: mpsc::Receiver<Peer>,
    _stop: DropGuard,
}

impl Node {
    async fn start(identity: &Identity, admission: &Arc<StaticAdmission>) -> Self {
        let (node, table, stop): (NodeName, _, _) = ("n".parse().unwrap(), Table::default(), CancellationToken::new());
        let config = mesh::Config { listen: loopback() };
        let started =
            mesh::start(config, node.clone(), identity, table.clone(), admission.clone(), Metrics::new()).await;
        let (mesh, task, gossip) = started.unwrap();
        let config =
            transfer::Config { listen: loopback(), gossip_port: gossip.port(), node: node.clone(), max_serving: 1 };
        let (joined_in, joined) = mpsc::channel(8);
        let surroundings = Surroundings {
            admission: admission.clone(),
            store: Arc::new(MemoryStore::new()),
            partials: Arc::new(NoPartials),
            metrics: Metrics::new(),
            joined: joined_in,
        };
        let transfer = Transfer::bind(config, identity, surroundings).unwrap();
        let peer = Peer { id: identity.peer_id(), node, zone: None, transfer: transfer.local_addr(), gossip };
        let (news_in, news) = mpsc::channel(64);
        tokio::spawn(task.run(news_in, stop.clone()));
        tokio::spawn(transfer.clone().run(stop.clone()));
        mesh.introduce(Credential::default(), peer.transfer, gossip, None).await;
        let holders = Holders::new(table);
        Self { peer, mesh, holders, transfer, news, _joined: joined, _stop: stop.drop_guard() }
    }

    async fn meets(&self, other: &Self) {
        self.mesh.admit(other.peer.clone(), LONG).await;
        other.mesh.admit(self.peer.clone(), LONG).await;
    }
}

struct Nowhere;

#[async_trait]
impl BlobSink for Nowhere {
    async fn append(&mut self, _: &[Bytes]) -> Result<(), StoreError> {
        Ok(())
    }
}

async fn whom_a_fetch_cannot_reach() {
    let identities = [Identity::generate(), Identity::generate(), Identity::generate()];
    let admission = Arc::new(StaticAdmission::new(identities.iter().map(Identity::peer_id)));
    let mut ours = Node::start(&identities[0], &admission).await;
    let (between, theirs) =
        (Node::start(&identities[1], &admission).await, Node::start(&identities[2], &admission).await);
    // These two hear of each other through the third: a neighbour that has just answered a ping is not doubted.
    ours.meets(&between).await;
    theirs.meets(&between).await;
    let (peer, blob) = (theirs.peer.id, Digest::of(b"told, and not there"));
    theirs.mesh.announce(vec![ContentChange::Added(Item::Blob(blob))]).await;
    let mut changes = ours.holders.changes();
    changes.wait_for(|_| ours.holders.of_blob(blob) == [peer]).await.unwrap();

    let fetcher = Doubting { transfer: ours.transfer.clone(), mesh: ours.mesh.clone(), udp: UdpState::default() };
    ours.transfer.know(&theirs.peer);
    let failed = fetcher.fetch(peer, blob, 1, &mut Nowhere).await;
    assert!(matches!(failed, Err(FetchError::Absent { .. })), "{failed:?}");
    // It answers after everything that was said to it before.
    ours.mesh.status().await.unwrap();
    assert_eq!(ours.holders.of_blob(blob), [peer], "who answers is not doubted");

    // Its address is one where nobody answers.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    ours.transfer.forget(peer);
    ours.transfer.know(&Peer { transfer: silent.local_addr().unwrap(), ..theirs.peer.clone() });
    let failed = fetcher.fetch(peer, blob, 1, &mut Nowhere).await;
    assert!(matches!(failed, Err(FetchError::Unreachable { .. })), "{failed:?}");
    // It lives and will say so, so that it is a holder again soon: what counts is that it was none.
    while ours.news.recv().await.expect("the mesh runs") != MeshNews::Down(peer) {}
}

#[tokio::test]
async fn whom_a_fetch_cannot_reach_is_no_holder_here_until_it_is_heard_of_and_who_fails_otherwise_stays_one() {
    tokio::time::timeout(LONG, whom_a_fetch_cannot_reach()).await.expect("the peer is not doubted");
}
