//! Recoveries over real meshes on loopback while UDP is blocked: honest providers, liars, and
//! providers that are no neighbours.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::admission::StaticAdmission;
use crate::agent::doubting::Doubting;
use crate::agent::progress::Progress;
use crate::agent::recover::RecoverError;
use crate::agent::ways::{OverMesh, Ways};
use crate::config::loopback;
use crate::decide::way::MAX_BLOB;
use crate::identity::Identity;
use crate::mesh::{self, Mesh, Table};
use crate::model::Credential;
use crate::ports::{FetchError, NoPartials, UdpStatus};
use crate::transfer::{self, Surroundings, Transfer};

const LONG: Duration = Duration::from_secs(120);

/// The mesh and the transfer of one agent. The transfer does not run, so nothing comes over QUIC.
struct Node {
    peer: Peer,
    store: Arc<MemoryStore>,
    mesh: Mesh,
    transfer: Transfer,
    holders: Holders,
    metrics: Metrics,
    _joined: mpsc::Receiver<Peer>,
    _stop: DropGuard,
}

impl Node {
    async fn start(identity: &Identity, admission: &Arc<StaticAdmission>) -> Self {
        let (node, table, stop): (NodeName, _, _) = ("n".parse().unwrap(), Table::default(), CancellationToken::new());
        let (metrics, store) = (Metrics::new(), Arc::new(MemoryStore::new()));
        let config = mesh::Config { listen: loopback() };
        let started =
            mesh::start(config, node.clone(), identity, table.clone(), admission.clone(), metrics.clone()).await;
        let (mesh, task, gossip) = started.unwrap();
        let config =
            transfer::Config { listen: loopback(), gossip_port: gossip.port(), node: node.clone(), max_serving: 16 };
        let (joined_in, joined) = mpsc::channel(8);
        let surroundings = Surroundings {
            admission: admission.clone(),
            store: store.clone(),
            partials: Arc::new(NoPartials),
            metrics: metrics.clone(),
            joined: joined_in,
        };
        let transfer = Transfer::bind(config, identity, surroundings).unwrap();
        let peer = Peer { id: identity.peer_id(), node, zone: None, transfer: transfer.local_addr(), gossip };
        let (news_in, mut news) = mpsc::channel(64);
        let task = task.serving(Arc::new(OverMesh(transfer.clone())));
        tokio::spawn(task.run(news_in, stop.clone()));
        tokio::spawn(async move { while news.recv().await.is_some() {} });
        mesh.introduce(Credential::default(), peer.transfer, gossip, None).await;
        let holders = Holders::new(table);
        Self { peer, store, mesh, transfer, holders, metrics, _joined: joined, _stop: stop.drop_guard() }
    }

    /// Announces all of the store.
    async fn announce(&self) {
        let mut items: Vec<_> = blobs_of(&*self.store).await.into_iter().map(Item::Blob).collect();
        for record in self.store.images().await.unwrap() {
            let Ok(Reference::Tag(repository, tag)) = record.name.parse() else { continue };
            items.push(Item::Image(repository, Some(tag), record.target.digest));
        }
        self.mesh.announce(items.into_iter().map(ContentChange::Added).collect()).await;
    }

    async fn knows(&self, image: &MadeImage, providers: usize) {
        let mut changes = self.holders.changes();
        let known = |holders: &Holders| holders.of_blob(image.root.digest).len() == providers;
        changes.wait_for(|_| known(&self.holders)).await.unwrap();
    }

    fn recoverer(&self) -> Recoverer {
        let harbour = Harbour::new();
        let quic =
            Doubting { transfer: self.transfer.clone(), mesh: self.mesh.clone(), udp: self.holders.udp().clone() };
        let ways = Arc::new(Ways::new(quic, self.metrics.clone()));
        let zone = watch::channel(None).1;
        let bring = Bring::new(
            self.peer.id,
            self.store.clone(),
            ways,
            self.holders.clone(),
            Underway::default(),
            zone,
            self.metrics.clone(),
        );
        let mut recoverer = harbour.recoverer_on(self.store.clone());
        recoverer.resolver.holders = self.holders.clone();
        recoverer.bring = Arc::new(bring);
        recoverer
    }

    /// A counter, by name and labels.
    fn counter(&self, name: &str) -> u64 {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or_default()
    }
}

