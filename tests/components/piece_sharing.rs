//! A recovery together with the transfer: an agent serves the pieces of a layer while the other
//! pieces are still in flight.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lighterman::admission::StaticAdmission;
use lighterman::agent::peers::inventory_view::PeerInventory;
use lighterman::agent::recovery::builder::RecoveryDependencies;
use lighterman::agent::recovery::downloads::Downloads;
use lighterman::agent::recovery::progress::Progress;
use lighterman::agent::recovery::recover::Recoverer;
use lighterman::decide::policy::Policy;
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::{InventoryItem, MeshEvent, Peer, PeerId, PieceMapUpdate};
use lighterman::oci::{PieceLayout, Reference};
use lighterman::ports::{Dialer, FetchError, Fetcher, NoPartialBlobs, PartialBlobs};
use lighterman::testing::image::{MadeImage, put_image};
use lighterman::testing::{MemoryStore, policy_without_disk_limits};
use lighterman::transfer::{Config, Transfer, TransferDependencies};
use lighterman::wire::Versions;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

const IMAGE: &str = "registry.example/team/app:1";

/// 49 pieces, which take three seconds at [`UPLOAD_RATE`].
const LAYER: u64 = 12 << 20;

/// Bytes per second of the whole provider. Slow, so that the follower receives several updates.
const UPLOAD_RATE: u64 = 4 << 20;

