//! A file whose parts come in any order, and which then never changes again.
//!
//! It is sparse: what was not written takes no room, and shows as a hole to a later process. As long as it can be written it has one name and
//! the mode 0600; once it is sealed, nothing of this process can write to it any more, whatever names it is given. What it is a part of, and
//! where it goes, is for the stores to know.

mod extents;
mod folder;
mod lock;

use std::fs::{self, File, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use bytes::Bytes;
use tokio::task::spawn_blocking;

use self::extents::{data_extents, write_all_at};
use self::lock::open_or_create;
use super::read_within;
use super::slow_disk::SlowDiskDetector;

pub use self::folder::{Leftover, create_staging_folder, is_locked, leftovers, sync_folder};

/// While it is written, nobody else needs it; sealed, everybody may read it, as containerd has it with its blobs (content/local/writer.go).
const UNSEALED: u32 = 0o600;
const SEALED: u32 = 0o444;

/// Written bytes after which the disk is made to begin. The kernel itself waits until a tenth of memory is dirty (`dirty_background_ratio`),
/// by which time most blobs are whole, and sealing would wait for all of it. Measured with 1 GiB on a disk of 1.2 GB/s, bytes coming at 600
/// MB/s: sealing took 370 ms without, 30 ms with this, and the whole 2.3 s instead of 2.9 s. Steps of 8 MiB were no better.
const SYNC_STEP: u64 = 64 << 20;

/// The file, while it is written and after.
pub struct StagingFile {
    path: PathBuf,
    size: u64,
    resumed_ranges: Vec<Range<u64>>,
    /// Locked against other processes as long as this is held. It also tells at the end whether the disk has taken everything: what went wrong
    /// while another handle was synced is told to each handle once.
    reader: Arc<File>,
    phase: RwLock<Phase>,
    slow_disk: SlowDiskDetector,
    unsynced: AtomicU64,
    syncing: AtomicBool,
}

enum Phase {
    Open(File),
    /// Nobody can write through us any more.
    Sealed,
    /// It was given up, or the disk did not take it and what is in the file now is not known.
    Broken,
}

impl StagingFile {
    /// Takes up what an earlier process left under this name, if it fits, or begins anew. Blocks.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when another process has it; what the file system says.
    pub fn open(path: &Path, size: u64) -> io::Result<Self> {
        let (reading, writing) = open_or_create(path, size)?;
        let left = data_extents(&reading, size)?;
        Ok(Self {
            path: path.to_owned(),
            size,
            resumed_ranges: left,
            reader: Arc::new(reading),
            phase: RwLock::new(Phase::Open(writing)),
            slow_disk: SlowDiskDetector::default(),
            unsynced: AtomicU64::new(0),
            syncing: AtomicBool::new(false),
        })
    }

    /// Where it is, until its owner gives it another name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes, which never changes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The parts that were not holes when it was taken up: sorted, not empty, not touching. A file system tells them in blocks, or not at all,
    /// and then it is one part.
    pub fn resumed_ranges(&self) -> Vec<Range<u64>> {
        self.resumed_ranges.clone()
    }

    /// Writes at an offset. Inline: a batch of 256 KiB and more goes to memory faster than to another thread (measured); where it turns out that
    /// the disk makes writers wait, on a blocking thread.
    ///
    /// # Errors
    /// Beyond the end, and when it is sealed; what the file system says.
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
        // Not waited for: whoever holds it alone is sealing.
        let Ok(phase) = self.phase.try_read() else { return Err(closed()) };
        let Phase::Open(file) = &*phase else { return Err(closed()) };
        write_all_at(file, offset, chunks)?;
        let now = Instant::now();
        self.slow_disk.record(now - start, now);
        Ok(())
    }

    /// Makes the disk begin, on a blocking thread, one at a time.
    fn sync_early(self: &Arc<Self>, written: u64) {
        let unsynced = self.unsynced.fetch_add(written, Ordering::Relaxed) + written;
        if unsynced < SYNC_STEP || self.syncing.swap(true, Ordering::Relaxed) {
            return;
        }
        self.unsynced.store(0, Ordering::Relaxed);
        let file = Arc::clone(self);
        // Nobody waits for it. What fails here may be told to nobody again, so the file is of no use from then on.
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

    /// Reads at most `most` bytes at `offset`, zeros where nothing was written. Goes on working when it is sealed, and when its name is gone.
    ///
    /// # Errors
    /// What the file system says.
    pub async fn read_at(&self, offset: u64, most: usize) -> io::Result<Bytes> {
        read_within(&self.reader, self.size, offset, most).await
    }

    /// Takes the writable handle away, makes the file read-only, and returns when it is on disk. Again, it does what is still to do. Blocks.
    ///
    /// # Errors
    /// What the file system says. A file that the disk did not take whole stays unusable.
    pub fn seal(&self) -> io::Result<()> {
        let mut phase = self.phase_mut();
        if matches!(*phase, Phase::Broken) {
            return Err(io::Error::other("what was written is not on disk"));
        }
        *phase = Phase::Sealed;
        self.reader.set_permissions(Permissions::from_mode(SEALED))?;
        let synced = self.reader.sync_all();
        if synced.is_err() {
            // The kernel forgets what it could not write: a second sync would succeed, and so would a look at what it has in memory.
            *phase = Phase::Broken;
            drop(phase);
            self.remove();
        }
        synced
    }

    /// Whether that path is another name of this file. Blocks.
    ///
    /// # Errors
    /// What the file system says; [`io::ErrorKind::NotFound`] when nothing has that name.
    pub fn is_linked_at(&self, path: &Path) -> io::Result<bool> {
        let (this, that) = (self.reader.metadata()?, fs::symlink_metadata(path)?);
        Ok(is_same_file(&this, &that))
    }

    /// Closes it for good and removes its name, if that is still its own. Blocks.
    pub fn remove(&self) {
        *self.phase_mut() = Phase::Broken;
        if self.is_linked_at(&self.path).unwrap_or(false) {
            // What cannot be removed is swept later.
            let _ = fs::remove_file(&self.path);
        }
    }

    fn phase(&self) -> RwLockReadGuard<'_, Phase> {
        self.phase.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn phase_mut(&self) -> RwLockWriteGuard<'_, Phase> {
        self.phase.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn closed() -> io::Error {
    io::Error::other("it is not being written any more")
}

fn is_same_file(this: &fs::Metadata, that: &fs::Metadata) -> bool {
    (this.dev(), this.ino()) == (that.dev(), that.ino())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.unwrap_or_else(|panicked| Err(io::Error::other(panicked)))
}

#[cfg(test)]
mod tests;
