//! The containerd store against containerd 1.7, 2.3 and 2.4, each with its own process, folders and
//! socket.

mod changes;
mod crashes;
pub(crate) mod daemon;
mod daemon_info;
mod discarding;
mod host_root;
mod images;
mod ingests;
mod layer_refill;
mod protection;
mod record_removal;
mod repair;
mod staging;
mod test_node;
mod unpacking;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use changes::{changes_are_noticed_after_a_restart, changes_by_other_clients_are_noticed};
use crashes::a_commit_aborted_at_any_point_leaves_no_partial_record;
use daemon::Daemon;
use daemon_info::{the_sandbox_image_is_read_from_containers, version_and_settings_of_containerd_are_read};
use host_root::{folders_below_the_root_of_a_node_are_found, unmounted_folders_have_no_disk_figures};
use images::{every_kind_of_image_is_recovered_and_survives_the_collector, labels_that_were_missing_are_written};
use ingests::{
    a_blob_of_another_namespace_is_written_again, a_containerd_killed_in_mid_write_keeps_nothing_of_the_blob,
    ingests_of_a_killed_agent_are_aborted_at_the_next_start, ingests_of_dropped_writers_are_aborted,
};
use lighterman::containerd::{Config, ContainerdStore};
use lighterman::oci::{Descriptor, Digest, Repository};
use lighterman::ports::{BlobMetadata, Blobs, Child, ChildKind, ContentStore, ImageRecord, ImageRecords, Pin, Pins};
use lighterman::testing::contract::{StoreUnderTest, UnfinishedWrite, assert_contract};
use lighterman::testing::image::write_blob;
use protection::{
    a_pin_by_another_program_is_neither_marked_nor_ended,
    a_protected_image_is_pinned_for_the_kubelet_until_it_is_released,
    a_protection_removed_by_a_pull_is_noticed_and_restored, an_absent_record_is_neither_protected_nor_created,
};
use record_removal::a_record_is_removed_when_cri_has_noticed_it;
use repair::{
    a_blob_without_its_file_is_fetched_again, a_blob_without_its_file_is_fetched_again_without_access_to_files,
    wrong_bytes_are_replaced,
};
use staging::{
    a_blob_collected_before_its_commit_is_linked_again,
    a_containerd_killed_before_the_commit_adopts_the_staged_blob_afterwards,
    a_file_that_no_record_names_is_not_trusted, a_file_that_no_record_names_is_not_trusted_where_blobs_are_sent,
    a_full_disk_is_reported_and_its_space_is_freed, a_staged_blob_is_adopted_as_it_is,
    a_staged_blob_on_another_mount_is_sent, a_staged_blob_under_the_isolated_policy_is_sent,
    abandoned_staging_files_are_removed,
};
use unpacking::{
    a_recovered_image_is_unpacked_before_its_record_is_written, an_abandoned_layer_is_removed,
    layers_are_unpacked_only_into_the_snapshotter_of_cri, partial_snapshots_of_a_killed_process_are_removed,
    the_unpacker_keeps_the_contract,
};

/// Deadline of each wait in a test. Long, so that a slow machine fails no test.
const WAIT_DEADLINE: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(3600);

/// Makes one test per behavior and version, so that a failure names both.
macro_rules! on_every_version {
    ($($behaviour:ident),* $(,)?) => {
        on_every_version!(@ containerd_1_7 "containerd-1.7" $($behaviour)*);
        on_every_version!(@ containerd_2_3 "containerd-2.3" $($behaviour)*);
        on_every_version!(@ containerd_2_4 "containerd-2.4" $($behaviour)*);
    };
    (@ $module:ident $version:literal $($behaviour:ident)*) => {
        mod $module {
            $(#[tokio::test]
            async fn $behaviour() {
                super::$behaviour($version).await;
            })*
        }
    };
}

