//! Storage of the content stores.

use std::fmt;
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use crate::report::{BenchError, note};

/// A folder on one kind of storage. Removed when dropped.
pub(crate) struct Storage {
    folder: TempDir,
    in_memory: bool,
}

/// Gives this process a mount namespace of its own. Later mounts are invisible outside, and end
/// with this process and its children.
pub(crate) fn unshare_mounts() -> Result<(), BenchError> {
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(|errno| format!("cannot make a mount namespace for the images: {errno} (run as root)"))?;
    let nothing: Option<&str> = None;
    Ok(mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?)
}

impl Storage {
    /// A tmpfs with space for this number of bytes, so that no disk is measured.
    pub(crate) fn memory(needed: u64) -> Result<Self, BenchError> {
        let folder = tempfile::tempdir()?;
        let size = format!("size={needed}");
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))?;
        let storage = Self { folder, in_memory: true };
        let available = std::fs::read_to_string("/proc/meminfo")?;
        let available = available.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.strip_suffix("kB"));
        let available = available.ok_or("no MemAvailable in /proc/meminfo")?.trim().parse::<u64>()? << 10;
        ensure_free("memory", available, needed)?;
        Ok(storage)
    }

    /// A folder on the disk of the build folder, with space for this number of bytes.
    pub(crate) fn disk(needed: u64) -> Result<Self, BenchError> {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let room = nix::sys::statvfs::statvfs(folder.path())?;
        ensure_free("disk", room.blocks_available() * room.fragment_size(), needed)?;
        Ok(Self { folder, in_memory: false })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until the disk has written earlier data, so that no run pays for another.
    pub(crate) fn settle(&self) -> Result<(), BenchError> {
        if !self.in_memory && !Command::new("sync").arg("--file-system").arg(self.path()).status()?.success() {
            return Err("sync failed".into());
        }
        Ok(())
    }
}

fn ensure_free(what: &str, available: u64, needed: u64) -> Result<(), BenchError> {
    if available < needed {
        return Err(format!("{} MiB of {what} are free, and {} MiB are needed", available >> 20, needed >> 20).into());
    }
    Ok(())
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.in_memory { "stores in memory (tmpfs)" } else { "stores on disk" })
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        // A process that is still ending would keep the mount busy, so the unmount is lazy.
        if self.in_memory
            && let Err(errno) = umount2(self.folder.path(), MntFlags::MNT_DETACH)
        {
            note(&format!("{} stays mounted: {errno}", self.folder.path().display()));
        }
    }
}
