//! Damaged blobs in a containerd are fetched again, although containerd has records of the blobs.

use std::fs;
use std::path::PathBuf;

use lighterman::containerd::{Config, ContainerdStore};
use lighterman::oci::Digest;
use lighterman::ports::Blobs;
use lighterman::testing::image::{MadeImage, Recipe};

use super::daemon::Daemon;
use super::test_node::{TestNode, blobs_lost_to_gc, every_blob};

const NAME: &str = "r.test/damaged:1";

/// A recovered image. Tests damage one blob at a time, and each time a recovery repairs the blob.
struct DamagedImage {
    daemon: Daemon,
    node: TestNode,
    image: MadeImage,
}

impl DamagedImage {
    async fn new(version: &str) -> Self {
        let (daemon, node) = (Daemon::start(version).await, TestNode::new());
        let recipe = Recipe { layers: vec![5 << 20, 3000], index: true, ..Recipe::default() };
        let image = node.announce_image(NAME, &recipe, 1).await;
        node.recover(&daemon.store("k8s.io"), NAME).await.unwrap();
        Self { daemon, node, image }
    }

    async fn assert_repaired(&self, store: &ContainerdStore, blob: Digest, what: &str) {
        let recovered = self.node.recover(store, NAME).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((recovered.fetched, recovered.present), (1, 4), "{what}: only the damaged blob is fetched");
        assert_eq!(Digest::of(&super::read(store, blob).await), blob, "{what}");
        assert_eq!(blobs_lost_to_gc(store, &self.image).await, Vec::<String>::new(), "{what}");
        let checked = self.daemon.ctr("k8s.io", &["images", "check", &format!("name=={NAME}")]);
        assert!(checked.contains("complete ("), "{what}: {checked}");
    }
}

/// Replaces a file by a new file: the old file is read-only, and may be sealed.
fn replace(path: &PathBuf, content: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, content).unwrap();
}

pub(crate) async fn wrong_bytes_are_replaced(version: &str) {
    let damaged = DamagedImage::new(version).await;
    let store = damaged.daemon.store("k8s.io");
    // A recovery does not hash the large layer, so the test leaves that layer alone.
    for blob in every_blob(&damaged.image).filter(|blob| blob.size < 1 << 20) {
        let path = damaged.daemon.file_of(blob.digest);
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] = !bytes[0];
        replace(&path, &bytes);
        damaged.assert_repaired(&store, blob.digest, &blob.media_type).await;
    }
}

pub(crate) async fn a_blob_without_its_file_is_fetched_again(version: &str) {
    let damaged = DamagedImage::new(version).await;
    let store = damaged.daemon.store("k8s.io");
    for blob in every_blob(&damaged.image) {
        let path = damaged.daemon.file_of(blob.digest);
        fs::remove_file(&path).unwrap();
        assert_eq!(store.blob(blob.digest).await.unwrap(), None, "no file: {}", blob.media_type);
        assert!(store.blobs().await.unwrap().iter().all(|listed| listed.digest != blob.digest), "{}", blob.media_type);
        damaged.assert_repaired(&store, blob.digest, &format!("no file: {}", blob.media_type)).await;
        for length in [0, blob.size - 1, blob.size + 1] {
            let mut bytes = fs::read(&path).unwrap();
            bytes.resize(usize::try_from(length).unwrap(), 0);
            replace(&path, &bytes);
            assert_eq!(store.blob(blob.digest).await.unwrap(), None, "{length} of {}", blob.size);
            damaged.assert_repaired(&store, blob.digest, &format!("{length} bytes of {}", blob.media_type)).await;
        }
    }
}

pub(crate) async fn a_blob_without_its_file_is_fetched_again_without_access_to_files(version: &str) {
    let damaged = DamagedImage::new(version).await;
    let content_root = Some(PathBuf::from("/nothing/is/here"));
    let config = Config { content_root, ..damaged.daemon.config("k8s.io") };
    let store = ContainerdStore::new(config).unwrap();
    for blob in every_blob(&damaged.image) {
        let path = damaged.daemon.file_of(blob.digest);
        fs::remove_file(&path).unwrap();
        damaged.assert_repaired(&store, blob.digest, &format!("no file: {}", blob.media_type)).await;
        let bytes = fs::read(&path).unwrap();
        replace(&path, &bytes[..bytes.len() - 1]);
        damaged.assert_repaired(&store, blob.digest, &format!("a byte short: {}", blob.media_type)).await;
    }
}
