//! The store notices records of other clients and a restart of containerd.

use std::time::Duration;

use lighterman::ports::{BlobMetadata, Blobs, ImageRecord, ImageRecords, Pins};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::daemon::Daemon;
use super::{HOUR, WAIT_DEADLINE, content, write};

pub(super) async fn changes_by_other_clients_are_noticed(version: &str) {
    let daemon = Daemon::start(version).await;
    let (store, other_client) = (daemon.store("events"), daemon.store("events"));
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let mut changes = store.changes();
    tokio::spawn(store.clone().run(stop));
    timeout(WAIT_DEADLINE, changes.changed()).await.expect("the first connection counts as a change").unwrap();

    let pin = other_client.pin(HOUR).await.unwrap();
    let target = write(&other_client, &content("noticed", 100), &pin, &BlobMetadata::default()).await;
    // containerd may subscribe a moment after the connection, so the test repeats the record.
    let waiting = async {
        for n in 0.. {
            let record = ImageRecord { name: format!("example.org/noticed:{n}"), target: target.clone() };
            other_client.put_image(&record).await.unwrap();
            if timeout(Duration::from_millis(500), changes.changed()).await.is_ok() {
                break;
            }
        }
    };
    timeout(WAIT_DEADLINE, waiting).await.expect("the store notices records of other clients");
}

pub(super) async fn changes_are_noticed_after_a_restart(version: &str) {
    let mut daemon = Daemon::start(version).await;
    let store = daemon.store("restarted");
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let mut changes = store.changes();
    tokio::spawn(store.clone().run(stop));
    timeout(WAIT_DEADLINE, changes.changed()).await.expect("the first connection counts as a change").unwrap();
    daemon.kill();
    changes.mark_unchanged();
    daemon.restart().await;
    timeout(WAIT_DEADLINE, changes.changed()).await.expect("the store reconnects after the restart").unwrap();
}
