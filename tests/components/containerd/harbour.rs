//! A node whose content is in a containerd, with one peer in memory.

use std::sync::Arc;

use lighterman::agent::bring::Bring;
use lighterman::agent::holders::Holders;
use lighterman::agent::lead::Lead;
use lighterman::agent::progress::Progress;
use lighterman::agent::recover::{RecoverError, Recovered, Recoverer};
use lighterman::agent::resolve::Resolver;
use lighterman::agent::swarm::Underway;
use lighterman::containerd::ContainerdStore;
use lighterman::decide::reserve::Reservations;
use lighterman::decide::rules::{ResolveSettings, Rules};
use lighterman::metrics::Metrics;
use lighterman::model::{ContentChange, Item, MeshEvent, NodeName, Peer, PeerId};
use lighterman::oci::{Descriptor, Digest, Platform, Reference};
use lighterman::ports::{ContentStore, Imports};
use lighterman::testing::image::{MadeImage, Recipe, make_image};
use lighterman::testing::{Behaviour, MemoryCluster, MemoryFetcher, MemoryRegistry, MemoryStore};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the node knows, and from whom.
pub(crate) struct Harbour {
    peer: Arc<MemoryStore>,
    fetcher: Arc<MemoryFetcher>,
    holders: Holders,
}

impl Harbour {
    pub(crate) fn new() -> Self {
        let (peer, fetcher) = (Arc::new(MemoryStore::new()), Arc::new(MemoryFetcher::default()));
        let holders = Holders::default();
        let (id, node, address) =
            (peer_id(1), "elsewhere".parse::<NodeName>().unwrap(), "127.0.0.1:1".parse().unwrap());
        holders.apply(MeshEvent::Up(Peer { id, node, zone: None, transfer: address, gossip: address }));
        fetcher.put_peer(id, Arc::clone(&peer) as _, Behaviour::Honest);
        Self { peer, fetcher, holders }
    }

    /// The peer has this image and says so.
    pub(crate) async fn offers(&self, name: &str, recipe: &Recipe, seed: u64) -> MadeImage {
        let image = make_image(&*self.peer, &[name.into()], recipe, seed).await.unwrap();
        let Ok(Reference::Tag(repository, tag)) = name.parse() else { panic!("{name} has no tag") };
        let blobs = self.peer.blobs().await.unwrap().into_iter().map(|blob| Item::Blob(blob.digest));
        let mut items: Vec<_> = blobs.collect();
        items.push(Item::Image(repository, Some(tag), image.root.digest));
        self.holders.apply(MeshEvent::Changed(peer_id(1), items.into_iter().map(ContentChange::Added).collect()));
        image
    }

    pub(crate) fn recoverer(&self, store: Arc<dyn ContentStore>) -> Recoverer {
        let (me, node) = (peer_id(0), "here".parse::<NodeName>().unwrap());
        let mut rules = Rules::default();
        // Whatever the machine's disk is like.
        (rules.budgets.min_free_bytes, rules.budgets.eviction_percent) = (0, 0);
        rules.budgets.collection_percent = 100;
        let metrics = Metrics::new();
        let claims = Arc::new(MemoryCluster::default().claims_of(node.clone()));
        Recoverer {
            store: Arc::clone(&store),
            resolver: Resolver {
                holders: self.holders.clone(),
                registry: Arc::new(MemoryRegistry::default()),
                cluster: Arc::new(MemoryCluster::default()),
                platform: Platform::of_this_node(),
                settings: ResolveSettings::default(),
            },
            bring: Arc::new(Bring::new(
                me,
                store,
                Arc::clone(&self.fetcher) as _,
                self.holders.clone(),
                Underway::default(),
                watch::channel(None).1,
                metrics.clone(),
            )),
            lead: Arc::new(Lead::new(claims, self.holders.clone(), metrics, node, me)),
            rules: watch::channel(Arc::new(rules)).1,
            platform: Platform::of_this_node(),
            room: Reservations::default(),
            imports: watch::channel(Imports::Allowed).1,
            unpacking: None,
        }
    }

    pub(crate) async fn recover(&self, store: &ContainerdStore, name: &str) -> Result<Recovered, RecoverError> {
        let recoverer = self.recoverer(Arc::new(store.clone()));
        recoverer
            .recover(&name.parse::<Reference>().unwrap().into(), &Progress::default(), &CancellationToken::new())
            .await
    }

    /// A blob's bytes, as the peer has them.
    pub(crate) async fn bytes_of(&self, blob: &Descriptor) -> Vec<u8> {
        let mut reader = self.peer.open(blob.digest).await.unwrap();
        reader.read_at(0, 64 << 20).await.unwrap().to_vec()
    }
}

/// The manifest, if the root is an index, the configuration, the layers, and the root.
pub(crate) fn every_blob(image: &MadeImage) -> impl Iterator<Item = &Descriptor> {
    image.blobs.iter().chain([&image.root])
}

/// Has everything collected that nothing holds, and says which blobs of the image are not there any more, or wrong.
pub(crate) async fn lost_to_the_collector(store: &ContainerdStore, image: &MadeImage) -> Vec<String> {
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
