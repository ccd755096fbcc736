//! The store aborts unfinished ingests of dropped writers and of killed processes. The store writes
//! a blob of another namespace again.

use std::time::Duration;

use lighterman::containerd::ContainerdStore;
use lighterman::oci::Digest;
use lighterman::ports::{BlobMetadata, Blobs, Pins, StoreError};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::daemon::Daemon;
use super::staging::proof;
use super::{HOUR, WAIT_DEADLINE, content, read, write};

pub(super) async fn a_containerd_killed_in_mid_write_keeps_nothing_of_the_blob(version: &str) {
    let mut daemon = Daemon::start(version).await;
    let store = daemon.store("killed");
    let pin = store.pin(HOUR).await.unwrap();
    let committed = write(&store, &content("kept", 3 << 20), &pin, &BlobMetadata::default()).await;
    let bytes = content("interrupted", 4 << 20);
    let (digest, metadata) = (Digest::of(&bytes), BlobMetadata::default());
    let mut put = store.put(bytes.clone(), proof(&bytes), &metadata, &pin);
    poll_until_ingest(&mut put, &daemon, "killed").await;

    daemon.kill();
    let failed = timeout(WAIT_DEADLINE, put).await.unwrap();
    assert!(matches!(failed, Err(StoreError::Unavailable(_))), "{failed:?}");
    let absent = timeout(WAIT_DEADLINE, store.blob(committed.digest)).await.unwrap();
    let Err(StoreError::Unavailable(text)) = absent else { panic!("{absent:?}") };
    assert!(text.contains("containerd.sock"), "{text}");
    assert!(timeout(WAIT_DEADLINE, store.ready()).await.unwrap().is_err());

    daemon.restart().await;
    assert_eq!(store.blob(digest).await.unwrap(), None);
    assert_eq!(read(&store, committed.digest).await, content("kept", 3 << 20));
    let rewritten = write(&store, &bytes, &pin, &BlobMetadata::default()).await;
    assert_eq!(read(&store, rewritten.digest).await, bytes);
}

/// Polls a write until containerd has an open ingest of the agent. While `ctr` runs, neither the
/// write nor its connection makes progress.
async fn poll_until_ingest(
    write: impl Future<Output = Result<(), StoreError>> + Unpin,
    daemon: &Daemon,
    containerd_namespace: &str,
) {
    let mut write = write;
    while !daemon.ctr(containerd_namespace, &["content", "active"]).contains("lighterman-") {
        let ended = timeout(Duration::from_millis(1), &mut write).await;
        assert!(ended.is_err(), "the write ended before ctr listed the ingest: {ended:?}");
    }
}

/// Waits until containerd has no open ingest of the agent.
async fn wait_no_ingests(daemon: &Daemon, containerd_namespace: &str) {
    let waiting = async {
        while daemon.ctr(containerd_namespace, &["content", "active"]).contains("lighterman-") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(WAIT_DEADLINE, waiting).await.expect("the abandoned ingest is aborted");
}

/// Starts a write, and drops the write when containerd has an open ingest.
async fn abandon_ingest(store: &ContainerdStore, daemon: &Daemon, containerd_namespace: &str) {
    let (bytes, metadata) = (content("begun", 4 << 20), BlobMetadata::default());
    let pin = store.pin(HOUR).await.unwrap();
    poll_until_ingest(store.put(bytes.clone(), proof(&bytes), &metadata, &pin), daemon, containerd_namespace).await;
    assert_eq!(store.blob(Digest::of(&bytes)).await.unwrap(), None);
}

pub(super) async fn ingests_of_dropped_writers_are_aborted(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("dropped");
    let stop = CancellationToken::new();
    let running = tokio::spawn(store.clone().run(stop.clone()));
    abandon_ingest(&store, &daemon, "dropped").await;
    wait_no_ingests(&daemon, "dropped").await;
    stop.cancel();
    timeout(WAIT_DEADLINE, running).await.expect("the store's task ends after the stop").unwrap();
}

pub(super) async fn ingests_of_a_killed_agent_are_aborted_at_the_next_start(version: &str) {
    let daemon = Daemon::start(version).await;
    abandon_ingest(&daemon.store("left"), &daemon, "left").await;
    assert!(daemon.ctr("left", &["content", "active"]).contains("lighterman-"), "ctr lists the open ingest");

    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    tokio::spawn(daemon.store("left").run(stop));
    wait_no_ingests(&daemon, "left").await;
}

/// Under the default content policy (`shared`) containerd would adopt the other namespace's copy at
/// the commit, if the agent wrote no bytes.
pub(super) async fn a_blob_of_another_namespace_is_written_again(version: &str) {
    let daemon = Daemon::start(version).await;
    let (store, other_store) = (daemon.store("here"), daemon.store("there"));
    let bytes = content("in both", (3 << 20) + 1);
    let pin = other_store.pin(HOUR).await.unwrap();
    let blob = write(&other_store, &bytes, &pin, &BlobMetadata::default()).await;
    assert_eq!(store.blob(blob.digest).await.unwrap(), None, "the blob is absent in this namespace");
    let pin = store.pin(HOUR).await.unwrap();
    // An abandoned ingest: containerd offered the other namespace's copy first, so the later abort
    // leaves the file with its bytes. The next write has to empty the file.
    let metadata = BlobMetadata::default();
    poll_until_ingest(store.put(bytes.clone(), proof(&bytes), &metadata, &pin), &daemon, "here").await;
    write(&store, &bytes, &pin, &BlobMetadata::default()).await;
    assert_eq!(read(&store, blob.digest).await, bytes);
}
