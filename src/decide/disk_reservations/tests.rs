//! Concurrent recoveries on one disk.

use proptest::prelude::*;

use super::*;
use crate::decide::disk_floor::{FileSystem, Volume};

/// Bytes that stay free.
const FLOOR: u64 = 100;

const FLOORS: DiskFloors = DiskFloors { min_free_bytes: FLOOR, image_gc_percent: 100, eviction_percent: 0 };

fn shared(free: u64) -> Disks {
    let disk = Some(FileSystem { device: Some(1), free, total: u64::MAX });
    Disks { content: disk, snapshots: disk }
}

fn download(bytes: u64) -> DiskNeed {
    DiskNeed { download: bytes, unpack: 0 }
}

fn reserve(all: &Reservations, bytes: u64, free: u64) -> Result<Reservation, OverLimit> {
    all.reserve(download(bytes), all.begin_measurement(), shared(free), FLOORS)
}

#[test]
fn two_recoveries_that_each_fit_do_not_both_go_below_the_floor() {
    let all = Reservations::default();
    let first = reserve(&all, 600, 1000).unwrap();
    let rejected = reserve(&all, 301, 1000).unwrap_err();
    assert_eq!(rejected, OverLimit::Disk { volume: Volume::Both, need: 301, reserved: 600, free: 1000, floor: 100 });
    assert!(rejected.to_string().contains("600"), "{rejected}");
    drop(reserve(&all, 300, 1000).unwrap());
    drop(first);
    assert_eq!(all.outstanding(), DiskNeed::default());
    reserve(&all, 900, 1000).unwrap();
}

#[test]
fn the_unpack_estimate_of_other_recoveries_counts() {
    let all = Reservations::default();
    let _first = all.reserve(DiskNeed::of_missing(300), all.begin_measurement(), shared(1000), FLOORS).unwrap();
    assert!(all.reserve(DiskNeed::of_missing(151), all.begin_measurement(), shared(1000), FLOORS).is_err());
    all.reserve(DiskNeed::of_missing(150), all.begin_measurement(), shared(1000), FLOORS).unwrap();
}

#[test]
fn written_bytes_are_not_counted_twice() {
    let all = Reservations::default();
    let first = reserve(&all, 600, 1000).unwrap();
    first.record_written(400);
    assert!(reserve(&all, 301, 600).is_err());
    reserve(&all, 300, 600).unwrap();
}

#[test]
fn bytes_written_during_the_measurement_do_not_count_as_free() {
    let all = Reservations::default();
    let first = reserve(&all, 600, 1000).unwrap();
    let before = all.begin_measurement();
    // `statvfs` has returned; the caller has not used the result yet.
    first.record_written(600);
    assert!(all.reserve(download(301), before, shared(1000), FLOORS).is_err());
    all.reserve(download(300), before, shared(1000), FLOORS).unwrap();
}

#[test]
fn the_real_size_of_a_layer_replaces_the_estimate() {
    let all = Reservations::default();
    let image = all.reserve(DiskNeed::of_missing(200), all.begin_measurement(), shared(1000), FLOORS).unwrap();
    image.record_written(200);
    let unpack = |real, free| image.replace_estimate(200, real, all.begin_measurement(), shared(free), FLOORS);
    let rejected = unpack(701, 800).unwrap_err();
    assert!(matches!(rejected, OverLimit::Disk { need: 701, reserved: 0, free: 800, .. }), "{rejected}");
    assert_eq!(all.outstanding(), DiskNeed { download: 0, unpack: 200 }, "the estimate stays");
    unpack(700, 800).unwrap();
    assert_eq!(all.outstanding(), DiskNeed { download: 0, unpack: 700 });
    image.record_unpacked(700);
    assert_eq!(all.outstanding(), DiskNeed::default());
}

#[test]
fn a_rejected_recovery_is_retried_once_when_its_space_is_free() {
    let all = Reservations::default();
    let freed = |free| all.clear_rejected_if_freed(all.begin_measurement(), shared(free), FLOORS);
    assert!(!all.has_rejected() && !freed(u64::MAX));
    assert!(reserve(&all, 500, 400).is_err() && reserve(&all, 900, 400).is_err());
    assert!(all.has_rejected() && !freed(599));
    assert!(freed(600), "the smaller of the two fits");
    assert!(!all.has_rejected() && !freed(u64::MAX));
}

