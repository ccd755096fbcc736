//! Unpacking of layers during a recovery. Among the unpacker's errors, only a full disk fails the
//! recovery.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::recovery::layer_unpacker::LayerUnpacker;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::disk_floor::OverLimit;
use crate::decide::disk_floor::{Disks, FileSystem};
use crate::model::RecoveredImage;
use crate::oci::StackedLayer;
use crate::ports::{Blobs, ImageRecords, Pin, Pins, UnpackError, UnpackOutcome, Unpacker};

#[derive(Clone, Copy, PartialEq)]
enum UnpackBehaviour {
    Succeeds,
    /// Fails at the layer with this number, counted from 1.
    FailsAt(usize),
    Unsupported,
    /// Leaves 200 bytes free from the layer with this number on.
    FillsAt(usize),
    /// Fails with [`StoreError::Full`] at the layer with this number, whatever the measured free
    /// space.
    FullAt(usize),
    /// Never returns, from the layer with this number on.
    HangsFrom(usize),
}

/// Unpacks in memory, and records the calls.
struct RecordingUnpacker {
    store: Arc<MemoryStore>,
    behaviour: UnpackBehaviour,
    calls: Mutex<Vec<UnpackCall>>,
}

struct UnpackCall {
    chain_id: Digest,
    /// The complete blobs in the store at the time of the call.
    complete_blobs: BTreeSet<Digest>,
    /// The store had an image record at the time of the call.
    has_record: bool,
}

