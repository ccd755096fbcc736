//! Reservations of disk space by concurrent recoveries. Together the recoveries keep the floors
//! free.
//!
//! `statvfs` reports the free bytes of now. Bytes that recoveries have reserved and not written yet
//! are missing from that figure, so the account here adds them. The account also remembers refused
//! recoveries. Not here: the calls of `statvfs`, the floors ([`super::disk_floor`]), and the size
//! limit of one image ([`super::plan`]).

use std::sync::Arc;

use parking_lot::Mutex;

use super::disk_floor::OverLimit;
use super::disk_floor::{DiskFloors, DiskNeed, Disks, check};

/// The reservations of one node. Clones share the account.
#[derive(Debug, Clone, Default)]
pub struct Reservations(Arc<Mutex<DiskAccount>>);

#[derive(Debug, Default)]
struct DiskAccount {
    /// Reserved and not written yet.
    outstanding: DiskNeed,
    /// Written or returned since the start. Wraps after 16 EiB, and only differences are used.
    released: DiskNeed,
    /// Recoveries that were refused since the last time that room was found.
    rejected: Vec<DiskNeed>,
}

/// Refusals that are remembered: more than a node recovers images at a time. A recovery beyond the
/// bound waits for its back-off.
const MAX_REJECTED: usize = 16;

/// The account before the call of `statvfs`. Bytes written between the two may be missing from the
/// result.
#[derive(Debug, Clone, Copy)]
pub struct MeasurementStart(DiskNeed);

/// Room for one recovery. The drop returns the bytes that were not written.
#[derive(Debug)]
pub struct Reservation {
    shared: Reservations,
    /// Changed only under the account's lock.
    outstanding: Mutex<DiskNeed>,
}

impl Reservations {
    /// The caller calls this before `statvfs`.
    pub fn begin_measurement(&self) -> MeasurementStart {
        MeasurementStart(self.0.lock().released)
    }

    /// Reserves `need` if every floor is kept after all recoveries have written all reserved bytes.
    /// `disks` was measured after `before`.
    ///
    /// # Errors
    /// [`OverLimit::Disk`] with the figures. Nothing is reserved then, and the refusal is
    /// remembered.
    pub fn reserve(
        &self,
        need: DiskNeed,
        before: MeasurementStart,
        disks: Disks,
        floors: DiskFloors,
    ) -> Result<Reservation, OverLimit> {
        let mut account = self.0.lock();
        account.admit(need, before, disks, floors)?;
        let left = account.add(need);
        drop(account);
        Ok(Reservation { shared: self.clone(), outstanding: Mutex::new(left) })
    }

    /// Whether a recovery was refused and no room was found since.
    pub fn has_rejected(&self) -> bool {
        !self.0.lock().rejected.is_empty()
    }

    /// Whether one of the refused recoveries would fit now. The refusals are then dropped, because
    /// all of these recoveries are retried.
    pub fn clear_rejected_if_freed(&self, before: MeasurementStart, disks: Disks, floors: DiskFloors) -> bool {
        let mut account = self.0.lock();
        let reserved = account.reserved(before);
        let is_freed = account.rejected.iter().any(|need| check(*need, reserved, disks, floors).is_ok());
        if is_freed {
            account.rejected.clear();
        }
        is_freed
    }

    /// All bytes that are reserved and not written yet.
    pub fn outstanding(&self) -> DiskNeed {
        self.0.lock().outstanding
    }
}

impl DiskAccount {
    /// Bytes returned since `before` count as reserved too: the measurement may be older than their
    /// write.
    fn reserved(&self, before: MeasurementStart) -> DiskNeed {
        let since = |now: u64, then: u64| now.wrapping_sub(then);
        let released = DiskNeed {
            download: since(self.released.download, before.0.download),
            unpack: since(self.released.unpack, before.0.unpack),
        };
        self.outstanding.plus(released)
    }

    fn admit(
        &mut self,
        need: DiskNeed,
        before: MeasurementStart,
        disks: Disks,
        floors: DiskFloors,
    ) -> Result<(), OverLimit> {
        let checked = check(need, self.reserved(before), disks, floors);
        if checked.is_err() && self.rejected.len() < MAX_REJECTED && !self.rejected.contains(&need) {
            self.rejected.push(need);
        }
        checked
    }

    /// Saturating, because a manifest's sizes may exceed every disk. Nothing else fits until such a
    /// reservation is returned.
    fn add(&mut self, need: DiskNeed) -> DiskNeed {
        let outstanding = self.outstanding;
        self.outstanding = outstanding.plus(need);
        DiskNeed {
            download: self.outstanding.download - outstanding.download,
            unpack: self.outstanding.unpack - outstanding.unpack,
        }
    }

    /// Takes at most `need` out of `left` and out of `outstanding`.
    fn take(&mut self, left: &mut DiskNeed, need: DiskNeed) -> DiskNeed {
        let taken = DiskNeed { download: need.download.min(left.download), unpack: need.unpack.min(left.unpack) };
        for total in [&mut *left, &mut self.outstanding] {
            total.download -= taken.download;
            total.unpack -= taken.unpack;
        }
        taken
    }
}

impl Reservation {
    /// Records bytes of blobs that are on the disk, so the file system counts them. The caller
    /// calls this after the write.
    pub fn record_written(&self, bytes: u64) {
        self.release(DiskNeed { download: bytes, unpack: 0 });
    }

    /// Records bytes of unpacked layers that are on the disk. The caller calls this after
    /// unpacking.
    pub fn record_unpacked(&self, bytes: u64) {
        self.release(DiskNeed { download: 0, unpack: bytes });
    }

    /// Replaces the estimate for layers of `compressed` bytes by their real size, if every floor
    /// is kept.
    ///
    /// # Errors
    /// As [`Reservations::reserve`]. The estimate stays.
    pub fn replace_estimate(
        &self,
        compressed: u64,
        real: u64,
        before: MeasurementStart,
        disks: Disks,
        floors: DiskFloors,
    ) -> Result<(), OverLimit> {
        let mut account = self.shared.0.lock();
        let mut left = self.outstanding.lock();
        let estimate = account.take(&mut left, DiskNeed { download: 0, unpack: compressed });
        let real = DiskNeed { download: 0, unpack: real };
        let admitted = account.admit(real, before, disks, floors);
        *left = left.plus(account.add(if admitted.is_ok() { real } else { estimate }));
        admitted
    }

    fn release(&self, need: DiskNeed) {
        let mut account = self.shared.0.lock();
        let mut left = self.outstanding.lock();
        let taken = account.take(&mut left, need);
        account.released.download = account.released.download.wrapping_add(taken.download);
        account.released.unpack = account.released.unpack.wrapping_add(taken.unpack);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release(DiskNeed { download: u64::MAX, unpack: u64::MAX });
    }
}

#[cfg(test)]
mod tests;
