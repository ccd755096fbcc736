//! Recoveries of one image in pieces, from several honest and dishonest peers at once.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::decide::claim::{ZoneLeader, zone_claim};
use crate::model::RecoveredImage;
use crate::oci::{MIN_PIECE_SIZE, PieceLayout};
use crate::ports::{Blobs, FetchError, PartialBlobs, Pins};

/// A layer of 13 pieces, the last one shorter, and a layer of one piece.
const LAYERS: [u64; 2] = [12 * MIN_PIECE_SIZE + 1000, 5000];

fn request() -> RecoveryRequest {
    IMAGE.parse::<Reference>().unwrap().into()
}

async fn recover(node: &TestNode) -> Result<RecoveredImage, RecoverError> {
    node.recoverer().recover(&request(), &Progress::default(), &CancellationToken::new()).await
}

/// A node, and peers 1, 2, ... with these behaviors and the same image.
async fn node_with_peers(behaviours: &[Behaviour]) -> (TestNode, MadeImage) {
    let node = TestNode::new();
    let mut image = None;
    for (number, behaviour) in (1..).zip(behaviours) {
        image = Some(node.add_provider_with_layers(number, IMAGE, &LAYERS, *behaviour).await);
    }
    (node, image.unwrap())
}

fn has_faults(node: &TestNode, kind: &str, count: u32) -> bool {
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
    assert!(has_faults(&node, "lied", 1), "the peer is at fault once");
}

#[tokio::test(start_paused = true)]
async fn a_provider_with_a_damaged_file_sends_one_wrong_piece() {
    let mut sent = 0;
    // If the first request is for the hash chain, the peer detects the damage while computing the
    // chain, and sends no piece. The order of the requests is random, hence eight attempts.
    for _ in 0..8 {
        let (node, _) =
            node_with_peers(&[Behaviour::DiskCorrupted, Behaviour::SendsChainSlowly, Behaviour::Honest]).await;
        recover(&node).await.unwrap();
        let wrong = node.fetcher.corrupt_piece_count();
        assert!(wrong == 0 || (wrong == 1 && has_faults(&node, "lied", 1)), "{wrong} pieces");
        sent += wrong;
    }
    assert!(sent > 0);
}

#[tokio::test(start_paused = true)]
async fn a_single_provider_gets_requests_for_all_pieces_while_it_computes_its_hash_chain() {
    let (node, image) = node_with_peers(&[Behaviour::SendsChainSlowly]).await;
    let (recoverer, progress, stop) = (node.recoverer(), Progress::default(), CancellationToken::new());
    let request = request();
    let recovery = recoverer.recover(&request, &progress, &stop);
    tokio::pin!(recovery);
    // Below the time limit of 500 ms for the verification of a provider's first piece.
    assert!(
        tokio::time::timeout(Duration::from_millis(400), &mut recovery).await.is_err(),
        "no blob is committed without its hash chain"
    );
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
    assert!(
        node.fetcher.corrupt_piece_count() <= 2,
        "{} wrong pieces from two peers",
        node.fetcher.corrupt_piece_count()
    );
}

#[tokio::test(start_paused = true)]
async fn the_author_of_a_forged_hash_chain_is_at_fault_and_not_the_honest_sender() {
    for forged in [0, 5, 11] {
        let (node, _) = node_with_peers(&[Behaviour::ForgesChain(forged), Behaviour::Honest]).await;
        let recoverer = node.recoverer();
        recoverer.recover(&request(), &Progress::default(), &CancellationToken::new()).await.unwrap();
        let honest = recoverer.blob_fetcher.peer_faults().standing(peer(2), tokio::time::Instant::now().into_std());
        assert_eq!(honest, crate::decide::peer_faults::Standing::Good, "forged at {forged}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_wrong_piece_is_fetched_from_another_provider() {
    let (node, image) = node_with_peers(&[Behaviour::CorruptsPiece(4), Behaviour::Honest]).await;
    let recovered = recover(&node).await.unwrap();
    assert_eq!(recovered.bytes, image.bytes(), "wrong bytes are not counted");
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
    assert!(first.is_err(), "the provider hangs");
    node.add_provider_with_layers(1, IMAGE, &LAYERS, Behaviour::Honest).await;
    let began = tokio::time::Instant::now();
    let recovered = recover(&node).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "simulated time: {:?}", began.elapsed());
    let staged = image.bytes() - recovered.bytes;
    assert!(staged >= 3 * MIN_PIECE_SIZE, "{staged} bytes were staged");
}

#[tokio::test(start_paused = true)]
async fn staged_pieces_with_wrong_bytes_are_fetched_again() {
    let (node, image) = node_with_peers(&[Behaviour::Honest]).await;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    let pin = node.store.pin(Duration::from_secs(60)).await.unwrap();
    let staged = node.store.stage(layer.digest, layer.size, &pin).await.unwrap();
    let wrong_bytes = bytes::Bytes::from(vec![7; 3 * MIN_PIECE_SIZE as usize]);
    staged.write_at(MIN_PIECE_SIZE, &[wrong_bytes]).await.unwrap();
    drop(staged);
    let began = tokio::time::Instant::now();
    let recovered = recover(&node).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "simulated time: {:?}", began.elapsed());
    assert_eq!(recovered.bytes, image.bytes(), "no staged byte was right");
}

