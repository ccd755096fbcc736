//! The agent's flow on ports in memory: what happens to images and pods, said in sentences.

mod by_hand;
mod denied;
mod dns;
mod doubting;
mod evidence;
mod indexes;
mod joining;
mod killed;
mod mending;
mod needs;
mod own_image;
mod recovering;
mod resolving;
mod retaining;
mod room;
mod salvaging;
mod stalls;
mod swarming;
mod telling;
mod udp;
mod unpacking;
mod ways;

use std::sync::Arc;

use super::bring::Bring;
use super::holders::Holders;
use super::lead::Lead;
use super::recover::Recoverer;
use super::resolve::Resolver;
use super::swarm::Underway;
use crate::decide::reserve::Reservations;
use crate::decide::rules::{ResolveSettings, Rules};
use crate::metrics::Metrics;
use crate::model::{ContentChange, Item, MeshEvent, NodeName, Peer, PeerId, Zone};
use crate::oci::{Digest, Platform, Reference};
use crate::ports::{ContentStore, ImageRecord, Imports, StoreError};
use crate::testing::image::{MadeImage, put_image};
use crate::testing::{Behaviour, MemoryCluster, MemoryFetcher, MemoryRegistry, MemoryStore};
use tokio::sync::watch;

/// One node with peers around it.
struct Harbour {
    store: Arc<MemoryStore>,
    fetcher: Arc<MemoryFetcher>,
    holders: Holders,
    cluster: MemoryCluster,
    registry: Arc<MemoryRegistry>,
    underway: Underway,
    zone: Option<Zone>,
    metrics: Metrics,
    rules: watch::Sender<Arc<Rules>>,
    imports: watch::Sender<Imports>,
    resolve: ResolveSettings,
}

const IMAGE: &str = "r.test/shop/checkout:v1";

impl Harbour {
    fn new() -> Self {
        let mut rules = Rules::default();
        rules.budgets.min_free_bytes = 0;
        rules.budgets.collection_percent = 100;
        rules.budgets.eviction_percent = 0;
        let cluster = MemoryCluster::default();
        cluster.put_namespace("shop", &[("lighterman.dev/allow", "true")]);
        Self {
            store: Arc::new(MemoryStore::new()),
            fetcher: Arc::default(),
            holders: Holders::default(),
            cluster,
            registry: Arc::default(),
            underway: Underway::default(),
            zone: None,
            metrics: Metrics::new(),
            rules: watch::Sender::new(Arc::new(rules)),
            imports: watch::Sender::new(Imports::Allowed),
            resolve: ResolveSettings::default(),
        }
    }

    /// Changes what is in force.
    fn rule(&self, change: impl FnOnce(&mut Rules)) {
        self.rules.send_modify(|rules| change(Arc::make_mut(rules)));
    }

    /// A peer with a store of its own that holds an image under this name, and says so.
    async fn peer_with(&self, number: u8, name: &str, behaviour: Behaviour) -> MadeImage {
        self.peer_with_layers(number, name, &[3000, 200, 10], behaviour).await
    }

    /// The same, with layers of these sizes.
    async fn peer_with_layers(&self, number: u8, name: &str, layers: &[u64], behaviour: Behaviour) -> MadeImage {
        let store = Arc::new(MemoryStore::new());
        let reference: Reference = name.parse().unwrap();
        let image = put_image(&*store, &[reference.to_string()], layers, 7).await.unwrap();
        self.announce(number, store, behaviour).await;
        image
    }

    /// Everything in the store, as the peer's agent would announce it.
    async fn announce(&self, number: u8, store: Arc<MemoryStore>, behaviour: Behaviour) {
        self.announce_in(None, number, store, behaviour).await;
    }

    /// The same, by a peer in a zone.
    async fn announce_in(&self, zone: Option<Zone>, number: u8, store: Arc<MemoryStore>, behaviour: Behaviour) {
        let mut items: Vec<_> = blobs_of(&*store).await.into_iter().map(Item::Blob).collect();
        for record in store.images().await.unwrap() {
            if let Ok(Reference::Tag(repository, tag)) = record.name.parse() {
                items.push(Item::Image(repository, Some(tag), record.target.digest));
            }
        }
        let id = peer(number);
        let address = "127.0.0.1:1".parse().unwrap();
        let node: NodeName = format!("node-{number}").parse().unwrap();
        self.holders.apply(MeshEvent::Up(Peer { id, node, zone, transfer: address, gossip: address }));
        self.holders.apply(MeshEvent::Snapshot(id, items));
        self.fetcher.put_peer(id, store, behaviour);
    }

    fn recoverer(&self) -> Recoverer {
        self.recoverer_on(Arc::clone(&self.store) as _)
    }

    fn recoverer_on(&self, store: Arc<dyn ContentStore>) -> Recoverer {
        let me = peer(0);
        let node: NodeName = "here".parse().unwrap();
        let claims = Arc::new(self.cluster.claims_of(node.clone()));
        Recoverer {
            store: Arc::clone(&store),
            resolver: Resolver {
                holders: self.holders.clone(),
                registry: Arc::clone(&self.registry) as _,
                cluster: Arc::new(self.cluster.clone()),
                platform: Platform::of_this_node(),
                settings: self.resolve.clone(),
            },
            bring: Arc::new(Bring::new(
                me,
                store,
                Arc::clone(&self.fetcher) as _,
                self.holders.clone(),
                self.underway.clone(),
                watch::channel(self.zone.clone()).1,
                self.metrics.clone(),
            )),
            lead: Arc::new(Lead::new(claims, self.holders.clone(), self.metrics.clone(), node, me)),
            rules: self.rules.subscribe(),
            platform: Platform::of_this_node(),
            room: Reservations::default(),
            imports: self.imports.subscribe(),
            unpacking: None,
        }
    }

    async fn record_names(&self) -> Vec<String> {
        let images: Result<Vec<ImageRecord>, StoreError> = self.store.images().await;
        let mut names: Vec<_> = images.unwrap().into_iter().map(|record| record.name).collect();
        names.sort();
        names
    }

    fn counted(&self, line: &str) -> bool {
        String::from_utf8(self.metrics.render()).unwrap().lines().any(|have| have == line)
    }
}

fn peer(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

async fn blobs_of(store: &dyn ContentStore) -> Vec<Digest> {
    store.blobs().await.unwrap().into_iter().map(|blob| blob.digest).collect()
}
