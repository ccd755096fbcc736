//! The store aborts unfinished ingests of dropped writers and of killed processes. The store writes
//! a blob of another namespace again.

use std::time::Duration;

use bytes::Bytes;
use lighterman::containerd::ContainerdStore;
use lighterman::oci::Digest;
use lighterman::ports::{BlobMetadata, BlobWriter, ContentStore, Pin, StoreError};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::daemon::Daemon;
use super::{HOUR, WAIT_DEADLINE, content, read, write};

pub(super) async fn a_containerd_killed_in_mid_write_keeps_nothing_of_the_blob(version: &str) {
    let mut daemon = Daemon::start(version).await;
    let store = daemon.store("killed");
    let pin = store.pin(HOUR).await.unwrap();
    let committed = write(&store, &content("kept", 3 << 20), &pin, &BlobMetadata::default()).await;
    let bytes = content("interrupted", 12 << 20);
    let digest = Digest::of(&bytes);
    let mut writer = store.create(digest, bytes.len() as u64, &pin).await.unwrap();
    writer.append(&[bytes.slice(..6 << 20)]).await.unwrap();

    daemon.kill();
    let failed = timeout(WAIT_DEADLINE, append_until_it_fails(writer.as_mut(), &bytes)).await.unwrap();
    assert!(matches!(failed, StoreError::Unavailable(_)), "{failed:?}");
    drop(writer);
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

/// The connection accepts some messages before an append fails.
async fn append_until_it_fails(writer: &mut dyn BlobWriter, bytes: &Bytes) -> StoreError {
    for _ in 0..6 {
        if let Err(error) = writer.append(&[bytes.slice(..1 << 20)]).await {
            return error;
        }
    }
    panic!("all six appends to a killed containerd succeeded");
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

async fn begin_ingest(store: &ContainerdStore, pin: &Pin) -> Box<dyn BlobWriter> {
    let bytes = content("begun", 5 << 20);
    let mut writer = store.create(Digest::of(&bytes), bytes.len() as u64, pin).await.unwrap();
    writer.append(&[bytes.slice(..4 << 20)]).await.unwrap();
    writer
}

pub(super) async fn ingests_of_dropped_writers_are_aborted(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("dropped");
    let stop = CancellationToken::new();
    let running = tokio::spawn(store.clone().run(stop.clone()));
    let pin = store.pin(HOUR).await.unwrap();
    let writer = begin_ingest(&store, &pin).await;
    assert!(daemon.ctr("dropped", &["content", "active"]).contains("lighterman-"), "ctr lists the open ingest");
    drop(writer);
    wait_no_ingests(&daemon, "dropped").await;
    stop.cancel();
    timeout(WAIT_DEADLINE, running).await.expect("the store's task ends after the stop").unwrap();
}

pub(super) async fn ingests_of_a_killed_agent_are_aborted_at_the_next_start(version: &str) {
    let daemon = Daemon::start(version).await;
    let killed = daemon.store("left");
    let pin = killed.pin(HOUR).await.unwrap();
    drop(begin_ingest(&killed, &pin).await);
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
    // leaves the file with its 3 MiB. The next write has to empty the file.
    let mut writer = store.create(blob.digest, blob.size, &pin).await.unwrap();
    writer.append(&[bytes.slice(..3 << 20)]).await.unwrap();
    drop(writer);
    write(&store, &bytes, &pin, &BlobMetadata::default()).await;
    assert_eq!(read(&store, blob.digest).await, bytes);
}
