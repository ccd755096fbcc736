//! Recoveries of indexes, nested or not: the manifest for this node's platform is selected.

use tokio_util::sync::CancellationToken;

use super::pod_controller::{REFUSED, RunningController, failing_pod, reports};
use super::*;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::model::{PodReportKind, RecoveredImage};
use crate::oci::{Descriptor, MAX_INDEX_DEPTH};
use crate::ports::ChildKind;
use crate::testing::image::{Recipe, make_image, put_document};

async fn recover(node: &TestNode) -> Result<RecoveredImage, RecoverError> {
    let request = IMAGE.parse::<Reference>().unwrap().into();
    node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await
}

fn nested() -> Recipe {
    Recipe { layers: vec![3000, 200], nested: true, ..Recipe::default() }
}

#[tokio::test(start_paused = true)]
async fn a_nested_index_is_followed_and_each_document_has_gc_labels_of_its_children() {
    let (node, peer_store) = (TestNode::new(), Arc::new(MemoryStore::new()));
    let image = make_image(&*peer_store, &[IMAGE.into()], &nested(), 7).await.unwrap();
    node.announce_store(1, peer_store, Behaviour::Honest).await;
    let recovered = recover(&node).await.unwrap();
    assert_eq!((recovered.digest, recovered.fetched), (image.target.digest, 6), "two indexes, a manifest, its blobs");
    let kinds = |document: &Descriptor| -> Vec<_> {
        let metadata = node.store.metadata(document.digest).unwrap();
        metadata.children.iter().map(|child| child.kind).collect()
    };
    for index in [&image.target, &image.blobs[0]] {
        assert_eq!(kinds(index), [ChildKind::Manifest, ChildKind::Manifest]);
    }
    assert_eq!(kinds(&image.blobs[1]), [ChildKind::Config, ChildKind::Layer, ChildKind::Layer]);
    node.store.collect();
    assert_eq!(blobs_of(&*node.store).await.len(), 6, "the image records alone keep every blob");
}

#[tokio::test(start_paused = true)]
async fn a_lost_document_between_an_index_and_its_manifest_is_fetched_again() {
    for lost in 0..3 {
        let (node, peer_store) = (TestNode::new(), Arc::new(MemoryStore::new()));
        make_image(&*peer_store, &[IMAGE.into()], &nested(), 7).await.unwrap();
        node.announce_store(1, peer_store, Behaviour::Honest).await;
        let image = make_image(&*node.store, &[IMAGE.into()], &nested(), 7).await.unwrap();
        node.store.remove_blob(image.blobs[lost].digest);
        let recovered = recover(&node).await.unwrap();
        assert_eq!((recovered.fetched, recovered.present), (1, 5), "without blob {lost}");
    }
}

#[tokio::test(start_paused = true)]
async fn indexes_are_followed_as_deep_as_the_bound_and_no_deeper() {
    for indexes in [MAX_INDEX_DEPTH, MAX_INDEX_DEPTH + 1] {
        let (node, peer_store) = (TestNode::new(), Arc::new(MemoryStore::new()));
        let mut inner = put_image(&*peer_store, &[], &[5], 1).await.unwrap().target;
        for _ in 0..indexes {
            let index = serde_json::json!({"schemaVersion": 2, "manifests": [for_this_platform(&inner)]}).to_string();
            inner = put_document(&*peer_store, IMAGE, index).await.unwrap();
        }
        node.announce_store(1, peer_store, Behaviour::Honest).await;
        let recovered = recover(&node).await;
        match indexes > MAX_INDEX_DEPTH {
            true => assert!(matches!(recovered, Err(RecoverError::NestedIndex { .. })), "{recovered:?}"),
            false => assert_eq!(recovered.unwrap().fetched, indexes + 3),
        }
    }
}

/// The manifest's index entry, for this node's platform.
fn for_this_platform(manifest: &Descriptor) -> Descriptor {
    Descriptor { platform: Some(Platform::of_this_node()), ..manifest.clone() }
}

fn unnamed() -> Recipe {
    Recipe { layers: vec![3000], index: true, without_platforms: true, ..Recipe::default() }
}

