//! Recoveries on disks that have little room, under the default settings.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::salvaging::{REFUSED, Watch, failing};
use super::*;
use crate::agent::progress::Progress;
use crate::agent::recover::RecoverError;
use crate::decide::disk::{Disks, FileSystem, Volume};
use crate::decide::plan::OverLimit;
use crate::ports::ReportKind;

const GIB: u64 = 1 << 30;

fn disk(device: u64, free: u64, total: u64) -> Option<FileSystem> {
    Some(FileSystem { device: Some(device), free, total })
}

/// One disk of 100 GiB for content and snapshots.
fn one_disk(free: u64) -> Disks {
    Disks { content: disk(1, free, 100 * GIB), snapshots: disk(1, free, 100 * GIB) }
}

/// A node under the default settings, beside one that has the image.
async fn harbour(disks: Disks) -> Harbour {
    let harbour = Harbour::new();
    harbour.rule(|rules| rules.budgets = Rules::default().budgets);
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.store.set_disks(disks);
    harbour
}

async fn refused_by(disks: Disks) -> OverLimit {
    let harbour = harbour(disks).await;
    let wanted = IMAGE.parse::<Reference>().unwrap().into();
    let recovered = harbour.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await;
    assert!(harbour.record_names().await.is_empty());
    match recovered {
        Err(RecoverError::OverLimit(refused)) => refused,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_is_recovered_in_the_band_that_the_kubelet_keeps() {
    let harbour = harbour(one_disk(17 * GIB)).await;
    let wanted = IMAGE.parse::<Reference>().unwrap().into();
    harbour.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_disk_that_is_short_is_named_and_nothing_is_fetched() {
    let disks = Disks { content: disk(1, 50 * GIB, 100 * GIB), snapshots: disk(2, 3 * GIB, 20 * GIB) };
    let refused = refused_by(disks).await;
    assert!(matches!(refused, OverLimit::Disk { volume: Volume::Snapshots, .. }), "{refused}");
    let disks = Disks { content: disk(1, 15 * GIB, 100 * GIB), snapshots: disk(2, 19 * GIB, 20 * GIB) };
    let refused = refused_by(disks).await;
    assert!(matches!(refused, OverLimit::Disk { volume: Volume::Content, .. }), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn space_that_becomes_free_wakes_the_recovery_that_was_refused() {
    let harbour = harbour(one_disk(15 * GIB)).await;
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("web", IMAGE, REFUSED)).await;
    // By now the back-off is minutes long.
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert!(harbour.record_names().await.is_empty());
    let told = harbour.cluster.reports();
    assert!(
        told.iter().all(|(_, said)| said.kind == ReportKind::Failed && said.note.contains("stay free")),
        "{told:?}"
    );
    harbour.store.set_disks(one_disk(16 * GIB));
    let nudged = tokio::time::timeout(Duration::from_secs(5), watch.nudges.recv()).await;
    assert_eq!(nudged.expect("a nudge at the next look").unwrap().name, "web");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn space_that_does_not_suffice_wakes_nothing() {
    let harbour = harbour(one_disk(15 * GIB)).await;
    let watch = Watch::start(&harbour);
    watch.sees(failing("web", IMAGE, REFUSED)).await;
    tokio::time::sleep(Duration::from_secs(1000)).await;
    let before = harbour.cluster.reports().len();
    harbour.store.set_disks(one_disk(15 * GIB + 1));
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(harbour.cluster.reports().len() <= before + 1, "only the back-off goes on");
    watch.stop().await;
}
