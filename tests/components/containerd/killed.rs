//! The agent and its containerd are killed at every step of a recovery.

use std::sync::Arc;
use std::time::Duration;

use lighterman::agent::progress::Progress;
use lighterman::containerd::ContainerdStore;
use lighterman::oci::Reference;
use lighterman::ports::ContentStore;
use lighterman::testing::image::{MadeImage, Recipe};
use lighterman::testing::{KilledAt, StoppingStore};
use tokio_util::sync::CancellationToken;

use super::PATIENCE;
use super::daemon::Daemon;
use super::harbour::{Harbour, every_blob, lost_to_the_collector};

const NAME: &str = "r.test/killed:1";

/// Recovers until that step; false when the recovery ended before it came.
async fn was_killed(harbour: &Harbour, store: &ContainerdStore, killed_at: KilledAt) -> bool {
    let stopping = StoppingStore::new(Arc::new(store.clone()), killed_at);
    let recoverer = harbour.recoverer(Arc::new(stopping.clone()));
    let (wanted, progress, stop) =
        (NAME.parse::<Reference>().unwrap().into(), Progress::default(), CancellationToken::new());
    let recovering = async {
        tokio::select! {
            biased;
            () = stopping.reached() => true,
            recovered = recoverer.recover(&wanted, &progress, &stop) => recovered.map(|_| false).unwrap(),
        }
    };
    tokio::time::timeout(PATIENCE, recovering).await.expect("it neither ends nor comes to the step")
}

async fn every_record_is_whole(store: &ContainerdStore, image: &MadeImage, when: &str) -> usize {
    let records = store.images().await.unwrap();
    if !records.is_empty() {
        for blob in every_blob(image) {
            assert!(store.blob(blob.digest).await.unwrap().is_some(), "{when}: a record without {}", blob.media_type);
        }
    }
    records.len()
}

/// What the killed agent held ends in an hour; here at once.
async fn end_pins(daemon: &Daemon, containerd_namespace: &str) {
    for lease in daemon.ctr(containerd_namespace, &["leases", "ls", "-q"]).lines() {
        daemon.ctr(containerd_namespace, &["leases", "rm", lease]);
    }
}

#[tokio::test]
async fn whenever_it_is_killed_nothing_is_half_recorded_and_the_next_start_finishes() {
    let mut daemon = Daemon::start("containerd-2").await;
    let harbour = Harbour::new();
    let recipe = Recipe { layers: vec![1_500_000, 3000], index: true, ..Recipe::default() };
    let image = harbour.offers(NAME, &recipe, 1).await;
    for step in 0.. {
        for (name, killed_at) in [("before", KilledAt::Before(step)), ("after", KilledAt::After(step))] {
            let containerd_namespace = format!("{name}-{step}");
            let store = daemon.store(&containerd_namespace);
            if !was_killed(&harbour, &store, killed_at).await {
                assert!(step >= 15, "the test takes the steps that there are: {step}");
                return;
            }
            daemon.kill();
            daemon.start_again().await;
            let when = format!("killed at {killed_at:?}");
            let store = daemon.store(&containerd_namespace);
            every_record_is_whole(&store, &image, &when).await;

            let next = harbour.recover(&store, NAME).await.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert_eq!(next.root, image.root.digest, "{when}");
            end_pins(&daemon, &containerd_namespace).await;
            assert_eq!(lost_to_the_collector(&store, &image).await, Vec::<String>::new(), "{when}");
            assert_eq!(every_record_is_whole(&store, &image, &when).await, 2, "{when}");
        }
    }
}

#[tokio::test]
async fn whenever_it_is_killed_and_nobody_goes_on_everything_is_collected() {
    let daemon = Daemon::start("containerd-2").await;
    let harbour = Harbour::new();
    let recipe = Recipe { layers: vec![1_500_000, 3000], index: true, ..Recipe::default() };
    let image = harbour.offers(NAME, &recipe, 1).await;
    for step in 0.. {
        for (name, killed_at) in [("before", KilledAt::Before(step)), ("after", KilledAt::After(step))] {
            let containerd_namespace = format!("{name}-{step}");
            let store = daemon.store(&containerd_namespace);
            if !was_killed(&harbour, &store, killed_at).await {
                return;
            }
            end_pins(&daemon, &containerd_namespace).await;
            let pin = store.pin(Duration::from_secs(60)).await.unwrap();
            store.release_and_collect(pin).await.unwrap();
            let records = every_record_is_whole(&store, &image, &format!("killed at {killed_at:?}")).await;
            let blobs = store.blobs().await.unwrap().len();
            assert_eq!(blobs, if records == 0 { 0 } else { 5 }, "killed at {killed_at:?}, {records} records");
        }
    }
}
