//! Room on the disk for recoveries that run at the same time: together they leave what must stay free.
//!
//! The file system says what is free now. What the others were allowed and have not written yet is not in that figure; it is counted
//! here. Not here: asking the file system, and the size limit of one image ([`super::plan`]).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::plan::OverLimit;

/// The reservations of one content store. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Reservations(Arc<Mutex<Ledger>>);

#[derive(Debug, Default)]
struct Ledger {
    /// Allowed and not written yet.
    outstanding: u64,
    /// Written, or given up, since the start. Wraps after 16 EiB, which only differences are made of.
    given_back: u64,
}

/// The moment before the free bytes are asked for. What is written between it and the answer may or may not be in the answer.
#[derive(Debug, Clone, Copy)]
pub struct Before(u64);

/// Room for one recovery. What was not written is given back when it is dropped.
#[derive(Debug)]
pub struct Reservation {
    shared: Reservations,
    /// Changed under the ledger's lock alone.
    left: AtomicU64,
}

impl Reservations {
    /// To be called before the store is asked how much is free.
    pub fn before_measuring(&self) -> Before {
        Before(self.lock().given_back)
    }

    /// Sets `missing` bytes aside if `floor` bytes stay free when everybody has written what they may. `free` is what the store said
    /// after `before`, `None` where it cannot tell: then everything fits.
    ///
    /// # Errors
    /// [`OverLimit::Disk`] with the figures. Nothing is set aside then.
    pub fn reserve(
        &self,
        missing: u64,
        before: Before,
        free: Option<u64>,
        floor: u64,
    ) -> Result<Reservation, OverLimit> {
        let mut ledger = self.lock();
        // What was given back meanwhile counts once more: the measurement may be from before it was written.
        let reserved = ledger.outstanding.saturating_add(ledger.given_back.wrapping_sub(before.0));
        fits(missing, reserved, free, floor)?;
        // Sizes are a manifest's word; beyond all disks nothing fits any more, which is right until they are given back.
        let left = missing.min(u64::MAX - ledger.outstanding);
        ledger.outstanding += left;
        Ok(Reservation { shared: self.clone(), left: left.into() })
    }

    /// What is set aside and not written yet, all together, in bytes.
    pub fn outstanding(&self) -> u64 {
        self.lock().outstanding
    }

    /// Nothing that runs under the lock panics half-way, so a poisoned one is as good.
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// So many bytes are on the disk now, so the store counts them itself. To be called after they are.
    pub fn written(&self, bytes: u64) {
        let mut ledger = self.shared.lock();
        let left = self.left.load(Relaxed);
        let bytes = bytes.min(left);
        self.left.store(left - bytes, Relaxed);
        ledger.outstanding -= bytes;
        ledger.given_back = ledger.given_back.wrapping_add(bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.written(u64::MAX);
    }
}

/// Whether `missing` bytes fit beside `reserved` ones that others will write.
fn fits(missing: u64, reserved: u64, free: Option<u64>, floor: u64) -> Result<(), OverLimit> {
    match free {
        Some(free) if missing > 0 && missing.saturating_add(reserved).saturating_add(floor) > free => {
            Err(OverLimit::Disk { missing, reserved, free, floor })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLOOR: u64 = 100;

    fn reserve(all: &Reservations, missing: u64, free: u64) -> Result<Reservation, OverLimit> {
        all.reserve(missing, all.before_measuring(), Some(free), FLOOR)
    }

    #[test]
    fn two_recoveries_that_each_fit_do_not_both_go_below_the_floor() {
        let all = Reservations::default();
        let first = reserve(&all, 600, 1000).unwrap();
        let refused = reserve(&all, 301, 1000).unwrap_err();
        assert_eq!(refused, OverLimit::Disk { missing: 301, reserved: 600, free: 1000, floor: 100 });
        assert!(refused.to_string().contains("600"), "{refused}");
        drop(reserve(&all, 300, 1000).unwrap());
        drop(first);
        assert_eq!(all.outstanding(), 0);
        reserve(&all, 900, 1000).unwrap();
    }

    #[test]
    fn what_is_written_is_not_counted_twice() {
        let all = Reservations::default();
        let first = reserve(&all, 600, 1000).unwrap();
        first.written(400);
        assert!(reserve(&all, 301, 600).is_err());
        reserve(&all, 300, 600).unwrap();
    }

    #[test]
    fn what_is_written_while_the_room_is_measured_is_not_taken_for_free() {
        let all = Reservations::default();
        let first = reserve(&all, 600, 1000).unwrap();
        let before = all.before_measuring();
        // The store has looked already; its answer is still on its way.
        first.written(600);
        assert!(all.reserve(301, before, Some(1000), FLOOR).is_err());
        all.reserve(300, before, Some(1000), FLOOR).unwrap();
    }

    #[test]
    fn more_than_was_reserved_or_than_any_disk_has_overflows_nothing() {
        let all = Reservations::default();
        let first = all.reserve(u64::MAX, all.before_measuring(), None, u64::MAX).unwrap();
        let second = all.reserve(u64::MAX, all.before_measuring(), None, u64::MAX).unwrap();
        assert!(all.reserve(1, all.before_measuring(), Some(u64::MAX - 1), 0).is_err());
        first.written(u64::MAX);
        second.written(u64::MAX);
        drop((first, second));
        assert_eq!(all.outstanding(), 0);
    }

    #[test]
    fn an_image_that_misses_nothing_fits_on_a_full_disk() {
        let all = Reservations::default();
        reserve(&all, 0, 0).unwrap();
    }

    /// What a recovery on a simulated disk does next; the number says which recovery.
    #[derive(Debug, Clone)]
    enum Move {
        Measure,
        Begin(u64),
        Write(usize, u64),
        End(usize),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let one = prop_oneof![
            Just(Move::Measure),
            (0_u64..400).prop_map(Move::Begin),
            (0_usize..4, 0_u64..200).prop_map(|(who, bytes)| Move::Write(who, bytes)),
            (0_usize..4).prop_map(Move::End),
        ];
        proptest::collection::vec(one, 1..200)
    }

    proptest! {
        /// On a disk that nobody else writes to. Measurements are as old as they like to be.
        #[test]
        fn the_floor_is_kept_however_recoveries_interleave(moves in moves()) {
            let all = Reservations::default();
            let mut free = 1000;
            let mut measured = (all.before_measuring(), free);
            // Each recovery: its reservation and what it may still write.
            let mut running: Vec<(Reservation, u64)> = Vec::new();
            for step in moves {
                let count = running.len().max(1);
                match step {
                    Move::Measure => measured = (all.before_measuring(), free),
                    Move::Begin(missing) => {
                        if let Ok(reservation) = all.reserve(missing, measured.0, Some(measured.1), FLOOR) {
                            running.push((reservation, missing));
                        }
                    }
                    Move::Write(who, bytes) => if let Some((reservation, may)) = running.get_mut(who % count) {
                        let bytes = bytes.min(*may);
                        free -= bytes;
                        *may -= bytes;
                        reservation.written(bytes);
                    }
                    Move::End(who) => if !running.is_empty() {
                        running.remove(who % count);
                    }
                }
                let promised: u64 = running.iter().map(|(_, may)| may).sum();
                prop_assert!(free >= FLOOR + promised, "{free} free, {promised} promised");
                prop_assert_eq!(all.outstanding(), promised);
            }
        }
    }
}
