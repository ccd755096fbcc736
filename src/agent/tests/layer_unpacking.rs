//! Layers are unpacked while the image comes, and nothing about it keeps the image from coming.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::recovery::layer_unpacker::LayerUnpacker;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::recovered_image::RecoveredImage;
use crate::decide::disk::{Disks, FileSystem};
use crate::decide::disk::OverLimit;
use crate::oci::StackedLayer;
use crate::ports::{Pin, UnpackError, UnpackOutcome, Unpacker};

/// What the test makes of each layer.
#[derive(Clone, Copy, PartialEq)]
enum UnpackBehaviour {
    Willing,
    /// Fails at the layer of this number.
    FailsAt(usize),
    /// Is not meant for layers.
    Unsuited,
    /// Leaves no room for the layers after the one of this number.
    FillsAt(usize),
    /// Finds no room for the layer of this number, whatever the disk said before.
    FullAt(usize),
    /// Never ends with the layer of this number and those after it.
    HangsFrom(usize),
}

/// Unpacks in memory, and remembers what it was asked.
struct RecordingUnpacker {
    store: Arc<MemoryStore>,
    behaviour: UnpackBehaviour,
    calls: Mutex<Vec<UnpackCall>>,
}

struct UnpackCall {
    chain_id: Digest,
    /// The blobs that were whole then.
    complete_blobs: BTreeSet<Digest>,
    /// The image had a name.
    has_record: bool,
}

#[async_trait]
impl Unpacker for RecordingUnpacker {
    async fn ensure_supported(&self) -> Result<(), UnpackError> {
        match self.behaviour {
            UnpackBehaviour::Unsuited => Err(UnpackError::Unsupported("the test".into())),
            UnpackBehaviour::Willing
            | UnpackBehaviour::FailsAt(_)
            | UnpackBehaviour::FillsAt(_)
            | UnpackBehaviour::FullAt(_)
            | UnpackBehaviour::HangsFrom(_) => Ok(()),
        }
    }

    async fn is_unpacked(&self, layer: &StackedLayer) -> Result<bool, UnpackError> {
        self.store.is_unpacked(layer).await
    }

    async fn unpack(&self, layer: &StackedLayer, pin: &Pin) -> Result<UnpackOutcome, UnpackError> {
        let complete_blobs = blobs_of(&*self.store).await.into_iter().collect();
        let has_record = !self.store.images().await?.is_empty();
        let number = {
            let mut asked = self.calls.lock().unwrap();
            asked.push(UnpackCall { chain_id: layer.chain_id, complete_blobs, has_record });
            asked.len()
        };
        match self.behaviour {
            UnpackBehaviour::FailsAt(failing) if failing == number => Err(StoreError::Other("no".into()).into()),
            UnpackBehaviour::HangsFrom(hanging) if hanging <= number => std::future::pending().await,
            UnpackBehaviour::FullAt(full) if full == number => Err(StoreError::Full(layer.blob.digest).into()),
            UnpackBehaviour::FillsAt(filling) if filling == number => {
                self.store.set_disks(two_disks(200));
                self.store.unpack(layer, pin).await
            }
            UnpackBehaviour::Willing
            | UnpackBehaviour::Unsuited
            | UnpackBehaviour::FailsAt(_)
            | UnpackBehaviour::FillsAt(_)
            | UnpackBehaviour::FullAt(_)
            | UnpackBehaviour::HangsFrom(_) => self.store.unpack(layer, pin).await,
        }
    }

    async fn keep_snapshot(&self, config: Digest, top: Digest) -> Result<(), UnpackError> {
        self.store.keep_snapshot(config, top).await
    }
}

/// Content on a disk with room, snapshots on one of 200 000 bytes with so many free.
fn two_disks(free: u64) -> Disks {
    let disk = |device, free, total| Some(FileSystem { device: Some(device), free, total });
    Disks { content: disk(1, 1 << 30, 1 << 30), snapshots: disk(2, free, 200_000) }
}

fn unpacker(node: &TestNode, mood: UnpackBehaviour) -> Arc<RecordingUnpacker> {
    Arc::new(RecordingUnpacker { store: Arc::clone(&node.store), behaviour: mood, calls: Mutex::default() })
}

fn recoverer(node: &TestNode, unpacker: &Arc<RecordingUnpacker>) -> Recoverer {
    let unpacker = Arc::clone(unpacker) as Arc<dyn Unpacker>;
    let layer_unpacker = LayerUnpacker::new(unpacker, Arc::clone(&node.store) as _, node.metrics.clone());
    Recoverer { layer_unpacker: Some(layer_unpacker), ..node.recoverer() }
}

