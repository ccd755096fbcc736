//! Recoveries over real meshes on loopback while UDP is blocked: honest providers, lying providers,
//! and the size limit.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::admission::StaticAdmission;
use crate::agent::recovery::mesh_range_fetcher::MeshRangeServer;
use crate::agent::recovery::peer_fetcher::PeerFetcher;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::config::loopback;
use crate::control::UdpStatus;
use crate::decide::transport_choice::MAX_BLOB;
use crate::identity::Identity;
use crate::mesh::{self, Mesh, SharedInventory};
use crate::model::Credential;
use crate::ports::{Blobs, FetchError, ImageRecords, MeshCommands, NoPartialBlobs};
use crate::transfer::{self, Transfer, TransferDependencies};

const LONG: Duration = Duration::from_secs(120);

/// The mesh and the transfer of one agent. The transfer does not run, so QUIC carries no bytes.
struct MeshNode {
    peer: Peer,
    store: Arc<MemoryStore>,
    mesh: Mesh,
    transfer: Transfer,
    inventory: PeerInventory,
    metrics: Metrics,
    _admitted: mpsc::Receiver<Peer>,
    _stop: DropGuard,
}

impl MeshNode {
    async fn start(identity: &Identity, admission: &Arc<StaticAdmission>) -> Self {
        let (node, shared_inventory, stop): (NodeName, _, _) =
            ("n".parse().unwrap(), SharedInventory::default(), CancellationToken::new());
        let (metrics, store) = (Metrics::new(), Arc::new(MemoryStore::new()));
        let config = mesh::Config { listen: loopback() };
        let started =
            mesh::start(config, node.clone(), identity, shared_inventory.clone(), admission.clone(), metrics.clone())
                .await;
        let (mesh, task, gossip) = started.unwrap();
        let config = transfer::Config {
            listen: loopback(),
            gossip_port: gossip.port(),
            node: node.clone(),
            concurrent_uploads: 16,
        };
        let (admitted_in, admitted) = mpsc::channel(8);
        let dependencies = TransferDependencies {
            admission: admission.clone(),
            store: store.clone(),
            partials: Arc::new(NoPartialBlobs),
            metrics: metrics.clone(),
            admitted_peers: admitted_in,
        };
        let transfer = Transfer::bind(config, identity, dependencies).unwrap();
        let peer = Peer { id: identity.peer_id(), node, zone: None, transfer: transfer.local_addr(), gossip };
        let (events_in, mut events) = mpsc::channel(64);
        let task = task.with_range_server(Arc::new(MeshRangeServer(transfer.clone())));
        tokio::spawn(task.run(events_in, stop.clone()));
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        mesh.introduce(Credential::default(), peer.transfer, gossip, None).await;
        let inventory = PeerInventory::new(shared_inventory);
        Self { peer, store, mesh, transfer, inventory, metrics, _admitted: admitted, _stop: stop.drop_guard() }
    }

    /// Announces every blob and every tagged image of the store.
    async fn announce(&self) {
        let mut items: Vec<_> = blobs_of(&*self.store).await.into_iter().map(InventoryItem::Blob).collect();
        for record in self.store.images().await.unwrap() {
            let Ok(Reference::Tag(repository, tag)) = record.name.parse() else { continue };
            items.push(InventoryItem::Image(repository, Some(tag), record.target.digest));
        }
        self.mesh.announce(items.into_iter().map(InventoryChange::Added).collect()).await;
    }

    async fn wait_for_providers(&self, image: &MadeImage, providers: usize) {
        let mut changes = self.inventory.changes();
        let known = |inventory: &PeerInventory| inventory.blob_providers(image.target.digest).len() == providers;
        changes.wait_for(|_| known(&self.inventory)).await.unwrap();
    }

    fn recoverer(&self) -> Recoverer {
        let udp = self.inventory.udp().clone();
        let fetcher = PeerFetcher::new(self.transfer.clone(), self.mesh.clone(), udp, self.metrics.clone());
        RecoveryDependencies {
            peer: self.peer.id,
            fetcher: Arc::new(fetcher),
            inventory: self.inventory.clone(),
            metrics: self.metrics.clone(),
            ..TestNode::new().recovery_dependencies(self.store.clone())
        }
        .build()
    }

    /// The value of the counter with this name and these labels, or 0.
    fn counter(&self, name: &str) -> u64 {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or_default()
    }
}

