//! The folder that staging files are in.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use nix::unistd::{AccessFlags, access};

use super::lock::open;

/// Makes sure that the folder is there and can be written to; nobody else gets into one that is made here. Blocks.
///
/// # Errors
/// What the file system says.
pub fn create_staging_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        // It may have been mounted read-only since it was made.
        _ => Ok(access(path, AccessFlags::W_OK | AccessFlags::X_OK)?),
    }
}

/// Makes sure that the names in a folder are on disk. Blocks.
///
/// # Errors
/// What the file system says.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A file that an earlier process left, or that is being written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Its name in the folder.
    pub name: OsString,
    /// How long ago it was last written to.
    pub age: Duration,
    /// How many names it has.
    pub links: u64,
}

/// Every file in the folder; none when the folder is not there. Blocks.
///
/// # Errors
/// What the file system says.
pub fn leftovers(folder: &Path) -> io::Result<Vec<Leftover>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        // One that has gone meanwhile is not left over.
        let Ok(metadata) = entry.metadata() else { continue };
        // A clock that was set back makes it young, and it stays for longer.
        let age = metadata.modified()?.elapsed().unwrap_or_default();
        found.push(Leftover { name: entry.file_name(), age, links: metadata.nlink() });
    }
    Ok(found)
}

/// Whether somebody has the staging file of this name, in this process or another. Blocks.
///
/// # Errors
/// What the file system says.
pub fn is_locked(path: &Path) -> io::Result<bool> {
    match open(path, OpenOptions::new().read(true))?.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}
