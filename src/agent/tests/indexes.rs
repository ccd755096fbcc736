//! Images whose name is an index: which of the manifests in the index runs here, at any depth.

use tokio_util::sync::CancellationToken;

use super::salvaging::{REFUSED, Watch, failing, reports};
use super::*;
use crate::agent::progress::Progress;
use crate::agent::recover::{RecoverError, Recovered};
use crate::oci::{Descriptor, MAX_INDEX_DEPTH};
use crate::ports::{ChildKind, ReportKind};
use crate::testing::image::{Recipe, make_image, put_document};

async fn recover(harbour: &Harbour) -> Result<Recovered, RecoverError> {
    let wanted = IMAGE.parse::<Reference>().unwrap().into();
    harbour.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await
}

fn nested() -> Recipe {
    Recipe { layers: vec![3000, 200], nested: true, ..Recipe::default() }
}

#[tokio::test(start_paused = true)]
async fn an_index_inside_an_index_is_followed_and_every_document_holds_its_children() {
    let (harbour, theirs) = (Harbour::new(), Arc::new(MemoryStore::new()));
    let image = make_image(&*theirs, &[IMAGE.into()], &nested(), 7).await.unwrap();
    harbour.announce(1, theirs, Behaviour::Honest).await;
    let recovered = recover(&harbour).await.unwrap();
    assert_eq!((recovered.root, recovered.fetched), (image.root.digest, 6), "two indexes, a manifest, its blobs");
    let kinds = |document: &Descriptor| -> Vec<_> {
        let remembered = harbour.store.remembered(document.digest).unwrap();
        remembered.children.iter().map(|child| child.kind).collect()
    };
    for index in [&image.root, &image.blobs[0]] {
        assert_eq!(kinds(index), [ChildKind::Manifest, ChildKind::Manifest]);
    }
    assert_eq!(kinds(&image.blobs[1]), [ChildKind::Config, ChildKind::Layer, ChildKind::Layer]);
    harbour.store.collect();
    assert_eq!(blobs_of(&*harbour.store).await.len(), 6, "the records alone hold every blob");
}

#[tokio::test(start_paused = true)]
async fn a_lost_document_between_an_index_and_its_manifest_is_fetched_again() {
    for lost in 0..3 {
        let (harbour, theirs) = (Harbour::new(), Arc::new(MemoryStore::new()));
        make_image(&*theirs, &[IMAGE.into()], &nested(), 7).await.unwrap();
        harbour.announce(1, theirs, Behaviour::Honest).await;
        let image = make_image(&*harbour.store, &[IMAGE.into()], &nested(), 7).await.unwrap();
        harbour.store.lose(image.blobs[lost].digest);
        let recovered = recover(&harbour).await.unwrap();
        assert_eq!((recovered.fetched, recovered.there), (1, 5), "without blob {lost}");
    }
}

#[tokio::test(start_paused = true)]
async fn indexes_are_followed_as_deep_as_the_bound_and_no_deeper() {
    for indexes in [MAX_INDEX_DEPTH, MAX_INDEX_DEPTH + 1] {
        let (harbour, theirs) = (Harbour::new(), Arc::new(MemoryStore::new()));
        let mut inner = put_image(&*theirs, &[], &[5], 1).await.unwrap().root;
        for _ in 0..indexes {
            let index = serde_json::json!({"schemaVersion": 2, "manifests": [named(&inner)]}).to_string();
            inner = put_document(&*theirs, IMAGE, index).await.unwrap();
        }
        harbour.announce(1, theirs, Behaviour::Honest).await;
        let recovered = recover(&harbour).await;
        match indexes > MAX_INDEX_DEPTH {
            true => assert!(matches!(recovered, Err(RecoverError::NestedIndex { .. })), "{recovered:?}"),
            false => assert_eq!(recovered.unwrap().fetched, indexes + 3),
        }
    }
}

/// The entry of an index for this platform.
fn named(manifest: &Descriptor) -> Descriptor {
    Descriptor { platform: Some(Platform::of_this_node()), ..manifest.clone() }
}

fn unnamed() -> Recipe {
    Recipe { layers: vec![3000], index: true, unnamed: true, ..Recipe::default() }
}

