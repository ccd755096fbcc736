//! What is here and wrong, or here and not whole, is mended with what peers hold.

use tokio_util::sync::CancellationToken;

use super::salvaging::{Watch, failing, reports};
use super::*;
use crate::agent::progress::Progress;
use crate::agent::recover::{RecoverError, Recovered};
use crate::agent::resolve::Wanted;
use crate::model::Waiting;
use crate::oci::Repository;
use crate::ports::{Remembered, ReportKind, Unpacker as _};
use crate::testing::image::{Recipe, make_image, put_document};

async fn recover(harbour: &Harbour) -> Result<Recovered, RecoverError> {
    let wanted = IMAGE.parse::<Reference>().unwrap().into();
    harbour.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await
}

/// The same image here and at a peer.
async fn on_both_sides(recipe: &Recipe) -> (Harbour, MadeImage) {
    let harbour = Harbour::new();
    let theirs = Arc::new(MemoryStore::new());
    make_image(&*theirs, &[IMAGE.into()], recipe, 7).await.unwrap();
    harbour.announce(1, theirs, Behaviour::Honest).await;
    let image = make_image(&*harbour.store, &[IMAGE.into()], recipe, 7).await.unwrap();
    (harbour, image)
}

fn indexed() -> Recipe {
    Recipe { layers: vec![3000, 200], index: true, ..Recipe::default() }
}

/// Whether every blob of the image is here after a collection, with the right bytes.
async fn is_whole(store: &MemoryStore, image: &MadeImage) -> bool {
    is_whole_of(store, image, 1 << 20).await
}

/// The same of an image whose blobs have this many bytes at most.
async fn is_whole_of(store: &MemoryStore, image: &MadeImage, longest: usize) -> bool {
    store.collect();
    let mut whole = true;
    for blob in image.blobs.iter().chain([&image.root]) {
        let bytes = match store.open(blob.digest).await {
            Ok(mut reader) => reader.read_at(0, longest).await.unwrap(),
            Err(_) => return false,
        };
        whole &= Digest::of(&bytes) == blob.digest;
    }
    whole
}

