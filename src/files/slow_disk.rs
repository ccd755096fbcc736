//! Detects a disk that makes writers wait, so that the runtime's threads do not wait for it.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A longer write has waited for the disk. 256 KiB to memory take a quarter of a millisecond even
/// at a gigabyte a second. A preempted thread runs again after 4 ms (the scheduler's usual slice).
const SLOW_WRITE: Duration = Duration::from_millis(5);

/// Time for which a disk counts as slow. The kernel makes a writer over its dirty limits wait at
/// most 200 ms at a time (`MAX_PAUSE` in mm/page-writeback.c), again and again. Five such waits
/// show whether the limits are met again. A permanently slow disk costs a runtime's thread at most
/// one wait per period.
const SLOW_PERIOD: Duration = Duration::from_secs(1);

/// State of one file's writes.
#[derive(Default)]
pub(super) struct SlowDiskDetector {
    slow_until: Mutex<Option<Instant>>,
}

impl SlowDiskDetector {
    /// Records the duration of a write that ended at `now`.
    pub(super) fn record(&self, took: Duration, now: Instant) {
        if took > SLOW_WRITE {
            *self.slow_until() = Some(now + SLOW_PERIOD);
        }
    }

    /// Whether the next write belongs on a blocking thread.
    pub(super) fn is_slow(&self, now: Instant) -> bool {
        self.slow_until().is_some_and(|until| now < until)
    }

    fn slow_until(&self) -> parking_lot::MutexGuard<'_, Option<Instant>> {
        self.slow_until.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_write_marks_the_disk_as_slow_for_a_period() {
        let (detector, start) = (SlowDiskDetector::default(), Instant::now());
        detector.record(SLOW_WRITE, start);
        assert!(!detector.is_slow(start), "a usual duration is not slow");
        detector.record(SLOW_WRITE * 2, start);
        let (before, after) = (start + SLOW_PERIOD - SLOW_WRITE, start + SLOW_PERIOD);
        assert!(detector.is_slow(start) && detector.is_slow(before) && !detector.is_slow(after));
        detector.record(SLOW_WRITE * 2, before);
        assert!(detector.is_slow(after), "another slow write extends the period");
        detector.record(Duration::ZERO, before);
        assert!(detector.is_slow(after), "a fast write does not end the period");
    }
}
