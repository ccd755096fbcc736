//! The command's client code against an agent on in-memory ports, over a real socket.

use std::sync::Arc;

use tokio::sync::mpsc;

use async_trait::async_trait;

use super::*;
use crate::agent::operator::manual_pull::ManualPuller;
use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::builder::RecoveryDependencies;
use crate::agent::recovery::progress::RecoveryTracker;
use crate::agent::supervisor::Supervisor;
use crate::control::{Config, ControlServer};
use crate::control::{Status, StatusSource};
use crate::metrics::Metrics;
use crate::model::{InventoryItem, MeshEvent, NodeName, Peer, PeerId};
use crate::ports::{Blobs, ImageRecords};
use crate::testing::image::{MadeImage, put_image};
use crate::testing::{Behaviour, MemoryFetcher, MemoryStore};

struct EmptyStatus;

#[async_trait]
impl StatusSource for EmptyStatus {
    async fn status(&self) -> Status {
        Status::default()
    }
}

const IMAGE: &str = "r.test/shop/checkout:v1";

/// The control socket of an agent with one peer, which has an image.
struct TestAgent {
    client: Client,
    store: Arc<MemoryStore>,
    image: MadeImage,
    _supervisor: Supervisor,
    _folder: tempfile::TempDir,
}

async fn start_agent() -> TestAgent {
    let (me, peer) = (PeerId::from_public_key([0; 32]), PeerId::from_public_key([1; 32]));
    let (node, metrics): (NodeName, _) = ("here".parse().unwrap(), Metrics::new());
    let (store, peer_store) = (Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new()));
    let image = put_image(&*peer_store, &[IMAGE.into()], &[90_000, 5], 1).await.unwrap();
    let (fetcher, inventory) = (Arc::new(MemoryFetcher::default()), PeerInventory::default());
    let address = "127.0.0.1:1".parse().unwrap();
    inventory.apply(MeshEvent::Up(Peer {
        id: peer,
        node: "there".parse().unwrap(),
        zone: None,
        transfer: address,
        gossip: address,
    }));
    let Ok(Reference::Tag(repository, tag)) = IMAGE.parse() else { panic!("a tag") };
    let blobs = peer_store.blobs().await.unwrap().into_iter().map(|blob| InventoryItem::Blob(blob.digest));
    let items = blobs.chain([InventoryItem::Image(repository, Some(tag), image.target.digest)]).collect();
    inventory.apply(MeshEvent::Snapshot(peer, items));
    fetcher.put_peer(peer, peer_store, Behaviour::Honest);
    let dependencies = RecoveryDependencies::on_fakes(me, node, Arc::clone(&store) as _, fetcher, inventory);
    let recoverer = RecoveryDependencies { metrics: metrics.clone(), ..dependencies }.build();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let (pull_sender, pulls) = mpsc::channel(4);
    let control =
        ControlServer::bind(Config { socket: socket.clone() }, Arc::new(EmptyStatus), pull_sender).await.unwrap();
    let manual_puller =
        ManualPuller { recoverer: Arc::new(recoverer), tracker: RecoveryTracker::default(), metrics, dry_run: false };
    let mut supervisor = Supervisor::default();
    supervisor.spawn("control", |stop| control.run(stop));
    supervisor.spawn("by hand", |stop| manual_puller.run(pulls, stop));
    TestAgent { client: Client::new(&socket), store, image, _supervisor: supervisor, _folder: folder }
}

#[tokio::test]
async fn a_manual_pull_fetches_the_image_and_reports_every_step() {
    let agent = start_agent().await;
    let mut reported = Vec::new();
    let last = pull(&agent.client, &IMAGE.parse().unwrap(), false, |progress| reported.push(progress.clone())).await;
    let Ok(PullProgress::Done { bytes, from, .. }) = last else { panic!("{last:?}") };
    assert_eq!((bytes, from), (agent.image.bytes(), vec!["there".to_owned()]));
    assert!(matches!(reported[..2], [PullProgress::Resolved { .. }, PullProgress::Planned { missing_blobs: 3, .. }]));
    assert!(matches!(reported[reported.len() - 2], PullProgress::Bytes { done, total } if done == total));
    assert!(agent.store.images().await.unwrap().iter().any(|record| record.name == IMAGE));
}

#[tokio::test]
async fn a_dry_run_ends_with_the_resolved_image() {
    let agent = start_agent().await;
    let last = pull(&agent.client, &IMAGE.parse().unwrap(), true, |_| {}).await;
    let Ok(PullProgress::Resolved { digest, providers, .. }) = last else { panic!("{last:?}") };
    assert_eq!((digest, providers), (agent.image.target.digest.to_string(), vec!["there".to_owned()]));
    assert!(agent.store.blobs().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_image_without_a_provider_is_a_failure_that_names_the_image() {
    let agent = start_agent().await;
    let last = pull(&agent.client, &"r.test/shop/basket:v1".parse().unwrap(), false, |_| {}).await;
    let Ok(PullProgress::Failed { kind: PullFailure::NoProvider, message, .. }) = last else { panic!("{last:?}") };
    assert!(message.contains("r.test/shop/basket:v1"), "{message}");
}
