//! Recoveries in which the agent and its containerd are killed at every step.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use lighterman::agent::recovery::progress::Progress;
use lighterman::containerd::ContainerdStore;
use lighterman::oci::{Digest, Reference};
use lighterman::ports::{BlobMetadata, Blobs, ImageRecords, Pins, StoreError};
use lighterman::testing::contract::AbortAfter;
use lighterman::testing::image::{MadeImage, Recipe};
use lighterman::testing::{KillPoint, StoppingStore};
use tokio_util::sync::CancellationToken;

use super::daemon::Daemon;
use super::staging::{links, proof, staged_files, write_out_of_order};
use super::test_node::{TestNode, blobs_lost_to_gc, every_blob};
use super::{HOUR, WAIT_DEADLINE, content, read};

const NAME: &str = "r.test/killed:1";

/// Recovers until the kill point. False when the recovery ended before the kill point.
async fn recover_until_killed(node: &TestNode, store: &ContainerdStore, killed_at: KillPoint) -> bool {
    let stopping = StoppingStore::new(Arc::new(store.clone()), killed_at);
    let recoverer = node.recoverer(Arc::new(stopping.clone()));
    let (wanted, progress, stop) =
        (NAME.parse::<Reference>().unwrap().into(), Progress::default(), CancellationToken::new());
    let recovering = async {
        tokio::select! {
            biased;
            () = stopping.reached() => true,
            recovered = recoverer.recover(&wanted, &progress, &stop) => recovered.map(|_| false).unwrap(),
        }
    };
    tokio::time::timeout(WAIT_DEADLINE, recovering).await.expect("the recovery ends or reaches the kill point")
}

async fn assert_records_are_complete(store: &ContainerdStore, image: &MadeImage, when: &str) -> usize {
    let records = store.images().await.unwrap();
    if !records.is_empty() {
        for blob in every_blob(image) {
            assert!(store.blob(blob.digest).await.unwrap().is_some(), "{when}: a record without {}", blob.media_type);
        }
    }
    records.len()
}

/// Ends the killed agent's pins at once; containerd would end them within an hour.
async fn end_pins(daemon: &Daemon, containerd_namespace: &str) {
    for lease in daemon.ctr(containerd_namespace, &["leases", "ls", "-q"]).lines() {
        daemon.ctr(containerd_namespace, &["leases", "rm", lease]);
    }
}

#[tokio::test]
async fn an_agent_killed_at_any_step_leaves_no_partial_record_and_the_next_start_finishes() {
    let mut daemon = Daemon::start("containerd-2.3").await;
    let node = TestNode::new();
    let recipe = Recipe { layers: vec![1_500_000, 3000], index: true, ..Recipe::default() };
    let image = node.announce_image(NAME, &recipe, 1).await;
    for step in 0.. {
        for (name, killed_at) in [("before", KillPoint::Before(step)), ("after", KillPoint::After(step))] {
            let containerd_namespace = format!("{name}-{step}");
            let store = daemon.store(&containerd_namespace);
            if !recover_until_killed(&node, &store, killed_at).await {
                assert!(step >= 11, "a recovery has at least 11 steps, not {step}");
                return;
            }
            daemon.kill();
            daemon.restart().await;
            let when = format!("killed at {killed_at:?}");
            let store = daemon.store(&containerd_namespace);
            assert_records_are_complete(&store, &image, &when).await;

            let next = node.recover(&store, NAME).await.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert_eq!(next.digest, image.target.digest, "{when}");
            end_pins(&daemon, &containerd_namespace).await;
            assert_eq!(blobs_lost_to_gc(&store, &image).await, Vec::<String>::new(), "{when}");
            assert_eq!(assert_records_are_complete(&store, &image, &when).await, 2, "{when}");
        }
    }
}

