//! Renewal times of a pin. Ten GiB over a link of 8 Mbit/s take three hours, and a pin that ends
//! before the image record exists leaves the blobs to containerd's garbage collector.

use std::time::{Duration, Instant};

/// Tries of a renewal before the pin ends: one at half life, then one after each 32nd of the life.
const TRIES_PER_LIFE: u32 = 32;

/// The time that one pin has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinTerm {
    lifetime: Duration,
    until: Instant,
    failed_at: Option<Instant>,
}

impl PinTerm {
    /// The term of a pin that was made, or is about to be made, at `now`.
    pub fn new(lifetime: Duration, now: Instant) -> Self {
        Self { lifetime, until: now + lifetime, failed_at: None }
    }

    /// The time of the next renewal.
    pub fn due(&self) -> Instant {
        let half = self.until - self.lifetime / 2;
        self.failed_at.map_or(half, |failed| half.max(failed + self.lifetime / TRIES_PER_LIFE))
    }

    /// Records that a renewal begun at `now` succeeded.
    pub fn record_renewal(&mut self, now: Instant) {
        *self = Self::new(self.lifetime, now);
    }

    /// Records that a renewal failed at `now`. True for the first failure since the last success.
    pub fn record_failure(&mut self, now: Instant) -> bool {
        self.failed_at.replace(now).is_none()
    }

    /// The time until the pin ends.
    pub fn left(&self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Duration = Duration::from_secs(3200);

    #[test]
    fn a_pin_is_renewed_at_half_life_for_a_whole_life() {
        let start = Instant::now();
        let mut term = PinTerm::new(LIFE, start);
        assert_eq!((term.due(), term.left(start)), (start + LIFE / 2, LIFE));
        term.record_renewal(term.due());
        assert_eq!((term.due(), term.left(start + LIFE)), (start + LIFE, LIFE / 2));
        assert_eq!(term.left(start + 2 * LIFE), Duration::ZERO);
    }

    #[test]
    fn a_failed_renewal_is_tried_sixteen_times_before_the_pin_ends_and_reported_once() {
        let start = Instant::now();
        let mut term = PinTerm::new(LIFE, start);
        let mut reports = Vec::new();
        while term.due() < start + LIFE {
            reports.push(term.record_failure(term.due()));
        }
        assert_eq!(reports.len(), 16);
        assert!(reports[0] && !reports[1..].contains(&true), "{reports:?}");
        term.record_renewal(start + LIFE);
        assert!(term.record_failure(term.due()), "the first failure after a success");
    }
}
