//! One image in pieces, from several peers at once, some of which lie.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::recovered_image::RecoveredImage;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::decide::claim::{ZoneLeader, zone_claim};
use crate::oci::{MIN_PIECE_SIZE, PieceLayout};
use crate::ports::{FetchError, PartialBlobs};

/// Twelve pieces and a bit, and one piece.
const LAYERS: [u64; 2] = [12 * MIN_PIECE_SIZE + 1000, 5000];

fn wanted() -> RecoveryRequest {
    IMAGE.parse::<Reference>().unwrap().into()
}

async fn recover(node: &TestNode) -> Result<RecoveredImage, RecoverError> {
    node.recoverer().recover(&wanted(), &Progress::default(), &CancellationToken::new()).await
}

/// Peers 1, 2, ... that behave so, with the same image.
async fn node_with_peers(behaviours: &[Behaviour]) -> (TestNode, MadeImage) {
    let node = TestNode::new();
    let mut image = None;
    for (number, behaviour) in (1..).zip(behaviours) {
        image = Some(node.add_provider_with_layers(number, IMAGE, &LAYERS, *behaviour).await);
    }
    (node, image.unwrap())
}

fn faults(node: &TestNode, kind: &str, count: u32) -> bool {
    node.has_metric(&format!("lighterman_peer_faults_total{{fault={kind:?}}} {count}"))
}