#[tokio::test]
async fn blobs_of_an_agent_killed_at_any_step_are_collected_without_a_next_start() {
    let daemon = Daemon::start("containerd-2.3").await;
    let node = TestNode::new();
    let recipe = Recipe { layers: vec![1_500_000, 3000], index: true, ..Recipe::default() };
    let image = node.announce_image(NAME, &recipe, 1).await;
    for step in 0.. {
        for (name, killed_at) in [("before", KillPoint::Before(step)), ("after", KillPoint::After(step))] {
            let containerd_namespace = format!("{name}-{step}");
            let store = daemon.store(&containerd_namespace);
            if !recover_until_killed(&node, &store, killed_at).await {
                return;
            }
            end_pins(&daemon, &containerd_namespace).await;
            let pin = store.pin(Duration::from_secs(60)).await.unwrap();
            store.release_and_collect(pin).await.unwrap();
            let records = assert_records_are_complete(&store, &image, &format!("killed at {killed_at:?}")).await;
            let blobs = store.blobs().await.unwrap().len();
            assert_eq!(blobs, if records == 0 { 0 } else { 5 }, "killed at {killed_at:?}, {records} records");
        }
    }
}

/// Names of the files in the blob folder, and names of the blobs that have a record.
async fn files_and_records(daemon: &Daemon, store: &ContainerdStore) -> (BTreeSet<String>, BTreeSet<String>) {
    let folder = daemon.content_root().join("blobs/sha256");
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let records = store.blobs().await.unwrap().into_iter().map(|blob| blob.digest.hex());
    (names.collect(), records.collect())
}

/// Waits until no thread holds the lock of a staging file.
async fn wait_staging_files_unlocked(daemon: &Daemon) {
    // A file that was removed meanwhile holds no lock.
    let is_free = |path: PathBuf| std::fs::File::open(path).map_or(true, |file| file.try_lock().is_ok());
    while !staged_files(daemon).into_iter().all(is_free) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Aborts the commit at every point where the commit awaits. Work on other threads continues, as
/// the kernel's work does after a kill.
pub(crate) async fn a_commit_aborted_at_any_point_leaves_no_partial_record(version: &str) {
    let daemon = Daemon::start(version).await;
    let pin = daemon.store("broken-off").pin(HOUR).await.unwrap();
    super::write(&daemon.store("broken-off"), &Bytes::from_static(b"makes the folder"), &pin, &BlobMetadata::default())
        .await;
    let mut resumed_commits = 0;
    for polls in 0.. {
        for resumed in [true, false] {
            let bytes = content(&format!("broken off after {polls} {resumed}"), 700_000);
            let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
            let killed = daemon.store("broken-off");
            let staged = killed.stage(digest, size, &pin).await.unwrap();
            write_out_of_order(&*staged, &bytes).await;
            let metadata = BlobMetadata::default();
            let commit = Box::pin(staged.commit(proof(&bytes), &metadata));
            let ended = AbortAfter { inner: commit, polls }.await;
            drop(staged);
            if let Some(ended) = ended {
                ended.unwrap();
                assert!(
                    polls > 8 && resumed_commits > 2,
                    "the commit is aborted at {polls} points and resumed {resumed_commits} times"
                );
                return;
            }
            let next = daemon.store("broken-off");
            if resumed {
                // Work on another thread may still hold the file's lock.
                let staged = loop {
                    match next.stage(digest, size, &pin).await {
                        Err(StoreError::Busy(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
                        staged => break staged,
                    }
                };
                match staged {
                    Err(StoreError::AlreadyExists(_)) => {}
                    staged => {
                        resumed_commits += 1;
                        let staged = staged.unwrap();
                        assert_eq!(staged.resumed_ranges().first(), Some(&(0..size)), "after {polls} polls");
                        staged.commit(proof(&bytes), &BlobMetadata::default()).await.unwrap();
                    }
                }
                assert_eq!(read(&next, digest).await, bytes, "after {polls} polls");
            }
            wait_staging_files_unlocked(&daemon).await;
            let stop = CancellationToken::new();
            let running = tokio::spawn(next.clone().run(stop.clone()));
            let cleanup = async {
                loop {
                    let (names, records) = files_and_records(&daemon, &next).await;
                    if names == records && staged_files(&daemon).iter().all(|path| links(path) == 1) {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let cleaned_up = tokio::time::timeout(WAIT_DEADLINE, cleanup).await;
            assert!(cleaned_up.is_ok(), "after {polls} polls: {:?}", files_and_records(&daemon, &next).await);
            stop.cancel();
            running.await.unwrap();
            // A staging file that the sweep did not adopt can still be resumed.
            if !resumed && next.blob(digest).await.unwrap().is_none() {
                let staged = next.stage(digest, size, &pin).await.unwrap();
                assert_eq!(staged.resumed_ranges().first(), Some(&(0..size)), "after {polls} polls");
                staged.abandon().await;
            }
        }
    }
}
