//! The agent's flow on ports in memory: what happens to images and pods, said in sentences.

mod blocked_udp;
mod denied_rights;
mod disk_space;
mod dns_queries;
mod indexes;
mod introducing;
mod joining;
mod killed_recovery;
mod layer_unpacking;
mod manual_pull;
mod membership;
mod notifications;
mod outage_evidence;
mod own_image;
mod pod_controller;
mod pod_needs;
mod recovery;
mod reference_resolution;
mod repair;
mod retained_layers;
mod stalled_pulls;
mod swarm;
mod tcp_fallback;
mod unreachable_providers;

use std::sync::Arc;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::builder::RecoveryDependencies;
use crate::agent::recovery::downloads::Downloads;
use crate::agent::recovery::recover::Recoverer;
use crate::decide::policy::{Policy, ResolveOptions};
use crate::metrics::Metrics;
use crate::model::{InventoryChange, InventoryItem, MeshEvent, NodeName, Peer, PeerId, Zone};
use crate::oci::{Digest, Platform, Reference};
use crate::ports::{ContentStore, ImageRecord, ImageRecords, ImportPermission, StoreError};
use crate::testing::image::{MadeImage, put_image};
use crate::testing::{Behaviour, MemoryCluster, MemoryFetcher, MemoryRegistry, MemoryStore};
use tokio::sync::watch;

/// One node with peers around it.
struct TestNode {
    store: Arc<MemoryStore>,
    fetcher: Arc<MemoryFetcher>,
    inventory: PeerInventory,
    cluster: MemoryCluster,
    registry: Arc<MemoryRegistry>,
    downloads: Downloads,
    zone: Option<Zone>,
    metrics: Metrics,
    policy: watch::Sender<Arc<Policy>>,
    imports: watch::Sender<ImportPermission>,
    resolve: ResolveOptions,
}

const IMAGE: &str = "r.test/shop/checkout:v1";

impl TestNode {
    fn new() -> Self {
        let mut policy = Policy::default();
        policy.budgets.min_free_bytes = 0;
        policy.budgets.image_gc_percent = 100;
        policy.budgets.eviction_percent = 0;
        let cluster = MemoryCluster::default();
        cluster.put_namespace("shop", &[("lighterman.dev/allow", "true")]);
        Self {
            store: Arc::new(MemoryStore::new()),
            fetcher: Arc::default(),
            inventory: PeerInventory::default(),
            cluster,
            registry: Arc::default(),
            downloads: Downloads::default(),
            zone: None,
            metrics: Metrics::new(),
            policy: watch::Sender::new(Arc::new(policy)),
            imports: watch::Sender::new(ImportPermission::Allowed),
            resolve: ResolveOptions::default(),
        }
    }

    /// Changes what is in force.
    fn change_policy(&self, change: impl FnOnce(&mut Policy)) {
        self.policy.send_modify(|policy| change(Arc::make_mut(policy)));
    }

    /// A peer with a store of its own that holds an image under this name, and says so.
    async fn add_provider(&self, number: u8, name: &str, behaviour: Behaviour) -> MadeImage {
        self.add_provider_with_layers(number, name, &[3000, 200, 10], behaviour).await
    }

    /// The same, with layers of these sizes.
    async fn add_provider_with_layers(
        &self,
        number: u8,
        name: &str,
        layers: &[u64],
        behaviour: Behaviour,
    ) -> MadeImage {
        let store = Arc::new(MemoryStore::new());
        let reference: Reference = name.parse().unwrap();
        let image = put_image(&*store, &[reference.to_string()], layers, 7).await.unwrap();
        self.announce_store(number, store, behaviour).await;
        image
    }

    /// Everything in the store, as the peer's agent would announce it.
    async fn announce_store(&self, number: u8, store: Arc<MemoryStore>, behaviour: Behaviour) {
        self.announce_store_in_zone(None, number, store, behaviour).await;
    }

    /// The same, by a peer in a zone.
    async fn announce_store_in_zone(
        &self,
        zone: Option<Zone>,
        number: u8,
        store: Arc<MemoryStore>,
        behaviour: Behaviour,
    ) {
        let mut items: Vec<_> = blobs_of(&*store).await.into_iter().map(InventoryItem::Blob).collect();
        for record in store.images().await.unwrap() {
            if let Ok(Reference::Tag(repository, tag)) = record.name.parse() {
                items.push(InventoryItem::Image(repository, Some(tag), record.target.digest));
            }
        }
        let id = peer(number);
        let address = "127.0.0.1:1".parse().unwrap();
        let node: NodeName = format!("node-{number}").parse().unwrap();
        self.inventory.apply(MeshEvent::Up(Peer { id, node, zone, transfer: address, gossip: address }));
        self.inventory.apply(MeshEvent::Snapshot(id, items));
        self.fetcher.put_peer(id, store, behaviour);
    }

    fn recoverer(&self) -> Recoverer {
        self.recoverer_on(Arc::clone(&self.store) as _)
    }

    fn recoverer_on(&self, store: Arc<dyn ContentStore>) -> Recoverer {
        self.recovery_dependencies(store).build()
    }

    fn recovery_dependencies(&self, store: Arc<dyn ContentStore>) -> RecoveryDependencies {
        let node: NodeName = "here".parse().unwrap();
        let (fetcher, inventory) = (Arc::clone(&self.fetcher) as _, self.inventory.clone());
        RecoveryDependencies {
            downloads: self.downloads.clone(),
            zone: watch::channel(self.zone.clone()).1,
            registry: Arc::clone(&self.registry) as _,
            cluster: Arc::new(self.cluster.clone()),
            claims: Arc::new(self.cluster.claims_of(node.clone())),
            policy: self.policy.subscribe(),
            resolve: self.resolve.clone(),
            imports: self.imports.subscribe(),
            metrics: self.metrics.clone(),
            ..RecoveryDependencies::on_fakes(peer(0), node, store, fetcher, inventory)
        }
    }

    async fn record_names(&self) -> Vec<String> {
        let images: Result<Vec<ImageRecord>, StoreError> = self.store.images().await;
        let mut names: Vec<_> = images.unwrap().into_iter().map(|record| record.name).collect();
        names.sort();
        names
    }

    fn has_metric(&self, line: &str) -> bool {
        String::from_utf8(self.metrics.render()).unwrap().lines().any(|have| have == line)
    }
}

fn peer(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

async fn blobs_of(store: &dyn ContentStore) -> Vec<Digest> {
    store.blobs().await.unwrap().into_iter().map(|blob| blob.digest).collect()
}
