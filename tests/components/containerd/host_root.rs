//! The agent's view of a node whose root file system is mounted at a folder, as in the chart.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use lighterman::containerd::{Config, ContainerdStore, ImageVerifiers, IngestMode};
use lighterman::files::below_root;
use lighterman::ports::{BlobMetadata, Pins, StoreDisks};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::daemon::Daemon;
use super::{HOUR, content, write};

/// A node's root at a folder. The daemon's folder is mounted as a disk, and a symbolic link of the
/// node leads to the disk.
struct RootedNode {
    root: tempfile::TempDir,
    disk: PathBuf,
}

impl RootedNode {
    fn of(daemon: &Daemon) -> Self {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("disk");
        fs::create_dir(&disk).unwrap();
        let (folder, bind) = (daemon.folder(), MsFlags::MS_BIND);
        mount(Some(folder), &disk, None::<&str>, bind, None::<&str>).unwrap();
        let host_path = root.path().join(folder.strip_prefix("/").unwrap());
        fs::create_dir_all(host_path.parent().unwrap()).unwrap();
        symlink("/disk", host_path).unwrap();
        Self { root, disk }
    }
}

impl Drop for RootedNode {
    fn drop(&mut self) {
        let _ = umount2(&self.disk, MntFlags::MNT_DETACH);
    }
}

pub(crate) async fn folders_below_the_root_of_a_node_are_found(version: &str) {
    let daemon = Daemon::start(version).await;
    let node = RootedNode::of(&daemon);
    let config = daemon.config("k8s.io");
    let socket = below_root(node.root.path(), &config.socket);
    let store = ContainerdStore::new(Config { socket, host_root: Some(node.root.path().into()), ..config }).unwrap();
    let pin = store.pin(HOUR).await.unwrap();
    write(&store, &content("below a root", 10), &pin, &BlobMetadata::default()).await;
    let found = store.inspect(Path::new("/opt/verifiers")).await.unwrap();
    let root = node.disk.join("root/io.containerd.content.v1.content");
    assert_eq!((found.content_root, found.ingest), (Some(root), Some(IngestMode::Linked)));
    assert_eq!(found.verifiers, ImageVerifiers::None, "a folder absent below the root is absent on the node");

    let disks = store.disks().await.unwrap();
    let device = disks.content.expect("the content store's").device;
    assert!(device.is_some());
    assert_eq!(disks.snapshots.expect("the snapshotter's").device, device);
}

pub(crate) async fn unmounted_folders_have_no_disk_figures(version: &str) {
    let daemon = Daemon::start(version).await;
    let empty_root = tempfile::tempdir().unwrap();
    let socket = daemon.config("k8s.io").socket;
    let root = empty_root.path().to_owned();
    let store = ContainerdStore::new(Config { socket, host_root: Some(root), ..daemon.config("k8s.io") }).unwrap();
    assert_eq!(store.disks().await.unwrap().content, None);
}
