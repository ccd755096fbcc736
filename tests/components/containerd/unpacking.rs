//! Layers unpacked through containerd's services, as containerd's own client lists the snapshots.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use lighterman::agent::recovery::layer_unpacker::LayerUnpacker;
use lighterman::agent::recovery::progress::Progress;
use lighterman::agent::recovery::recover::Recoverer;
use lighterman::containerd::{ContainerdStore, Snapshotter};
use lighterman::metrics::Metrics;
use lighterman::oci::{Digest, Reference};
use lighterman::ports::{ContentStore, Pin, Pins, UnpackOutcome, Unpacker};
use lighterman::testing::contract::unpacking::{UnpackingStore, assert_unpacking_contract};
use lighterman::testing::contract::{StoreUnderTest, UnfinishedWrite};
use lighterman::testing::image::{Compression, MadeImage, Recipe, make_image};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::daemon::Daemon;
use super::test_node::{TestNode, blobs_lost_to_gc};
use super::{ContainerdSubject, HOUR, WAIT_DEADLINE, fresh};

/// Name and kind of each snapshot in the list of `ctr`.
fn snapshots(daemon: &Daemon, containerd_namespace: &str) -> Vec<(String, String)> {
    let listed = daemon.ctr(containerd_namespace, &["snapshots", "--snapshotter", "overlayfs", "ls"]);
    let row = |line: &str| {
        let line = line.trim_end();
        let kind = line.split_whitespace().last().unwrap_or_default();
        // The agent's keys contain a space. Columns are padded, and a parent begins like a name.
        let name = line.strip_suffix(kind).unwrap_or(line).trim();
        let name =
            name.rsplit_once(" sha256:").filter(|(before, _)| before.contains("sha256:")).map_or(name, |it| it.0);
        (name.trim().to_owned(), kind.to_owned())
    };
    listed.lines().skip(1).filter(|line| !line.trim().is_empty()).map(row).collect()
}

fn committed_snapshots(daemon: &Daemon, containerd_namespace: &str) -> BTreeSet<Digest> {
    let listed = snapshots(daemon, containerd_namespace).into_iter();
    listed.filter(|(_, kind)| kind == "Committed").map(|(name, _)| name.parse().unwrap()).collect()
}

fn active_snapshots(daemon: &Daemon, containerd_namespace: &str) -> Vec<String> {
    let listed = snapshots(daemon, containerd_namespace).into_iter();
    listed.filter(|(_, kind)| kind == "Active").map(|(name, _)| name).collect()
}

struct UnpackingSubject<'a> {
    daemon: &'a Daemon,
    inner: ContainerdSubject,
}

#[async_trait]
impl StoreUnderTest for UnpackingSubject<'_> {
    fn store(&self) -> Arc<dyn ContentStore> {
        self.inner.store()
    }

    async fn collect(&self) {
        self.inner.collect().await;
    }

    async fn restart(&mut self, unfinished: UnfinishedWrite) {
        self.inner.restart(unfinished).await;
    }
}

#[async_trait]
impl UnpackingStore for UnpackingSubject<'_> {
    fn unpacker(&self) -> Arc<dyn Unpacker> {
        Arc::new(self.inner.store.clone())
    }

    async fn unpacked(&self) -> BTreeSet<Digest> {
        committed_snapshots(self.daemon, &self.inner.config.containerd_namespace)
    }

    async fn half_unpacked(&self) -> usize {
        active_snapshots(self.daemon, &self.inner.config.containerd_namespace).len()
    }
}

pub(crate) async fn the_unpacker_keeps_the_contract(version: &str) {
    let daemon = &Daemon::start(version).await;
    assert_unpacking_contract(version, async || UnpackingSubject { daemon, inner: fresh(daemon.config("")) }).await;
}

async fn recover(node: &TestNode, store: &ContainerdStore, name: &str) {
    let shared = Arc::new(store.clone());
    let unpacking = Some(LayerUnpacker::new(Arc::clone(&shared) as _, Arc::clone(&shared) as _, Metrics::new()));
    let recoverer = Recoverer { layer_unpacker: unpacking, ..node.recoverer(shared) };
    let (wanted, progress) = (name.parse::<Reference>().unwrap().into(), Progress::default());
    recoverer.recover(&wanted, &progress, &CancellationToken::new()).await.unwrap();
}

fn chain_ids(image: &MadeImage) -> BTreeSet<Digest> {
    image.layers.iter().map(|layer| layer.chain_id).collect()
}

/// Reads a file of an image. `ctr images mount` mounts the snapshot of the topmost layer, as CRI
/// does for a container, and fails without that snapshot.
fn file_of_image(daemon: &Daemon, name: &str, file: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().to_str().unwrap();
    daemon.ctr("k8s.io", &["images", "mount", name, target]);
    let read = std::fs::read(folder.path().join(file));
    assert!(Command::new("umount").arg(target).status().unwrap().success());
    daemon.ctr("k8s.io", &["images", "unmount", "--rm", target]);
    read.unwrap_or_else(|error| panic!("{file} of {name}: {error}"))
}

