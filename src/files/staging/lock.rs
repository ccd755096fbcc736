//! Taking a name for a staging file: what an earlier process left there, or a new one.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::unistd::geteuid;

use super::{SEALED, UNSEALED, is_same_file};

/// Tries to take a name that others take or remove in the meantime.
const TRIES: usize = 8;

/// Two handles of one file that has one name and is ours alone: for reading, locked, and for writing.
pub(super) fn open_or_create(path: &Path, size: u64) -> io::Result<(File, File)> {
    for _ in 0..TRIES {
        let reading = match open(path, OpenOptions::new().read(true)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create(path, size)?;
                continue;
            }
            // A link, or something else that is no file of ours.
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
        // Whoever had it before the lock was ours may have removed its name, or given it to another file.
        let found = reading.metadata()?;
        if !fs::symlink_metadata(path).is_ok_and(|named| is_same_file(&named, &found)) {
            continue;
        }
        if !is_resumable(&found, size) {
            fs::remove_file(path)?;
            continue;
        }
        // It was sealed and is not proved any more. Its owner may open it all the same only when its mode says so.
        reading.set_permissions(Permissions::from_mode(UNSEALED))?;
        let writing = open(path, OpenOptions::new().write(true))?;
        if is_same_file(&writing.metadata()?, &found) {
            return Ok((reading, writing));
        }
    }
    Err(io::Error::other("others take it and remove it again and again"))
}

/// Neither through a link, nor waiting for whoever writes into a pipe.
pub(super) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits()).open(path)
}

fn create(path: &Path, size: u64) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(UNSEALED).open(path) {
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        Ok(file) => file.set_len(size),
    }
}

/// A file with a second name may be somebody's blob, and is never written to.
fn is_resumable(found: &fs::Metadata, size: u64) -> bool {
    let mode = found.mode() & 0o7777;
    let ours = found.is_file() && found.uid() == geteuid().as_raw() && (mode == UNSEALED || mode == SEALED);
    ours && found.nlink() == 1 && found.len() == size
}
