//! A node whose content is in a containerd, with one peer in memory.

use std::sync::Arc;

use lighterman::agent::blob_fetcher::BlobFetcher;
use lighterman::agent::claim_coordinator::ClaimCoordinator;
use lighterman::agent::inventory_view::PeerInventory;
use lighterman::agent::progress::Progress;
use lighterman::agent::recover::{RecoverError, RecoveredImage, Recoverer};
use lighterman::agent::reference_resolver::ReferenceResolver;
use lighterman::agent::swarm::Downloads;
use lighterman::containerd::ContainerdStore;
use lighterman::decide::disk_reservations::Reservations;
use lighterman::decide::policy::{Policy, ResolveOptions};
use lighterman::metrics::Metrics;
use lighterman::model::{InventoryChange, InventoryItem, MeshEvent, NodeName, Peer, PeerId};
use lighterman::oci::{Descriptor, Digest, Platform, Reference};
use lighterman::ports::{ContentStore, ImportPermission};
use lighterman::testing::image::{MadeImage, Recipe, make_image};
use lighterman::testing::{Behaviour, MemoryCluster, MemoryFetcher, MemoryRegistry, MemoryStore};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the node knows, and from whom.
pub(crate) struct TestNode {
    peer_store: Arc<MemoryStore>,
    fetcher: Arc<MemoryFetcher>,
    inventory: PeerInventory,
}

impl TestNode {
    pub(crate) fn new() -> Self {
        let (peer, fetcher) = (Arc::new(MemoryStore::new()), Arc::new(MemoryFetcher::default()));
        let holders = PeerInventory::default();
        let (id, node, address) =
            (peer_id(1), "elsewhere".parse::<NodeName>().unwrap(), "127.0.0.1:1".parse().unwrap());
        holders.apply(MeshEvent::Up(Peer { id, node, zone: None, transfer: address, gossip: address }));
        fetcher.put_peer(id, Arc::clone(&peer) as _, Behaviour::Honest);
        Self { peer_store: peer, fetcher, inventory: holders }
    }

    /// The peer has this image and says so.
    pub(crate) async fn announce_image(&self, name: &str, recipe: &Recipe, seed: u64) -> MadeImage {
        let image = make_image(&*self.peer_store, &[name.into()], recipe, seed).await.unwrap();
        let Ok(Reference::Tag(repository, tag)) = name.parse() else { panic!("{name} has no tag") };
        let blobs = self.peer_store.blobs().await.unwrap().into_iter().map(|blob| InventoryItem::Blob(blob.digest));
        let mut items: Vec<_> = blobs.collect();
        items.push(InventoryItem::Image(repository, Some(tag), image.target.digest));
        self.inventory.apply(MeshEvent::Changed(peer_id(1), items.into_iter().map(InventoryChange::Added).collect()));
        image
    }

    pub(crate) fn recoverer(&self, store: Arc<dyn ContentStore>) -> Recoverer {
        let (me, node) = (peer_id(0), "here".parse::<NodeName>().unwrap());
        let mut rules = Policy::default();
        // Whatever the machine's disk is like.
        (rules.budgets.min_free_bytes, rules.budgets.eviction_percent) = (0, 0);
        rules.budgets.image_gc_percent = 100;
        let metrics = Metrics::new();
        let claims = Arc::new(MemoryCluster::default().claims_of(node.clone()));
        Recoverer {
            store: Arc::clone(&store),
            resolver: ReferenceResolver {
                inventory: self.inventory.clone(),
                registry: Arc::new(MemoryRegistry::default()),
                cluster: Arc::new(MemoryCluster::default()),
                platform: Platform::of_this_node(),
                options: ResolveOptions::default(),
            },
            blob_fetcher: Arc::new(BlobFetcher::new(
                me,
                store,
                Arc::clone(&self.fetcher) as _,
                self.inventory.clone(),
                Downloads::default(),
                watch::channel(None).1,
                metrics.clone(),
            )),
            claims: Arc::new(ClaimCoordinator::new(claims, self.inventory.clone(), metrics, node, me)),
            policy: watch::channel(Arc::new(rules)).1,
            platform: Platform::of_this_node(),
            reservations: Reservations::default(),
            imports: watch::channel(ImportPermission::Allowed).1,
            layer_unpacker: None,
        }
    }

    pub(crate) async fn recover(&self, store: &ContainerdStore, name: &str) -> Result<RecoveredImage, RecoverError> {
        let recoverer = self.recoverer(Arc::new(store.clone()));
        recoverer
            .recover(&name.parse::<Reference>().unwrap().into(), &Progress::default(), &CancellationToken::new())
            .await
    }

    /// A blob's bytes, as the peer has them.
    pub(crate) async fn bytes_of(&self, blob: &Descriptor) -> Vec<u8> {
        let mut reader = self.peer_store.open(blob.digest).await.unwrap();
        reader.read_at(0, 64 << 20).await.unwrap().to_vec()
    }
}

/// The manifest, if the root is an index, the configuration, the layers, and the root.
pub(crate) fn every_blob(image: &MadeImage) -> impl Iterator<Item = &Descriptor> {
    image.blobs.iter().chain([&image.target])
}

/// Has everything collected that nothing holds, and says which blobs of the image are not there any more, or wrong.
pub(crate) async fn blobs_lost_to_gc(store: &ContainerdStore, image: &MadeImage) -> Vec<String> {
    let pin = store.pin(std::time::Duration::from_secs(60)).await.unwrap();
    store.release_and_collect(pin).await.unwrap();
    let mut lost = Vec::new();
    for blob in every_blob(image) {
        let right = match store.open(blob.digest).await {
            Ok(_) => Digest::of(&super::read(store, blob.digest).await) == blob.digest,
            Err(_) => false,
        };
        if !right {
            lost.push(format!("{} {}", blob.media_type, blob.digest));
        }
    }
    lost
}

fn peer_id(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}