#[async_trait]
impl Unpacker for RecordingUnpacker {
    async fn ensure_supported(&self) -> Result<(), UnpackError> {
        match self.behaviour {
            UnpackBehaviour::Unsupported => Err(UnpackError::Unsupported("the test".into())),
            UnpackBehaviour::Succeeds
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
            let mut calls = self.calls.lock();
            calls.push(UnpackCall { chain_id: layer.chain_id, complete_blobs, has_record });
            calls.len()
        };
        match self.behaviour {
            UnpackBehaviour::FailsAt(failing) if failing == number => Err(StoreError::Other("no".into()).into()),
            UnpackBehaviour::HangsFrom(hanging) if hanging <= number => std::future::pending().await,
            UnpackBehaviour::FullAt(full) if full == number => Err(StoreError::Full(layer.blob.digest).into()),
            UnpackBehaviour::FillsAt(filling) if filling == number => {
                self.store.set_disks(two_disks(200));
                self.store.unpack(layer, pin).await
            }
            UnpackBehaviour::Succeeds
            | UnpackBehaviour::Unsupported
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

/// A content disk with enough space, and a snapshot disk of 200 000 bytes with `free` bytes free.
fn two_disks(free: u64) -> Disks {
    let disk = |device, free, total| Some(FileSystem { device: Some(device), free, total });
    Disks { content: disk(1, 1 << 30, 1 << 30), snapshots: disk(2, free, 200_000) }
}

fn unpacker(node: &TestNode, behaviour: UnpackBehaviour) -> Arc<RecordingUnpacker> {
    Arc::new(RecordingUnpacker { store: Arc::clone(&node.store), behaviour, calls: Mutex::default() })
}

fn recoverer(node: &TestNode, unpacker: &Arc<RecordingUnpacker>) -> Recoverer {
    let unpacker = Arc::clone(unpacker) as Arc<dyn Unpacker>;
    let layer_unpacker = LayerUnpacker::new(unpacker, Arc::clone(&node.store) as _, node.metrics.clone());
    Recoverer { layer_unpacker: Some(layer_unpacker), ..node.recoverer() }
}

async fn recover(node: &TestNode, unpacker: &Arc<RecordingUnpacker>) -> Result<RecoveredImage, RecoverError> {
    let (request, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    recoverer(node, unpacker).recover(&request, &progress, &CancellationToken::new()).await
}

fn chain_ids(image: &MadeImage) -> Vec<Digest> {
    image.layers.iter().map(|layer| layer.chain_id).collect()
}

#[tokio::test(start_paused = true)]
async fn layers_are_unpacked_bottom_up_before_the_image_is_recorded() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Succeeds);
    recover(&node, &unpacker).await.unwrap();
    let calls = unpacker.calls.lock();
    assert_eq!(calls.iter().map(|call| call.chain_id).collect::<Vec<_>>(), chain_ids(&image));
    for (call, layer) in calls.iter().zip(&image.layers) {
        assert!(!call.has_record, "a pod that starts after the record makes containerd unpack too");
        assert!(call.complete_blobs.contains(&layer.blob.digest), "only complete layers are unpacked");
    }
    assert!(node.has_metric(r#"lighterman_layers_unpacked_total{result="unpacked"} 3"#));
    node.store.collect();
    assert_eq!(node.store.unpacked(), chain_ids(&image).into_iter().collect(), "the image keeps its snapshots");
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
    let unpacker = unpacker(&node, UnpackBehaviour::Succeeds);
    let recovered = tokio::time::timeout(Duration::from_secs(5), recover(&node, &unpacker)).await;
    assert!(recovered.is_err(), "the recovery waits for the hanging peer");
    let unpacked: Vec<_> = unpacker.calls.lock().iter().map(|call| call.chain_id).collect();
    assert_eq!(unpacked, chain_ids(&image)[..2]);
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_cannot_be_unpacked_does_not_fail_the_recovery() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::FailsAt(2));
    recover(&node, &unpacker).await.unwrap();
    assert_eq!(unpacker.calls.lock().len(), 2, "the runtime unpacks the other layers");
    assert!(node.has_metric(r#"lighterman_layers_unpacked_total{result="failed"} 1"#));
    assert_eq!(node.record_names().await.len(), 2);
    node.store.collect();
    assert_eq!(blobs_of(&*node.store).await.len(), image.blobs.len() + 1);
    assert!(node.store.unpacked().is_empty(), "unfinished snapshots are collected");
}

#[tokio::test(start_paused = true)]
async fn an_image_without_space_for_its_layers_is_recorded_once_there_is_space() {
    let node = TestNode::new();
    node.change_policy(|policy| policy.budgets.eviction_percent = 15);
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.store.set_disks(two_disks(60_000));
    let unpacker = unpacker(&node, UnpackBehaviour::FillsAt(1));
    let rejected = recover(&node, &unpacker).await.unwrap_err();
    let RecoverError::NoRoomToUnpack(OverLimit::Disk { free, floor, .. }) = &rejected else { panic!("{rejected}") };
    assert_eq!((*free, *floor), (200, 30_000));
    assert!(
        rejected.to_string().contains("the file system of containerd's snapshotter has 200 bytes free"),
        "{rejected}"
    );
    assert!(node.record_names().await.is_empty());
    assert_eq!(unpacker.calls.lock().len(), 1, "only the layer that fits is unpacked");
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
    let rejected = recover(&node, &unpacker).await.unwrap_err();
    assert!(matches!(rejected, RecoverError::Store { source: StoreError::Full(_), .. }), "{rejected}");
    assert!(rejected.to_string().contains("containerd's snapshotter"), "{rejected}");
    assert!(node.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_unsupported_unpacker_counts_and_reports_nothing() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Unsupported);
    recover(&node, &unpacker).await.unwrap();
    assert!(unpacker.calls.lock().is_empty());
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
    assert!(began.elapsed() > Duration::from_secs(120), "unpacking may take longer than the kubelet waits");
    assert!(began.elapsed() < Duration::from_secs(900), "pods wait for the record: {:?}", began.elapsed());
    assert!(node.has_metric(r#"lighterman_layers_unpacked_total{result="given_up"} 1"#));
    assert_eq!(node.record_names().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_of_more_than_an_hour_keeps_its_content_and_the_time_to_unpack_it() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::HangsFrom(1));
    // Another recovery writes a layer over a slow link.
    let (store, layer) = (Arc::clone(&node.store), image.layers[2].blob.clone());
    let pin = store.pin(Duration::from_secs(86_400)).await.unwrap();
    let other = store.stage(layer.digest, layer.size, &pin).await.unwrap();
    let other_recovery = async {
        tokio::time::sleep(Duration::from_secs(3550)).await;
        drop(other);
        tokio::time::sleep(Duration::from_secs(100)).await;
        store.collect();
    };
    let began = tokio::time::Instant::now();
    let (recovered, ()) = tokio::join!(recover(&node, &unpacker), other_recovery);
    let took = began.elapsed();
    assert!(took > Duration::from_secs(3550 + 590), "unpacking timed out early: {took:?}");
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
        let (request, progress) = (name.parse::<Reference>().unwrap().into(), Progress::default());
        recoverer.recover(&request, &progress, &CancellationToken::new()).await
    }));
    timeout(Duration::from_secs(60), all).await.map(drop).unwrap_err();
    assert_eq!(unpacker.calls.lock().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_cancelled_while_unpacking_ends_at_once_and_records_nothing() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::HangsFrom(1));
    let (recoverer, stop) = (recoverer(&node, &unpacker), CancellationToken::new());
    let (request, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    let stopping = async {
        while unpacker.calls.lock().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(progress.unpacking(), Some((1, 3)));
        stop.cancel();
        tokio::time::Instant::now()
    };
    let (result, stopped) = tokio::join!(recoverer.recover(&request, &progress, &stop), stopping);
    assert!(matches!(result, Err(RecoverError::Abandoned)), "{result:?}");
    assert!(stopped.elapsed() < Duration::from_secs(1));
    assert!(node.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_whole_recorded_image_is_left_to_the_runtime_to_unpack() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Succeeds);
    node.recoverer()
        .recover(&IMAGE.parse::<Reference>().unwrap().into(), &Progress::default(), &CancellationToken::new())
        .await
        .unwrap();
    recover(&node, &unpacker).await.unwrap();
    assert!(unpacker.calls.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_unpacker_does_not_wait_for_an_image_that_failed() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Corrupts).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Succeeds);
    let failed = recover(&node, &unpacker).await;
    assert!(matches!(failed, Err(RecoverError::Fetch { .. })), "{failed:?}");
    assert!(unpacker.calls.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_image_whose_config_does_not_match_its_layers_is_left_to_the_runtime() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[], &[5], 1).await.unwrap();
    // The manifest has one layer more than the config.
    let (config, layer) = (&image.blobs[0], &image.blobs[1]);
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer, layer]});
    crate::testing::image::put_document(&*store, IMAGE, manifest.to_string()).await.unwrap();
    node.announce_store(1, store, Behaviour::Honest).await;
    let unpacker = unpacker(&node, UnpackBehaviour::Succeeds);
    recover(&node, &unpacker).await.unwrap();
    assert!(unpacker.calls.lock().is_empty());
    assert!(node.has_metric(r#"lighterman_layers_unpacked_total{result="failed"} 1"#));
}
