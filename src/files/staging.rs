//! A file whose parts arrive in any order, and which never changes after its seal.
//!
//! The file is sparse: unwritten parts take no space, and a later process sees them as holes.
//! Before the seal the file has one name and the mode 0600. After the seal no handle of this
//! process can write, whatever names the file gets. The stores decide about the file's name and
//! place.

mod extents;
mod folder;
mod lock;

use std::fs::{self, File, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::task::spawn_blocking;

use self::extents::{data_extents, write_all_at};
use self::lock::open_or_create;
use super::read_within;
use super::slow_disk::SlowDiskDetector;

pub use self::folder::{Leftover, create_staging_folder, is_locked, leftovers, sync_folder};

/// Modes before and after the seal. Before, only this process needs the file. After, every user may
/// read the file, as containerd's blobs (content/local/writer.go).
const UNSEALED: u32 = 0o600;
const SEALED: u32 = 0o444;

/// Written bytes after which a sync starts. The kernel starts only when a tenth of memory is dirty
/// (`dirty_background_ratio`). Most blobs are whole by then, and the seal would wait for every
/// byte. Measured with 1 GiB that arrives at 600 MB/s, on a disk of 1.2 GB/s: with early syncs the
/// seal took 30 ms instead of 370 ms, and the whole file 2.3 s instead of 2.9 s. Steps of 8 MiB
/// were no better.
const SYNC_STEP: u64 = 64 << 20;

/// A staging file, before and after its seal.
pub struct StagingFile {
    path: PathBuf,
    size: u64,
    resumed_ranges: Vec<Range<u64>>,
    /// Holds the lock against other handles. Reports failed writes at the final sync: the kernel
    /// reports a failure to each open handle once, whichever handle was synced.
    reader: Arc<File>,
    phase: RwLock<Phase>,
    slow_disk: SlowDiskDetector,
    unsynced: AtomicU64,
    syncing: AtomicBool,
}

enum Phase {
    Open(File),
    /// No handle of this process can write.
    Sealed,
    /// The file was removed, or the disk failed and the content is unknown.
    Broken,
}

impl StagingFile {
    /// Resumes the file of an earlier process if the file fits, or creates a new file. Blocks.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when another handle has the lock; errors of the file system.
    pub fn open(path: &Path, size: u64) -> io::Result<Self> {
        let (reading, writing) = open_or_create(path, size)?;
        let resumed_ranges = data_extents(&reading, size)?;
        Ok(Self {
            path: path.to_owned(),
            size,
            resumed_ranges,
            reader: Arc::new(reading),
            phase: RwLock::new(Phase::Open(writing)),
            slow_disk: SlowDiskDetector::default(),
            unsynced: AtomicU64::new(0),
            syncing: AtomicBool::new(false),
        })
    }

    /// Path of the file, until the owner moves the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes, which never changes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Ranges with data when the file was opened: sorted, not empty, not adjacent. The file system
    /// rounds to blocks. Without support for holes the whole file is one range.
    pub fn resumed_ranges(&self) -> Vec<Range<u64>> {
        self.resumed_ranges.clone()
    }

    /// Writes at an offset. Inline, because a batch of 256 KiB and more goes to memory faster than
    /// to another thread (measured). On a blocking thread while the disk makes writers wait.
    ///
    /// # Errors
    /// A write beyond the end or after the seal; errors of the file system.
    pub async fn write_at(self: &Arc<Self>, offset: u64, chunks: &[Bytes]) -> io::Result<()> {
        let written = chunks.iter().fold(0_u64, |sum, chunk| sum.saturating_add(chunk.len() as u64));
        if offset.saturating_add(written) > self.size {
            return Err(io::Error::other(format!("{written} bytes at {offset} of {}", self.size)));
        }
        if self.slow_disk.is_slow(Instant::now()) {
            let (file, chunks) = (Arc::clone(self), chunks.to_vec());
            blocking(move || file.write_inline(offset, &chunks)).await?;
        } else {
            self.write_inline(offset, chunks)?;
        }
        self.sync_early(written);
        Ok(())
    }

    fn write_inline(&self, offset: u64, chunks: &[Bytes]) -> io::Result<()> {
        let start = Instant::now();
        // No wait: only `seal` and `remove` take the write lock, and both close the file.
        let Some(phase) = self.phase.try_read() else { return Err(closed()) };
        let Phase::Open(file) = &*phase else { return Err(closed()) };
        write_all_at(file, offset, chunks)?;
        let now = Instant::now();
        self.slow_disk.record(now - start, now);
        Ok(())
    }

    /// Starts a sync on a blocking thread, one at a time.
    fn sync_early(self: &Arc<Self>, written: u64) {
        let unsynced = self.unsynced.fetch_add(written, Ordering::Relaxed) + written;
        if unsynced < SYNC_STEP || self.syncing.swap(true, Ordering::Relaxed) {
            return;
        }
        self.unsynced.store(0, Ordering::Relaxed);
        let file = Arc::clone(self);
        // Not awaited. The kernel may report the failure to no other handle, so a failed sync
        // removes the file.
        spawn_blocking(move || {
            let failed = match &*file.phase() {
                Phase::Open(writing) => writing.sync_data().is_err(),
                _ => false,
            };
            if failed {
                file.remove();
            }
            file.syncing.store(false, Ordering::Relaxed);
        });
    }

    /// Reads at most `most` bytes at `offset`; unwritten bytes are zeros. Works after the seal, and
    /// after the file is removed.
    ///
    /// # Errors
    /// Errors of the file system.
    pub async fn read_at(&self, offset: u64, limit: usize) -> io::Result<Bytes> {
        read_within(&self.reader, self.size, offset, limit).await
    }

    /// Closes the writable handle, makes the file read-only, and returns when the file is on disk.
    /// A second call does the remaining steps. Blocks.
    ///
    /// # Errors
    /// Errors of the file system. After a failed sync the file stays unusable.
    pub fn seal(&self) -> io::Result<()> {
        let mut phase = self.phase_mut();
        if matches!(*phase, Phase::Broken) {
            return Err(io::Error::other("the file was removed, or the disk did not write all of its bytes"));
        }
        *phase = Phase::Sealed;
        self.reader.set_permissions(Permissions::from_mode(SEALED))?;
        let synced = self.reader.sync_all();
        if synced.is_err() {
            // The kernel marks pages clean that it could not write: a second sync would succeed,
            // and a read from memory would too.
            *phase = Phase::Broken;
            drop(phase);
            self.remove();
        }
        synced
    }

    /// Whether `path` is another name of this file. Blocks.
    ///
    /// # Errors
    /// Errors of the file system; [`io::ErrorKind::NotFound`] for a missing `path`.
    pub fn is_linked_at(&self, path: &Path) -> io::Result<bool> {
        let (this, that) = (self.reader.metadata()?, fs::symlink_metadata(path)?);
        Ok(is_same_file(&this, &that))
    }

    /// Closes the file and removes its name, unless another file has the name. Blocks.
    pub fn remove(&self) {
        *self.phase_mut() = Phase::Broken;
        if self.is_linked_at(&self.path).unwrap_or(false) {
            // A later sweep removes the file after an error.
            let _ = fs::remove_file(&self.path);
        }
    }

    fn phase(&self) -> RwLockReadGuard<'_, Phase> {
        self.phase.read()
    }

    fn phase_mut(&self) -> RwLockWriteGuard<'_, Phase> {
        self.phase.write()
    }
}

fn closed() -> io::Error {
    io::Error::other("the file is closed for writing")
}

fn is_same_file(this: &fs::Metadata, that: &fs::Metadata) -> bool {
    (this.dev(), this.ino()) == (that.dev(), that.ino())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.unwrap_or_else(|panicked| Err(io::Error::other(panicked)))
}

#[cfg(test)]
mod tests;
