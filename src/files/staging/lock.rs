//! Opens and locks a staging file: an earlier process's file or a new one.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::unistd::geteuid;

use super::{SEALED, UNSEALED, is_same_file};

/// Attempts, because other processes may create or remove the file meanwhile.
const TRIES: usize = 8;

/// Two handles of a file with one name and no other user: for reading, with the lock, and for
/// writing.
pub(super) fn open_or_create(path: &Path, size: u64) -> io::Result<(File, File)> {
    for _ in 0..TRIES {
        let reading = match open(path, OpenOptions::new().read(true)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create(path, size)?;
                continue;
            }
            // A symbolic link, which no agent creates.
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ELOOP as i32) => {
                fs::remove_file(path)?;
                continue;
            }
            reading => reading?,
        };
        reading.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::from(io::ErrorKind::WouldBlock),
            TryLockError::Error(error) => error,
        })?;
        // The earlier owner of the lock may have removed the name, or another file may have the
        // name.
        let metadata = reading.metadata()?;
        if !fs::symlink_metadata(path).is_ok_and(|named| is_same_file(&named, &metadata)) {
            continue;
        }
        if !is_resumable(&metadata, size) {
            fs::remove_file(path)?;
            continue;
        }
        // A sealed leftover is unverified again. Without mode 0600 not even the owner can open it
        // for writing.
        reading.set_permissions(Permissions::from_mode(UNSEALED))?;
        let writing = open(path, OpenOptions::new().write(true))?;
        if is_same_file(&writing.metadata()?, &metadata) {
            return Ok((reading, writing));
        }
    }
    Err(io::Error::other("other processes keep creating and removing the file"))
}

/// Follows no link, and does not wait for the writer of a pipe.
pub(super) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits()).open(path)
}

fn create(path: &Path, size: u64) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(UNSEALED).open(path) {
        // Another process created the file first.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        Ok(file) => file.set_len(size),
    }
}

/// A file with a second link may be a blob of a store, and is never written to.
fn is_resumable(metadata: &fs::Metadata, size: u64) -> bool {
    let mode = metadata.mode() & 0o7777;
    let is_ours = metadata.is_file() && metadata.uid() == geteuid().as_raw() && (mode == UNSEALED || mode == SEALED);
    is_ours && metadata.nlink() == 1 && metadata.len() == size
}
