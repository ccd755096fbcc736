//! Writes parts of a file, and lists the written parts.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;

use bytes::Bytes;
use nix::errno::Errno;
use nix::sys::uio::pwritev;
use nix::unistd::{Whence, lseek64};

/// Most slices in one call (Linux, `UIO_MAXIOV`).
const MAX_SLICES: usize = 1024;

/// Writes all chunks, one after the other.
pub(super) fn write_all_at(file: &File, offset: u64, chunks: &[Bytes]) -> io::Result<()> {
    let mut slices: Vec<_> = chunks.iter().filter(|chunk| !chunk.is_empty()).map(|chunk| IoSlice::new(chunk)).collect();
    let (mut rest, mut offset) = (&mut slices[..], offset);
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MAX_SLICES)];
        match pwritev(file, batch, offset.cast_signed()) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                IoSlice::advance_slices(&mut rest, written);
                offset += written as u64;
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Ranges with data, up to `size`. A file system without holes reports one range.
pub(super) fn data_extents(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek64(file, at.cast_signed(), Whence::SeekData) {
            Ok(start) => start.cast_unsigned(),
            // Only a hole follows.
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = lseek64(file, start.cast_signed(), Whence::SeekHole)?.cast_unsigned().min(size);
        match ranges.last_mut() {
            Some(before) if before.end == start => before.end = at,
            _ if start < at => ranges.push(start..at),
            _ => break,
        }
    }
    Ok(ranges)
}