/// An agent for which UDP is blocked, and neighbours of the agent that provide an image.
async fn port(providers: usize, layers: &[u64]) -> (Node, Vec<Node>, MadeImage) {
    let identities: Vec<_> = (0..=providers).map(|_| Identity::generate()).collect();
    let admission = Arc::new(StaticAdmission::new(identities.iter().map(Identity::peer_id)));
    let ours = Node::start(&identities[0], &admission).await;
    ours.holders.udp().replace(UdpStatus { blocked_since: Some(1), port: 4701, nodes: 3 });
    let (mut all, mut made) = (Vec::new(), None);
    for identity in &identities[1..] {
        let provider = Node::start(identity, &admission).await;
        made = Some(put_image(&*provider.store, &[IMAGE.to_owned()], layers, 7).await.unwrap());
        provider.announce().await;
        ours.mesh.admit(provider.peer.clone(), LONG).await;
        provider.mesh.admit(ours.peer.clone(), LONG).await;
        all.push(provider);
    }
    let made = made.expect("there is a provider");
    ours.knows(&made, providers).await;
    (ours, all, made)
}

async fn recover(node: &Node) -> Result<u64, RecoverError> {
    let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    node.recoverer().recover(&wanted, &progress, &CancellationToken::new()).await.map(|recovered| recovered.bytes)
}

async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, test).await.expect("the test is stuck")
}

#[tokio::test]
async fn an_image_comes_over_the_mesh_from_several_providers() {
    within(async {
        let (ours, providers, made) = port(2, &[3 << 20, 300, 0]).await;
        assert_eq!(recover(&ours).await.unwrap(), made.bytes());
        let over_tcp = ours.counter("lighterman_fetched_over_tcp_bytes_total");
        // A piece may have been requested of both.
        assert!(over_tcp >= made.bytes(), "{over_tcp}");
        assert_eq!(ours.counter("lighterman_fetched_bytes_total"), over_tcp, "nothing came over QUIC");
        assert!(providers.iter().all(|provider| provider.counter("lighterman_served_bytes_total") > 0));
    })
    .await;
}

#[tokio::test]
async fn a_provider_that_lies_over_tcp_is_found_by_the_digest_and_passed_over() {
    within(async {
        let (ours, providers, made) = port(2, &[3 << 20, 300]).await;
        for blob in &made.blobs {
            providers[0].store.spoil(blob.digest);
        }
        providers[0].store.spoil(made.root.digest);
        assert_eq!(recover(&ours).await.unwrap(), made.bytes());
        for blob in &made.blobs {
            let mut reader = ours.store.open(blob.digest).await.unwrap();
            let bytes = reader.read_at(0, usize::try_from(blob.size).unwrap()).await.unwrap();
            assert_eq!(Digest::of(&bytes), blob.digest);
        }
    })
    .await;
}

#[tokio::test]
async fn an_image_whose_one_provider_lies_over_tcp_does_not_come() {
    within(async {
        let (ours, providers, made) = port(1, &[200 << 10]).await;
        let layer = made.blobs.iter().max_by_key(|blob| blob.size).unwrap();
        providers[0].store.spoil(layer.digest);
        let RecoverError::Fetch { digest, attempts } = recover(&ours).await.unwrap_err() else { panic!("not fetched") };
        assert_eq!(digest, layer.digest);
        assert!(attempts.iter().any(FetchError::is_peers_fault), "{attempts:?}");
        assert_eq!(ours.counter("lighterman_peer_faults_total{fault=\"lied\"}"), 1);
        assert!(ours.store.blob(layer.digest).await.unwrap().is_none());
    })
    .await;
}

#[tokio::test]
async fn an_image_beyond_the_limit_is_refused_before_any_of_its_layers_comes() {
    within(async {
        let (ours, _providers, made) = port(1, &[MAX_BLOB + 1, 300]).await;
        let error = recover(&ours).await.unwrap_err();
        assert!(matches!(error, RecoverError::NeedsUdp { .. }), "{error}");
        assert!(error.to_string().contains(&MAX_BLOB.to_string()), "{error}");
        for blob in &made.blobs {
            assert!(ours.store.blob(blob.digest).await.unwrap().is_none());
        }
    })
    .await;
}
