//! One image in pieces, from several peers at once, some of which lie.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::progress::Progress;
use crate::agent::recover::{RecoverError, Recovered};
use crate::agent::resolve::Wanted;
use crate::decide::claim::{Crossing, zone_claim};
use crate::oci::{Cut, SMALLEST_PIECE};
use crate::ports::{FetchError, Partials};

/// Twelve pieces and a bit, and one piece.
const LAYERS: [u64; 2] = [12 * SMALLEST_PIECE + 1000, 5000];

fn wanted() -> Wanted {
    IMAGE.parse::<Reference>().unwrap().into()
}

async fn recover(harbour: &Harbour) -> Result<Recovered, RecoverError> {
    harbour.recoverer().recover(&wanted(), &Progress::default(), &CancellationToken::new()).await
}

/// Peers 1, 2, ... that behave so, with the same image.
async fn harbour_with(behaviours: &[Behaviour]) -> (Harbour, MadeImage) {
    let harbour = Harbour::new();
    let mut image = None;
    for (number, behaviour) in (1..).zip(behaviours) {
        image = Some(harbour.peer_with_layers(number, IMAGE, &LAYERS, *behaviour).await);
    }
    (harbour, image.unwrap())
}

fn faults(harbour: &Harbour, kind: &str, count: u32) -> bool {
    harbour.counted(&format!("lighterman_peer_faults_total{{fault={kind:?}}} {count}"))
}

