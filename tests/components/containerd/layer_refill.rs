//! Layers of an image that was pulled and discarded before the agent ran. The agent fetches the
//! layers from a real registry into a real containerd, where the layers survive a collection.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lighterman::agent::retention::retainer::Retainer;
use lighterman::decide::fill::{FetchFrom, RATE};
use lighterman::decide::retain::{RetainBytes, RetainLayers, RetainOptions};
use lighterman::metrics::Metrics;
use lighterman::oci::Digest;
use lighterman::ports::{Blobs, ContentStore};
use lighterman::registry::{Config, RegistryClient};
use lighterman::testing::MemoryStore;
use lighterman::testing::image::{Compression, MadeImage, Recipe, make_image};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::discarding::{DiscardingNode, pull};
use super::test_node::TestNode;
use crate::registry::{RegistryFolder, RegistryProcess, push_blob, push_manifest};

/// The first fetch from a registry begins 40 s after the start at the latest. The test runs with
/// the pauses of production.
const FETCH_DEADLINE: Duration = Duration::from_secs(180);

/// Pushes an image of eight gzipped layers, 1 KiB to 4 MiB.
async fn push(registry: &RegistryProcess) -> (String, MadeImage) {
    let content = MemoryStore::new();
    let name = format!("{}/team/app:v1", registry.name);
    let layers = [1 << 10, 4 << 20, 20_000, 300_000, 1 << 20, 1 << 10, 2 << 20, 5000].to_vec();
    let recipe = Recipe { layers, compression: Compression::Gzip, ..Recipe::default() };
    let image = make_image(&content, std::slice::from_ref(&name), &recipe, 300).await.unwrap();
    let bytes = async |digest| content.open(digest).await.unwrap().read_at(0, 64 << 20).await.unwrap();
    for blob in &image.blobs {
        push_blob(registry, bytes(blob.digest).await).await;
    }
    let manifest = bytes(image.target.digest).await;
    push_manifest(registry, "v1", &image.target.media_type, manifest).await;
    (name, image)
}

pub(super) async fn discarded_layers_are_fetched_from_the_registry(version: &str) {
    let (node, folder) = (DiscardingNode::start(version).await, RegistryFolder::empty());
    let registry = folder.serve("");
    let (name, image) = push(&registry).await;
    pull(&node.socket, &name).await;
    assert_eq!(node.layers_left(&image).await, 0, "this containerd discards unpacked layers");

    node.set_used(&[&name]);
    let (layers, bytes) = (RetainLayers::OptedIn, RetainBytes::Bytes(1 << 30));
    let options = RetainOptions { layers, bytes, fetch: FetchFrom::Registry, fetch_rate: RATE };
    let (store, leases) = (Arc::new(node.store.clone()), Arc::new(node.store.clone()));
    let mut recoverer = TestNode::new().recoverer(Arc::clone(&store) as Arc<dyn ContentStore>);
    recoverer.resolver.registry = Arc::new(RegistryClient::new(Config::default()).unwrap());
    let healthy = watch::channel(Arc::new(BTreeSet::from([registry.name.clone()]))).1;
    let (status_in, mut status) = watch::channel(None);
    let retainer = Retainer::new(store, leases, options, node.used.subscribe(), Metrics::new(), status_in)
        .with_filler(Arc::new(recoverer), healthy);
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    tokio::spawn(retainer.run(stop));
    let complete = status.wait_for(|status| {
        status.as_ref().is_some_and(|status| (status.images, status.wanted, status.lacking) == (1, 1, 0))
    });
    timeout(FETCH_DEADLINE, complete).await.expect("all layers are fetched within the deadline").unwrap();
    assert_eq!(node.layers_left(&image).await, 8);
    for layer in &image.layers {
        let bytes = super::read(&node.store, layer.blob.digest).await;
        assert_eq!(Digest::of(&bytes), layer.blob.digest);
    }
}
