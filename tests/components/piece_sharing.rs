//! An agent's recovery and its transfer together: what comes to a node goes on to others before all of it is there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lighterman::admission::StaticAdmission;
use lighterman::agent::blob_fetcher::BlobFetcher;
use lighterman::agent::claim_coordinator::ClaimCoordinator;
use lighterman::agent::inventory_view::PeerInventory;
use lighterman::agent::progress::Progress;
use lighterman::agent::recover::Recoverer;
use lighterman::agent::reference_resolver::ReferenceResolver;
use lighterman::agent::swarm::Downloads;
use lighterman::decide::disk_reservations::Reservations;
use lighterman::decide::policy::{Policy, ResolveOptions};
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::{InventoryItem, MeshEvent, NodeName, Peer, PeerId, PieceMapUpdate};
use lighterman::oci::{PieceLayout, Platform, Reference};
use lighterman::ports::{FetchError, ImportPermission, NoPartialBlobs, PartialBlobs, PieceFetcher};
use lighterman::testing::image::{MadeImage, put_image};
use lighterman::testing::{MemoryCluster, MemoryRegistry, MemoryStore};
use lighterman::transfer::{Config, Transfer, TransferDependencies};
use lighterman::wire::Versions;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

const IMAGE: &str = "registry.example/team/app:1";

/// 49 pieces, which take three seconds at [`RATE`].
const LAYER: u64 = 12 << 20;

/// What the holder sends, in bytes per second: slowly enough to hear of the pieces as they come.
const UPLOAD_RATE: u64 = 4 << 20;

