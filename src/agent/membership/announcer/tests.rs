use std::collections::BTreeMap;

use tokio::sync::mpsc;

use super::*;
use crate::admission::StaticAdmission;
use crate::config::loopback;
use crate::identity::Identity;
use crate::mesh;
use crate::model::OutageKind;
use crate::oci::{Descriptor, Digest, Platform, Reference, Repository};
use crate::ports::{BlobMetadata, Blobs, ImageRecord, ImageRecords, Pins, Unpacker as _};
use crate::testing::MemoryStore;
use crate::testing::image::{MadeImage, Recipe, make_image, put_document};

const NAME: &str = "r.test/shop/checkout:v1";

#[test]
fn removed_items_are_withdrawn_and_only_new_items_are_announced() {
    let blob = |name: &str| InventoryItem::Blob(Digest::of(name.as_bytes()));
    let Ok(Reference::Tag(repository, tag)) = "r.test/a:1".parse() else { panic!("a tag") };
    let image_digest = Digest::of(b"root");
    let name = InventoryItem::Image(repository, Some(tag), image_digest);
    let changes =
        changes_between(&[blob("old"), blob("same"), name.clone()].into(), &[blob("same"), blob("new")].into());
    let expected =
        [InventoryChange::Removed(blob("old")), InventoryChange::Removed(name), InventoryChange::Added(blob("new"))];
    assert_eq!(changes, expected);
}

#[test]
fn damaged_blobs_are_not_announced_and_over_the_limit_blobs_are_dropped_first() {
    let blob =
        |n: usize| BlobInfo { digest: Digest::of(&n.to_le_bytes()), size: 1, sources: Vec::new(), has_children: false };
    let blobs: Vec<_> = (0..MAX_ITEMS).map(blob).collect();
    let outage = Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: 1 };
    let repository = Repository { registry: "r.test".into(), path: "a".into() };
    let name = InventoryItem::Image(repository, None, blobs[0].digest);
    let scan_result = |damaged: &[&BlobInfo]| ImageScan {
        names: [name.clone()].into(),
        damaged: damaged.iter().map(|blob| blob.digest).collect(),
        incomplete: 0,
        reasons: BTreeMap::new(),
    };
    let announced = announceable_items(&blobs[..2], scan_result(&[&blobs[1]]), &[], BTreeSet::new());
    assert_eq!(announced, [InventoryItem::Blob(blobs[0].digest), name.clone()].into());
    let announced = announceable_items(&blobs, scan_result(&[]), std::slice::from_ref(&outage), BTreeSet::new());
    assert_eq!(announced.len(), MAX_ITEMS);
    assert!(announced.contains(&name) && announced.contains(&InventoryItem::Outage(outage)));
}

async fn scan(images: &mut ImageScanner, store: &MemoryStore) -> ImageScan {
    let (blobs, records) = (store.blobs().await.unwrap(), store.images().await.unwrap());
    images.scan(store, &blobs, &records).await.unwrap()
}

/// The announced names of a store, and the number of incomplete images.
async fn announced(store: &MemoryStore) -> (Vec<String>, usize) {
    let result = scan(&mut ImageScanner::default(), store).await;
    let text = |item: &InventoryItem| match item {
        InventoryItem::Image(repository, Some(tag), _) => format!("{repository}:{tag}"),
        InventoryItem::Image(repository, None, root) => format!("{repository}@{root}"),
        other => panic!("{other:?} is no name"),
    };
    (result.names.iter().map(text).collect(), result.incomplete)
}

async fn store_with_image(recipe: &Recipe) -> (MemoryStore, MadeImage) {
    let store = MemoryStore::new();
    let image = make_image(&store, &[NAME.into()], recipe, 7).await.unwrap();
    (store, image)
}

/// Removes the blob, whatever pins it.
async fn discard(store: &MemoryStore, blob: &Descriptor) {
    let pin = store.pin(Duration::from_secs(60)).await.unwrap();
    store.discard(blob.digest, &pin).await.unwrap();
}

#[tokio::test]
async fn an_image_that_is_whole_for_one_platform_is_announced_by_name() {
    let layers = vec![300, 20];
    for recipe in [
        Recipe { layers: layers.clone(), ..Recipe::default() },
        Recipe { layers: layers.clone(), index: true, attested: true, ..Recipe::default() },
        Recipe { layers: layers.clone(), nested: true, attested: true, ..Recipe::default() },
        Recipe { layers, foreign: true, duplicate_layer: true, docker: true, ..Recipe::default() },
        Recipe::default(),
    ] {
        let (store, _) = store_with_image(&recipe).await;
        assert_eq!(announced(&store).await, (vec![NAME.to_owned()], 0), "{recipe:?}");
    }
}

