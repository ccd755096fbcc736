//! Recoveries of every kind of image that a registry may have, from a peer into a containerd.

use lighterman::ports::{BlobMetadata, Blobs, ImageRecord, ImageRecords, Pins};
use lighterman::testing::image::{Compression, Recipe};

use super::daemon::Daemon;
use super::test_node::{TestNode, blobs_lost_to_gc, every_blob};
use super::{HOUR, write};

/// Nearly every image has a layer that exceeds one content message, so that the layer is split.
fn kinds() -> Vec<(&'static str, Recipe)> {
    let layers = || Recipe { layers: vec![1_500_000, 3000], ..Recipe::default() };
    vec![
        ("oci", layers()),
        ("oci-gzip", Recipe { compression: Compression::Gzip, ..layers() }),
        ("oci-zstd", Recipe { compression: Compression::Zstd, ..layers() }),
        ("docker", Recipe { docker: true, ..layers() }),
        ("docker-gzip", Recipe { docker: true, compression: Compression::Gzip, ..layers() }),
        ("oci-index", Recipe { index: true, compression: Compression::Gzip, ..layers() }),
        ("docker-list", Recipe { docker: true, index: true, compression: Compression::Gzip, ..layers() }),
        ("attested", Recipe { index: true, attested: true, ..layers() }),
        ("nested", Recipe { nested: true, compression: Compression::Gzip, ..layers() }),
        ("nested-list", Recipe { docker: true, nested: true, compression: Compression::Gzip, ..layers() }),
        ("unnamed", Recipe { index: true, without_platforms: true, compression: Compression::Gzip, ..layers() }),
        ("twice", Recipe { duplicate_layer: true, ..layers() }),
        ("no-layers", Recipe::default()),
        ("no-layers-index", Recipe { index: true, ..Recipe::default() }),
    ]
}

pub(crate) async fn every_kind_of_image_is_recovered_and_survives_the_collector(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("k8s.io");
    let node = TestNode::new();
    let mut recovered_images = Vec::new();
    for (seed, (kind, recipe)) in (1..).zip(kinds()) {
        let name = format!("r.test/kinds/{kind}:1");
        let image = node.announce_image(&name, &recipe, seed).await;
        let recovered = node.recover(&store, &name).await.unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert_eq!(recovered.fetched + recovered.present, image.blobs.len() + 1, "{kind}");
        recovered_images.push((kind, recipe, name, image));
    }
    let listed = daemon.ctr("k8s.io", &["images", "ls"]);
    for (kind, recipe, name, image) in &recovered_images {
        let config = &image.blobs[recipe.indexes()];
        let repository = name.trim_end_matches(":1");
        for name in [name.clone(), format!("{repository}@{}", image.target.digest), config.digest.to_string()] {
            let line = listed.lines().find(|line| line.split(' ').next() == Some(&name));
            let line = line.unwrap_or_else(|| panic!("{kind}: {name} is not in\n{listed}"));
            assert!(line.contains("io.cri-containerd.image=managed"), "{kind}: {line}");
            assert!(line.contains(&image.target.digest.to_string()), "{kind}: {line}");
        }
        let checked = daemon.ctr("k8s.io", &["images", "check", &format!("name=={name}")]);
        assert!(checked.contains("complete ("), "{kind}: {checked}");
    }
    for (kind, _, _, image) in &recovered_images {
        assert!(blobs_lost_to_gc(&store, image).await.is_empty(), "{kind}");
    }
}

/// All blobs are present without the labels that connect them, as after a commit that dropped the
/// labels.
pub(crate) async fn labels_that_were_missing_are_written(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("k8s.io");
    let node = TestNode::new();
    let recipe = Recipe { layers: vec![1_500_000, 3000], index: true, ..Recipe::default() };
    let name = "r.test/unlabeled:1";
    let image = node.announce_image(name, &recipe, 1).await;
    let pin = store.pin(HOUR).await.unwrap();
    for blob in every_blob(&image) {
        let bytes = node.bytes_of(blob).await.into();
        write(&store, &bytes, &pin, &BlobMetadata::default()).await;
    }
    // The image record exists as well.
    store.put_image(&ImageRecord { name: name.into(), target: image.target.clone() }).await.unwrap();

    let recovered = node.recover(&store, name).await.unwrap();
    assert_eq!((recovered.fetched, recovered.present), (0, 5));
    store.release(pin).await.unwrap();
    assert_eq!(blobs_lost_to_gc(&store, &image).await, Vec::<String>::new());
    let manifest = store.blob(image.blobs[0].digest).await.unwrap().unwrap();
    assert!(manifest.has_children);
    assert_eq!(manifest.sources.iter().map(ToString::to_string).collect::<Vec<_>>(), ["r.test/unlabeled"]);
}