#[tokio::test(start_paused = true)]
async fn a_partial_provider_serves_staged_pieces() {
    let (node, image) = node_with_peers(&[Behaviour::HangsAfter(10)]).await;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    let other = TestNode::new();
    let (first, second) = (node.recoverer(), other.recoverer());
    // The other node gets the large layer from peer 3 alone, which is the first node and still
    // downloads the layer. Peer 2 provides all other blobs.
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

    let (request, stop, progress, second_progress) =
        (request(), CancellationToken::new(), Progress::default(), Progress::default());
    let release = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let received = second_progress.blobs()[&layer.digest].done;
        assert!(received >= 5 * MIN_PIECE_SIZE, "{received} bytes before the download was complete");
        node.add_provider_with_layers(4, IMAGE, &LAYERS, Behaviour::Honest).await;
    };
    let (first_result, second_result, ()) = tokio::join!(
        first.recover(&request, &progress, &stop),
        second.recover(&request, &second_progress, &stop),
        release
    );
    first_result.unwrap();
    let recovered = second_result.unwrap();
    assert_eq!(recovered.providers[&peer(3)], layer.size, "the partial provider sent the whole layer");
    assert_eq!(PieceLayout::for_size(layer.size).piece_count(), 13);
}

/// A peer that ranks before this node as the zone's leader for this image.
fn peer_ranked_before_us(digest: Digest, zone: &Zone) -> u8 {
    let now = std::time::Instant::now();
    let is_ranked_before = |number: &u8| {
        let mut leader = ZoneLeader::new(peer(0), zone_claim(digest, zone), now);
        leader.set_fetching(&[peer(*number)], now);
        !leader.update_is_leading(now)
    };
    (10..).find(is_ranked_before).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_node_fetches_from_another_zone_itself_if_the_zone_leader_makes_no_progress() {
    let zone = |name: &str| Zone::try_from(name.to_owned()).unwrap();
    let node = TestNode { zone: Some(zone("here")), ..TestNode::new() };
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap().digest;
    node.announce_store_in_zone(Some(zone("there")), 1, Arc::clone(&store), Behaviour::Honest).await;
    // The zone leader announces downloads of all blobs and never gets a piece.
    let leader = peer_ranked_before_us(image.target.digest, &zone("here"));
    node.announce_store_in_zone(Some(zone("here")), leader, Arc::new(MemoryStore::new()), Behaviour::Honest).await;
    let fetching =
        image.blobs.iter().map(|blob| InventoryChange::Added(InventoryItem::Fetching(blob.digest))).collect();
    node.inventory.apply(MeshEvent::Changed(peer(leader), fetching));

    let (recoverer, progress, stop) = (node.recoverer(), Progress::default(), CancellationToken::new());
    let request = request();
    let recovery = recoverer.recover(&request, &progress, &stop);
    tokio::pin!(recovery);
    let early = tokio::time::timeout(Duration::from_millis(2500), &mut recovery).await;
    assert!(early.is_err() && progress.blobs()[&layer].done == 0, "the node waits for the zone leader");
    let recovered = recovery.await.unwrap();
    assert_eq!(recovered.providers.into_keys().collect::<Vec<_>>(), [peer(1)], "the node fetches from the other zone");
}

#[tokio::test(start_paused = true)]
async fn a_blob_that_no_provider_sent_can_be_retried_at_once() {
    let (node, _) = node_with_peers(&[Behaviour::Unreachable]).await;
    recover(&node).await.unwrap_err();
    assert!(node.downloads.announced().borrow().is_empty(), "the announcement of the download is withdrawn");
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
    assert!(tokio::time::timeout(Duration::from_secs(1), recover(&node)).await.is_err(), "the second recovery waits");
    assert!(node.downloads.partial(layer).is_some(), "the first recovery continues and serves its pieces");
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
    assert!(began.elapsed() < Duration::from_secs(60), "simulated time: {:?}", began.elapsed());
    let chain_requests = node.fetcher.chain_request_count();
    assert!((1..500).contains(&chain_requests), "{chain_requests} requests for a hash chain");
}
