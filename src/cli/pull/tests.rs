//! An agent on ports in memory, asked over a real socket by the code that the command runs.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use async_trait::async_trait;

use super::*;
use crate::agent::bring::Bring;
use crate::agent::by_hand::ByHand;
use crate::agent::holders::Holders;
use crate::agent::lead::Lead;
use crate::agent::progress::Board;
use crate::agent::recover::Recoverer;
use crate::agent::resolve::Resolver;
use crate::agent::supervisor::Supervisor;
use crate::agent::swarm::Underway;
use crate::control::{Config, Control};
use crate::decide::reserve::Reservations;
use crate::decide::rules::{ResolveSettings, Rules};
use crate::metrics::Metrics;
use crate::model::{Item, MeshEvent, NodeName, Peer, PeerId};
use crate::oci::Platform;
use crate::ports::{ContentStore, Imports, Status, StatusSource};
use crate::testing::image::{MadeImage, put_image};
use crate::testing::{Behaviour, MemoryCluster, MemoryFetcher, MemoryRegistry, MemoryStore};

struct Nothing;

#[async_trait]
impl StatusSource for Nothing {
    async fn status(&self) -> Status {
        Status::default()
    }
}

const IMAGE: &str = "r.test/shop/checkout:v1";

/// What of an agent answers people, and a peer that holds an image.
struct Agent {
    client: Client,
    store: Arc<MemoryStore>,
    image: MadeImage,
    _supervisor: Supervisor,
    _folder: tempfile::TempDir,
}

async fn agent() -> Agent {
    let (me, peer) = (PeerId::from_public_key([0; 32]), PeerId::from_public_key([1; 32]));
    let (node, metrics): (NodeName, _) = ("here".parse().unwrap(), Metrics::new());
    let (store, theirs) = (Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new()));
    let image = put_image(&*theirs, &[IMAGE.into()], &[90_000, 5], 1).await.unwrap();
    let (fetcher, holders) = (Arc::new(MemoryFetcher::default()), Holders::default());
    let address = "127.0.0.1:1".parse().unwrap();
    holders.apply(MeshEvent::Up(Peer {
        id: peer,
        node: "there".parse().unwrap(),
        zone: None,
        transfer: address,
        gossip: address,
    }));
    let Ok(Reference::Tag(repository, tag)) = IMAGE.parse() else { panic!("a tag") };
    let blobs = theirs.blobs().await.unwrap().into_iter().map(|blob| Item::Blob(blob.digest));
    let items = blobs.chain([Item::Image(repository, Some(tag), image.root.digest)]).collect();
    holders.apply(MeshEvent::Snapshot(peer, items));
    fetcher.put_peer(peer, theirs, Behaviour::Honest);
    let claims = Arc::new(MemoryCluster::default().claims_of(node.clone()));
    let recoverer = Recoverer {
        store: Arc::clone(&store) as _,
        resolver: Resolver {
            holders: holders.clone(),
            registry: Arc::new(MemoryRegistry::default()),
            cluster: Arc::new(MemoryCluster::default()),
            platform: Platform::of_this_node(),
            settings: ResolveSettings::default(),
        },
        bring: Arc::new(Bring::new(
            me,
            Arc::clone(&store) as _,
            fetcher,
            holders.clone(),
            Underway::default(),
            watch::channel(None).1,
            metrics.clone(),
        )),
        lead: Arc::new(Lead::new(claims, holders, metrics.clone(), node, me)),
        rules: watch::channel(Arc::new(Rules::default())).1,
        platform: Platform::of_this_node(),
        room: Reservations::default(),
        imports: watch::channel(Imports::Allowed).1,
        unpacking: None,
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let (pulls_in, pulls) = mpsc::channel(4);
    let control = Control::bind(Config { socket: socket.clone() }, Arc::new(Nothing), pulls_in).await.unwrap();
    let by_hand = ByHand { recoverer: Arc::new(recoverer), board: Board::default(), metrics, dry_run: false };
    let mut supervisor = Supervisor::default();
    supervisor.spawn("control", |stop| control.run(stop));
    supervisor.spawn("by hand", |stop| by_hand.run(pulls, stop));
    Agent { client: Client::new(&socket), store, image, _supervisor: supervisor, _folder: folder }
}

#[tokio::test]
async fn an_image_is_pulled_by_hand_and_every_step_is_told() {
    let agent = agent().await;
    let mut told = Vec::new();
    let last = pull(&agent.client, &IMAGE.parse().unwrap(), false, |progress| told.push(progress.clone())).await;
    let Ok(PullProgress::Done { bytes, from, .. }) = last else { panic!("{last:?}") };
    assert_eq!((bytes, from), (agent.image.bytes(), vec!["there".to_owned()]));
    assert!(matches!(told[..2], [PullProgress::Resolved { .. }, PullProgress::Planned { missing_blobs: 3, .. }]));
    assert!(matches!(told[told.len() - 2], PullProgress::Bytes { done, total } if done == total));
    assert!(agent.store.images().await.unwrap().iter().any(|record| record.name == IMAGE));
}

#[tokio::test]
async fn a_dry_run_ends_with_what_the_image_is() {
    let agent = agent().await;
    let last = pull(&agent.client, &IMAGE.parse().unwrap(), true, |_| {}).await;
    let Ok(PullProgress::Resolved { digest, providers, .. }) = last else { panic!("{last:?}") };
    assert_eq!((digest, providers), (agent.image.root.digest.to_string(), vec!["there".to_owned()]));
    assert!(agent.store.blobs().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_image_that_nobody_holds_is_a_failure_that_names_it() {
    let agent = agent().await;
    let last = pull(&agent.client, &"r.test/shop/basket:v1".parse().unwrap(), false, |_| {}).await;
    let Ok(PullProgress::Failed { kind: PullFailure::NoProvider, message, .. }) = last else { panic!("{last:?}") };
    assert!(message.contains("r.test/shop/basket:v1"), "{message}");
}
