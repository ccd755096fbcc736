//! The cgroup of containerd, and whether another program shares it.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::below;

/// Mounts of cgroup v2: alone, and beside v1 in systemd's hybrid layout.
const TREES: [&str; 2] = ["sys/fs/cgroup", "sys/fs/cgroup/unified"];

/// Longest file of `/proc`: PATH_MAX for each of the 13 controllers of cgroup v1.
const MAX_FILE: u64 = 64 * 1024;

/// Most processes of a node: the kernel's default `pid_max` for 32 CPUs.
const MAX_PROCESSES: usize = 32_768;

/// ID of containerd's cgroup v2. `root` is `/` or the mount of the node's root file system.
///
/// # Errors
/// The reason why the cgroup does not identify containerd's sockets.
pub(super) fn containerd_cgroup(root: &Path, pid: u64) -> Result<u64, String> {
    let name = read(root, &format!("proc/{pid}/comm")).unwrap_or_default();
    if !is_containerd(&name) {
        return Err(format!("process {pid} of the node is not containerd (its name is {:?})", name.trim()));
    }
    let file = read(root, &format!("proc/{pid}/cgroup")).unwrap_or_default();
    let path = path_in_v2(&file).ok_or("the node has no cgroup v2")?;
    if path.is_empty() {
        return Err("containerd runs in the root cgroup, like any other program".into());
    }
    let folders = TREES.iter().filter_map(|tree| fs::metadata(below(root, tree).join(path)).ok());
    // The inode number of a cgroup's folder is the cgroup's ID on 64-bit kernels.
    let id = folders.map(|folder| folder.ino()).next().ok_or(format!("no cgroup {path:?} can be seen"))?;
    match other_program(root, &file) {
        None => Ok(id),
        Some(other) => Err(format!("containerd shares the cgroup {path:?} with {other:?}")),
    }
}

/// Path of a process in cgroup v2, without the leading slash. A process in its own cgroup namespace
/// sees other paths relative to that namespace: `/../../system.slice/...`.
fn path_in_v2(file: &str) -> Option<&str> {
    let mut path = file.lines().find_map(|line| line.strip_prefix("0::/"))?;
    while let Some(rest) = path.strip_prefix("..") {
        path = rest.trim_start_matches('/');
    }
    Some(path)
}

/// Name of another program in the cgroup, besides containerd and its shims. k3s and RKE2 run all of
/// their programs in the cgroup of one service.
fn other_program(root: &Path, cgroup: &str) -> Option<String> {
    let own = path_in_v2(cgroup);
    let processes = fs::read_dir(below(root, "proc")).ok()?.flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
    ids.take(MAX_PROCESSES).find_map(|id| {
        let file = read(root, &format!("proc/{id}/cgroup"))?;
        if path_in_v2(&file) != own {
            return None;
        }
        let name = read(root, &format!("proc/{id}/comm"))?;
        (!is_containerd(&name)).then(|| name.trim().to_owned())
    })
}

/// containerd, the shims, and the runtime that starts a container. The kernel cuts names after 15
/// bytes.
fn is_containerd(name: &str) -> bool {
    let name = name.trim();
    name.starts_with("containerd") || name.starts_with("runc")
}

/// Reads a file below `root`; `None` for an unreadable file, as after the end of a process.
fn read(root: &Path, path: &str) -> Option<String> {
    let mut text = String::new();
    fs::File::open(below(root, path)).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node's `/proc` and `/sys/fs/cgroup`: (process, name, cgroup).
    fn node(tree: &str, processes: &[(u64, &str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (id, name, cgroup) in processes {
            let folder = root.path().join(format!("proc/{id}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("comm"), format!("{name}\n")).unwrap();
            fs::write(folder.join("cgroup"), format!("8:pids:/x\n0::{cgroup}\n")).unwrap();
            let path = cgroup.trim_start_matches("/..");
            fs::create_dir_all(root.path().join(format!("{tree}/{path}"))).unwrap();
        }
        root
    }

    #[test]
    fn containerd_and_its_shims_share_a_cgroup_that_is_found_in_either_layout() {
        for tree in TREES {
            let cgroup = "/system.slice/containerd.service";
            let processes = [(7, "containerd", cgroup), (8, "containerd-shim", cgroup), (9, "kubelet", "/k.service")];
            let root = node(tree, &processes);
            let expected = fs::metadata(root.path().join(tree).join(&cgroup[1..])).unwrap().ino();
            assert_eq!(containerd_cgroup(root.path(), 7), Ok(expected));
        }
    }

    #[test]
    fn a_cgroup_namespace_of_the_agents_own_does_not_hide_the_cgroup() {
        let cgroup = "/../../system.slice/containerd.service";
        let root = node(TREES[0], &[(7, "containerd", cgroup)]);
        let folder = root.path().join("sys/fs/cgroup/system.slice/containerd.service");
        fs::create_dir_all(&folder).unwrap();
        assert_eq!(containerd_cgroup(root.path(), 7), Ok(fs::metadata(folder).unwrap().ino()));
    }

    #[test]
    fn a_shared_or_root_cgroup_is_rejected_with_the_reason() {
        let rejection =
            |processes: &[(u64, &str, &str)]| containerd_cgroup(node(TREES[0], processes).path(), 7).unwrap_err();
        assert!(rejection(&[(7, "containerd", "/")]).contains("root cgroup"));
        let shared = rejection(&[(7, "containerd", "/k3s.service"), (8, "k3s-server", "/k3s.service")]);
        assert!(shared.contains("k3s-server"), "{shared}");
        assert!(rejection(&[(7, "nginx", "/nginx.service")]).contains("nginx"));
        assert!(rejection(&[]).contains("not containerd"));
    }
}