#[test]
fn space_released_by_another_recovery_triggers_a_retry() {
    let all = Reservations::default();
    let first = reserve(&all, 800, 1000).unwrap();
    assert!(reserve(&all, 500, 1000).is_err());
    assert!(!all.clear_rejected_if_freed(all.begin_measurement(), shared(1000), FLOORS));
    drop(first);
    assert!(all.clear_rejected_if_freed(all.begin_measurement(), shared(1000), FLOORS));
}

#[test]
fn rejected_needs_are_kept_up_to_a_bound() {
    let all = Reservations::default();
    for bytes in 1..100 {
        assert!(reserve(&all, bytes, 0).is_err());
    }
    assert_eq!(all.0.lock().rejected.len(), MAX_REJECTED);
}

#[test]
fn sizes_beyond_the_reservation_or_any_disk_overflow_nothing() {
    let all = Reservations::default();
    let unseen = |need| all.reserve(need, all.begin_measurement(), Disks::default(), FLOORS).unwrap();
    let huge = DiskNeed { download: u64::MAX, unpack: u64::MAX };
    let (first, second) = (unseen(huge), unseen(huge));
    assert!(reserve(&all, 1, u64::MAX - 1).is_err());
    first.record_written(u64::MAX);
    second.record_written(u64::MAX);
    drop((first, second));
    assert_eq!(all.outstanding(), DiskNeed::default());
}

/// The next step of a recovery on a simulated disk. The first number selects the recovery.
#[derive(Debug, Clone)]
enum DiskStep {
    Measure,
    /// With a download of so many bytes, and the estimate for unpacking them.
    Begin(u64),
    Write(usize, u64),
    /// Unpacks everything that is left, so many times as large as its estimate.
    Unpack(usize, u64),
    End(usize),
}

fn steps() -> impl Strategy<Value = Vec<DiskStep>> {
    let one = prop_oneof![
        Just(DiskStep::Measure),
        (0_u64..400).prop_map(DiskStep::Begin),
        (0_usize..4, 0_u64..200).prop_map(|(which, bytes)| DiskStep::Write(which, bytes)),
        (0_usize..4, 1_u64..4).prop_map(|(which, times)| DiskStep::Unpack(which, times)),
        (0_usize..4).prop_map(DiskStep::End),
    ];
    proptest::collection::vec(one, 1..200)
}

proptest! {
    /// On a disk without other writers. Measurements may be arbitrarily old.
    #[test]
    fn the_floor_is_kept_however_recoveries_interleave(steps in steps()) {
        let all = Reservations::default();
        let mut free = 1000;
        let mut measured = (all.begin_measurement(), free);
        // Each recovery: its reservation, what it may still write, and what it may still unpack.
        let mut running: Vec<(Reservation, u64, u64)> = Vec::new();
        for step in steps {
            let count = running.len().max(1);
            match step {
                DiskStep::Measure => measured = (all.begin_measurement(), free),
                DiskStep::Begin(missing) => {
                    if let Ok(reservation) = all.reserve(DiskNeed::of_missing(missing), measured.0, shared(measured.1), FLOORS) {
                        running.push((reservation, missing, missing));
                    }
                }
                DiskStep::Write(which, bytes) => if let Some((reservation, may, _)) = running.get_mut(which % count) {
                    let bytes = bytes.min(*may);
                    free -= bytes;
                    *may -= bytes;
                    reservation.record_written(bytes);
                }
                DiskStep::Unpack(which, times) => if let Some((reservation, _, may)) = running.get_mut(which % count) {
                    let real = *may * times;
                    if reservation.replace_estimate(*may, real, measured.0, shared(measured.1), FLOORS).is_ok() {
                        free -= real;
                        *may = 0;
                        reservation.record_unpacked(real);
                    }
                }
                DiskStep::End(which) => if !running.is_empty() {
                    running.remove(which % count);
                }
            }
            let promised = running.iter().fold((0, 0), |sum, (_, write, unpack)| (sum.0 + write, sum.1 + unpack));
            prop_assert!(free >= FLOOR + promised.0 + promised.1, "{free} bytes free, {promised:?} reserved");
            prop_assert_eq!(all.outstanding(), DiskNeed { download: promised.0, unpack: promised.1 });
        }
    }
}
