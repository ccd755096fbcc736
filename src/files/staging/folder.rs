//! The folder of staging files.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use nix::unistd::{AccessFlags, access};

use super::lock::open;

/// Creates the folder with mode 0700, unless it exists, and verifies that the folder is writable.
/// Blocks.
///
/// # Errors
/// Errors of the file system.
pub fn create_staging_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        // An existing folder may have been mounted read-only since its creation.
        _ => Ok(access(path, AccessFlags::W_OK | AccessFlags::X_OK)?),
    }
}

/// Syncs the names in a folder to disk. Blocks.
///
/// # Errors
/// Errors of the file system.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A file in the folder: of an earlier process, or one that is being written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// File name.
    pub name: OsString,
    /// Time since the last write.
    pub age: Duration,
    /// Number of hard links.
    pub links: u64,
}

/// Every file in the folder; empty for a missing folder. Blocks.
///
/// # Errors
/// Errors of the file system.
pub fn leftovers(folder: &Path) -> io::Result<Vec<Leftover>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        // A file that was removed meanwhile is no leftover.
        let Ok(metadata) = entry.metadata() else { continue };
        // A clock that was set back makes the file young, so the file stays longer.
        let age = metadata.modified()?.elapsed().unwrap_or_default();
        found.push(Leftover { name: entry.file_name(), age, links: metadata.nlink() });
    }
    Ok(found)
}

/// Whether a handle has the lock of this staging file, in this process or another. Blocks.
///
/// # Errors
/// Errors of the file system.
pub fn is_locked(path: &Path) -> io::Result<bool> {
    match open(path, OpenOptions::new().read(true))?.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}