#[tokio::test]
async fn an_image_that_lacks_a_blob_is_not_announced_by_name_and_is_counted() {
    let indexed = Recipe { layers: vec![300, 20], index: true, attested: true, ..Recipe::default() };
    let nested = Recipe { nested: true, ..indexed.clone() };
    for (recipe, blobs) in [(indexed, 4), (nested, 5)] {
        for lost in 0..blobs {
            let (store, image) = store_with_image(&recipe).await;
            discard(&store, &image.blobs[lost]).await;
            assert_eq!(announced(&store).await, (vec![], 1), "without blob {lost} of {recipe:?}");
        }
        let (store, image) = store_with_image(&recipe).await;
        discard(&store, &image.target).await;
        assert_eq!(announced(&store).await, (vec![], 1), "without the index");
    }
}

#[tokio::test]
async fn an_index_that_is_whole_only_for_another_platform_is_announced() {
    let (store, image) = store_with_image(&Recipe { layers: vec![30], ..Recipe::default() }).await;
    let other_platform = Platform { architecture: "s390x".into(), os: "linux".into(), variant: None };
    let entry = Descriptor { platform: Some(other_platform), ..image.target };
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    put_document(&store, "r.test/shop/checkout:other", index).await.unwrap();
    let (names, _) = announced(&store).await;
    assert!(names.contains(&"r.test/shop/checkout:other".to_owned()), "{names:?}");
}

#[tokio::test]
async fn a_recorded_source_names_an_image_too() {
    let (store, image) = store_with_image(&Recipe { layers: vec![30], index: true, ..Recipe::default() }).await;
    let from = |path: &str| Repository { registry: "r.test".into(), path: path.into() };
    let manifest = &image.blobs[0];
    for (blob, path) in [(manifest, "shop/checkout"), (&image.blobs[2], "shop/layers")] {
        let metadata = BlobMetadata { source: Some(from(path)), children: Vec::new() };
        store.add_metadata(blob.digest, &metadata).await.unwrap();
    }
    let by_digest = format!("r.test/shop/checkout@{}", manifest.digest);
    assert_eq!(announced(&store).await.0, [by_digest, NAME.to_owned()], "a layer is no image");
}

#[tokio::test]
async fn a_name_with_another_digest_than_its_target_is_not_announced() {
    let (store, image) = store_with_image(&Recipe::default()).await;
    let name = format!("r.test/shop/checkout@{}", Digest::of(b"another"));
    store.put_image(&ImageRecord { name, target: image.target.clone() }).await.unwrap();
    let matching = format!("r.test/shop/checkout@{}", image.target.digest);
    store.put_image(&ImageRecord { name: matching.clone(), target: image.target }).await.unwrap();
    assert_eq!(announced(&store).await.0, [matching, NAME.to_owned()]);
}

#[tokio::test]
async fn missing_layers_are_reported_with_their_true_reason() {
    for (snapshotter, discards, is_unpacked, expected) in [
        ("overlayfs", Some(true), true, "layers discarded after unpacking"),
        ("overlayfs", None, true, "layers discarded after unpacking"),
        ("overlayfs", Some(false), true, "layers lost"),
        ("overlayfs", Some(true), false, "layers lost"),
        ("stargz", Some(false), true, "layers pulled lazily by the snapshotter stargz"),
    ] {
        let (store, image) = store_with_image(&Recipe { layers: vec![300, 20], ..Recipe::default() }).await;
        store.set_runtime(snapshotter, discards);
        let pin = store.pin(Duration::from_secs(60)).await.unwrap();
        for layer in image.layers.iter().filter(|_| is_unpacked) {
            store.unpack(layer, &pin).await.unwrap();
        }
        for layer in &image.layers {
            discard(&store, &layer.blob).await;
        }
        let mut images = ImageScanner::default();
        for _ in 0..2 {
            assert_eq!(scan(&mut images, &store).await.reasons, [(expected.to_owned(), 1)].into(), "{snapshotter}");
        }
        let result = {
            make_image(&store, &[NAME.into()], &Recipe { layers: vec![300, 20], ..Recipe::default() }, 7)
                .await
                .unwrap();
            scan(&mut images, &store).await
        };
        assert!(result.reasons.is_empty(), "the layers are here again");
    }
}