on_every_version![
    the_store_keeps_the_contract,
    the_store_keeps_the_contract_without_access_to_files,
    a_containerd_killed_in_mid_write_keeps_nothing_of_the_blob,
    ingests_of_dropped_writers_are_aborted,
    ingests_of_a_killed_agent_are_aborted_at_the_next_start,
    labels_of_other_clients_survive,
    a_blob_of_another_namespace_is_written_again,
    changes_by_other_clients_are_noticed,
    changes_are_noticed_after_a_restart,
    a_record_is_written_when_cri_has_noticed_it,
    a_record_is_removed_when_cri_has_noticed_it,
    a_protected_image_is_pinned_for_the_kubelet_until_it_is_released,
    a_pin_by_another_program_is_neither_marked_nor_ended,
    an_absent_record_is_neither_protected_nor_created,
    a_protection_removed_by_a_pull_is_noticed_and_restored,
    every_kind_of_image_is_recovered_and_survives_the_collector,
    labels_that_were_missing_are_written,
    version_and_settings_of_containerd_are_read,
    folders_below_the_root_of_a_node_are_found,
    unmounted_folders_have_no_disk_figures,
    the_sandbox_image_is_read_from_containers,
    wrong_bytes_are_replaced,
    a_blob_without_its_file_is_fetched_again,
    a_blob_without_its_file_is_fetched_again_without_access_to_files,
    a_staged_blob_is_adopted_as_it_is,
    a_staged_blob_under_the_isolated_policy_is_sent,
    a_staged_blob_on_another_mount_is_sent,
    a_blob_collected_before_its_commit_is_linked_again,
    a_file_that_no_record_names_is_not_trusted,
    a_file_that_no_record_names_is_not_trusted_where_blobs_are_sent,
    a_full_disk_is_reported_and_its_space_is_freed,
    a_containerd_killed_before_the_commit_adopts_the_staged_blob_afterwards,
    a_commit_aborted_at_any_point_leaves_no_partial_record,
    abandoned_staging_files_are_removed,
    the_unpacker_keeps_the_contract,
    a_recovered_image_is_unpacked_before_its_record_is_written,
    an_abandoned_layer_is_removed,
    partial_snapshots_of_a_killed_process_are_removed,
    layers_are_unpacked_only_into_the_snapshotter_of_cri,
];

struct ContainerdSubject {
    config: Config,
    store: ContainerdStore,
}

/// Makes a store in a containerd namespace of its own.
fn fresh(config: Config) -> ContainerdSubject {
    static NEXT_NAMESPACE: AtomicUsize = AtomicUsize::new(0);
    let containerd_namespace = format!("test-{}", NEXT_NAMESPACE.fetch_add(1, Ordering::Relaxed));
    let config = Config { containerd_namespace, ..config };
    ContainerdSubject { store: ContainerdStore::new(config.clone()).unwrap(), config }
}

#[async_trait]
impl StoreUnderTest for ContainerdSubject {
    fn store(&self) -> Arc<dyn ContentStore> {
        Arc::new(self.store.clone())
    }

    /// The synchronous deletion of a lease returns after containerd has collected.
    async fn collect(&self) {
        let pin = self.store.pin(HOUR).await.unwrap();
        self.store.release_and_collect(pin).await.unwrap();
    }

    /// [`ContainerdStore::run`] does not run here, so no sweep aborts the dropped writer's ingest.
    async fn restart(&mut self, unfinished: UnfinishedWrite) {
        drop(unfinished);
        self.store = ContainerdStore::new(self.config.clone()).unwrap();
    }
}

async fn the_store_keeps_the_contract(version: &str) {
    let daemon = Daemon::start(version).await;
    assert_contract(version, async || fresh(daemon.config(""))).await;
}

async fn the_store_keeps_the_contract_without_access_to_files(version: &str) {
    let daemon = Daemon::start(version).await;
    let absent_root = Some(PathBuf::from("/nothing/is/here"));
    assert_contract(version, async || fresh(Config { content_root: absent_root.clone(), ..daemon.config("") })).await;
}

/// Bytes that differ at every offset, so that bytes at a wrong offset fail the comparison.
pub(crate) fn content(seed: &str, size: usize) -> Bytes {
    let mut bytes: Vec<u8> =
        (0_u64..).flat_map(|n| *Digest::of(format!("{seed} {n}").as_bytes()).as_bytes()).take(size).collect();
    bytes.shrink_to_fit();
    bytes.into()
}

