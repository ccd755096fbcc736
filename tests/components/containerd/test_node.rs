//! A node whose content is in a containerd, with one peer in memory.

use std::sync::Arc;

use lighterman::agent::peers::inventory_view::PeerInventory;
use lighterman::agent::recovery::builder::RecoveryDependencies;
use lighterman::agent::recovery::progress::Progress;
use lighterman::agent::recovery::recover::Recoverer;
use lighterman::agent::recovery::recover_error::RecoverError;
use lighterman::containerd::ContainerdStore;
use lighterman::model::{InventoryChange, InventoryItem, MeshEvent, NodeName, Peer, PeerId, RecoveredImage};
use lighterman::oci::{Descriptor, Digest, Reference};
use lighterman::ports::{Blobs, ContentStore, Pins};
use lighterman::testing::image::{MadeImage, Recipe, make_image};
use lighterman::testing::{Behaviour, MemoryFetcher, MemoryStore, policy_without_disk_limits};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Inventory and fetcher of the node, and the store of the peer.
pub(crate) struct TestNode {
    peer_store: Arc<MemoryStore>,
    fetcher: Arc<MemoryFetcher>,
    inventory: PeerInventory,
}

impl TestNode {
    pub(crate) fn new() -> Self {
        let (peer_store, fetcher) = (Arc::new(MemoryStore::new()), Arc::new(MemoryFetcher::default()));
        let inventory = PeerInventory::default();
        let (id, node, address) =
            (peer_id(1), "elsewhere".parse::<NodeName>().unwrap(), "127.0.0.1:1".parse().unwrap());
        inventory.apply(MeshEvent::Up(Peer { id, node, zone: None, transfer: address, gossip: address }));
        fetcher.put_peer(id, Arc::clone(&peer_store) as _, Behaviour::Honest);
        Self { peer_store, fetcher, inventory }
    }

    /// Puts an image into the peer's store and announces the image to the node.
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
        let (fetcher, inventory) = (Arc::clone(&self.fetcher) as _, self.inventory.clone());
        RecoveryDependencies {
            policy: watch::channel(Arc::new(policy_without_disk_limits())).1,
            ..RecoveryDependencies::on_fakes(peer_id(0), "here".parse().unwrap(), store, fetcher, inventory)
        }
        .build()
    }

    pub(crate) async fn recover(&self, store: &ContainerdStore, name: &str) -> Result<RecoveredImage, RecoverError> {
        let recoverer = self.recoverer(Arc::new(store.clone()));
        recoverer
            .recover(&name.parse::<Reference>().unwrap().into(), &Progress::default(), &CancellationToken::new())
            .await
    }

    /// Bytes of a blob in the peer's store.
    pub(crate) async fn bytes_of(&self, blob: &Descriptor) -> Vec<u8> {
        let mut reader = self.peer_store.open(blob.digest).await.unwrap();
        reader.read_at(0, 64 << 20).await.unwrap().to_vec()
    }
}

/// All blobs of the image, with the root at the end.
pub(crate) fn every_blob(image: &MadeImage) -> impl Iterator<Item = &Descriptor> {
    image.blobs.iter().chain([&image.target])
}

/// Collects, then lists the blobs of the image that are missing or have wrong bytes.
pub(crate) async fn blobs_lost_to_gc(store: &ContainerdStore, image: &MadeImage) -> Vec<String> {
    let pin = store.pin(std::time::Duration::from_secs(60)).await.unwrap();
    store.release_and_collect(pin).await.unwrap();
    let mut lost = Vec::new();
    for blob in every_blob(image) {
        let is_intact = match store.open(blob.digest).await {
            Ok(_) => Digest::of(&super::read(store, blob.digest).await) == blob.digest,
            Err(_) => false,
        };
        if !is_intact {
            lost.push(format!("{} {}", blob.media_type, blob.digest));
        }
    }
    lost
}

fn peer_id(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}