/// An agent for which UDP is blocked, and neighbors of the agent that provide an image.
async fn node_with_blocked_udp(providers: usize, layers: &[u64]) -> (MeshNode, Vec<MeshNode>, MadeImage) {
    let identities: Vec<_> = (0..=providers).map(|_| Identity::generate()).collect();
    let admission = Arc::new(StaticAdmission::new(identities.iter().map(Identity::peer_id)));
    let node = MeshNode::start(&identities[0], &admission).await;
    node.inventory.udp().replace(UdpStatus { blocked_since: Some(1), port: 4701, nodes: 3 });
    let (mut all, mut image) = (Vec::new(), None);
    for identity in &identities[1..] {
        let provider = MeshNode::start(identity, &admission).await;
        image = Some(put_image(&*provider.store, &[IMAGE.to_owned()], layers, 7).await.unwrap());
        provider.announce().await;
        node.mesh.admit(provider.peer.clone(), LONG).await;
        provider.mesh.admit(node.peer.clone(), LONG).await;
        all.push(provider);
    }
    let image = image.expect("there is a provider");
    node.wait_for_providers(&image, providers).await;
    (node, all, image)
}

async fn recover(node: &MeshNode) -> Result<u64, RecoverError> {
    let (request, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    node.recoverer().recover(&request, &progress, &CancellationToken::new()).await.map(|recovered| recovered.bytes)
}

async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, test).await.expect("the test is stuck")
}

#[tokio::test]
async fn an_image_comes_over_the_mesh_from_several_providers() {
    within(async {
        let (node, providers, image) = node_with_blocked_udp(2, &[3 << 20, 300, 0]).await;
        assert_eq!(recover(&node).await.unwrap(), image.bytes());
        let over_tcp = node.counter("lighterman_fetched_over_tcp_bytes_total");
        // A hedged request may fetch a piece from both.
        assert!(over_tcp >= image.bytes(), "{over_tcp}");
        assert_eq!(node.counter("lighterman_fetched_bytes_total"), over_tcp, "nothing came over QUIC");
        assert!(providers.iter().all(|provider| provider.counter("lighterman_served_bytes_total") > 0));
    })
    .await;
}

#[tokio::test]
async fn a_provider_that_lies_over_tcp_is_found_by_the_digest_and_passed_over() {
    within(async {
        let (node, providers, image) = node_with_blocked_udp(2, &[3 << 20, 300]).await;
        for blob in &image.blobs {
            providers[0].store.corrupt(blob.digest);
        }
        providers[0].store.corrupt(image.target.digest);
        assert_eq!(recover(&node).await.unwrap(), image.bytes());
        for blob in &image.blobs {
            let mut reader = node.store.open(blob.digest).await.unwrap();
            let bytes = reader.read_at(0, usize::try_from(blob.size).unwrap()).await.unwrap();
            assert_eq!(Digest::of(&bytes), blob.digest);
        }
    })
    .await;
}

#[tokio::test]
async fn an_image_whose_only_provider_lies_over_tcp_is_not_recovered() {
    within(async {
        let (node, providers, image) = node_with_blocked_udp(1, &[200 << 10]).await;
        let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
        providers[0].store.corrupt(layer.digest);
        let RecoverError::Fetch { digest, attempts } = recover(&node).await.unwrap_err() else { panic!("not fetched") };
        assert_eq!(digest, layer.digest);
        assert!(attempts.iter().any(FetchError::is_peer_fault), "{attempts:?}");
        assert_eq!(node.counter("lighterman_peer_faults_total{fault=\"lied\"}"), 1);
        assert!(node.store.blob(layer.digest).await.unwrap().is_none());
    })
    .await;
}

#[tokio::test]
async fn an_image_over_the_tcp_limit_is_rejected_before_a_layer_is_fetched() {
    within(async {
        let (node, _providers, image) = node_with_blocked_udp(1, &[MAX_BLOB + 1, 300]).await;
        let error = recover(&node).await.unwrap_err();
        assert!(matches!(error, RecoverError::NeedsUdp { .. }), "{error}");
        assert!(error.to_string().contains(&MAX_BLOB.to_string()), "{error}");
        for blob in &image.blobs {
            assert!(node.store.blob(blob.digest).await.unwrap().is_none());
        }
    })
    .await;
}