#[tokio::test(start_paused = true)]
async fn pieces_are_fetched_from_every_provider() {
    let (node, image) = node_with_peers(&[Behaviour::Honest; 3]).await;
    let recovered = recover(&node).await.unwrap();
    assert_eq!(recovered.providers.len(), 3);
    assert_eq!((recovered.bytes, recovered.fetched), (image.bytes(), 4));
    assert!(recovered.providers.values().all(|bytes| *bytes < image.bytes() / 2), "{:?}", recovered.providers);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_sends_wrong_bytes_is_found_by_a_piece_and_honest_peers_provide_the_image() {
    let (node, _) = node_with_peers(&[Behaviour::Corrupts, Behaviour::Honest, Behaviour::Honest]).await;
    recover(&node).await.unwrap();
    assert!(faults(&node, "lied", 1), "one lie is enough");
}

#[tokio::test(start_paused = true)]
async fn a_provider_with_a_damaged_file_sends_one_wrong_piece() {
    let mut sent = 0;
    // Now and then it is asked for its list before it is asked for a piece, finds it out itself, and sends none.
    for _ in 0..8 {
        let (node, _) =
            node_with_peers(&[Behaviour::DiskCorrupted, Behaviour::SendsChainSlowly, Behaviour::Honest]).await;
        recover(&node).await.unwrap();
        let spoilt = node.fetcher.corrupt_piece_count();
        assert!(spoilt == 0 || (spoilt == 1 && faults(&node, "lied", 1)), "{spoilt} pieces");
        sent += spoilt;
    }
    assert!(sent > 0);
}

#[tokio::test(start_paused = true)]
async fn a_single_provider_gets_requests_for_all_pieces_while_it_computes_its_hash_chain() {
    let (node, image) = node_with_peers(&[Behaviour::SendsChainSlowly]).await;
    let (recoverer, progress, stop) = (node.recoverer(), Progress::default(), CancellationToken::new());
    let wanted = wanted();
    let recovery = recoverer.recover(&wanted, &progress, &stop);
    tokio::pin!(recovery);
    // Less than a stranger's first piece waits where nothing can be compared.
    assert!(tokio::time::timeout(Duration::from_millis(400), &mut recovery).await.is_err(), "nothing is kept unproved");
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    assert_eq!(progress.blobs()[&layer.digest].done, layer.size);
    recovery.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_slow_hash_chain_does_not_keep_a_recovery_alive() {
    let (node, _) = node_with_peers(&[Behaviour::DripsChain]).await;
    let began = tokio::time::Instant::now();
    let RecoverError::Fetch { attempts, .. } = recover(&node).await.unwrap_err() else { panic!() };
    assert!(
        matches!(attempts[..], [FetchError::Stalled { peer: dripping, .. }] if dripping == peer(1)),
        "{attempts:?}"
    );
    assert!(began.elapsed() < Duration::from_secs(60), "simulated time: {:?}", began.elapsed());
    node.add_provider_with_layers(2, IMAGE, &LAYERS, Behaviour::Honest).await;
    recover(&node).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_hash_chain_of_a_lying_provider_does_not_verify_its_pieces() {
    let (node, _) = node_with_peers(&[Behaviour::DiskCorrupted, Behaviour::DiskCorrupted, Behaviour::Honest]).await;
    recover(&node).await.unwrap();
    assert!(node.fetcher.corrupt_piece_count() <= 2, "{} pieces for two liars", node.fetcher.corrupt_piece_count());
}

#[tokio::test(start_paused = true)]
async fn the_author_of_a_forged_hash_chain_is_at_fault_and_not_the_honest_sender() {
    for forged in [0, 5, 11] {
        let (node, _) = node_with_peers(&[Behaviour::ForgesChain(forged), Behaviour::Honest]).await;
        let recoverer = node.recoverer();
        recoverer.recover(&wanted(), &Progress::default(), &CancellationToken::new()).await.unwrap();
        let honest = recoverer.blob_fetcher.trust().standing(peer(2), tokio::time::Instant::now().into_std());
        assert_eq!(honest, crate::decide::peer_faults::Standing::Good, "forged at {forged}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_wrong_piece_is_fetched_from_another_provider() {
    let (node, image) = node_with_peers(&[Behaviour::CorruptsPiece(4), Behaviour::Honest]).await;
    let recovered = recover(&node).await.unwrap();
    assert_eq!(recovered.bytes, image.bytes(), "what was wrong is not counted");
}

#[tokio::test(start_paused = true)]
async fn lying_providers_alone_provide_no_image() {
    let (node, _) = node_with_peers(&[Behaviour::Corrupts, Behaviour::Corrupts]).await;
    let RecoverError::Fetch { attempts, .. } = recover(&node).await.unwrap_err() else { panic!() };
    assert!(attempts.iter().any(FetchError::is_peer_fault), "{attempts:?}");
    assert!(node.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_hanging_provider_does_not_delay_pieces_of_other_providers() {
    let (node, _) = node_with_peers(&[Behaviour::HangsAfter(2), Behaviour::Honest]).await;
    let began = tokio::time::Instant::now();
    recover(&node).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "simulated time: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn staged_pieces_are_not_fetched_again() {
    let (node, image) = node_with_peers(&[Behaviour::HangsAfter(6)]).await;
    let first = tokio::time::timeout(Duration::from_secs(20), recover(&node)).await;
    assert!(first.is_err(), "it hangs");
    node.add_provider_with_layers(1, IMAGE, &LAYERS, Behaviour::Honest).await;
    let began = tokio::time::Instant::now();
    let recovered = recover(&node).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "simulated time: {:?}", began.elapsed());
    let pieces = image.bytes() - recovered.bytes;
    assert!(pieces >= 3 * MIN_PIECE_SIZE, "{pieces} bytes were there");
}

#[tokio::test(start_paused = true)]
async fn staged_pieces_with_wrong_bytes_are_fetched_again() {
    let (node, image) = node_with_peers(&[Behaviour::Honest]).await;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    let pin = node.store.pin(Duration::from_secs(60)).await.unwrap();
    let staged = node.store.stage(layer.digest, layer.size, &pin).await.unwrap();
    let rubbish = bytes::Bytes::from(vec![7; 3 * MIN_PIECE_SIZE as usize]);
    staged.write_at(MIN_PIECE_SIZE, &[rubbish]).await.unwrap();
    drop(staged);
    let began = tokio::time::Instant::now();
    let recovered = recover(&node).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "simulated time: {:?}", began.elapsed());
    assert_eq!(recovered.bytes, image.bytes(), "nothing of it was right");
}

#[tokio::test(start_paused = true)]
async fn a_partial_provider_serves_staged_pieces() {
    let (node, image) = node_with_peers(&[Behaviour::HangsAfter(10)]).await;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    let other = TestNode::new();
    let (first, second) = (node.recoverer(), other.recoverer());
    // The other knows only the node that is fetching, and the documents from elsewhere.
    let documents = Arc::new(MemoryStore::new());
    put_image(&*documents, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    documents.remove_blob(layer.digest);
    other.announce_store(2, documents, Behaviour::Honest).await;
    let partials: Arc<dyn PartialBlobs> = Arc::new(node.downloads.clone());
    other.announce_store(3, Arc::clone(&node.store), Behaviour::Honest).await;
    other.fetcher.put_fetching_peer(peer(3), Arc::clone(&node.store) as _, partials);
    other
        .inventory
        .apply(MeshEvent::Changed(peer(3), vec![InventoryChange::Added(InventoryItem::Fetching(layer.digest))]));

    let (wanted, stop, progress, others) =
        (wanted(), CancellationToken::new(), Progress::default(), Progress::default());
    let release = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let come = others.blobs()[&layer.digest].done;
        assert!(come >= 5 * MIN_PIECE_SIZE, "{come} bytes were given on while the rest was to come");
        node.add_provider_with_layers(4, IMAGE, &LAYERS, Behaviour::Honest).await;
    };
    let (one, two, ()) =
        tokio::join!(first.recover(&wanted, &progress, &stop), second.recover(&wanted, &others, &stop), release);
    one.unwrap();
    let two = two.unwrap();
    assert_eq!(two.providers[&peer(3)], layer.size, "all of the layer came from the node that was fetching it");
    assert_eq!(PieceLayout::for_size(layer.size).piece_count(), 13);
}

/// A peer that ranks before this node when they fetch this image in this zone.
fn peer_ranked_before_us(root: Digest, zone: &Zone) -> u8 {
    let now = std::time::Instant::now();
    let is_better = |number: &u8| {
        let mut crossing = ZoneLeader::new(peer(0), zone_claim(root, zone), now);
        crossing.set_fetching(&[peer(*number)], now);
        !crossing.update_is_leading(now)
    };
    (10..).find(is_better).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_node_fetches_from_another_zone_itself_if_the_zone_leader_makes_no_progress() {
    let zone = |name: &str| Zone::try_from(name.to_owned()).unwrap();
    let node = TestNode { zone: Some(zone("here")), ..TestNode::new() };
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap().digest;
    node.announce_store_in_zone(Some(zone("there")), 1, Arc::clone(&store), Behaviour::Honest).await;
    // It says that it is fetching, and has nothing yet, for ever.
    let leader = peer_ranked_before_us(image.target.digest, &zone("here"));
    node.announce_store_in_zone(Some(zone("here")), leader, Arc::new(MemoryStore::new()), Behaviour::Honest).await;
    let fetching =
        image.blobs.iter().map(|blob| InventoryChange::Added(InventoryItem::Fetching(blob.digest))).collect();
    node.inventory.apply(MeshEvent::Changed(peer(leader), fetching));

    let (recoverer, progress, stop) = (node.recoverer(), Progress::default(), CancellationToken::new());
    let wanted = wanted();
    let recovery = recoverer.recover(&wanted, &progress, &stop);
    tokio::pin!(recovery);
    let early = tokio::time::timeout(Duration::from_millis(2500), &mut recovery).await;
    assert!(early.is_err() && progress.blobs()[&layer].done == 0, "it waits for the other");
    let recovered = recovery.await.unwrap();
    assert_eq!(recovered.providers.into_keys().collect::<Vec<_>>(), [peer(1)], "and does it itself at last");
}

#[tokio::test(start_paused = true)]
async fn a_blob_that_no_provider_sent_can_be_retried_at_once() {
    let (node, _) = node_with_peers(&[Behaviour::Unreachable]).await;
    recover(&node).await.unwrap_err();
    assert!(node.downloads.announced().borrow().is_empty(), "nobody is told any more that it comes");
    node.add_provider_with_layers(2, IMAGE, &LAYERS, Behaviour::Honest).await;
    let began = tokio::time::Instant::now();
    recover(&node).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "simulated time: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_recovery_leaves_the_download_of_a_shared_layer_running() {
    let (node, image) = node_with_peers(&[Behaviour::HangsAfter(6)]).await;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap().digest;
    let first = recover(&node);
    tokio::pin!(first);
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut first).await.is_err());
    assert!(node.downloads.partial(layer).is_some());
    assert!(tokio::time::timeout(Duration::from_secs(1), recover(&node)).await.is_err(), "it waits");
    assert!(node.downloads.partial(layer).is_some(), "the first one goes on, and gives on what it has");
}

#[tokio::test(start_paused = true)]
async fn partial_providers_without_pieces_get_a_bounded_number_of_requests() {
    let node = TestNode::new();
    let documents = Arc::new(MemoryStore::new());
    let image = put_image(&*documents, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    documents.remove_blob(layer.digest);
    node.announce_store(2, documents, Behaviour::Honest).await;
    for number in 3..6 {
        node.announce_store(number, Arc::new(MemoryStore::new()), Behaviour::Honest).await;
        let fetching = vec![InventoryChange::Added(InventoryItem::Fetching(layer.digest))];
        node.inventory.apply(MeshEvent::Changed(peer(number), fetching));
    }
    let began = tokio::time::Instant::now();
    assert!(matches!(recover(&node).await, Err(RecoverError::Fetch { digest, .. }) if digest == layer.digest));
    assert!(began.elapsed() < Duration::from_secs(60), "it ends: {:?}", began.elapsed());
    let lists = node.fetcher.chain_request_count();
    assert!((1..500).contains(&lists), "{lists} questions for a list");
}
