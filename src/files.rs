//! Blobs in files, for image layouts and for containerd's content folder, and small private files.

mod cached_read;
mod host_path;
mod slow_disk;
mod staging;
mod versioned_file;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use tokio::task::spawn_blocking;

use crate::decide::disk_floor::FileSystem;
use crate::oci::Digest;
use crate::ports::{BlobReader, StoreError};
pub use host_path::below_root;
pub use staging::{Leftover, StagingFile, create_staging_folder, is_locked, leftovers, sync_folder};
pub use versioned_file::read_versioned;

/// Most bytes of one read, whatever the caller's limit: the largest piece of a transfer. Bounds a
/// buffer.
const MAX_READ: usize = 8 << 20;

/// Path of a blob in a content store that is a folder: OCI image layout specification, "Blobs".
/// containerd uses the same path.
pub fn blob_path(root: &Path, digest: Digest) -> PathBuf {
    root.join("blobs/sha256").join(digest.hex())
}

/// Figures of the file system of `folder`.
///
/// # Errors
/// Errors of the file system.
pub fn file_system(folder: &Path) -> io::Result<FileSystem> {
    let device = std::fs::metadata(folder)?.dev();
    Ok(FileSystem { device: Some(device), ..measure(folder)? })
}

/// Figures of the file system beneath the overlay that is mounted at `folder`; `None` for another
/// kind of mount. An overlay's figures are those of the file system that it writes to (Linux,
/// `ovl_statfs`).
///
/// # Errors
/// Errors of the file system.
pub fn file_system_below_overlay(folder: &Path) -> io::Result<Option<FileSystem>> {
    let is_overlay = nix::sys::statfs::statfs(folder)?.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC;
    is_overlay.then(|| measure(folder)).transpose()
}

fn measure(folder: &Path) -> io::Result<FileSystem> {
    let stat = nix::sys::statvfs::statvfs(folder)?;
    let block_size = stat.fragment_size();
    Ok(FileSystem { device: None, free: stat.blocks_available() * block_size, total: stat.blocks() * block_size })
}

/// Reads a file of at most `most` bytes that only this process's user can read or write.
///
/// # Errors
/// Errors of the file system, and a file of a wrong type, owner, mode or size.
pub fn read_private(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    // Follows no link, and does not wait for the writer of a pipe.
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    let rejection = match (metadata.is_file(), metadata.uid() == geteuid().as_raw(), metadata.mode() & 0o077) {
        (false, ..) => Some("the path is no regular file".to_owned()),
        (_, false, _) => Some(format!("the file belongs to user {}", metadata.uid())),
        (.., 0) => (metadata.len() > limit).then(|| format!("the file has more than {limit} bytes")),
        _ => Some(format!("the file has mode {:o} instead of 600", metadata.mode() & 0o777)),
    };
    if let Some(rejection) = rejection {
        return Err(io::Error::other(rejection));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a file with mode 0600 atomically: the content is on disk before the file has its name.
///
/// # Errors
/// Errors of the file system.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("the path has no parent folder"))?;
    let staged = path.with_extension("new");
    // A killed process may have left the file.
    let _ = std::fs::remove_file(&staged);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&staged, path)?;
    File::open(folder)?.sync_all()
}

/// Reads a blob from its file, also after the file is removed.
pub struct FileReader {
    digest: Digest,
    file: Arc<File>,
    size: u64,
}

impl FileReader {
    /// Opens the blob's file under `root`.
    ///
    /// # Errors
    /// Errors of the file system; [`io::ErrorKind::NotFound`] for a missing file.
    pub async fn open(root: &Path, digest: Digest) -> io::Result<Self> {
        let path = blob_path(root, digest);
        let opened = spawn_blocking(move || {
            let file = File::open(path)?;
            let size = file.metadata()?.len();
            Ok(Self { digest, file: Arc::new(file), size })
        });
        opened.await.unwrap_or_else(|panicked| Err(io::Error::other(panicked)))
    }
}

#[async_trait]
impl BlobReader for FileReader {
    fn size(&self) -> u64 {
        self.size
    }

    async fn read_at(&mut self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        let read = read_within(&self.file, self.size, offset, limit).await;
        read.map_err(|error| StoreError::Other(format!("reading the file of {} at {offset}: {error}", self.digest)))
    }
}

/// Reads of a file of `size` bytes, at most [`MAX_READ`] at once.
async fn read_within(file: &Arc<File>, size: u64, offset: u64, limit: usize) -> io::Result<Bytes> {
    let rest = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
    let length = limit.min(rest).min(MAX_READ);
    if length == 0 { Ok(Bytes::new()) } else { cached_read::read_exact_at(file, offset, length).await }
}