#[tokio::test(start_paused = true)]
async fn an_entry_without_a_platform_is_selected_by_its_config() {
    for recipe in [unnamed(), Recipe { nested: true, ..unnamed() }] {
        let (node, peer_store) = (TestNode::new(), Arc::new(MemoryStore::new()));
        let image = make_image(&*peer_store, &[IMAGE.into()], &recipe, 7).await.unwrap();
        node.announce_store(1, peer_store, Behaviour::Honest).await;
        let recovered = recover(&node).await.unwrap();
        assert_eq!(recovered.digest, image.target.digest);
        node.store.collect();
        assert_eq!(blobs_of(&*node.store).await.len(), image.blobs.len() + 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cri_could_not_size_waits_for_the_missing_document() {
    let (node, peer_store) = (TestNode::new(), Arc::new(MemoryStore::new()));
    let image = make_image(&*peer_store, &[IMAGE.into()], &unnamed(), 7).await.unwrap();
    let sized = image.blobs.last().unwrap();
    peer_store.remove_blob(sized.digest);
    node.announce_store(1, peer_store, Behaviour::Honest).await;
    let rejected = recover(&node).await;
    assert!(
        matches!(&rejected, Err(RecoverError::BlobsWithoutProvider { blobs, .. }) if blobs[..] == [sized.digest]),
        "{rejected:?}"
    );
    assert!(node.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_entry_without_a_platform_is_rejected_if_its_config_names_another_platform() {
    let (node, peer_store) = (TestNode::new(), Arc::new(MemoryStore::new()));
    let recipe = Recipe { architecture: Some("s390x".into()), ..unnamed() };
    let image = make_image(&*peer_store, &[IMAGE.into()], &recipe, 7).await.unwrap();
    node.announce_store(1, peer_store, Behaviour::Honest).await;
    let rejected = recover(&node).await;
    let index_digest = image.target.digest;
    assert!(matches!(rejected, Err(RecoverError::NoPlatform { digest, .. }) if digest == index_digest), "{rejected:?}");
    let layer = &image.blobs[2];
    assert!(node.fetcher.served().iter().all(|(_, digest)| *digest != layer.digest), "no layer is fetched");
    node.store.collect();
    assert!(blobs_of(&*node.store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_manifest_outside_an_index_is_accepted_for_any_platform() {
    let (node, peer_store) = (TestNode::new(), Arc::new(MemoryStore::new()));
    let recipe = Recipe { architecture: Some("s390x".into()), layers: vec![5], ..Recipe::default() };
    make_image(&*peer_store, &[IMAGE.into()], &recipe, 7).await.unwrap();
    node.announce_store(1, peer_store, Behaviour::Honest).await;
    assert_eq!(recover(&node).await.unwrap().fetched, 3, "as in containerd");
}

/// A store with an index for two platforms and the image of one platform: this node's if `ours`,
/// or s390x.
async fn with_one_platform(is_own_platform: bool) -> Arc<MemoryStore> {
    let (store, other) = (Arc::new(MemoryStore::new()), MemoryStore::new());
    let (first, second): (&MemoryStore, &MemoryStore) =
        if is_own_platform { (&other, &store) } else { (&store, &other) };
    let other_platform = Platform { architecture: "s390x".into(), os: "linux".into(), variant: None };
    let entries = [
        Descriptor { platform: Some(other_platform), ..put_image(first, &[], &[5], 1).await.unwrap().target },
        for_this_platform(&put_image(second, &[], &[5], 2).await.unwrap().target),
    ];
    let index = serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string();
    put_document(&*store, IMAGE, index).await.unwrap();
    store
}

#[tokio::test(start_paused = true)]
async fn providers_of_other_platforms_are_reported_once_and_a_matching_provider_is_used_at_once() {
    let node = TestNode::new();
    node.announce_store(1, with_one_platform(false).await, Behaviour::Honest).await;
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("p", IMAGE, REFUSED)).await;
    // Longer than the longest back-off of 300 s.
    tokio::time::sleep(std::time::Duration::from_secs(1800)).await;
    assert_eq!(reports(&node), [("p".to_owned(), PodReportKind::NoProvider)]);
    let note = node.cluster.reports()[0].1.note.clone();
    assert!(note.contains("other platforms") && note.contains(&Platform::of_this_node().to_string()), "{note}");
    // Another provider without this platform starts no attempt.
    let served_before = node.fetcher.served().len();
    node.announce_store(2, with_one_platform(false).await, Behaviour::Honest).await;
    controller.settle().await;
    assert_eq!(node.fetcher.served().len(), served_before);
    node.announce_store(3, with_one_platform(true).await, Behaviour::Honest).await;
    controller.settle().await;
    assert_eq!(controller.nudges.try_recv().unwrap().name, "p");
    controller.stop().await;
}
