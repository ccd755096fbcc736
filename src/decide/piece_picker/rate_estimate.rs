//! Estimate of the arrival rate while any bytes are expected.

use std::time::{Duration, Instant};

/// Longer than the interval between batches of a piece's bytes, shorter than a relevant change.
const SAMPLE: Duration = Duration::from_millis(50);

/// Weight of the latest sample: the last ten samples dominate the average.
const WEIGHT: f64 = 0.2;

/// Bytes per second, as a moving average. Waiting for an answer counts, idling does not.
#[derive(Debug, Clone, Default)]
pub(super) struct RateEstimate {
    average: Option<f64>,
    /// The largest value of the average so far.
    peak: f64,
    bytes: u64,
    /// When the last sample was taken; `None` while no bytes are expected.
    since: Option<Instant>,
}

impl RateEstimate {
    pub(super) fn begin(&mut self, now: Instant) {
        if self.since.is_none() {
            (self.bytes, self.since) = (0, Some(now));
        }
    }

    pub(super) fn end(&mut self, now: Instant) {
        if self.bytes > 0 {
            self.sample(now);
        }
        self.since = None;
    }

    pub(super) fn add(&mut self, bytes: u64, now: Instant) {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.silence(now) >= SAMPLE {
            self.sample(now);
        }
    }

    fn silence(&self, now: Instant) -> Duration {
        self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    fn sample(&mut self, now: Instant) {
        // At least a millisecond: a burst says little about a sustained rate.
        let time = self.silence(now).max(Duration::from_millis(1)).as_secs_f64();
        let rate = self.bytes as f64 / time;
        // Weighted by duration, or a peer that answers in bursts looks faster than it is.
        let weight = 1.0 - (1.0 - WEIGHT).powf((time / SAMPLE.as_secs_f64()).min(10.0));
        let average = self.average.map_or(rate, |average| average + (rate - average) * weight);
        (self.average, self.peak) = (Some(average), self.peak.max(average));
        (self.bytes, self.since) = (0, Some(now));
    }

    pub(super) fn peak(&self) -> f64 {
        self.peak
    }

    /// The current estimate: silence lowers the average, at most by half.
    pub(super) fn now(&self, now: Instant) -> Option<f64> {
        let average = self.average?.max(1.0);
        let silence = self.silence(now);
        if silence <= 4 * SAMPLE {
            return Some(average);
        }
        Some(average.min(f64::midpoint(average, self.bytes as f64 / silence.as_secs_f64())))
    }
}
