use std::collections::BTreeMap;

use tokio::sync::mpsc;

use super::*;
use crate::admission::StaticAdmission;
use crate::config::loopback;
use crate::identity::Identity;
use crate::mesh;
use crate::model::OutageKind;
use crate::oci::{Descriptor, Digest, Platform, Reference, Repository};
use crate::ports::{ImageRecord, Remembered, Unpacker as _};
use crate::testing::MemoryStore;
use crate::testing::image::{MadeImage, Recipe, make_image, put_document};

const NAME: &str = "r.test/shop/checkout:v1";

#[test]
fn what_is_gone_is_withdrawn_and_only_what_is_new_is_told() {
    let blob = |name: &str| Item::Blob(Digest::of(name.as_bytes()));
    let Ok(Reference::Tag(repository, tag)) = "r.test/a:1".parse() else { panic!("a tag") };
    let root = Digest::of(b"root");
    let name = Item::Image(repository, Some(tag), root);
    let changes = difference(&[blob("old"), blob("same"), name.clone()].into(), &[blob("same"), blob("new")].into());
    let expected =
        [ContentChange::Removed(blob("old")), ContentChange::Removed(name), ContentChange::Added(blob("new"))];
    assert_eq!(changes, expected);
}

#[test]
fn what_is_damaged_is_not_told_and_of_too_much_the_blobs_go_first() {
    let blob =
        |n: usize| BlobInfo { digest: Digest::of(&n.to_le_bytes()), size: 1, sources: Vec::new(), has_children: false };
    let blobs: Vec<_> = (0..MAX_ITEMS).map(blob).collect();
    let outage = Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: 1 };
    let repository = Repository { registry: "r.test".into(), path: "a".into() };
    let name = Item::Image(repository, None, blobs[0].digest);
    let looked = |damaged: &[&BlobInfo]| Looked {
        names: [name.clone()].into(),
        damaged: damaged.iter().map(|blob| blob.digest).collect(),
        incomplete: 0,
        reasons: BTreeMap::new(),
    };
    let told = everything(&blobs[..2], looked(&[&blobs[1]]), &[], BTreeSet::new());
    assert_eq!(told, [Item::Blob(blobs[0].digest), name.clone()].into());
    let told = everything(&blobs, looked(&[]), std::slice::from_ref(&outage), BTreeSet::new());
    assert_eq!(told.len(), MAX_ITEMS);
    assert!(told.contains(&name) && told.contains(&Item::Outage(outage)));
}

async fn look(images: &mut Images, store: &MemoryStore) -> Looked {
    let (blobs, records) = (store.blobs().await.unwrap(), store.images().await.unwrap());
    images.look(store, &blobs, &records).await.unwrap()
}

/// The names that are told of a store, and how many images are not.
async fn told(store: &MemoryStore) -> (Vec<String>, usize) {
    let looked = look(&mut Images::default(), store).await;
    let text = |item: &Item| match item {
        Item::Image(repository, Some(tag), _) => format!("{repository}:{tag}"),
        Item::Image(repository, None, root) => format!("{repository}@{root}"),
        other => panic!("{other:?} is no name"),
    };
    (looked.names.iter().map(text).collect(), looked.incomplete)
}

async fn made(recipe: &Recipe) -> (MemoryStore, MadeImage) {
    let store = MemoryStore::new();
    let image = make_image(&store, &[NAME.into()], recipe, 7).await.unwrap();
    (store, image)
}

/// The blob goes, whatever holds it.
async fn lose(store: &MemoryStore, blob: &Descriptor) {
    let pin = store.pin(Duration::from_secs(60)).await.unwrap();
    store.discard(blob.digest, &pin).await.unwrap();
}

#[tokio::test]
async fn an_image_that_is_whole_for_one_platform_is_told_by_name() {
    let layers = vec![300, 20];
    for recipe in [
        Recipe { layers: layers.clone(), ..Recipe::default() },
        Recipe { layers: layers.clone(), index: true, attested: true, ..Recipe::default() },
        Recipe { layers: layers.clone(), nested: true, attested: true, ..Recipe::default() },
        Recipe { layers, foreign: true, twice: true, docker: true, ..Recipe::default() },
        Recipe::default(),
    ] {
        let (store, _) = made(&recipe).await;
        assert_eq!(told(&store).await, (vec![NAME.to_owned()], 0), "{recipe:?}");
    }
}

