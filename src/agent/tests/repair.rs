//! Repair of damaged and incomplete images with blobs from peers.

use tokio_util::sync::CancellationToken;

use super::pod_controller::{RunningController, failing_pod, reports};
use super::*;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::model::{PodReportKind, RecoveredImage, WaitingState};
use crate::oci::Repository;
use crate::ports::{BlobMetadata, Blobs, Pins, Unpacker as _};
use crate::testing::image::{Recipe, make_image, put_document};

async fn recover(node: &TestNode) -> Result<RecoveredImage, RecoverError> {
    let request = IMAGE.parse::<Reference>().unwrap().into();
    node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await
}

/// A node and a peer with the same image.
async fn node_and_peer_with(recipe: &Recipe) -> (TestNode, MadeImage) {
    let node = TestNode::new();
    let peer_store = Arc::new(MemoryStore::new());
    make_image(&*peer_store, &[IMAGE.into()], recipe, 7).await.unwrap();
    node.announce_store(1, peer_store, Behaviour::Honest).await;
    let image = make_image(&*node.store, &[IMAGE.into()], recipe, 7).await.unwrap();
    (node, image)
}

fn indexed() -> Recipe {
    Recipe { layers: vec![3000, 200], index: true, ..Recipe::default() }
}

/// Collects garbage. Returns whether the store then has every blob of the image, with the right
/// bytes.
async fn collect_and_verify(store: &MemoryStore, image: &MadeImage) -> bool {
    collect_and_verify_up_to(store, image, 1 << 20).await
}

/// As [`collect_and_verify`], for an image with blobs of at most `longest` bytes.
async fn collect_and_verify_up_to(store: &MemoryStore, image: &MadeImage, max_bytes: usize) -> bool {
    store.collect();
    let mut is_whole = true;
    for blob in image.blobs.iter().chain([&image.target]) {
        let bytes = match store.open(blob.digest).await {
            Ok(mut reader) => reader.read_at(0, max_bytes).await.unwrap(),
            Err(_) => return false,
        };
        is_whole &= Digest::of(&bytes) == blob.digest;
    }
    is_whole
}