pub(crate) async fn write(store: &ContainerdStore, bytes: &Bytes, pin: &Pin, metadata: &BlobMetadata) -> Descriptor {
    let digest = write_blob(store, bytes.clone(), metadata, pin).await.unwrap();
    let media_type = "application/vnd.oci.image.manifest.v1+json".into();
    Descriptor { media_type, digest, size: bytes.len() as u64, platform: None, attestation: false }
}

async fn read(store: &ContainerdStore, digest: Digest) -> Vec<u8> {
    let mut reader = store.open(digest).await.unwrap();
    let mut bytes = Vec::new();
    loop {
        let read = reader.read_at(bytes.len() as u64, 1 << 20).await.unwrap();
        if read.is_empty() {
            return bytes;
        }
        bytes.extend_from_slice(&read);
    }
}

async fn labels_of_other_clients_survive(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("labels");
    let pin = store.pin(HOUR).await.unwrap();
    let repository = |path: &str| Some(Repository { registry: "10.0.0.1:5000".into(), path: path.into() });
    let layer = |name: &str| Child { digest: Digest::of(name.as_bytes()), kind: ChildKind::Layer };
    let first = BlobMetadata { source: repository("team/app"), children: vec![layer("a")] };
    let blob = write(&store, &content("labeled", 100), &pin, &first).await;
    let foreign_label = format!("containerd.io/gc.ref.content.l.1={}", Digest::of(b"theirs"));
    let by_digest = blob.digest.to_string();
    daemon.ctr("labels", &["content", "label", &by_digest, &foreign_label, "made.by=another-client"]);

    let more = BlobMetadata { source: repository("other/app"), children: vec![layer("a"), layer("b")] };
    store.add_metadata(blob.digest, &more).await.unwrap();
    let listed = daemon.ctr("labels", &["content", "ls"]);
    for label in [
        format!("containerd.io/gc.ref.content.l.0={}", Digest::of(b"a")),
        foreign_label,
        format!("containerd.io/gc.ref.content.l.2={}", Digest::of(b"b")),
        "containerd.io/distribution.source.10.0.0.1:5000=other/app,team/app".into(),
        "made.by=another-client".into(),
    ] {
        assert!(listed.contains(&label), "{label} is not in {listed}");
    }
}

/// Writes an image with a layer that does not unpack. For a new record the CRI plugin reads only
/// the manifest and the configuration.
async fn image(store: &ContainerdStore, pin: &Pin, architecture: &str) -> (Descriptor, Digest) {
    let layer = write(store, &content(architecture, 1000), pin, &BlobMetadata::default()).await;
    let config = format!(
        r#"{{"architecture":"{architecture}","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        layer.digest
    );
    let config = write(store, &config.into(), pin, &BlobMetadata::default()).await;
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
        "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},
        "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{}","size":{}}}]}}"#,
        config.digest, config.size, layer.digest, layer.size
    );
    let children = vec![
        Child { digest: config.digest, kind: ChildKind::Config },
        Child { digest: layer.digest, kind: ChildKind::Layer },
    ];
    (write(store, &manifest.into(), pin, &BlobMetadata { source: None, children }).await, config.digest)
}

async fn a_record_is_written_when_cri_has_noticed_it(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("k8s.io");
    let pin = store.pin(HOUR).await.unwrap();
    let name = "example.org/team/app:1";
    let record_line = || {
        let listed = daemon.ctr("k8s.io", &["images", "ls"]);
        let line = listed.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        line.unwrap_or_else(|| panic!("{name} is not in {listed}"))
    };
    // The first round creates the record, and the second moves the record to another target.
    for version in ["amd64", "arm64"] {
        let (target, config) = image(&store, &pin, version).await;
        store.put_image(&ImageRecord { name: name.into(), target: target.clone() }).await.unwrap();
        let line = record_line();
        assert!(line.contains("io.cri-containerd.image=managed"), "{line}");
        assert!(line.contains(&target.digest.to_string()), "{line}");
        let names: Vec<_> = store.images().await.unwrap().into_iter().map(|record| record.name).collect();
        assert!(names.contains(&config.to_string()), "the CRI plugin records the image's ID: {names:?}");
    }
}