#[tokio::test(start_paused = true)]
async fn a_small_blob_with_wrong_bytes_is_replaced_and_nothing_else_is_fetched() {
    let (_, image) = on_both_sides(&indexed()).await;
    for blob in image.blobs.iter().chain([&image.root]) {
        let (harbour, image) = on_both_sides(&indexed()).await;
        harbour.store.spoil(blob.digest);
        let recovered = recover(&harbour).await.unwrap();
        assert_eq!((recovered.fetched, recovered.bytes), (1, blob.size), "{}", blob.media_type);
        assert!(is_whole(&harbour.store, &image).await, "{}", blob.media_type);
        assert_eq!(harbour.store.pins(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_large_layer_with_wrong_bytes_is_replaced_where_the_kubelet_found_it_damaged() {
    let recipe = Recipe { layers: vec![5 << 20, 200], ..Recipe::default() };
    for (in_doubt, expected) in [(true, 1), (false, 0)] {
        let (harbour, image) = on_both_sides(&recipe).await;
        let layer = image.blobs.iter().find(|blob| blob.size > 4 << 20).unwrap();
        harbour.store.spoil(layer.digest);
        let wanted = Wanted { in_doubt, ..IMAGE.parse::<Reference>().unwrap().into() };
        let recovered =
            harbour.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await.unwrap();
        assert_eq!(recovered.fetched, expected, "in doubt: {in_doubt}");
        if in_doubt {
            assert_eq!(recovered.bytes, layer.size);
            assert!(is_whole_of(&harbour.store, &image, 8 << 20).await);
            assert_eq!(harbour.store.pins(), 0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_damaged_layer_that_no_peer_has_stays() {
    let harbour = Harbour::new();
    let recipe = Recipe { layers: vec![5 << 20, 200], ..Recipe::default() };
    let image = make_image(&*harbour.store, &[IMAGE.into()], &recipe, 7).await.unwrap();
    let layer = image.blobs.iter().find(|blob| blob.size > 4 << 20).unwrap();
    harbour.store.spoil(layer.digest);
    let wanted = Wanted { in_doubt: true, ..IMAGE.parse::<Reference>().unwrap().into() };
    let _ = harbour.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await;
    assert!(harbour.store.blob(layer.digest).await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn what_was_remembered_of_a_replaced_manifest_is_remembered_still() {
    let (harbour, image) = on_both_sides(&indexed()).await;
    let other = Repository { registry: "mirror.test".into(), path: "checkout".into() };
    let remembered = Remembered { source: Some(other.clone()), children: Vec::new() };
    harbour.store.remember(image.root.digest, &remembered).await.unwrap();
    harbour.store.spoil(image.root.digest);
    recover(&harbour).await.unwrap();
    let blob = harbour.store.blob(image.root.digest).await.unwrap().unwrap();
    let ours = IMAGE.parse::<Reference>().unwrap().repository().clone();
    assert_eq!((blob.sources, blob.has_children), (vec![other, ours], true));
}

#[tokio::test(start_paused = true)]
async fn what_is_damaged_stays_while_nobody_has_better() {
    let (harbour, image) = on_both_sides(&indexed()).await;
    let config = &image.blobs[1];
    harbour.store.spoil(config.digest);
    harbour.fetcher.put_peer(peer(1), Arc::new(MemoryStore::new()), Behaviour::Gone);
    let failed = recover(&harbour).await.unwrap_err();
    assert!(matches!(failed, RecoverError::Fetch { digest, .. } if digest == config.digest), "{failed}");
    harbour.store.collect();
    assert_eq!(blobs_of(&*harbour.store).await.len(), 5, "nothing is removed before there is something better");
}

#[tokio::test(start_paused = true)]
async fn a_record_without_its_blobs_is_repaired_by_fetching_them() {
    for lost in 0..4 {
        let (harbour, image) = on_both_sides(&indexed()).await;
        let pin = harbour.store.pin(std::time::Duration::from_secs(600)).await.unwrap();
        harbour.store.discard(image.blobs[lost].digest, &pin).await.unwrap();
        let recovered = recover(&harbour).await.unwrap();
        harbour.store.release(pin).await.unwrap();
        assert_eq!((recovered.fetched, recovered.there), (1, 4), "without blob {lost}");
        assert!(is_whole(&harbour.store, &image).await, "without blob {lost}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_artifact_is_refused_and_said_to_be_one() {
    let harbour = Harbour::new();
    let theirs = Arc::new(MemoryStore::new());
    let config =
        serde_json::json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(b"{}"), "size": 2});
    let chart =
        serde_json::json!({"schemaVersion": 2, "artifactType": "application/x.chart", "config": config, "layers": []});
    put_document(&*theirs, IMAGE, chart.to_string()).await.unwrap();
    harbour.announce(1, theirs, Behaviour::Honest).await;
    let refused = recover(&harbour).await.unwrap_err();
    assert!(refused.to_string().contains("an artifact of type \"application/x.chart\""), "{refused}");
    assert!(blobs_of(&*harbour.store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_broken_image_that_is_unpacked_keeps_its_record_because_pods_start_from_the_snapshot() {
    for is_unpacked in [true, false] {
        let harbour = Harbour::new();
        let recipe = Recipe { layers: vec![3000, 200], nested: true, ..Recipe::default() };
        let here = make_image(&*harbour.store, &[IMAGE.to_owned()], &recipe, 1).await.unwrap();
        let pin = harbour.store.pin(std::time::Duration::from_secs(36_000)).await.unwrap();
        // The lower layer alone is no image.
        for layer in here.layers.iter().take(if is_unpacked { 2 } else { 1 }) {
            harbour.store.unpack(layer, &pin).await.unwrap();
        }
        harbour.store.lose(here.layers[0].blob.digest);
        harbour.registry.put_registry("r.test");
        let mut pod = failing("p", IMAGE, "");
        pod.containers[0].waiting = Some(Waiting {
            reason: "CreateContainerError".into(),
            message: "failed to unpack: content digest sha256:00: not found".into(),
        });
        let watch = Watch::start(&harbour);
        watch.sees(pod).await;
        tokio::time::sleep(std::time::Duration::from_secs(1800)).await;
        assert_eq!(harbour.record_names().await.is_empty(), !is_unpacked);
        assert_eq!(reports(&harbour).iter().any(|(_, kind)| *kind == ReportKind::Removed), !is_unpacked);
        watch.stop().await;
    }
}