async fn recover(node: &TestNode, unpacker: &Arc<RecordingUnpacker>) -> Result<RecoveredImage, RecoverError> {
    let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    recoverer(node, unpacker).recover(&wanted, &progress, &CancellationToken::new()).await
}

fn chain_ids(image: &MadeImage) -> Vec<Digest> {
    image.layers.iter().map(|layer| layer.chain_id).collect()
}

#[tokio::test(start_paused = true)]
async fn layers_are_unpacked_bottom_up_before_the_image_is_recorded() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Willing);
    recover(&node, &unpacker).await.unwrap();
    let asked = unpacker.calls.lock().unwrap();
    assert_eq!(asked.iter().map(|asked| asked.chain_id).collect::<Vec<_>>(), chain_ids(&image));
    for (asked, layer) in asked.iter().zip(&image.layers) {
        assert!(!asked.has_record, "a pod that finds a name has it unpacked a second time");
        assert!(asked.complete_blobs.contains(&layer.blob.digest), "only what is whole");
    }
    assert!(node.has_metric(r#"lighterman_layers_unpacked_total{result="unpacked"} 3"#));
    node.store.collect();
    assert_eq!(node.store.unpacked(), chain_ids(&image).into_iter().collect(), "the image holds what is unpacked");
    assert_eq!(node.store.pins(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_layer_is_unpacked_while_the_layer_above_is_missing() {
    let node = TestNode::new();
    let (below, above) = (Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new()));
    let image = put_image(&*below, &[IMAGE.into()], &[3000, 200, 10], 7).await.unwrap();
    put_image(&*above, &[], &[3000, 200, 10], 7).await.unwrap();
    let top = image.layers[2].blob.digest;
    for blob in blobs_of(&*above).await {
        if blob == top { below.remove_blob(blob) } else { above.remove_blob(blob) }
    }
    node.announce_store(1, below, Behaviour::Honest).await;
    node.announce_store(2, above, Behaviour::Hangs).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Willing);
    let recovered = tokio::time::timeout(Duration::from_secs(5), recover(&node, &unpacker)).await;
    assert!(recovered.is_err(), "a peer that hangs is waited for");
    let asked: Vec<_> = unpacker.calls.lock().unwrap().iter().map(|asked| asked.chain_id).collect();
    assert_eq!(asked, chain_ids(&image)[..2]);
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_cannot_be_unpacked_does_not_fail_the_recovery() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::FailsAt(2));
    recover(&node, &unpacker).await.unwrap();
    assert_eq!(unpacker.calls.lock().unwrap().len(), 2, "the rest is left to the runtime");
    assert!(node.has_metric(r#"lighterman_layers_unpacked_total{result="failed"} 1"#));
    assert_eq!(node.record_names().await.len(), 2);
    node.store.collect();
    assert_eq!(blobs_of(&*node.store).await.len(), image.blobs.len() + 1);
    assert!(node.store.unpacked().is_empty(), "what nobody keeps is collected");
}

#[tokio::test(start_paused = true)]
async fn an_image_without_space_for_its_layers_is_recorded_once_there_is_space() {
    let node = TestNode::new();
    node.change_policy(|rules| rules.budgets.eviction_percent = 15);
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.store.set_disks(two_disks(60_000));
    let unpacker = unpacker(&node, UnpackBehaviour::FillsAt(1));
    let refused = recover(&node, &unpacker).await.unwrap_err();
    let RecoverError::NoRoomToUnpack(OverLimit::Disk { free, floor, .. }) = &refused else { panic!("{refused}") };
    assert_eq!((*free, *floor), (200, 30_000));
    assert!(
        refused.to_string().contains("the file system of containerd's snapshotter has 200 bytes free"),
        "{refused}"
    );
    assert!(node.record_names().await.is_empty());
    assert_eq!(unpacker.calls.lock().unwrap().len(), 1, "the layer that fits");
    node.store.set_disks(two_disks(60_000));
    recover(&node, &unpacker).await.unwrap();
    assert_eq!(node.record_names().await.len(), 2);
    node.store.collect();
    assert_eq!(node.store.unpacked(), chain_ids(&image).into_iter().collect());
}

#[tokio::test(start_paused = true)]
async fn an_image_that_fills_the_disk_while_unpacking_is_not_recorded() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::FullAt(2));
    let refused = recover(&node, &unpacker).await.unwrap_err();
    assert!(matches!(refused, RecoverError::Store { source: StoreError::Full(_), .. }), "{refused}");
    assert!(refused.to_string().contains("containerd's snapshotter"), "{refused}");
    assert!(node.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_unsuited_unpacker_counts_and_reports_nothing() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Unsuited);
    recover(&node, &unpacker).await.unwrap();
    assert!(unpacker.calls.lock().unwrap().is_empty());
    assert!(!String::from_utf8(node.metrics.render()).unwrap().contains("layers_unpacked_total{"));
    assert_eq!(node.record_names().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_unpacks_too_slowly_is_recorded_after_the_timeout() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::HangsFrom(2));
    let began = tokio::time::Instant::now();
    recover(&node, &unpacker).await.unwrap();
    assert!(began.elapsed() > Duration::from_secs(120), "longer than the kubelet would wait");
    assert!(began.elapsed() < Duration::from_secs(900), "its pods wait for the name: {:?}", began.elapsed());
    assert!(node.has_metric(r#"lighterman_layers_unpacked_total{result="given_up"} 1"#));
    assert_eq!(node.record_names().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_of_more_than_an_hour_keeps_its_content_and_the_time_to_unpack_it() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::HangsFrom(1));
    // Another recovery writes a layer, on a slow link.
    let (store, layer) = (Arc::clone(&node.store), image.layers[2].blob.clone());
    let pin = store.pin(Duration::from_secs(86_400)).await.unwrap();
    let other = store.create(layer.digest, layer.size, &pin).await.unwrap();
    let elsewhere = async {
        tokio::time::sleep(Duration::from_secs(3550)).await;
        drop(other);
        tokio::time::sleep(Duration::from_secs(100)).await;
        store.collect();
    };
    let began = tokio::time::Instant::now();
    let (recovered, ()) = tokio::join!(recover(&node, &unpacker), elsewhere);
    let took = began.elapsed();
    assert!(took > Duration::from_secs(3550 + 590), "unpacking was given up early: {took:?}");
    node.store.collect();
    assert_eq!(recovered.unwrap().fetched, 5);
    assert_eq!(blobs_of(&*node.store).await.len(), 5);
}

#[tokio::test(start_paused = true)]
async fn two_images_are_unpacked_at_a_time_and_a_third_image_waits() {
    let node = TestNode::new();
    let images = ["registry.example/one:v1", "registry.example/two:v1", "registry.example/three:v1"];
    for (number, name) in (1..).zip(images) {
        node.add_provider_with_layers(number, name, &[1000 + u64::from(number)], Behaviour::Honest).await;
    }
    let unpacker = unpacker(&node, UnpackBehaviour::HangsFrom(1));
    let recoverer = recoverer(&node, &unpacker);
    let all = join_all(images.map(async |name| {
        let (wanted, progress) = (name.parse::<Reference>().unwrap().into(), Progress::default());
        recoverer.recover(&wanted, &progress, &CancellationToken::new()).await
    }));
    timeout(Duration::from_secs(60), all).await.map(drop).unwrap_err();
    assert_eq!(unpacker.calls.lock().unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_cancelled_while_unpacking_ends_at_once_and_records_nothing() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::HangsFrom(1));
    let (recoverer, stop) = (recoverer(&node, &unpacker), CancellationToken::new());
    let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    let stopping = async {
        while unpacker.calls.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(progress.unpacking(), Some((1, 3)));
        stop.cancel();
        tokio::time::Instant::now()
    };
    let (result, stopped) = tokio::join!(recoverer.recover(&wanted, &progress, &stop), stopping);
    assert!(matches!(result, Err(RecoverError::Abandoned)), "{result:?}");
    assert!(stopped.elapsed() < Duration::from_secs(1));
    assert!(node.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_whole_recorded_image_is_left_to_the_runtime_to_unpack() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Willing);
    node.recoverer()
        .recover(&IMAGE.parse::<Reference>().unwrap().into(), &Progress::default(), &CancellationToken::new())
        .await
        .unwrap();
    recover(&node, &unpacker).await.unwrap();
    assert!(unpacker.calls.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_unpacker_does_not_wait_for_an_image_that_failed() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Corrupts).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Willing);
    let failed = recover(&node, &unpacker).await;
    assert!(matches!(failed, Err(RecoverError::Fetch { .. })), "{failed:?}");
    assert!(unpacker.calls.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_image_whose_config_does_not_match_its_layers_is_left_to_the_runtime() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[], &[5], 1).await.unwrap();
    // Its manifest has one layer more than the configuration knows.
    let (config, layer) = (&image.blobs[0], &image.blobs[1]);
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer, layer]});
    crate::testing::image::put_document(&*store, IMAGE, manifest.to_string()).await.unwrap();
    node.announce_store(1, store, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Willing);
    recover(&node, &unpacker).await.unwrap();
    assert!(unpacker.calls.lock().unwrap().is_empty());
    assert!(node.has_metric(r#"lighterman_layers_unpacked_total{result="failed"} 1"#));
}
