//! Reads from files: inline from memory, on a blocking thread from the disk.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tokio::task::spawn_blocking;

/// Most bytes that are copied on the runtime's thread. Half a transfer's batch takes some ten
/// microseconds, as a switch to another thread and back does.
const MAX_INLINE_READ: usize = 256 << 10;

/// Reads exactly so many bytes. A page that is not in memory does not block the runtime's thread.
///
/// # Errors
/// Errors of the file system, and an early end of the file.
pub(super) async fn read_exact_at(file: &Arc<File>, offset: u64, length: usize) -> io::Result<Bytes> {
    let mut bytes = vec![0; length];
    let cached = if length <= MAX_INLINE_READ { read_cached(file, offset, &mut bytes) } else { 0 };
    if cached == length {
        return Ok(bytes.into());
    }
    let file = file.clone();
    let read = spawn_blocking(move || {
        file.read_exact_at(&mut bytes[cached..], offset + cached as u64)?;
        Ok(bytes.into())
    });
    read.await.unwrap_or_else(|panicked| Err(io::Error::other(panicked)))
}

/// Reads the leading bytes that are in memory; nothing without support for `RWF_NOWAIT`. A tmpfs
/// lacks the support, but has every page in memory.
fn read_cached(file: &File, offset: u64, bytes: &mut [u8]) -> usize {
    match preadv2(file, &mut [IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT) {
        Ok(read) => read,
        Err(Errno::OPNOTSUPP) if is_on_tmpfs(file) => file.read_at(bytes, offset).unwrap_or(0),
        Err(_) => 0,
    }
}

fn is_on_tmpfs(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reads_return_the_bytes_at_the_offset() {
        let content: Vec<u8> = (0..MAX_INLINE_READ + 5000).map(|index| (index % 251) as u8).collect();
        for folder in folders() {
            let path = folder.path().join("blob");
            std::fs::write(&path, &content).unwrap();
            let file = Arc::new(File::open(path).unwrap());
            for (offset, length) in
                [(0, 1), (4095, 2), (5000, MAX_INLINE_READ), (0, content.len()), (content.len() - 1, 1)]
            {
                let read = read_exact_at(&file, offset as u64, length).await.unwrap();
                assert!(read == content[offset..offset + length], "{length} at {offset}");
            }
            for (offset, length) in [(content.len(), 1), (content.len() - 1, 2), (0, content.len() + 1)] {
                assert!(read_exact_at(&file, offset as u64, length).await.is_err(), "{length} at {offset}");
            }
        }
    }

    #[test]
    fn a_file_in_memory_is_read_without_another_thread() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("blob");
        std::fs::write(&path, b"12345").unwrap();
        let mut read = [0; 3];
        assert_eq!((read_cached(&File::open(path).unwrap(), 1, &mut read), &read), (3, b"234"));
    }

    /// In the folder for temporary files, and in memory.
    fn folders() -> [tempfile::TempDir; 2] {
        [tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap()]
    }
}