#[tokio::test]
async fn an_image_that_lacks_a_blob_is_not_told_by_name_and_is_counted() {
    let indexed = Recipe { layers: vec![300, 20], index: true, attested: true, ..Recipe::default() };
    let nested = Recipe { nested: true, ..indexed.clone() };
    for (recipe, blobs) in [(indexed, 4), (nested, 5)] {
        for lost in 0..blobs {
            let (store, image) = made(&recipe).await;
            lose(&store, &image.blobs[lost]).await;
            assert_eq!(told(&store).await, (vec![], 1), "without blob {lost} of {recipe:?}");
        }
        let (store, image) = made(&recipe).await;
        lose(&store, &image.root).await;
        assert_eq!(told(&store).await, (vec![], 1), "without the index");
    }
}

#[tokio::test]
async fn an_index_with_only_another_platform_is_told_because_it_is_whole_for_somebody() {
    let (store, image) = made(&Recipe { layers: vec![30], ..Recipe::default() }).await;
    let elsewhere = Platform { architecture: "s390x".into(), os: "linux".into(), variant: None };
    let entry = Descriptor { platform: Some(elsewhere), ..image.root };
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    put_document(&store, "r.test/shop/checkout:other", index).await.unwrap();
    let (names, _) = told(&store).await;
    assert!(names.contains(&"r.test/shop/checkout:other".to_owned()), "{names:?}");
}

#[tokio::test]
async fn what_is_remembered_of_its_source_names_an_image_too() {
    let (store, image) = made(&Recipe { layers: vec![30], index: true, ..Recipe::default() }).await;
    let from = |path: &str| Repository { registry: "r.test".into(), path: path.into() };
    let manifest = &image.blobs[0];
    for (blob, path) in [(manifest, "shop/checkout"), (&image.blobs[2], "shop/layers")] {
        let remembered = Remembered { source: Some(from(path)), children: Vec::new() };
        store.remember(blob.digest, &remembered).await.unwrap();
    }
    let by_digest = format!("r.test/shop/checkout@{}", manifest.digest);
    assert_eq!(told(&store).await.0, [by_digest, NAME.to_owned()], "a layer is no image");
}

#[tokio::test]
async fn a_name_with_another_digest_than_its_target_s_is_not_told() {
    let (store, image) = made(&Recipe::default()).await;
    let name = format!("r.test/shop/checkout@{}", Digest::of(b"another"));
    store.put_image(&ImageRecord { name, target: image.root.clone() }).await.unwrap();
    let right = format!("r.test/shop/checkout@{}", image.root.digest);
    store.put_image(&ImageRecord { name: right.clone(), target: image.root }).await.unwrap();
    assert_eq!(told(&store).await.0, [right, NAME.to_owned()]);
}

#[tokio::test]
async fn missing_layers_are_told_with_their_true_reason() {
    for (snapshotter, discards, is_unpacked, expected) in [
        ("overlayfs", Some(true), true, "layers discarded after unpacking"),
        ("overlayfs", None, true, "layers discarded after unpacking"),
        ("overlayfs", Some(false), true, "layers lost"),
        ("overlayfs", Some(true), false, "layers lost"),
        ("stargz", Some(false), true, "layers pulled lazily by the snapshotter stargz"),
    ] {
        let (store, image) = made(&Recipe { layers: vec![300, 20], ..Recipe::default() }).await;
        store.set_runtime(snapshotter, discards);
        let pin = store.pin(Duration::from_secs(60)).await.unwrap();
        for layer in image.layers.iter().filter(|_| is_unpacked) {
            store.unpack(layer, &pin).await.unwrap();
        }
        for layer in &image.layers {
            lose(&store, &layer.blob).await;
        }
        let mut images = Images::default();
        for _ in 0..2 {
            assert_eq!(look(&mut images, &store).await.reasons, [(expected.to_owned(), 1)].into(), "{snapshotter}");
        }
        let looked = {
            make_image(&store, &[NAME.into()], &Recipe { layers: vec![300, 20], ..Recipe::default() }, 7)
                .await
                .unwrap();
            look(&mut images, &store).await
        };
        assert!(looked.reasons.is_empty(), "the layers are here again");
    }
}

