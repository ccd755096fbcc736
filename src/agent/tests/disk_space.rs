//! Recoveries on almost full disks, under the default budgets.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::pod_controller::{REFUSED, RunningController, failing_pod};
use super::*;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::disk_floor::OverLimit;
use crate::decide::disk_floor::{Disks, FileSystem, Volume};
use crate::model::PodReportKind;

const GIB: u64 = 1 << 30;

fn disk(device: u64, free: u64, total: u64) -> Option<FileSystem> {
    Some(FileSystem { device: Some(device), free, total })
}

/// One disk of 100 GiB for content and snapshots.
fn one_disk(free: u64) -> Disks {
    Disks { content: disk(1, free, 100 * GIB), snapshots: disk(1, free, 100 * GIB) }
}

/// A node with the default budgets, and a peer that provides the image.
async fn node(disks: Disks) -> TestNode {
    let node = TestNode::new();
    node.change_policy(|policy| policy.budgets = Policy::default().budgets);
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.store.set_disks(disks);
    node
}

async fn rejection_by(disks: Disks) -> OverLimit {
    let node = node(disks).await;
    let request = IMAGE.parse::<Reference>().unwrap().into();
    let recovered = node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await;
    assert!(node.record_names().await.is_empty());
    match recovered {
        Err(RecoverError::OverLimit(rejection)) => rejection,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_is_recovered_above_the_eviction_threshold() {
    let node = node(one_disk(17 * GIB)).await;
    let request = IMAGE.parse::<Reference>().unwrap().into();
    node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_error_names_the_full_disk_and_nothing_is_fetched() {
    let disks = Disks { content: disk(1, 50 * GIB, 100 * GIB), snapshots: disk(2, 3 * GIB, 20 * GIB) };
    let rejection = rejection_by(disks).await;
    assert!(matches!(rejection, OverLimit::Disk { volume: Volume::Snapshots, .. }), "{rejection}");
    let disks = Disks { content: disk(1, 15 * GIB, 100 * GIB), snapshots: disk(2, 19 * GIB, 20 * GIB) };
    let rejection = rejection_by(disks).await;
    assert!(matches!(rejection, OverLimit::Disk { volume: Volume::Content, .. }), "{rejection}");
}

#[tokio::test(start_paused = true)]
async fn freed_space_restarts_the_rejected_recovery() {
    let node = node(one_disk(15 * GIB)).await;
    let mut controller = RunningController::start(&node);
    controller.send_pod(failing_pod("web", IMAGE, REFUSED)).await;
    // By now the back-off lasts minutes.
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert!(node.record_names().await.is_empty());
    let reports = node.cluster.reports();
    assert!(
        reports.iter().all(|(_, report)| report.kind == PodReportKind::Failed && report.note.contains("stay free")),
        "{reports:?}"
    );
    node.store.set_disks(one_disk(16 * GIB));
    let nudged = tokio::time::timeout(Duration::from_secs(5), controller.nudges.recv()).await;
    assert_eq!(nudged.expect("a nudge after the next measurement of the disks").unwrap().name, "web");
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn insufficient_freed_space_restarts_no_recovery() {
    let node = node(one_disk(15 * GIB)).await;
    let controller = RunningController::start(&node);
    controller.send_pod(failing_pod("web", IMAGE, REFUSED)).await;
    tokio::time::sleep(Duration::from_secs(1000)).await;
    let before = node.cluster.reports().len();
    node.store.set_disks(one_disk(15 * GIB + 1));
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(node.cluster.reports().len() <= before + 1, "only the back-off starts attempts");
    controller.stop().await;
}
