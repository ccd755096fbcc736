//! Layers are unpacked while the image comes, and nothing about it keeps the image from coming.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::progress::Progress;
use crate::agent::recover::{RecoverError, Recovered};
use crate::agent::unpack::Unpacking;
use crate::decide::disk::{Disks, FileSystem};
use crate::decide::plan::OverLimit;
use crate::oci::StackedLayer;
use crate::ports::{Pin, UnpackError, Unpacked, Unpacker};

/// What the test makes of each layer.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
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
struct Witness {
    store: Arc<MemoryStore>,
    mood: Mood,
    asked: Mutex<Vec<Asked>>,
}

struct Asked {
    chain_id: Digest,
    /// The blobs that were whole then.
    here: BTreeSet<Digest>,
    /// The image had a name.
    named: bool,
}

#[async_trait]
impl Unpacker for Witness {
    async fn suits(&self) -> Result<(), UnpackError> {
        match self.mood {
            Mood::Unsuited => Err(UnpackError::Unsuited("the test".into())),
            Mood::Willing | Mood::FailsAt(_) | Mood::FillsAt(_) | Mood::FullAt(_) | Mood::HangsFrom(_) => Ok(()),
        }
    }

    async fn is_unpacked(&self, layer: &StackedLayer) -> Result<bool, UnpackError> {
        self.store.is_unpacked(layer).await
    }

    async fn unpack(&self, layer: &StackedLayer, pin: &Pin) -> Result<Unpacked, UnpackError> {
        let here = blobs_of(&*self.store).await.into_iter().collect();
        let named = !self.store.images().await?.is_empty();
        let number = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(Asked { chain_id: layer.chain_id, here, named });
            asked.len()
        };
        match self.mood {
            Mood::FailsAt(failing) if failing == number => Err(StoreError::Other("no".into()).into()),
            Mood::HangsFrom(hanging) if hanging <= number => std::future::pending().await,
            Mood::FullAt(full) if full == number => Err(StoreError::Full(layer.blob.digest).into()),
            Mood::FillsAt(filling) if filling == number => {
                self.store.set_disks(two_disks(200));
                self.store.unpack(layer, pin).await
            }
            Mood::Willing
            | Mood::Unsuited
            | Mood::FailsAt(_)
            | Mood::FillsAt(_)
            | Mood::FullAt(_)
            | Mood::HangsFrom(_) => self.store.unpack(layer, pin).await,
        }
    }

    async fn keep(&self, config: Digest, top: Digest) -> Result<(), UnpackError> {
        self.store.keep(config, top).await
    }
}

/// Content on a disk with room, snapshots on one of 200 000 bytes with so many free.
fn two_disks(free: u64) -> Disks {
    let disk = |device, free, total| Some(FileSystem { device: Some(device), free, total });
    Disks { content: disk(1, 1 << 30, 1 << 30), snapshots: disk(2, free, 200_000) }
}

fn witness(harbour: &Harbour, mood: Mood) -> Arc<Witness> {
    Arc::new(Witness { store: Arc::clone(&harbour.store), mood, asked: Mutex::default() })
}

fn recoverer(harbour: &Harbour, witness: &Arc<Witness>) -> Recoverer {
    let unpacker = Arc::clone(witness) as Arc<dyn Unpacker>;
    let unpacking = Unpacking::new(unpacker, Arc::clone(&harbour.store) as _, harbour.metrics.clone());
    Recoverer { unpacking: Some(unpacking), ..harbour.recoverer() }
}

async fn recover(harbour: &Harbour, witness: &Arc<Witness>) -> Result<Recovered, RecoverError> {
    let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    recoverer(harbour, witness).recover(&wanted, &progress, &CancellationToken::new()).await
}

fn names(image: &MadeImage) -> Vec<Digest> {
    image.layers.iter().map(|layer| layer.chain_id).collect()
}

