//! Paths of the node's root file system, which is mounted at a folder here.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

/// Most symbolic links in one path, as in Linux (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Resolves `path` below `root`. Symbolic links count from `root`, as for programs with that root:
/// a node's `/var/lib/containerd` may be a link to `/data/containerd`. Missing parts stay as they
/// are.
pub fn below_root(root: &Path, path: &Path) -> PathBuf {
    let mut parts = parts_of(path);
    // Relative to `root`.
    let mut found = PathBuf::new();
    let mut links = 0;
    while let Some(part) = parts.pop_front() {
        if part == ".." {
            found.pop();
            continue;
        }
        let target = std::fs::read_link(root.join(&found).join(&part));
        match target {
            Ok(target) if links < MAX_LINKS => {
                links += 1;
                if target.is_absolute() {
                    found = PathBuf::new();
                }
                let rest = std::mem::replace(&mut parts, parts_of(&target));
                parts.extend(rest);
            }
            Ok(_) | Err(_) => found.push(part),
        }
    }
    root.join(found)
}

fn parts_of(path: &Path) -> VecDeque<OsString> {
    let part = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn symbolic_links_count_from_the_other_root_and_never_leave_it() {
        let node = tempfile::tempdir().unwrap();
        let root = node.path();
        fs::create_dir_all(root.join("data/containerd/blobs")).unwrap();
        fs::create_dir_all(root.join("var/lib")).unwrap();
        fs::create_dir_all(root.join("run/containerd")).unwrap();
        symlink("/data/containerd", root.join("var/lib/containerd")).unwrap();
        symlink("../run", root.join("var/run")).unwrap();
        symlink("../../../../../../data", root.join("var/out")).unwrap();
        symlink("loop", root.join("var/loop")).unwrap();
        for (path, found) in [
            ("/var/lib/containerd/blobs", "data/containerd/blobs"),
            ("/var/run/containerd/containerd.sock", "run/containerd/containerd.sock"),
            ("/var/out/containerd", "data/containerd"),
            ("/../../var/lib", "var/lib"),
            ("/absent/folder", "absent/folder"),
            ("/var/loop", "var/loop"),
        ] {
            assert_eq!(below_root(root, Path::new(path)), root.join(found), "{path}");
        }
        assert_eq!(below_root(Path::new("/"), Path::new("/proc/./version")), Path::new("/proc/version"));
    }
}
