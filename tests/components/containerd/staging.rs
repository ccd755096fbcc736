//! Blobs staged in pieces: linked and adopted where containerd accepts files, sent where containerd
//! does not.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lighterman::containerd::{Config, ContainerdStore, IngestMode};
use lighterman::oci::{BlobProof, Digest, Hasher};
use lighterman::ports::{BlobMetadata, Blobs, Pin, Pins, STAGED_BLOB_LIFE, StagedBlob, StoreError};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::daemon::Daemon;
use super::{HOUR, WAIT_DEADLINE, content, read, write};

pub(crate) fn proof(bytes: &Bytes) -> BlobProof {
    let mut hasher = Hasher::default();
    hasher.update(bytes);
    hasher.verify(Digest::of(bytes), bytes.len() as u64).unwrap()
}

/// Writes the second half, then the first.
pub(crate) async fn write_out_of_order(staged: &dyn StagedBlob, bytes: &Bytes) {
    let middle = bytes.len() / 2;
    staged.write_at(middle as u64, &[bytes.slice(middle..)]).await.unwrap();
    staged.write_at(0, &[bytes.slice(..middle)]).await.unwrap();
}

/// Files in the agent's staging folder in the content store.
pub(crate) fn staged_files(daemon: &Daemon) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(daemon.content_root().join("lighterman-staging")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Number of a file's hard links; 1 when the file has just been removed.
pub(crate) fn links(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(1, |file| file.nlink())
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// Stages and commits a blob. Returns the inode of the staging file, if the file was in the content
/// store.
async fn stage(store: &ContainerdStore, daemon: &Daemon, bytes: &Bytes, pin: &Pin) -> Option<u64> {
    let digest = Digest::of(bytes);
    let staged = store.stage(digest, bytes.len() as u64, pin).await.unwrap();
    write_out_of_order(&*staged, bytes).await;
    let before = staged_files(daemon).iter().find(|path| path.ends_with(digest.hex())).map(|path| inode(path));
    staged.commit(proof(bytes), &BlobMetadata::default()).await.unwrap();
    before
}

/// containerd creates the blob folder with the first blob. The store is inspected before that, as
/// by an agent that starts on an empty node.
async fn with_content(daemon: &Daemon, containerd_namespace: &str) -> (ContainerdStore, Pin) {
    let store = daemon.store(containerd_namespace);
    assert_eq!(ingest(&store).await, None, "the ingest mode is unknown before the first blob");
    let pin = store.pin(HOUR).await.unwrap();
    write(&store, &content("makes the folder", 10), &pin, &BlobMetadata::default()).await;
    (store, pin)
}

async fn ingest(store: &ContainerdStore) -> Option<IngestMode> {
    store.inspect(Path::new("/nothing/is/here")).await.unwrap().ingest
}

/// Counts the handles of this process that can write to the file with this inode.
fn writable_handles(file: u64) -> usize {
    let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let is_writable = |number: &std::ffi::OsStr| {
        let info = fs::read_to_string(Path::new("/proc/self/fdinfo").join(number)).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0").trim();
        u32::from_str_radix(flags, 8).unwrap() & 0o3 != 0
    };
    let of_file = entries.filter(|entry| fs::metadata(entry.path()).is_ok_and(|found| found.ino() == file));
    of_file.filter(|entry| is_writable(&entry.file_name())).count()
}

pub(crate) async fn a_staged_blob_is_adopted_as_it_is(version: &str) {
    let daemon = Daemon::start(version).await;
    let (store, pin) = with_content(&daemon, "adopted").await;
    let bytes = content("adopted", (3 << 20) + 7);
    let digest = Digest::of(&bytes);
    let staged = store.stage(digest, bytes.len() as u64, &pin).await.unwrap();
    write_out_of_order(&*staged, &bytes).await;
    let file = inode(&daemon.content_root().join("lighterman-staging").join(digest.hex()));
    assert_eq!(writable_handles(file), 1, "the staging file is open for writing");
    staged.commit(proof(&bytes), &BlobMetadata::default()).await.unwrap();

    assert_eq!(inode(&daemon.file_of(digest)), file, "the blob is the staging file itself");
    assert_eq!(ingest(&store).await, Some(IngestMode::Linked));
    assert_eq!(writable_handles(file), 0);
    let found = fs::metadata(daemon.file_of(digest)).unwrap();
    assert_eq!((found.mode() & 0o777, found.nlink()), (0o444, 1));
    assert_eq!(staged_files(&daemon), Vec::<PathBuf>::new());
    assert!(!daemon.ctr("adopted", &["content", "active"]).contains("lighterman-"));
    staged.write_at(0, &[Bytes::from_static(b"wrong")]).await.unwrap_err();
    drop(staged);

    // The staging folder disturbs neither the collector nor the list of blobs.
    fs::write(daemon.content_root().join("lighterman-staging/stray"), "x").unwrap();
    collect(&store).await;
    assert_eq!(store.blobs().await.unwrap().len(), 2);
    assert_eq!(read(&store, digest).await, bytes);
    store.release(pin).await.unwrap();
    collect(&store).await;
    assert!(!daemon.file_of(digest).exists(), "the collector removes the released blob");
    assert_eq!(daemon.ctr("adopted", &["content", "ls", "-q"]), "");
}

/// Removes the record of a blob and collects. Without such a removal the collector does not look at
/// the files.
async fn collect(store: &ContainerdStore) {
    let pin = store.pin(HOUR).await.unwrap();
    write(store, &content("to be collected", 100), &pin, &BlobMetadata::default()).await;
    store.release_and_collect(pin).await.unwrap();
}

/// Asserts that a staged blob is sent, and that neither a staging file nor a stray file is left.
async fn assert_sent(daemon: &Daemon, store: &ContainerdStore, pin: &Pin, expected_reason: &str) {
    let bytes = content("sent", (3 << 20) + 7);
    let digest = Digest::of(&bytes);
    let before = stage(store, daemon, &bytes, pin).await.unwrap();
    assert_ne!(inode(&daemon.file_of(digest)), before, "the blob is another file than the staging file");
    assert_eq!(read(store, digest).await, bytes);
    let Some(IngestMode::Copied(reason)) = ingest(store).await else { panic!("{:?}", ingest(store).await) };
    assert!(reason.contains(expected_reason), "{reason}");
    assert_eq!(staged_files(daemon), Vec::<PathBuf>::new());
    let names = fs::read_dir(daemon.content_root().join("blobs/sha256")).unwrap().count();
    assert_eq!(names, store.blobs().await.unwrap().len(), "every blob file has a record");
}

pub(crate) async fn a_staged_blob_under_the_isolated_policy_is_sent(version: &str) {
    let isolated = "[plugins.\"io.containerd.metadata.v1.bolt\"]\n  content_sharing_policy = \"isolated\"\n";
    let daemon = Daemon::start_in(version, tempfile::tempdir().unwrap(), isolated).await;
    let (store, pin) = with_content(&daemon, "isolated").await;
    assert_sent(&daemon, &store, &pin, "content_sharing_policy").await;
}

/// A file system in memory. Drop unmounts the file system.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(folder: &Path, options: &str) -> Self {
        fs::create_dir_all(folder).unwrap();
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
        Self(folder.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

pub(crate) async fn a_staged_blob_on_another_mount_is_sent(version: &str) {
    let daemon = Daemon::start(version).await;
    let (store, pin) = with_content(&daemon, "mounted").await;
    let _mounted = Tmpfs::mount(&daemon.content_root().join("lighterman-staging"), "size=16m");
    assert_sent(&daemon, &store, &pin, "cross-device").await;
}

pub(crate) async fn a_blob_collected_before_its_commit_is_linked_again(version: &str) {
    let daemon = Daemon::start(version).await;
    let (store, pin) = with_content(&daemon, "collected").await;
    let bytes = content("collected", 1 << 20);
    let digest = Digest::of(&bytes);
    let staged = store.stage(digest, bytes.len() as u64, &pin).await.unwrap();
    write_out_of_order(&*staged, &bytes).await;
    let file = daemon.content_root().join("lighterman-staging").join(digest.hex());
    fs::hard_link(&file, daemon.file_of(digest)).unwrap();
    collect(&store).await;
    assert!(!daemon.file_of(digest).exists(), "the collector removes a blob file without a record");
    let before = inode(&file);
    staged.commit(proof(&bytes), &BlobMetadata::default()).await.unwrap();
    assert_eq!((inode(&daemon.file_of(digest)), read(&store, digest).await), (before, bytes.to_vec()));

    // The same while collections run all the time.
    let stop = CancellationToken::new();
    let collecting = tokio::spawn({
        let (store, stop) = (store.clone(), stop.clone());
        async move {
            while !stop.is_cancelled() {
                collect(&store).await;
            }
        }
    });
    for number in 0..30 {
        let bytes = content(&format!("during collection {number}"), 100_000);
        stage(&store, &daemon, &bytes, &pin).await;
        assert_eq!(read(&store, Digest::of(&bytes)).await, bytes, "the {number}th");
    }
    stop.cancel();
    collecting.await.unwrap();
}

pub(crate) async fn a_file_that_no_record_names_is_not_trusted(version: &str) {
    let daemon = Daemon::start(version).await;
    let (store, pin) = with_content(&daemon, "found").await;
    let (wrong, right) = (content("expected", 300_000), content("right already", 300_000));
    fs::write(daemon.file_of(Digest::of(&wrong)), content("something else", 300_000)).unwrap();
    fs::write(daemon.file_of(Digest::of(&right)), &right).unwrap();
    let inode_before = inode(&daemon.file_of(Digest::of(&right)));
    for bytes in [&wrong, &right] {
        stage(&store, &daemon, bytes, &pin).await;
        assert_eq!(read(&store, Digest::of(bytes)).await, *bytes);
    }
    assert_eq!(inode(&daemon.file_of(Digest::of(&right))), inode_before, "a file with the right bytes stays");
    assert_eq!(staged_files(&daemon), Vec::<PathBuf>::new());
}

pub(crate) async fn a_file_that_no_record_names_is_not_trusted_where_blobs_are_sent(version: &str) {
    let isolated = "[plugins.\"io.containerd.metadata.v1.bolt\"]\n  content_sharing_policy = \"isolated\"\n";
    for settings in [isolated, ""] {
        for has_file_access in [true, false] {
            let daemon = Daemon::start_in(version, tempfile::tempdir().unwrap(), settings).await;
            let (store_with_files, pin) = with_content(&daemon, "sent").await;
            let content_root = Some(PathBuf::from("/nothing/is/here"));
            let store_without_files = ContainerdStore::new(Config { content_root, ..daemon.config("sent") }).unwrap();
            let store = if has_file_access { &store_with_files } else { &store_without_files };
            let what = format!("policy {settings:?}, files seen: {has_file_access}");
            let (same_size, other_size) = (content("as long", 3_000_000), content("of another size", 2_000_000));
            fs::write(daemon.file_of(Digest::of(&same_size)), content("something else", 3_000_000)).unwrap();
            fs::write(daemon.file_of(Digest::of(&other_size)), "short").unwrap();
            for bytes in [&same_size, &other_size] {
                let digest = Digest::of(bytes);
                let staged = store.stage(digest, bytes.len() as u64, &pin).await.unwrap();
                write_out_of_order(&*staged, bytes).await;
                staged.commit(proof(bytes), &BlobMetadata::default()).await.unwrap();
                assert_eq!(read(store, digest).await, *bytes, "{what}");
            }
            let direct = content("written directly", 300_000);
            fs::write(daemon.file_of(Digest::of(&direct)), content("something else", 300_000)).unwrap();
            write(store, &direct, &pin, &BlobMetadata::default()).await;
            assert_eq!(read(store, Digest::of(&direct)).await, direct, "{what}");
        }
    }
}

pub(crate) async fn a_full_disk_is_reported_and_its_space_is_freed(version: &str) {
    let folder = tempfile::tempdir().unwrap();
    let _small = Tmpfs::mount(folder.path(), "size=48m");
    let daemon = Daemon::start_in(version, folder, "").await;
    let (store, pin) = with_content(&daemon, "full").await;
    let bytes = content("too large", 4 << 20);
    let digest = Digest::of(b"never whole");
    let staged = store.stage(digest, 1 << 30, &pin).await.unwrap();
    let mut outcome = Ok(());
    for number in 0..32 {
        outcome = staged.write_at(number * (8 << 20), std::slice::from_ref(&bytes)).await;
        if outcome.is_err() {
            break;
        }
    }
    assert!(matches!(&outcome, Err(StoreError::Full(full)) if *full == digest), "{outcome:?}");
    staged.abandon().await;
    drop(staged);
    await_free_space(daemon.folder(), 2 * bytes.len() as u64).await;
    stage(&store, &daemon, &bytes, &pin).await;
    assert_eq!(read(&store, Digest::of(&bytes)).await, bytes);
}

/// Waits until the disk has this many bytes free. Other tests start processes: between `fork` and
/// `exec` a child has copies of this process's open files, and a removed file's space is freed with
/// the last copy.
async fn await_free_space(folder: &Path, bytes: u64) {
    let freed = async {
        loop {
            let disk = statvfs(folder).unwrap();
            if disk.blocks_available() * disk.fragment_size() >= bytes {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(WAIT_DEADLINE, freed).await.expect("the space of an abandoned staging file is freed");
}

pub(crate) async fn a_containerd_killed_before_the_commit_adopts_the_staged_blob_afterwards(version: &str) {
    let mut daemon = Daemon::start(version).await;
    let (store, pin) = with_content(&daemon, "killed").await;
    let bytes = content("staged during the kill", 2 << 20);
    let staged = store.stage(Digest::of(&bytes), bytes.len() as u64, &pin).await.unwrap();
    daemon.kill();
    write_out_of_order(&*staged, &bytes).await;
    let failed = staged.commit(proof(&bytes), &BlobMetadata::default()).await;
    assert!(matches!(failed, Err(StoreError::Unavailable(_))), "{failed:?}");
    staged.write_at(0, &[Bytes::from_static(b"wrong")]).await.unwrap_err();
    daemon.restart().await;
    staged.commit(proof(&bytes), &BlobMetadata::default()).await.unwrap();
    assert_eq!(read(&store, Digest::of(&bytes)).await, bytes);
}

pub(crate) async fn abandoned_staging_files_are_removed(version: &str) {
    let daemon = Daemon::start(version).await;
    let (store, pin) = with_content(&daemon, "given-up").await;
    let begin = async |name: &str, age: Duration| {
        let bytes = content(name, 5000);
        let staged = store.stage(Digest::of(&bytes), 5000, &pin).await.unwrap();
        staged.write_at(0, std::slice::from_ref(&bytes)).await.unwrap();
        let path = daemon.content_root().join("lighterman-staging").join(Digest::of(&bytes).hex());
        fs::File::options().write(true).open(&path).unwrap().set_modified(SystemTime::now() - age).unwrap();
        (staged, path)
    };
    let (brief, long) = (Duration::from_secs(60), STAGED_BLOB_LIFE + Duration::from_secs(60));
    let (open, open_path) = begin("held", long).await;
    let (young, young_path) = begin("young", STAGED_BLOB_LIFE - brief).await;
    let (old, old_path) = begin("old", long).await;
    drop((young, old));
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    // A second store stands for another process: only a file's lock shows that the file is in use.
    tokio::spawn(daemon.store("given-up").run(stop));
    let removed = async {
        while old_path.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(WAIT_DEADLINE, removed).await.expect("the sweep removes the abandoned staging file");
    assert!(open_path.exists() && young_path.exists());
    drop(open);
}