#[tokio::test]
async fn an_artifact_is_neither_announced_nor_counted_as_incomplete() {
    let store = MemoryStore::new();
    let empty = put_document(&store, "sha256:an-id", "{}".into()).await.unwrap();
    let config = Descriptor { media_type: "application/vnd.oci.empty.v1+json".into(), ..empty };
    let artifact = serde_json::json!({"schemaVersion": 2, "config": config, "layers": []}).to_string();
    put_document(&store, NAME, artifact).await.unwrap();
    assert_eq!(announced(&store).await, (vec![], 0));
}

#[tokio::test]
async fn a_damaged_manifest_is_not_announced_until_it_is_replaced() {
    let (store, image) = store_with_image(&Recipe { layers: vec![30], ..Recipe::default() }).await;
    store.corrupt(image.target.digest);
    let mut images = ImageScanner::default();
    let result = scan(&mut images, &store).await;
    assert_eq!((result.names.len(), result.incomplete), (0, 1));
    assert_eq!(result.damaged, [image.target.digest].into());
    store.corrupt(image.target.digest);
    let result = scan(&mut images, &store).await;
    assert_eq!((result.names.len(), result.incomplete, result.damaged.len()), (1, 0, 0));
}

#[tokio::test]
async fn a_document_is_read_once() {
    let (store, image) = store_with_image(&Recipe { layers: vec![30], ..Recipe::default() }).await;
    let mut images = ImageScanner::default();
    assert_eq!(scan(&mut images, &store).await.names.len(), 1);
    // The bytes are damaged after the first read, and are not read again.
    store.corrupt(image.target.digest);
    assert_eq!(scan(&mut images, &store).await.names.len(), 1);
    // A document that was absent in between is read again.
    discard(&store, &image.target).await;
    assert_eq!(scan(&mut images, &store).await.names.len(), 0);
    make_image(&store, &[NAME.into()], &Recipe { layers: vec![30], ..Recipe::default() }, 7).await.unwrap();
    assert_eq!(scan(&mut images, &store).await.names.len(), 1);
}

#[tokio::test]
async fn a_silently_collected_blob_is_withdrawn_at_the_next_listing() {
    let (store, image) = store_with_image(&Recipe { layers: vec![30], ..Recipe::default() }).await;
    let (identity, admission) = (Identity::generate(), Arc::new(StaticAdmission::new([])));
    let (config, node) = (mesh::Config { listen: loopback() }, "n1".parse().unwrap());
    let started =
        mesh::start(config, node, &identity, mesh::SharedInventory::default(), admission, Metrics::new()).await;
    let (mesh, task, _) = started.unwrap();
    let stop = CancellationToken::new();
    let (events_in, _events) = mpsc::channel(1);
    tokio::spawn(task.run(events_in, stop.clone()));
    let fetching = watch::Sender::new(BTreeSet::new());
    let announcer = Announcer::new(
        Arc::new(store.clone()),
        Arc::new(mesh.clone()),
        Metrics::new(),
        watch::Sender::new(false),
        VolatileItems { outages: watch::channel(Vec::new()).1, fetching: fetching.subscribe() },
        watch::Sender::new(None),
        watch::Sender::new(None),
    );
    let announced_count = async || mesh.status().await.unwrap().items;

    // Paused only here: the mesh binds a port, which needs a running clock.
    tokio::time::pause();
    tokio::spawn(announcer.run(stop.clone()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(announced_count().await, 4, "a manifest, a configuration, a layer and a name");
    store.remove_blob(image.blobs.last().unwrap().digest);
    tokio::time::sleep(LIST_PERIOD - Duration::from_secs(2)).await;
    assert_eq!(announced_count().await, 4, "the store sent no event");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(announced_count().await, 2, "the blob is withdrawn, and with it the name");
    fetching.send_replace([Digest::of(b"coming")].into());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(announced_count().await, 3, "a download is announced at once");
    fetching.send_replace(BTreeSet::new());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(announced_count().await, 3, "the next list withdraws the download");
    tokio::time::sleep(LIST_PERIOD).await;
    assert_eq!(announced_count().await, 2);
    stop.cancel();
}
