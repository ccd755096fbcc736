//! An agent's recovery and its transfer together: what comes to a node goes on to others before all of it is there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lighterman::admission::StaticAdmission;
use lighterman::agent::bring::Bring;
use lighterman::agent::holders::Holders;
use lighterman::agent::lead::Lead;
use lighterman::agent::progress::Progress;
use lighterman::agent::recover::Recoverer;
use lighterman::agent::resolve::Resolver;
use lighterman::agent::swarm::Underway;
use lighterman::decide::reserve::Reservations;
use lighterman::decide::rules::{ResolveSettings, Rules};
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::{Availability, Item, MeshEvent, NodeName, Peer, PeerId};
use lighterman::oci::{Cut, Platform, Reference};
use lighterman::ports::{FetchError, Imports, NoPartials, Partials, PieceFetcher};
use lighterman::testing::image::{MadeImage, put_image};
use lighterman::testing::{MemoryCluster, MemoryRegistry, MemoryStore};
use lighterman::transfer::{Config, Surroundings, Transfer};
use lighterman::wire::Versions;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

const IMAGE: &str = "registry.example/team/app:1";

/// 49 pieces, which take three seconds at [`RATE`].
const LAYER: u64 = 12 << 20;

/// What the holder sends, in bytes per second: slowly enough to hear of the pieces as they come.
const RATE: u64 = 4 << 20;

#[tokio::test]
async fn a_peer_hears_of_a_layers_pieces_as_they_come_and_then_of_the_whole() {
    let [holds, fetches, follows] = [(); 3].map(|()| Identity::generate());
    let (holds_it, has_some) = (holds.peer_id(), fetches.peer_id());
    let all = [holds_it, has_some, follows.peer_id()];
    let stop = CancellationToken::new();

    let full = Arc::new(MemoryStore::new());
    let image = put_image(&*full, &[IMAGE.into()], &[LAYER], 7).await.unwrap();
    let today = Versions::TRANSFER;
    let holder = start(&holds, all, &full, Arc::new(NoPartials), (RATE, today), &stop);
    let (store, underway) = (Arc::new(MemoryStore::new()), Underway::default());
    let fetcher = start(&fetches, all, &store, Arc::new(underway.clone()), (0, today), &stop);
    let follower = start(&follows, all, &Arc::new(MemoryStore::new()), Arc::new(NoPartials), (0, today), &stop);
    follower.greet(fetcher.local_addr(), Some(has_some)).await.unwrap();

    let peer = fetcher.greet(holder.local_addr(), Some(holds_it)).await.unwrap();
    let holders = Holders::default();
    announce(&holders, peer, &image);
    let recoverer = recoverer(has_some, store, fetcher, holders, underway);

    let layer = image.blobs.iter().find(|blob| blob.size >= LAYER).expect("the layer").clone();
    let cut = Cut::usual(layer.size);
    let hears = async {
        let mut following = loop {
            match follower.follow(has_some, layer.digest, cut).await {
                Ok(following) => break following,
                Err(error) => assert!(matches!(error, FetchError::Absent { .. }), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let (mut heard, mut words) = (BTreeSet::new(), 0);
        loop {
            let pieces: Vec<_> = match following.next().await.expect("it goes on until all is there") {
                Availability::These(bits) => bits.ones().collect(),
                Availability::Also(news) => news.into_iter().map(|piece| piece as usize).collect(),
                Availability::Whole => break,
            };
            words += 1;
            assert!(pieces.into_iter().all(|piece| heard.insert(piece)), "each is told once");
        }
        (heard.len(), words)
    };
    let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    let both = async { tokio::join!(recoverer.recover(&wanted, &progress, &stop), hears) };
    let (recovered, (heard, words)) = tokio::time::timeout(Duration::from_secs(120), both).await.expect("it is stuck");
    assert_eq!(recovered.unwrap().bytes, image.bytes());
    // What has come before it follows is one word, and what comes in the last moment is told of as the whole.
    assert!(heard > cut.pieces() / 2 && words > 3, "{heard} of {} pieces in {words} words", cut.pieces());
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
        let provider = start(&one, all, &full, Arc::new(NoPartials), (0, provides), &stop);
        let (store, underway) = (Arc::new(MemoryStore::new()), Underway::default());
        let fetcher = start(&other, all, &store, Arc::new(underway.clone()), (0, fetches), &stop);
        let peer = fetcher.greet(provider.local_addr(), Some(one.peer_id())).await.unwrap();
        let holders = Holders::default();
        announce(&holders, peer, &image);
        let recoverer = recoverer(other.peer_id(), store, fetcher, holders, underway);
        let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
        let recovery = recoverer.recover(&wanted, &progress, &stop);
        let recovered = tokio::time::timeout(Duration::from_secs(120), recovery).await.expect("it is stuck");
        assert_eq!(recovered.unwrap().bytes, image.bytes(), "{who}");
        stop.cancel();
    }
}

/// Applies what the mesh says of a peer that has all of the image.
fn announce(holders: &Holders, peer: Peer, image: &MadeImage) {
    let id = peer.id;
    holders.apply(MeshEvent::Up(peer));
    let blobs = image.blobs.iter().map(|blob| Item::Blob(blob.digest)).chain([Item::Blob(image.root.digest)]);
    let Reference::Tag(repository, tag) = IMAGE.parse().unwrap() else { unreachable!("it has a tag") };
    let items = blobs.chain([Item::Image(repository, Some(tag), image.root.digest)]).collect();
    holders.apply(MeshEvent::Snapshot(id, items));
}

fn start(
    identity: &Identity,
    admits: [PeerId; 3],
    store: &Arc<MemoryStore>,
    partials: Arc<dyn Partials>,
    (max_upload_rate, versions): (u64, Versions),
    stop: &CancellationToken,
) -> Transfer {
    let config = Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        // Nobody gossips here.
        gossip_port: 1,
        node: "node-a".parse().unwrap(),
        max_serving: 16,
    };
    let mut rules = Rules::default();
    rules.budgets.max_upload_rate = max_upload_rate;
    let surroundings = Surroundings {
        admission: Arc::new(StaticAdmission::new(admits)),
        store: store.clone(),
        partials,
        metrics: Metrics::new(),
        joined: mpsc::channel(4).0,
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
    holders: Holders,
    underway: Underway,
) -> Recoverer {
    let (node, metrics): (NodeName, _) = ("node-a".parse().unwrap(), Metrics::new());
    let mut rules = Rules::default();
    rules.budgets.min_free_bytes = 0;
    rules.budgets.collection_percent = 100;
    rules.budgets.eviction_percent = 0;
    let claims = Arc::new(MemoryCluster::default().claims_of(node.clone()));
    let zone = watch::channel(None).1;
    let transfer = Arc::new(transfer);
    Recoverer {
        store: store.clone(),
        resolver: Resolver {
            holders: holders.clone(),
            registry: Arc::new(MemoryRegistry::default()),
            cluster: Arc::new(MemoryCluster::default()),
            platform: Platform::of_this_node(),
            settings: ResolveSettings::default(),
        },
        bring: Arc::new(Bring::new(me, store, transfer, holders.clone(), underway, zone, metrics.clone())),
        lead: Arc::new(Lead::new(claims, holders, metrics, node, me)),
        rules: watch::channel(Arc::new(rules)).1,
        platform: Platform::of_this_node(),
        room: Reservations::default(),
        imports: watch::channel(Imports::Allowed).1,
        unpacking: None,
    }
}