#[tokio::test]
async fn a_follower_receives_new_pieces_of_a_layer_until_the_provider_is_whole() {
    let [provider_identity, fetcher_identity, follower_identity] = [(); 3].map(|()| Identity::generate());
    let (provider_id, fetcher_id) = (provider_identity.peer_id(), fetcher_identity.peer_id());
    let admitted = [provider_id, fetcher_id, follower_identity.peer_id()];
    let stop = CancellationToken::new();

    let provider_store = Arc::new(MemoryStore::new());
    let image = put_image(&*provider_store, &[IMAGE.into()], &[LAYER], 7).await.unwrap();
    let current = Versions::TRANSFER;
    let provider = start_transfer(
        &provider_identity,
        admitted,
        &provider_store,
        Arc::new(NoPartialBlobs),
        (UPLOAD_RATE, current),
        &stop,
    );
    let (store, downloads) = (Arc::new(MemoryStore::new()), Downloads::default());
    let fetcher = start_transfer(&fetcher_identity, admitted, &store, Arc::new(downloads.clone()), (0, current), &stop);
    let follower = start_transfer(
        &follower_identity,
        admitted,
        &Arc::new(MemoryStore::new()),
        Arc::new(NoPartialBlobs),
        (0, current),
        &stop,
    );
    follower.dial(fetcher.local_addr(), Some(fetcher_id)).await.unwrap();

    let peer = fetcher.dial(provider.local_addr(), Some(provider_id)).await.unwrap();
    let inventory = PeerInventory::default();
    announce(&inventory, peer, &image);
    let recoverer = recoverer(fetcher_id, store, fetcher, inventory, downloads);

    let layer = image.blobs.iter().find(|blob| blob.size >= LAYER).expect("the layer").clone();
    let layout = PieceLayout::for_size(layer.size);
    let receive_updates = async {
        let mut following = loop {
            match follower.follow(fetcher_id, layer.digest, layout).await {
                Ok(following) => break following,
                Err(error) => assert!(matches!(error, FetchError::Absent { .. }), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let (mut received, mut updates) = (BTreeSet::new(), 0);
        loop {
            let pieces: Vec<_> = match following.next().await.expect("updates continue until the provider is whole") {
                PieceMapUpdate::Map(bits) => bits.ones().collect(),
                PieceMapUpdate::Have(new_pieces) => new_pieces.into_iter().map(|piece| piece as usize).collect(),
                PieceMapUpdate::HaveAll => break,
            };
            updates += 1;
            assert!(pieces.into_iter().all(|piece| received.insert(piece)), "each piece is announced once");
        }
        (received.len(), updates)
    };
    let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    let both = async { tokio::join!(recoverer.recover(&wanted, &progress, &stop), receive_updates) };
    let (recovered, (received, updates)) =
        tokio::time::timeout(Duration::from_secs(120), both).await.expect("the recovery ends in time");
    assert_eq!(recovered.unwrap().bytes, image.bytes());
    // One map has all pieces from before the follow, and `HaveAll` stands for the last pieces.
    assert!(
        received > layout.piece_count() / 2 && updates > 3,
        "{received} of {} pieces in {updates} updates",
        layout.piece_count()
    );
    stop.cancel();
}

#[tokio::test]
async fn an_image_is_recovered_from_a_peer_of_another_major_in_either_direction() {
    let (current, next) = (Versions::TRANSFER, Versions::TRANSFER.after_next_major());
    for (provider_versions, fetcher_versions, case) in
        [(current, next, "the newer fetches"), (next, current, "the older fetches")]
    {
        let [provider_identity, fetcher_identity] = [(); 2].map(|()| Identity::generate());
        let admitted = [provider_identity.peer_id(), fetcher_identity.peer_id(), fetcher_identity.peer_id()];
        let stop = CancellationToken::new();
        let provider_store = Arc::new(MemoryStore::new());
        let image = put_image(&*provider_store, &[IMAGE.into()], &[LAYER, 700], 7).await.unwrap();
        let provider = start_transfer(
            &provider_identity,
            admitted,
            &provider_store,
            Arc::new(NoPartialBlobs),
            (0, provider_versions),
            &stop,
        );
        let (store, downloads) = (Arc::new(MemoryStore::new()), Downloads::default());
        let fetcher = start_transfer(
            &fetcher_identity,
            admitted,
            &store,
            Arc::new(downloads.clone()),
            (0, fetcher_versions),
            &stop,
        );
        let peer = fetcher.dial(provider.local_addr(), Some(provider_identity.peer_id())).await.unwrap();
        let inventory = PeerInventory::default();
        announce(&inventory, peer, &image);
        let recoverer = recoverer(fetcher_identity.peer_id(), store, fetcher, inventory, downloads);
        let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
        let recovery = recoverer.recover(&wanted, &progress, &stop);
        let recovered =
            tokio::time::timeout(Duration::from_secs(120), recovery).await.expect("the recovery ends in time");
        assert_eq!(recovered.unwrap().bytes, image.bytes(), "{case}");
        stop.cancel();
    }
}

/// Applies the mesh events of a peer that has the whole image.
fn announce(inventory: &PeerInventory, peer: Peer, image: &MadeImage) {
    let id = peer.id;
    inventory.apply(MeshEvent::Up(peer));
    let blobs = image
        .blobs
        .iter()
        .map(|blob| InventoryItem::Blob(blob.digest))
        .chain([InventoryItem::Blob(image.target.digest)]);
    let Reference::Tag(repository, tag) = IMAGE.parse().unwrap() else { unreachable!("the image has a tag") };
    let items = blobs.chain([InventoryItem::Image(repository, Some(tag), image.target.digest)]).collect();
    inventory.apply(MeshEvent::Snapshot(id, items));
}

fn start_transfer(
    identity: &Identity,
    admitted: [PeerId; 3],
    store: &Arc<MemoryStore>,
    partials: Arc<dyn PartialBlobs>,
    (max_upload_rate, versions): (u64, Versions),
    stop: &CancellationToken,
) -> Transfer {
    let config = Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        // This test runs no gossip.
        gossip_port: 1,
        node: "node-a".parse().unwrap(),
        concurrent_uploads: 16,
    };
    let mut policy = Policy::default();
    policy.budgets.max_upload_rate = max_upload_rate;
    let dependencies = TransferDependencies {
        admission: Arc::new(StaticAdmission::new(admitted)),
        store: store.clone(),
        partials,
        metrics: Metrics::new(),
        admitted_peers: mpsc::channel(4).0,
    };
    let policy_receiver = watch::channel(Arc::new(policy)).1;
    let transfer = Transfer::bind_with_versions(config, identity, dependencies, policy_receiver, versions).unwrap();
    tokio::spawn(transfer.clone().run(stop.clone()));
    transfer
}

fn recoverer(
    me: PeerId,
    store: Arc<MemoryStore>,
    transfer: Transfer,
    inventory: PeerInventory,
    downloads: Downloads,
) -> Recoverer {
    RecoveryDependencies {
        downloads,
        policy: watch::channel(Arc::new(policy_without_disk_limits())).1,
        ..RecoveryDependencies::on_fakes(me, "node-a".parse().unwrap(), store, Arc::new(transfer), inventory)
    }
    .build()
}
