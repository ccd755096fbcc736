//! Room on the disk for recoveries that run at the same time: together they leave what must stay
//! free.
//!
//! `statvfs` says how much is free now. Bytes that recoveries were promised and have not written
//! yet are missing from that figure and are counted here, as are the recoveries that were refused.
//! Not here: asking the file system, the lines that must not be crossed ([`super::disk`]), and the
//! size limit of one image ([`super::plan`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{DiskFloors, DiskNeed, Disks, check};
use super::plan::OverLimit;

/// The reservations of one node. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Reservations(Arc<Mutex<DiskAccount>>);

#[derive(Debug, Default)]
struct DiskAccount {
    /// Promised and not written yet.
    outstanding: DiskNeed,
    /// Written, or given up, since the start. Wraps after 16 EiB, which only differences are made
    /// of.
    released: DiskNeed,
    /// Recoveries that were refused since room was last found.
    refusals: Vec<DiskNeed>,
}

/// Refusals that are remembered: more than a node recovers images at a time. A recovery beyond the
/// bound waits for its back-off.
const MAX_REFUSALS: usize = 16;

/// The moment before the free bytes are asked for. Bytes that are written between the two may be
/// missing from the answer.
#[derive(Debug, Clone, Copy)]
pub struct MeasurementStart(DiskNeed);

/// Room for one recovery. Dropping it gives back the bytes that were not written.
#[derive(Debug)]
pub struct Reservation {
    shared: Reservations,
    /// Changed under the ledger's lock alone.
    outstanding: Mutex<DiskNeed>,
}

impl Reservations {
    /// To be called before the file systems are asked how much is free.
    pub fn begin_measurement(&self) -> MeasurementStart {
        MeasurementStart(lock(&self.0).released)
    }

    /// Sets `need` aside if no line is crossed when every recovery has written what it may. `disks`
    /// is what the file systems said after `before`.
    ///
    /// # Errors
    /// [`OverLimit::Disk`] with the figures. Nothing is set aside then, and the refusal is
    /// remembered.
    pub fn reserve(
        &self,
        need: DiskNeed,
        before: MeasurementStart,
        disks: Disks,
        lines: DiskFloors,
    ) -> Result<Reservation, OverLimit> {
        let mut ledger = lock(&self.0);
        ledger.admit(need, before, disks, lines)?;
        let left = ledger.add(need);
        drop(ledger);
        Ok(Reservation { shared: self.clone(), outstanding: Mutex::new(left) })
    }

    /// Whether a recovery was refused and none was found to have room since.
    pub fn has_refused(&self) -> bool {
        !lock(&self.0).refusals.is_empty()
    }

    /// Whether one of the refused recoveries would be let in now. The refusals are then forgotten,
    /// because all are tried again.
    pub fn clear_refusals_if_freed(&self, before: MeasurementStart, disks: Disks, lines: DiskFloors) -> bool {
        let mut ledger = lock(&self.0);
        let reserved = ledger.reserved(before);
        let is_freed = ledger.refusals.iter().any(|need| check(*need, reserved, disks, lines).is_ok());
        if is_freed {
            ledger.refusals.clear();
        }
        is_freed
    }

    /// All bytes that are set aside and not written yet.
    pub fn outstanding(&self) -> DiskNeed {
        lock(&self.0).outstanding
    }
}

/// Nothing that runs under a lock panics half-way, so a poisoned one is as good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DiskAccount {
    /// Bytes given back since `before` count once more: the measurement may be older than their
    /// write.
    fn reserved(&self, before: MeasurementStart) -> DiskNeed {
        let since = |now: u64, then: u64| now.wrapping_sub(then);
        let given_back = DiskNeed {
            download: since(self.released.download, before.0.download),
            unpack: since(self.released.unpack, before.0.unpack),
        };
        self.outstanding.plus(given_back)
    }

    fn admit(
        &mut self,
        need: DiskNeed,
        before: MeasurementStart,
        disks: Disks,
        lines: DiskFloors,
    ) -> Result<(), OverLimit> {
        let checked = check(need, self.reserved(before), disks, lines);
        if checked.is_err() && self.refusals.len() < MAX_REFUSALS && !self.refusals.contains(&need) {
            self.refusals.push(need);
        }
        checked
    }

    /// Sizes are a manifest's word; beyond all disks nothing fits any more, which is right until
    /// they are given back.
    fn add(&mut self, need: DiskNeed) -> DiskNeed {
        let outstanding = self.outstanding;
        self.outstanding = outstanding.plus(need);
        DiskNeed {
            download: self.outstanding.download - outstanding.download,
            unpack: self.outstanding.unpack - outstanding.unpack,
        }
    }

    /// Takes at most `need` out of `left` and out of what is outstanding.
    fn take(&mut self, left: &mut DiskNeed, need: DiskNeed) -> DiskNeed {
        let taken = DiskNeed { download: need.download.min(left.download), unpack: need.unpack.min(left.unpack) };
        for of in [&mut *left, &mut self.outstanding] {
            of.download -= taken.download;
            of.unpack -= taken.unpack;
        }
        taken
    }
}

impl Reservation {
    /// So many bytes of blobs are on the disk now, so the file system counts them itself. To be
    /// called after they are.
    pub fn record_written(&self, bytes: u64) {
        self.release(DiskNeed { download: bytes, unpack: 0 });
    }

    /// So many bytes of unpacked layers are on the disk now. To be called after they are.
    pub fn record_unpacked(&self, bytes: u64) {
        self.release(DiskNeed { download: 0, unpack: bytes });
    }

    /// Swaps the estimate for layers of `compressed` bytes for their real size, if no line is
    /// crossed then.
    ///
    /// # Errors
    /// As [`Reservations::reserve`]. The estimate stays.
    pub fn replace_estimate(
        &self,
        compressed: u64,
        real: u64,
        before: MeasurementStart,
        disks: Disks,
        lines: DiskFloors,
    ) -> Result<(), OverLimit> {
        let mut ledger = lock(&self.shared.0);
        let mut left = lock(&self.outstanding);
        let estimate = ledger.take(&mut left, DiskNeed { download: 0, unpack: compressed });
        let real = DiskNeed { download: 0, unpack: real };
        let admitted = ledger.admit(real, before, disks, lines);
        *left = left.plus(ledger.add(if admitted.is_ok() { real } else { estimate }));
        admitted
    }

    fn release(&self, need: DiskNeed) {
        let mut ledger = lock(&self.shared.0);
        let mut left = lock(&self.outstanding);
        let taken = ledger.take(&mut left, need);
        ledger.released.download = ledger.released.download.wrapping_add(taken.download);
        ledger.released.unpack = ledger.released.unpack.wrapping_add(taken.unpack);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release(DiskNeed { download: u64::MAX, unpack: u64::MAX });
    }
}

#[cfg(test)]
mod tests;