pub(crate) async fn a_recovered_image_is_unpacked_before_its_record_is_written(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("k8s.io");
    let node = TestNode::new();
    let mut expected = BTreeSet::new();
    for (seed, packing) in [(1, Compression::Plain), (2, Compression::Gzip), (3, Compression::Zstd)] {
        let name = format!("r.test/unpacked/{packing:?}:1").to_lowercase();
        let recipe = Recipe { layers: vec![1_500_000, 3000], index: true, compression: packing, ..Recipe::default() };
        let image = node.announce_image(&name, &recipe, seed).await;
        recover(&node, &store, &name).await;
        expected.extend(chain_ids(&image));
        assert_eq!(committed_snapshots(&daemon, "k8s.io"), expected, "{packing:?}");
        assert_eq!(blobs_lost_to_gc(&store, &image).await, Vec::<String>::new());
        assert_eq!(committed_snapshots(&daemon, "k8s.io"), expected, "{packing:?}, collected");
        assert_eq!(file_of_image(&daemon, &name, "data/0.bin").len(), 1_500_000, "{packing:?}");
        assert_eq!(file_of_image(&daemon, &name, "data/1.bin").len(), 3000, "{packing:?}");
    }
}

/// Makes an image with a layer that takes a moment to unpack. Returns the image's pin too.
async fn large_image(store: &ContainerdStore) -> (Pin, MadeImage) {
    let pin = store.pin(HOUR).await.unwrap();
    let recipe = Recipe { layers: vec![160 << 20, 10], compression: Compression::Gzip, ..Recipe::default() };
    (pin, make_image(store, &["r.test/large:1".into()], &recipe, 1).await.unwrap())
}

/// Begins to unpack the image's first layer, and drops the work once the snapshot is active.
async fn abort_unpacking(
    daemon: &Daemon,
    (containerd_namespace, store): (&str, &ContainerdStore),
    image: &MadeImage,
    pin: &Pin,
) {
    let unpacking = store.unpack(&image.layers[0], pin);
    let begun = async {
        while active_snapshots(daemon, containerd_namespace).is_empty() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        unpacked = unpacking => panic!("the layer was unpacked before the test saw a snapshot: {unpacked:?}"),
        () = begun => {}
    }
}

async fn wait_no_active_snapshots(daemon: &Daemon, containerd_namespace: &str) {
    let waiting = async {
        while !active_snapshots(daemon, containerd_namespace).is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(WAIT_DEADLINE, waiting).await.expect("the partial snapshot is removed");
}

async fn unpack_all(store: &ContainerdStore, image: &MadeImage, pin: &Pin) {
    for layer in &image.layers {
        assert_eq!(store.unpack(layer, pin).await.unwrap(), UnpackOutcome::Unpacked);
    }
}

pub(crate) async fn an_abandoned_layer_is_removed(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("given-up");
    let (pin, image) = large_image(&store).await;
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    tokio::spawn(store.clone().run(stop));
    abort_unpacking(&daemon, ("given-up", &store), &image, &pin).await;
    wait_no_active_snapshots(&daemon, "given-up").await;
    unpack_all(&store, &image, &pin).await;
    assert_eq!(committed_snapshots(&daemon, "given-up"), chain_ids(&image));
}

/// The agent's next start removes partial snapshots. Without a next start the collector removes the
/// snapshots after the end of the pin. Until then a partial snapshot blocks no other unpacking.
pub(crate) async fn partial_snapshots_of_a_killed_process_are_removed(version: &str) {
    let mut daemon = Daemon::start(version).await;
    let (pin, image) = large_image(&daemon.store("killed")).await;
    abort_unpacking(&daemon, ("killed", &daemon.store("killed")), &image, &pin).await;
    daemon.kill();
    daemon.restart().await;
    assert_eq!(active_snapshots(&daemon, "killed").len(), 1, "the killed process left a partial snapshot");
    let store = daemon.store("killed");
    unpack_all(&store, &image, &pin).await;
    assert_eq!(committed_snapshots(&daemon, "killed"), chain_ids(&image));

    let stop = CancellationToken::new();
    let running = tokio::spawn(store.clone().run(stop.clone()));
    wait_no_active_snapshots(&daemon, "killed").await;
    stop.cancel();
    running.await.unwrap();
    assert_eq!(committed_snapshots(&daemon, "killed"), chain_ids(&image), "the sweep keeps complete snapshots");

    let (pin, image) = large_image(&daemon.store("collected")).await;
    abort_unpacking(&daemon, ("collected", &daemon.store("collected")), &image, &pin).await;
    daemon.store("collected").release_and_collect(pin).await.unwrap();
    assert_eq!(snapshots(&daemon, "collected"), [], "the collector removes the partial snapshot");
}

pub(crate) async fn layers_are_unpacked_only_into_the_snapshotter_of_cri(version: &str) {
    // The setting is in differently named plugins of containerd 1 and 2, and containerd 2 does not
    // migrate the setting from the old plugin.
    let cri = |snapshotter: &str| {
        format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"{snapshotter}\"\n\
             [plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"{snapshotter}\"\n\
             [proxy_plugins.stargz]\n  type = \"snapshot\"\n  address = \"/nothing/is/here.sock\"\n"
        )
    };
    for (configured, is_supported) in [("native", true), ("stargz", false), ("absent", false)] {
        let daemon = Daemon::start_in(version, tempfile::tempdir().unwrap(), &cri(configured)).await;
        let found = daemon.store("k8s.io").inspect(Path::new("/nothing/is/here")).await.unwrap().snapshotter;
        match found {
            Snapshotter::Supported(name) => assert!(is_supported && name == configured, "{configured}: {name}"),
            Snapshotter::Unsupported(reason) => assert!(!is_supported, "{configured}: {reason}"),
        }
    }
}