#[tokio::test(start_paused = true)]
async fn layers_are_unpacked_from_the_lowest_up_before_the_image_has_a_name() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::Willing);
    recover(&harbour, &witness).await.unwrap();
    let asked = witness.asked.lock().unwrap();
    assert_eq!(asked.iter().map(|asked| asked.chain_id).collect::<Vec<_>>(), names(&image));
    for (asked, layer) in asked.iter().zip(&image.layers) {
        assert!(!asked.named, "a pod that finds a name has it unpacked a second time");
        assert!(asked.here.contains(&layer.blob.digest), "only what is whole");
    }
    assert!(harbour.counted(r#"lighterman_layers_unpacked_total{result="unpacked"} 3"#));
    harbour.store.collect();
    assert_eq!(harbour.store.unpacked(), names(&image).into_iter().collect(), "the image holds what is unpacked");
    assert_eq!(harbour.store.pins(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_layer_is_unpacked_while_the_one_above_it_does_not_come() {
    let harbour = Harbour::new();
    let (below, above) = (Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new()));
    let image = put_image(&*below, &[IMAGE.into()], &[3000, 200, 10], 7).await.unwrap();
    put_image(&*above, &[], &[3000, 200, 10], 7).await.unwrap();
    let top = image.layers[2].blob.digest;
    for blob in blobs_of(&*above).await {
        if blob == top { below.lose(blob) } else { above.lose(blob) }
    }
    harbour.announce(1, below, Behaviour::Honest).await;
    harbour.announce(2, above, Behaviour::Hangs).await;
    let witness = witness(&harbour, Mood::Willing);
    let recovered = tokio::time::timeout(Duration::from_secs(5), recover(&harbour, &witness)).await;
    assert!(recovered.is_err(), "a peer that hangs is waited for");
    let asked: Vec<_> = witness.asked.lock().unwrap().iter().map(|asked| asked.chain_id).collect();
    assert_eq!(asked, names(&image)[..2]);
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_cannot_be_unpacked_does_not_keep_the_image_from_coming() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::FailsAt(2));
    recover(&harbour, &witness).await.unwrap();
    assert_eq!(witness.asked.lock().unwrap().len(), 2, "the rest is left to the runtime");
    assert!(harbour.counted(r#"lighterman_layers_unpacked_total{result="failed"} 1"#));
    assert_eq!(harbour.record_names().await.len(), 2);
    harbour.store.collect();
    assert_eq!(blobs_of(&*harbour.store).await.len(), image.blobs.len() + 1);
    assert!(harbour.store.unpacked().is_empty(), "what nobody keeps is collected");
}

#[tokio::test(start_paused = true)]
async fn an_image_whose_layers_have_no_room_gets_no_name_and_is_unpacked_once_there_is_room() {
    let harbour = Harbour::new();
    harbour.rule(|rules| rules.budgets.eviction_percent = 15);
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.store.set_disks(two_disks(60_000));
    let witness = witness(&harbour, Mood::FillsAt(1));
    let refused = recover(&harbour, &witness).await.unwrap_err();
    let RecoverError::NoRoomToUnpack(OverLimit::Disk { free, floor, .. }) = &refused else { panic!("{refused}") };
    assert_eq!((*free, *floor), (200, 30_000));
    assert!(
        refused.to_string().contains("the file system of containerd's snapshotter has 200 bytes free"),
        "{refused}"
    );
    assert!(harbour.record_names().await.is_empty());
    assert_eq!(witness.asked.lock().unwrap().len(), 1, "the layer that fits");
    harbour.store.set_disks(two_disks(60_000));
    recover(&harbour, &witness).await.unwrap();
    assert_eq!(harbour.record_names().await.len(), 2);
    harbour.store.collect();
    assert_eq!(harbour.store.unpacked(), names(&image).into_iter().collect());
}

#[tokio::test(start_paused = true)]
async fn an_image_whose_unpacking_fills_the_disk_gets_no_name() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::FullAt(2));
    let refused = recover(&harbour, &witness).await.unwrap_err();
    assert!(matches!(refused, RecoverError::Store { source: StoreError::Full(_), .. }), "{refused}");
    assert!(refused.to_string().contains("containerd's snapshotter"), "{refused}");
    assert!(harbour.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn where_nothing_is_unpacked_nothing_is_counted_or_told() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::Unsuited);
    recover(&harbour, &witness).await.unwrap();
    assert!(witness.asked.lock().unwrap().is_empty());
    assert!(!String::from_utf8(harbour.metrics.render()).unwrap().contains("layers_unpacked_total{"));
    assert_eq!(harbour.record_names().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_takes_too_long_to_unpack_is_recorded_all_the_same() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::HangsFrom(2));
    let began = tokio::time::Instant::now();
    recover(&harbour, &witness).await.unwrap();
    assert!(began.elapsed() > Duration::from_secs(120), "longer than the kubelet would wait");
    assert!(began.elapsed() < Duration::from_secs(900), "its pods wait for the name: {:?}", began.elapsed());
    assert!(harbour.counted(r#"lighterman_layers_unpacked_total{result="given_up"} 1"#));
    assert_eq!(harbour.record_names().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_of_more_than_an_hour_keeps_its_content_and_the_time_to_unpack_it() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::HangsFrom(1));
    // Another recovery writes a layer, on a slow link.
    let (store, layer) = (Arc::clone(&harbour.store), image.layers[2].blob.clone());
    let pin = store.pin(Duration::from_secs(86_400)).await.unwrap();
    let other = store.create(layer.digest, layer.size, &pin).await.unwrap();
    let elsewhere = async {
        tokio::time::sleep(Duration::from_secs(3550)).await;
        drop(other);
        tokio::time::sleep(Duration::from_secs(100)).await;
        store.collect();
    };
    let began = tokio::time::Instant::now();
    let (recovered, ()) = tokio::join!(recover(&harbour, &witness), elsewhere);
    let took = began.elapsed();
    assert!(took > Duration::from_secs(3550 + 590), "unpacking was given up early: {took:?}");
    harbour.store.collect();
    assert_eq!(recovered.unwrap().fetched, 5);
    assert_eq!(blobs_of(&*harbour.store).await.len(), 5);
}

#[tokio::test(start_paused = true)]
async fn two_images_are_unpacked_at_a_time_and_a_third_waits() {
    let harbour = Harbour::new();
    let images = ["registry.example/one:v1", "registry.example/two:v1", "registry.example/three:v1"];
    for (number, name) in (1..).zip(images) {
        harbour.peer_with_layers(number, name, &[1000 + u64::from(number)], Behaviour::Honest).await;
    }
    let witness = witness(&harbour, Mood::HangsFrom(1));
    let recoverer = recoverer(&harbour, &witness);
    let all = join_all(images.map(async |name| {
        let (wanted, progress) = (name.parse::<Reference>().unwrap().into(), Progress::default());
        recoverer.recover(&wanted, &progress, &CancellationToken::new()).await
    }));
    timeout(Duration::from_secs(60), all).await.map(drop).unwrap_err();
    assert_eq!(witness.asked.lock().unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn stopped_while_it_unpacks_it_ends_at_once_and_names_nothing() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::HangsFrom(1));
    let (recoverer, stop) = (recoverer(&harbour, &witness), CancellationToken::new());
    let (wanted, progress) = (IMAGE.parse::<Reference>().unwrap().into(), Progress::default());
    let stopping = async {
        while witness.asked.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(progress.unpacking(), Some((1, 3)));
        stop.cancel();
        tokio::time::Instant::now()
    };
    let (result, stopped) = tokio::join!(recoverer.recover(&wanted, &progress, &stop), stopping);
    assert!(matches!(result, Err(RecoverError::Abandoned)), "{result:?}");
    assert!(stopped.elapsed() < Duration::from_secs(1));
    assert!(harbour.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_image_that_is_whole_and_has_its_name_is_the_runtime_s_to_unpack() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::Willing);
    harbour
        .recoverer()
        .recover(&IMAGE.parse::<Reference>().unwrap().into(), &Progress::default(), &CancellationToken::new())
        .await
        .unwrap();
    recover(&harbour, &witness).await.unwrap();
    assert!(witness.asked.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_image_that_does_not_come_is_not_waited_for() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Lies).await;
    let witness = witness(&harbour, Mood::Willing);
    let failed = recover(&harbour, &witness).await;
    assert!(matches!(failed, Err(RecoverError::Fetch { .. })), "{failed:?}");
    assert!(witness.asked.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_configuration_that_says_nothing_of_its_layers_is_left_to_the_runtime() {
    let harbour = Harbour::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[], &[5], 1).await.unwrap();
    // Its manifest has one layer more than the configuration knows.
    let (config, layer) = (&image.blobs[0], &image.blobs[1]);
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer, layer]});
    crate::testing::image::put_document(&*store, IMAGE, manifest.to_string()).await.unwrap();
    harbour.announce(1, store, Behaviour::Honest).await;
    let witness = witness(&harbour, Mood::Willing);
    recover(&harbour, &witness).await.unwrap();
    assert!(witness.asked.lock().unwrap().is_empty());
    assert!(harbour.counted(r#"lighterman_layers_unpacked_total{result="failed"} 1"#));
}
