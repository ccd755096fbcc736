//! The agent's view of a node whose root file system is mounted at a folder, as the chart does.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use lighterman::containerd::{Config, ContainerdStore, Ingest, Verifiers};
use lighterman::files::below_root;
use lighterman::ports::{ContentStore, Remembered};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::daemon::Daemon;
use super::{HOUR, content, write};

/// A node's root at a folder: the daemon's own folder is a disk, and a symbolic link of the node
/// leads to it.
struct Node {
    root: tempfile::TempDir,
    disk: PathBuf,
}

impl Node {
    fn of(daemon: &Daemon) -> Self {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("disk");
        fs::create_dir(&disk).unwrap();
        let (folder, bind) = (daemon.folder(), MsFlags::MS_BIND);
        mount(Some(folder), &disk, None::<&str>, bind, None::<&str>).unwrap();
        let named = root.path().join(folder.strip_prefix("/").unwrap());
        fs::create_dir_all(named.parent().unwrap()).unwrap();
        symlink("/disk", named).unwrap();
        Self { root, disk }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = umount2(&self.disk, MntFlags::MNT_DETACH);
    }
}

pub(crate) async fn below_the_node_s_root_its_folders_are_found(version: &str) {
    let daemon = Daemon::start(version).await;
    let node = Node::of(&daemon);
    let config = daemon.config("k8s.io");
    let socket = below_root(node.root.path(), &config.socket);
    let store = ContainerdStore::new(Config { socket, host_root: Some(node.root.path().into()), ..config }).unwrap();
    let pin = store.pin(HOUR).await.unwrap();
    write(&store, &content("below a root", 10), &pin, &Remembered::default()).await;
    let found = store.surroundings(Path::new("/opt/verifiers")).await.unwrap();
    let root = node.disk.join("root/io.containerd.content.v1.content");
    assert_eq!((found.content_root, found.ingest), (Some(root), Some(Ingest::Linked)));
    assert_eq!(found.verifiers, Verifiers::None, "what is absent there is absent on the node");

    let disks = store.disks().await.unwrap();
    let device = disks.content.expect("the content store's").device;
    assert!(device.is_some());
    assert_eq!(disks.snapshots.expect("the snapshotter's").device, device);
}

pub(crate) async fn folders_that_are_not_mounted_have_no_figures(version: &str) {
    let daemon = Daemon::start(version).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let socket = daemon.config("k8s.io").socket;
    let root = elsewhere.path().to_owned();
    let blind = ContainerdStore::new(Config { socket, host_root: Some(root), ..daemon.config("k8s.io") }).unwrap();
    assert_eq!(blind.disks().await.unwrap().content, None);
}