#[tokio::test(start_paused = true)]
async fn a_small_blob_with_wrong_bytes_is_replaced_and_nothing_else_is_fetched() {
    let (_, image) = node_and_peer_with(&indexed()).await;
    for blob in image.blobs.iter().chain([&image.target]) {
        let (node, image) = node_and_peer_with(&indexed()).await;
        node.store.corrupt(blob.digest);
        let recovered = recover(&node).await.unwrap();
        assert_eq!((recovered.fetched, recovered.bytes), (1, blob.size), "{}", blob.media_type);
        assert!(collect_and_verify(&node.store, &image).await, "{}", blob.media_type);
        assert_eq!(node.store.pins(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_large_damaged_layer_is_replaced_if_the_kubelet_reported_missing_content() {
    let recipe = Recipe { layers: vec![5 << 20, 200], ..Recipe::default() };
    for (verify_layers, expected) in [(true, 1), (false, 0)] {
        let (node, image) = node_and_peer_with(&recipe).await;
        let layer = image.blobs.iter().find(|blob| blob.size > 4 << 20).unwrap();
        node.store.corrupt(layer.digest);
        let request = RecoveryRequest { verify_layers, ..IMAGE.parse::<Reference>().unwrap().into() };
        let recovered =
            node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await.unwrap();
        assert_eq!(recovered.fetched, expected, "verify_layers: {verify_layers}");
        if verify_layers {
            assert_eq!(recovered.bytes, layer.size);
            assert!(collect_and_verify_up_to(&node.store, &image, 8 << 20).await);
            assert_eq!(node.store.pins(), 0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_damaged_layer_that_no_peer_has_stays() {
    let node = TestNode::new();
    let recipe = Recipe { layers: vec![5 << 20, 200], ..Recipe::default() };
    let image = make_image(&*node.store, &[IMAGE.into()], &recipe, 7).await.unwrap();
    let layer = image.blobs.iter().find(|blob| blob.size > 4 << 20).unwrap();
    node.store.corrupt(layer.digest);
    let request = RecoveryRequest { verify_layers: true, ..IMAGE.parse::<Reference>().unwrap().into() };
    let _ = node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await;
    assert!(node.store.blob(layer.digest).await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_replaced_manifest_keeps_its_source_and_gc_labels() {
    let (node, image) = node_and_peer_with(&indexed()).await;
    let other = Repository { registry: "mirror.test".into(), path: "checkout".into() };
    let metadata = BlobMetadata { source: Some(other.clone()), children: Vec::new() };
    node.store.add_metadata(image.target.digest, &metadata).await.unwrap();
    node.store.corrupt(image.target.digest);
    recover(&node).await.unwrap();
    let blob = node.store.blob(image.target.digest).await.unwrap().unwrap();
    let repository = IMAGE.parse::<Reference>().unwrap().repository().clone();
    assert_eq!((blob.sources, blob.has_children), (vec![other, repository], true));
}

#[tokio::test(start_paused = true)]
async fn a_damaged_blob_stays_while_no_provider_has_the_right_bytes() {
    let (node, image) = node_and_peer_with(&indexed()).await;
    let config = &image.blobs[1];
    node.store.corrupt(config.digest);
    node.fetcher.put_peer(peer(1), Arc::new(MemoryStore::new()), Behaviour::Unreachable);
    let failed = recover(&node).await.unwrap_err();
    assert!(matches!(failed, RecoverError::Fetch { digest, .. } if digest == config.digest), "{failed}");
    node.store.collect();
    assert_eq!(blobs_of(&*node.store).await.len(), 5, "a damaged blob stays until a replacement arrives");
}

#[tokio::test(start_paused = true)]
async fn a_recorded_image_without_its_blobs_is_repaired() {
    for lost in 0..4 {
        let (node, image) = node_and_peer_with(&indexed()).await;
        let pin = node.store.pin(std::time::Duration::from_secs(600)).await.unwrap();
        node.store.discard(image.blobs[lost].digest, &pin).await.unwrap();
        let recovered = recover(&node).await.unwrap();
        node.store.release(pin).await.unwrap();
        assert_eq!((recovered.fetched, recovered.present), (1, 4), "without blob {lost}");
        assert!(collect_and_verify(&node.store, &image).await, "without blob {lost}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_artifact_is_rejected_and_the_error_names_its_type() {
    let node = TestNode::new();
    let peer_store = Arc::new(MemoryStore::new());
    let config =
        serde_json::json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(b"{}"), "size": 2});
    let chart =
        serde_json::json!({"schemaVersion": 2, "artifactType": "application/x.chart", "config": config, "layers": []});
    put_document(&*peer_store, IMAGE, chart.to_string()).await.unwrap();
    node.announce_store(1, peer_store, Behaviour::Honest).await;
    let rejected = recover(&node).await.unwrap_err();
    assert!(rejected.to_string().contains("an artifact of type \"application/x.chart\""), "{rejected}");
    assert!(blobs_of(&*node.store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_broken_image_that_is_unpacked_keeps_its_record_because_pods_start_from_the_snapshot() {
    for is_unpacked in [true, false] {
        let node = TestNode::new();
        let recipe = Recipe { layers: vec![3000, 200], nested: true, ..Recipe::default() };
        let image = make_image(&*node.store, &[IMAGE.to_owned()], &recipe, 1).await.unwrap();
        let pin = node.store.pin(std::time::Duration::from_secs(36_000)).await.unwrap();
        // The lower layer alone does not unpack the image.
        for layer in image.layers.iter().take(if is_unpacked { 2 } else { 1 }) {
            node.store.unpack(layer, &pin).await.unwrap();
        }
        node.store.remove_blob(image.layers[0].blob.digest);
        node.registry.put_registry("r.test");
        let mut pod = failing_pod("p", IMAGE, "");
        pod.containers[0].waiting = Some(WaitingState {
            reason: "CreateContainerError".into(),
            message: "failed to unpack: content digest sha256:00: not found".into(),
        });
        let controller = RunningController::start(&node);
        controller.send_pod(pod).await;
        tokio::time::sleep(std::time::Duration::from_secs(1800)).await;
        assert_eq!(node.record_names().await.is_empty(), !is_unpacked);
        assert_eq!(reports(&node).iter().any(|(_, kind)| *kind == PodReportKind::RecordRemoved), !is_unpacked);
        controller.stop().await;
    }
}