#[tokio::test]
async fn a_follower_receives_new_pieces_of_a_layer_until_the_provider_is_whole() {
    let [holds, fetches, follows] = [(); 3].map(|()| Identity::generate());
    let (holds_it, has_some) = (holds.peer_id(), fetches.peer_id());
    let all = [holds_it, has_some, follows.peer_id()];
    let stop = CancellationToken::new();

    let full = Arc::new(MemoryStore::new());
    let image = put_image(&*full, &[IMAGE.into()], &[LAYER], 7).await.unwrap();
    let today = Versions::TRANSFER;
    let holder = start_transfer(&holds, all, &full, Arc::new(NoPartialBlobs), (UPLOAD_RATE, today), &stop);
    let (store, downloads) = (Arc::new(MemoryStore::new()), Downloads::default());
    let fetcher = start_transfer(&fetches, all, &store, Arc::new(downloads.clone()), (0, today), &stop);
    let follower =
        start_transfer(&follows, all, &Arc::new(MemoryStore::new()), Arc::new(NoPartialBlobs), (0, today), &stop);
    follower.dial(fetcher.local_addr(), Some(has_some)).await.unwrap();

    let peer = fetcher.dial(holder.local_addr(), Some(holds_it)).await.unwrap();
    let holders = PeerInventory::default();
    announce(&holders, peer, &image);
    let recoverer = recoverer(has_some, store, fetcher, holders, downloads);

    let layer = image.blobs.iter().find(|blob| blob.size >= LAYER).expect("the layer").clone();
    let cut = PieceLayout::for_size(layer.size);
    let hears = async {
        let mut following = loop {
            match follower.follow(has_some, layer.digest, cut).await {
                Ok(following) => break following,
                Err(error) => assert!(matches!(error, FetchError::Absent { .. }), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let (mut received, mut updates) = (BTreeSet::new(), 0);
        loop {
            let pieces: Vec<_> = match following.next().await.expect("it goes on until all is there") {
                PieceMapUpdate::Map(bits) => bits.ones().collect(),
                PieceMapUpdate::Have(news) => news.into_iter().map(|piece| piece as usize).collect(),
                PieceMapUpdate::HaveAll => break,
            };
            updates += 1;
            assert!(pieces.into_iter().all(|piece| received.insert(piece)), "each is told once");
        }
        (received.len(), updates)
    };
    let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    let both = async { tokio::join!(recoverer.recover(&wanted, &progress, &stop), hears) };
    let (recovered, (received, updates)) =
        tokio::time::timeout(Duration::from_secs(120), both).await.expect("it is stuck");
    assert_eq!(recovered.unwrap().bytes, image.bytes());
    // What has come before it follows is one word, and what comes in the last moment is told of as the whole.
    assert!(
        received > cut.piece_count() / 2 && updates > 3,
        "{received} of {} pieces in {updates} updates",
        cut.piece_count()
    );
    stop.cancel();
}

#[tokio::test]
async fn an_image_is_recovered_from_a_peer_of_another_major_in_either_direction() {
    let (today, next) = (Versions::TRANSFER, Versions::TRANSFER.after_next_major());
    for (provides, fetches, who) in [(today, next, "the newer fetches"), (next, today, "the older fetches")] {
        let [one, other] = [(); 2].map(|()| Identity::generate());
        let all = [one.peer_id(), other.peer_id(), other.peer_id()];
        let stop = CancellationToken::new();
        let full = Arc::new(MemoryStore::new());
        let image = put_image(&*full, &[IMAGE.into()], &[LAYER, 700], 7).await.unwrap();
        let provider = start_transfer(&one, all, &full, Arc::new(NoPartialBlobs), (0, provides), &stop);
        let (store, downloads) = (Arc::new(MemoryStore::new()), Downloads::default());
        let fetcher = start_transfer(&other, all, &store, Arc::new(downloads.clone()), (0, fetches), &stop);
        let peer = fetcher.dial(provider.local_addr(), Some(one.peer_id())).await.unwrap();
        let holders = PeerInventory::default();
        announce(&holders, peer, &image);
        let recoverer = recoverer(other.peer_id(), store, fetcher, holders, downloads);
        let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
        let recovery = recoverer.recover(&wanted, &progress, &stop);
        let recovered = tokio::time::timeout(Duration::from_secs(120), recovery).await.expect("it is stuck");
        assert_eq!(recovered.unwrap().bytes, image.bytes(), "{who}");
        stop.cancel();
    }
}

/// Applies what the mesh says of a peer that has all of the image.
fn announce(holders: &PeerInventory, peer: Peer, image: &MadeImage) {
    let id = peer.id;
    holders.apply(MeshEvent::Up(peer));
    let blobs = image
        .blobs
        .iter()
        .map(|blob| InventoryItem::Blob(blob.digest))
        .chain([InventoryItem::Blob(image.target.digest)]);
    let Reference::Tag(repository, tag) = IMAGE.parse().unwrap() else { unreachable!("it has a tag") };
    let items = blobs.chain([InventoryItem::Image(repository, Some(tag), image.target.digest)]).collect();
    holders.apply(MeshEvent::Snapshot(id, items));
}

fn start_transfer(
    identity: &Identity,
    admits: [PeerId; 3],
    store: &Arc<MemoryStore>,
    partials: Arc<dyn PartialBlobs>,
    (max_upload_rate, versions): (u64, Versions),
    stop: &CancellationToken,
) -> Transfer {
    let config = Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        // Nobody gossips here.
        gossip_port: 1,
        node: "node-a".parse().unwrap(),
        concurrent_uploads: 16,
    };
    let mut rules = Policy::default();
    rules.budgets.max_upload_rate = max_upload_rate;
    let surroundings = TransferDependencies {
        admission: Arc::new(StaticAdmission::new(admits)),
        store: store.clone(),
        partials,
        metrics: Metrics::new(),
        admitted_peers: mpsc::channel(4).0,
    };
    let in_force = watch::channel(Arc::new(rules)).1;
    let transfer = Transfer::bind_with_versions(config, identity, surroundings, in_force, versions).unwrap();
    tokio::spawn(transfer.clone().run(stop.clone()));
    transfer
}

fn recoverer(
    me: PeerId,
    store: Arc<MemoryStore>,
    transfer: Transfer,
    holders: PeerInventory,
    downloads: Downloads,
) -> Recoverer {
    let (node, metrics): (NodeName, _) = ("node-a".parse().unwrap(), Metrics::new());
    let mut rules = Policy::default();
    rules.budgets.min_free_bytes = 0;
    rules.budgets.image_gc_percent = 100;
    rules.budgets.eviction_percent = 0;
    let claims = Arc::new(MemoryCluster::default().claims_of(node.clone()));
    let zone = watch::channel(None).1;
    let transfer = Arc::new(transfer);
    Recoverer {
        store: store.clone(),
        resolver: ReferenceResolver {
            inventory: holders.clone(),
            registry: Arc::new(MemoryRegistry::default()),
            cluster: Arc::new(MemoryCluster::default()),
            platform: Platform::of_this_node(),
            options: ResolveOptions::default(),
        },
        blob_fetcher: Arc::new(BlobFetcher::new(
            me,
            store,
            transfer,
            holders.clone(),
            downloads,
            zone,
            metrics.clone(),
        )),
        claims: Arc::new(ClaimCoordinator::new(claims, holders, metrics, node, me)),
        policy: watch::channel(Arc::new(rules)).1,
        platform: Platform::of_this_node(),
        reservations: Reservations::default(),
        imports: watch::channel(ImportPermission::Allowed).1,
        layer_unpacker: None,
    }
}