#[tokio::test(start_paused = true)]
async fn an_entry_without_a_platform_beside_named_ones_runs_where_its_configuration_says() {
    for recipe in [unnamed(), Recipe { nested: true, ..unnamed() }] {
        let (harbour, theirs) = (Harbour::new(), Arc::new(MemoryStore::new()));
        let image = make_image(&*theirs, &[IMAGE.into()], &recipe, 7).await.unwrap();
        harbour.announce(1, theirs, Behaviour::Honest).await;
        let recovered = recover(&harbour).await.unwrap();
        assert_eq!(recovered.root, image.root.digest);
        harbour.store.collect();
        assert_eq!(blobs_of(&*harbour.store).await.len(), image.blobs.len() + 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cri_could_not_size_waits_for_the_missing_document() {
    let (harbour, theirs) = (Harbour::new(), Arc::new(MemoryStore::new()));
    let image = make_image(&*theirs, &[IMAGE.into()], &unnamed(), 7).await.unwrap();
    let sized = image.blobs.last().unwrap();
    theirs.lose(sized.digest);
    harbour.announce(1, theirs, Behaviour::Honest).await;
    let refused = recover(&harbour).await;
    assert!(matches!(&refused, Err(RecoverError::NotHeld { blobs, .. }) if blobs[..] == [sized.digest]), "{refused:?}");
    assert!(harbour.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_entry_without_a_platform_is_refused_where_its_configuration_names_another() {
    let (harbour, theirs) = (Harbour::new(), Arc::new(MemoryStore::new()));
    let recipe = Recipe { architecture: Some("s390x".into()), ..unnamed() };
    let image = make_image(&*theirs, &[IMAGE.into()], &recipe, 7).await.unwrap();
    harbour.announce(1, theirs, Behaviour::Honest).await;
    let refused = recover(&harbour).await;
    let root = image.root.digest;
    assert!(matches!(refused, Err(RecoverError::NoPlatform { digest, .. }) if digest == root), "{refused:?}");
    let layer = &image.blobs[2];
    assert!(harbour.fetcher.served().iter().all(|(_, digest)| *digest != layer.digest), "no layer moves");
    harbour.store.collect();
    assert!(blobs_of(&*harbour.store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_manifest_by_itself_runs_whatever_its_configuration_names() {
    let (harbour, theirs) = (Harbour::new(), Arc::new(MemoryStore::new()));
    let recipe = Recipe { architecture: Some("s390x".into()), layers: vec![5], ..Recipe::default() };
    make_image(&*theirs, &[IMAGE.into()], &recipe, 7).await.unwrap();
    harbour.announce(1, theirs, Behaviour::Honest).await;
    assert_eq!(recover(&harbour).await.unwrap().fetched, 3, "as in containerd");
}

/// A store with an index for two platforms, and the image of one of them.
async fn with_one_platform(ours: bool) -> Arc<MemoryStore> {
    let (store, other) = (Arc::new(MemoryStore::new()), MemoryStore::new());
    let (first, second): (&MemoryStore, &MemoryStore) = if ours { (&other, &store) } else { (&store, &other) };
    let elsewhere = Platform { architecture: "s390x".into(), os: "linux".into(), variant: None };
    let entries = [
        Descriptor { platform: Some(elsewhere), ..put_image(first, &[], &[5], 1).await.unwrap().root },
        named(&put_image(second, &[], &[5], 2).await.unwrap().root),
    ];
    let index = serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string();
    put_document(&*store, IMAGE, index).await.unwrap();
    store
}

#[tokio::test(start_paused = true)]
async fn providers_of_another_platform_only_are_reported_once_and_a_right_one_is_used_at_once() {
    let harbour = Harbour::new();
    harbour.announce(1, with_one_platform(false).await, Behaviour::Honest).await;
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    // Long enough for the longest wait between two tries.
    tokio::time::sleep(std::time::Duration::from_secs(1800)).await;
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::NoProvider)]);
    let note = harbour.cluster.reports()[0].1.note.clone();
    assert!(note.contains("other platforms") && note.contains(&Platform::of_this_node().to_string()), "{note}");
    // One more of the wrong kind wakes nothing.
    let tried = harbour.fetcher.served().len();
    harbour.announce(2, with_one_platform(false).await, Behaviour::Honest).await;
    watch.rest().await;
    assert_eq!(harbour.fetcher.served().len(), tried);
    harbour.announce(3, with_one_platform(true).await, Behaviour::Honest).await;
    watch.rest().await;
    assert_eq!(watch.nudges.try_recv().unwrap().name, "p");
    watch.stop().await;
}