#[tokio::test(start_paused = true)]
async fn pieces_come_from_everybody_who_holds_the_blob() {
    let (harbour, image) = harbour_with(&[Behaviour::Honest; 3]).await;
    let recovered = recover(&harbour).await.unwrap();
    assert_eq!(recovered.providers.len(), 3);
    assert_eq!((recovered.bytes, recovered.fetched), (image.bytes(), 4));
    assert!(recovered.providers.values().all(|bytes| *bytes < image.bytes() / 2), "{:?}", recovered.providers);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_sends_other_bytes_is_found_by_a_piece_and_the_image_comes_from_the_honest() {
    let (harbour, _) = harbour_with(&[Behaviour::Lies, Behaviour::Honest, Behaviour::Honest]).await;
    recover(&harbour).await.unwrap();
    assert!(faults(&harbour, "lied", 1), "one lie is enough");
}

#[tokio::test(start_paused = true)]
async fn one_whose_file_rotted_sends_one_piece_of_it() {
    let mut sent = 0;
    // Now and then it is asked for its list before it is asked for a piece, finds it out itself, and sends none.
    for _ in 0..8 {
        let (harbour, _) = harbour_with(&[Behaviour::Rotten, Behaviour::ListsSlowly, Behaviour::Honest]).await;
        recover(&harbour).await.unwrap();
        let spoilt = harbour.fetcher.spoilt();
        assert!(spoilt == 0 || (spoilt == 1 && faults(&harbour, "lied", 1)), "{spoilt} pieces");
        sent += spoilt;
    }
    assert!(sent > 0);
}

#[tokio::test(start_paused = true)]
async fn a_lone_holder_is_asked_for_everything_while_it_makes_its_list() {
    let (harbour, image) = harbour_with(&[Behaviour::ListsSlowly]).await;
    let (recoverer, progress, stop) = (harbour.recoverer(), Progress::default(), CancellationToken::new());
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
async fn a_list_that_drips_keeps_no_recovery_alive() {
    let (harbour, _) = harbour_with(&[Behaviour::DripsList]).await;
    let began = tokio::time::Instant::now();
    let RecoverError::Fetch { attempts, .. } = recover(&harbour).await.unwrap_err() else { panic!() };
    assert!(
        matches!(attempts[..], [FetchError::Stalled { peer: dripping, .. }] if dripping == peer(1)),
        "{attempts:?}"
    );
    assert!(began.elapsed() < Duration::from_secs(60), "simulated time: {:?}", began.elapsed());
    harbour.peer_with_layers(2, IMAGE, &LAYERS, Behaviour::Honest).await;
    recover(&harbour).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_liar_is_not_believed_because_its_own_list_says_what_it_sends() {
    let (harbour, _) = harbour_with(&[Behaviour::Rotten, Behaviour::Rotten, Behaviour::Honest]).await;
    recover(&harbour).await.unwrap();
    assert!(harbour.fetcher.spoilt() <= 2, "{} pieces for two liars", harbour.fetcher.spoilt());
}

#[tokio::test(start_paused = true)]
async fn whoever_forges_the_list_is_named_and_not_the_honest_sender() {
    for forged in [0, 5, 11] {
        let (harbour, _) = harbour_with(&[Behaviour::ForgesList(forged), Behaviour::Honest]).await;
        let recoverer = harbour.recoverer();
        recoverer.recover(&wanted(), &Progress::default(), &CancellationToken::new()).await.unwrap();
        let honest = recoverer.bring.trust().standing(peer(2), tokio::time::Instant::now().into_std());
        assert_eq!(honest, crate::decide::trust::Standing::Good, "forged at {forged}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_spoilt_piece_comes_from_another_peer() {
    let (harbour, image) = harbour_with(&[Behaviour::SpoilsPiece(4), Behaviour::Honest]).await;
    let recovered = recover(&harbour).await.unwrap();
    assert_eq!(recovered.bytes, image.bytes(), "what was wrong is not counted");
}

#[tokio::test(start_paused = true)]
async fn from_liars_alone_nothing_comes_and_nothing_is_kept() {
    let (harbour, _) = harbour_with(&[Behaviour::Lies, Behaviour::Lies]).await;
    let RecoverError::Fetch { attempts, .. } = recover(&harbour).await.unwrap_err() else { panic!() };
    assert!(attempts.iter().any(FetchError::is_peers_fault), "{attempts:?}");
    assert!(harbour.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_hangs_does_not_hold_up_what_others_have() {
    let (harbour, _) = harbour_with(&[Behaviour::HangsAfter(2), Behaviour::Honest]).await;
    let began = tokio::time::Instant::now();
    recover(&harbour).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "simulated time: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_has_come_before_is_not_fetched_again() {
    let (harbour, image) = harbour_with(&[Behaviour::HangsAfter(6)]).await;
    let first = tokio::time::timeout(Duration::from_secs(20), recover(&harbour)).await;
    assert!(first.is_err(), "it hangs");
    harbour.peer_with_layers(1, IMAGE, &LAYERS, Behaviour::Honest).await;
    let began = tokio::time::Instant::now();
    let recovered = recover(&harbour).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "simulated time: {:?}", began.elapsed());
    let pieces = image.bytes() - recovered.bytes;
    assert!(pieces >= 3 * SMALLEST_PIECE, "{pieces} bytes were there");
}

#[tokio::test(start_paused = true)]
async fn pieces_that_rotted_on_disk_are_fetched_again() {
    let (harbour, image) = harbour_with(&[Behaviour::Honest]).await;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    let pin = harbour.store.pin(Duration::from_secs(60)).await.unwrap();
    let staged = harbour.store.stage(layer.digest, layer.size, &pin).await.unwrap();
    let rubbish = bytes::Bytes::from(vec![7; 3 * SMALLEST_PIECE as usize]);
    staged.write_at(SMALLEST_PIECE, &[rubbish]).await.unwrap();
    drop(staged);
    let began = tokio::time::Instant::now();
    let recovered = recover(&harbour).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "simulated time: {:?}", began.elapsed());
    assert_eq!(recovered.bytes, image.bytes(), "nothing of it was right");
}

#[tokio::test(start_paused = true)]
async fn what_is_still_coming_is_given_on() {
    let (harbour, image) = harbour_with(&[Behaviour::HangsAfter(10)]).await;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    let other = Harbour::new();
    let (first, second) = (harbour.recoverer(), other.recoverer());
    // The other knows only the node that is fetching, and the documents from elsewhere.
    let documents = Arc::new(MemoryStore::new());
    put_image(&*documents, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    documents.lose(layer.digest);
    other.announce(2, documents, Behaviour::Honest).await;
    let partials: Arc<dyn Partials> = Arc::new(harbour.underway.clone());
    other.announce(3, Arc::clone(&harbour.store), Behaviour::Honest).await;
    other.fetcher.put_fetching_peer(peer(3), Arc::clone(&harbour.store) as _, partials);
    other.holders.apply(MeshEvent::Changed(peer(3), vec![ContentChange::Added(Item::Fetching(layer.digest))]));

    let (wanted, stop, progress, others) =
        (wanted(), CancellationToken::new(), Progress::default(), Progress::default());
    let release = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let come = others.blobs()[&layer.digest].done;
        assert!(come >= 5 * SMALLEST_PIECE, "{come} bytes were given on while the rest was to come");
        harbour.peer_with_layers(4, IMAGE, &LAYERS, Behaviour::Honest).await;
    };
    let (one, two, ()) =
        tokio::join!(first.recover(&wanted, &progress, &stop), second.recover(&wanted, &others, &stop), release);
    one.unwrap();
    let two = two.unwrap();
    assert_eq!(two.providers[&peer(3)], layer.size, "all of the layer came from the node that was fetching it");
    assert_eq!(Cut::usual(layer.size).pieces(), 13);
}

/// A peer that ranks before this node when they fetch this image in this zone.
fn better(root: Digest, zone: &Zone) -> u8 {
    let now = std::time::Instant::now();
    let is_better = |number: &u8| {
        let mut crossing = Crossing::new(peer(0), zone_claim(root, zone), now);
        crossing.learn(&[peer(*number)], now);
        !crossing.may_cross(now)
    };
    (10..).find(is_better).unwrap()
}

#[tokio::test(start_paused = true)]
async fn another_zone_is_left_to_the_one_that_fetches_from_it_until_nothing_comes() {
    let zone = |name: &str| Zone::try_from(name.to_owned()).unwrap();
    let harbour = Harbour { zone: Some(zone("here")), ..Harbour::new() };
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap().digest;
    harbour.announce_in(Some(zone("there")), 1, Arc::clone(&store), Behaviour::Honest).await;
    // It says that it is fetching, and has nothing yet, for ever.
    let leader = better(image.root.digest, &zone("here"));
    harbour.announce_in(Some(zone("here")), leader, Arc::new(MemoryStore::new()), Behaviour::Honest).await;
    let fetching = image.blobs.iter().map(|blob| ContentChange::Added(Item::Fetching(blob.digest))).collect();
    harbour.holders.apply(MeshEvent::Changed(peer(leader), fetching));

    let (recoverer, progress, stop) = (harbour.recoverer(), Progress::default(), CancellationToken::new());
    let wanted = wanted();
    let recovery = recoverer.recover(&wanted, &progress, &stop);
    tokio::pin!(recovery);
    let early = tokio::time::timeout(Duration::from_millis(2500), &mut recovery).await;
    assert!(early.is_err() && progress.blobs()[&layer].done == 0, "it waits for the other");
    let recovered = recovery.await.unwrap();
    assert_eq!(recovered.providers.into_keys().collect::<Vec<_>>(), [peer(1)], "and does it itself at last");
}

#[tokio::test(start_paused = true)]
async fn a_blob_that_nobody_could_send_can_be_tried_again_at_once() {
    let (harbour, _) = harbour_with(&[Behaviour::Gone]).await;
    recover(&harbour).await.unwrap_err();
    assert!(harbour.underway.told().borrow().is_empty(), "nobody is told any more that it comes");
    harbour.peer_with_layers(2, IMAGE, &LAYERS, Behaviour::Honest).await;
    let began = tokio::time::Instant::now();
    recover(&harbour).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "simulated time: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_recovery_that_waits_for_another_ones_layer_leaves_it_alone_when_it_ends() {
    let (harbour, image) = harbour_with(&[Behaviour::HangsAfter(6)]).await;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap().digest;
    let first = recover(&harbour);
    tokio::pin!(first);
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut first).await.is_err());
    assert!(harbour.underway.partial(layer).is_some());
    assert!(tokio::time::timeout(Duration::from_secs(1), recover(&harbour)).await.is_err(), "it waits");
    assert!(harbour.underway.partial(layer).is_some(), "the first one goes on, and gives on what it has");
}

#[tokio::test(start_paused = true)]
async fn those_who_are_fetching_and_have_nothing_are_not_asked_without_end() {
    let harbour = Harbour::new();
    let documents = Arc::new(MemoryStore::new());
    let image = put_image(&*documents, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).unwrap();
    documents.lose(layer.digest);
    harbour.announce(2, documents, Behaviour::Honest).await;
    for number in 3..6 {
        harbour.announce(number, Arc::new(MemoryStore::new()), Behaviour::Honest).await;
        let fetching = vec![ContentChange::Added(Item::Fetching(layer.digest))];
        harbour.holders.apply(MeshEvent::Changed(peer(number), fetching));
    }
    let began = tokio::time::Instant::now();
    assert!(matches!(recover(&harbour).await, Err(RecoverError::Fetch { digest, .. }) if digest == layer.digest));
    assert!(began.elapsed() < Duration::from_secs(60), "it ends: {:?}", began.elapsed());
    let lists = harbour.fetcher.lists_asked();
    assert!((1..500).contains(&lists), "{lists} questions for a list");
}