#[tokio::test]
async fn an_artifact_is_neither_told_nor_missed() {
    let store = MemoryStore::new();
    let empty = put_document(&store, "sha256:an-id", "{}".into()).await.unwrap();
    let config = Descriptor { media_type: "application/vnd.oci.empty.v1+json".into(), ..empty };
    let artifact = serde_json::json!({"schemaVersion": 2, "config": config, "layers": []}).to_string();
    put_document(&store, NAME, artifact).await.unwrap();
    assert_eq!(told(&store).await, (vec![], 0));
}

#[tokio::test]
async fn a_damaged_manifest_is_not_told_until_it_is_replaced() {
    let (store, image) = made(&Recipe { layers: vec![30], ..Recipe::default() }).await;
    store.spoil(image.root.digest);
    let mut images = Images::default();
    let looked = look(&mut images, &store).await;
    assert_eq!((looked.names.len(), looked.incomplete), (0, 1));
    assert_eq!(looked.damaged, [image.root.digest].into());
    store.spoil(image.root.digest);
    let looked = look(&mut images, &store).await;
    assert_eq!((looked.names.len(), looked.incomplete, looked.damaged.len()), (1, 0, 0));
}

#[tokio::test]
async fn a_document_is_read_once() {
    let (store, image) = made(&Recipe { layers: vec![30], ..Recipe::default() }).await;
    let mut images = Images::default();
    assert_eq!(look(&mut images, &store).await.names.len(), 1);
    // Its bytes go bad, and nobody looks: they were right when they were read.
    store.spoil(image.root.digest);
    assert_eq!(look(&mut images, &store).await.names.len(), 1);
    // What was gone meanwhile is read again.
    lose(&store, &image.root).await;
    assert_eq!(look(&mut images, &store).await.names.len(), 0);
    make_image(&store, &[NAME.into()], &Recipe { layers: vec![30], ..Recipe::default() }, 7).await.unwrap();
    assert_eq!(look(&mut images, &store).await.names.len(), 1);
}

#[tokio::test]
async fn what_was_collected_in_silence_is_withdrawn_at_the_next_listing() {
    let (store, image) = made(&Recipe { layers: vec![30], ..Recipe::default() }).await;
    let (identity, nobody) = (Identity::generate(), Arc::new(StaticAdmission::new([])));
    let (config, node) = (mesh::Config { listen: loopback() }, "n1".parse().unwrap());
    let started = mesh::start(config, node, &identity, mesh::Table::default(), nobody, Metrics::new()).await;
    let (mesh, task, _) = started.unwrap();
    let stop = CancellationToken::new();
    let (news_in, _news) = mpsc::channel(1);
    tokio::spawn(task.run(news_in, stop.clone()));
    let fetching = watch::Sender::new(BTreeSet::new());
    let advertiser = Advertiser::new(
        Arc::new(store.clone()),
        mesh.clone(),
        Metrics::new(),
        watch::Sender::new(false),
        Besides { outages: watch::channel(Vec::new()).1, fetching: fetching.subscribe() },
        watch::Sender::new(None),
        watch::Sender::new(None),
    );
    let told = async || mesh.status().await.unwrap().items;

    // Only now: a mesh that binds its port waits for the system, and a paused clock for nobody.
    tokio::time::pause();
    tokio::spawn(advertiser.run(stop.clone()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(told().await, 4, "a manifest, a configuration, a layer and a name");
    store.lose(image.blobs.last().unwrap().digest);
    tokio::time::sleep(RELIST - Duration::from_secs(2)).await;
    assert_eq!(told().await, 4, "nobody has said a word");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(told().await, 2, "the blob is withdrawn, and with it the name");
    fetching.send_replace([Digest::of(b"coming")].into());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(told().await, 3, "that a blob is on its way is told at once");
    fetching.send_replace(BTreeSet::new());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(told().await, 3, "and taken back when the store is listed");
    tokio::time::sleep(RELIST).await;
    assert_eq!(told().await, 2);
    stop.cancel();
}
