//! Whether a disk keeps up, so that the runtime's threads do not wait for one that does not.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A write that took longer has waited for the disk: 256 KiB to memory take a quarter of a millisecond even at a gigabyte a second, and a
/// thread that lost its processor has it back after four (the scheduler's usual slice).
const SLOW_WRITE: Duration = Duration::from_millis(5);

/// How long it then counts as slow. The kernel lets a writer that is over its dirty limits wait for 200 ms at most at a time (`MAX_PAUSE` in
/// mm/page-writeback.c) and does so again and again: within five of those it shows whether that is over. A disk that is slow for good costs a
/// runtime's thread one wait in each such time at most.
const SLOW_PERIOD: Duration = Duration::from_secs(1);

/// What was seen of one file's writes.
#[derive(Default)]
pub(super) struct SlowDiskDetector {
    slow_until: Mutex<Option<Instant>>,
}

impl SlowDiskDetector {
    /// Notes how long a write took that ended now.
    pub(super) fn record(&self, took: Duration, now: Instant) {
        if took > SLOW_WRITE {
            *self.slow_until() = Some(now + SLOW_PERIOD);
        }
    }

    /// Whether the next write should be made where it may wait.
    pub(super) fn is_slow(&self, now: Instant) -> bool {
        self.slow_until().is_some_and(|until| now < until)
    }

    fn slow_until(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.slow_until.lock().expect("nothing panics while it holds a time")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_write_marks_the_disk_as_slow_for_a_period() {
        let (pace, start) = (SlowDiskDetector::default(), Instant::now());
        pace.record(SLOW_WRITE, start);
        assert!(!pace.is_slow(start), "as long as that is usual");
        pace.record(SLOW_WRITE * 2, start);
        let (before, after) = (start + SLOW_PERIOD - SLOW_WRITE, start + SLOW_PERIOD);
        assert!(pace.is_slow(start) && pace.is_slow(before) && !pace.is_slow(after));
        pace.record(SLOW_WRITE * 2, before);
        assert!(pace.is_slow(after), "it goes on while the disk does");
        pace.record(Duration::ZERO, before);
        assert!(pace.is_slow(after), "one that did not wait does not prove that the disk has caught up");
    }
}
