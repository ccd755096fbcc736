//! The skew of this node's clock against the API server's clock, and when the skew is reported.
//!
//! An HTTP answer's `Date` has whole seconds, and the answer travels. So one answer gives bounds of
//! the skew and not the skew. The certain part counts: the bound next to zero.

use std::time::{Duration, Instant};

/// The difference that is allowed between two nodes' clocks, or a node's and the API server's. A
/// verdict is void this long after the end that the credential names.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// The skew that is reported. A node that is behind the API server by more than [`LEEWAY`] rejects
/// fresh tokens of peers. Certificates of `agent.admission=certificate` have the time of the node
/// that made them, and two nodes may be off in opposite directions, hence half. Claims suffer
/// earlier: a Lease holds for 15 s, and a node further ahead takes the Leases of others for
/// expired. A second holder of a claim does no harm, so 15 s are no reason for a warning.
pub const MAX_SKEW: Duration = Duration::from_secs(LEEWAY.as_secs() / 2);

/// The skew below which the clock counts as right again. The distance to [`MAX_SKEW`] keeps a clock
/// at the limit from being reported twice.
const CLEARED_BELOW: Duration = Duration::from_secs(20);

/// Answers in a row that have to agree: the clock may have been set during one of them.
const SAMPLES_TO_CHANGE: u32 = 2;

/// Interval of requests. A clock without time service loses or gains a second in hours to days; a
/// wrong clock is set at the start of a node. A thousand agents send three requests in two seconds.
const INTERVAL: Duration = Duration::from_secs(600);

/// Interval of requests after a failure, and after an answer that contradicts the state.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// This clock and the monotonic clock differ by so much when the clock stepped during a request.
const MAX_STEP: Duration = Duration::from_secs(1);

/// One answer of the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockSample {
    /// This node's clock when the request was sent, since 1970.
    pub sent: Duration,
    /// Time from the request to the answer, by the monotonic clock.
    pub took: Duration,
    /// This node's clock when the answer arrived, since 1970.
    pub received: Duration,
    /// The API server's clock, since 1970, cut to whole seconds.
    pub date: Duration,
}

impl ClockSample {
    /// Seconds by which this node's clock is certainly ahead (above zero) or behind (below zero);
    /// `None` if this node's clock stepped meanwhile.
    pub fn certain_seconds(&self) -> Option<f64> {
        let elapsed = self.received.checked_sub(self.sent)?;
        if elapsed.abs_diff(self.took) > MAX_STEP {
            return None;
        }
        let seconds = |time: Duration| time.as_secs_f64() - self.date.as_secs_f64();
        let (lower, upper) = (seconds(self.sent) - 1.0, seconds(self.received));
        Some(if lower > 0.0 { lower } else { upper.min(0.0) })
    }
}

/// A change of state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ClockChange {
    /// The clock is too far off, by so many seconds ahead (below zero: behind).
    Skewed(f64),
    /// The clock is right again.
    Corrected,
}

/// The skew over time.
#[derive(Debug, Clone)]
pub struct ClockSkew {
    due: Instant,
    seconds: Option<f64>,
    is_skewed: bool,
    /// Answers in a row that contradict the state.
    contradicting_samples: u32,
}

impl ClockSkew {
    /// The first request is due within 30 s. `jitter` from 0 to 1.
    pub fn new(now: Instant, jitter: f64) -> Self {
        Self { due: now + RETRY_INTERVAL.mul_f64(jitter), seconds: None, is_skewed: false, contradicting_samples: 0 }
    }

    /// The time of the next request.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// The last certain skew in seconds, and whether the skew is reported; `None` before the first
    /// answer.
    pub fn state(&self) -> Option<(f64, bool)> {
        self.seconds.map(|seconds| (seconds, self.is_skewed))
    }

    /// No answer arrived, or the clock stepped during the request.
    pub fn record_failure(&mut self, now: Instant, jitter: f64) {
        self.due = now + RETRY_INTERVAL.mul_f64(0.5 + jitter);
    }

    /// An answer arrived. Returns the change of state, if any.
    pub fn record_sample(&mut self, sample: &ClockSample, now: Instant, jitter: f64) -> Option<ClockChange> {
        let Some(seconds) = sample.certain_seconds() else {
            self.record_failure(now, jitter);
            return None;
        };
        self.seconds = Some(seconds);
        let off = seconds.abs();
        let disagrees = match self.is_skewed {
            true => off < CLEARED_BELOW.as_secs_f64(),
            false => off > MAX_SKEW.as_secs_f64(),
        };
        self.contradicting_samples = if disagrees { self.contradicting_samples + 1 } else { 0 };
        let change = (self.contradicting_samples >= SAMPLES_TO_CHANGE).then(|| {
            self.is_skewed = !self.is_skewed;
            self.contradicting_samples = 0;
            if self.is_skewed { ClockChange::Skewed(seconds) } else { ClockChange::Corrected }
        });
        let pause = if self.contradicting_samples > 0 { RETRY_INTERVAL } else { INTERVAL };
        self.due = now + pause.mul_f64(0.5 + jitter);
        change
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_790_000_000;

    /// An answer after `took` milliseconds, with this node's clock `ahead` seconds ahead.
    fn sample(ahead: f64, took: u64) -> ClockSample {
        let server = 0.4 + NOW as f64;
        let sent = Duration::from_secs_f64(server + ahead);
        let took = Duration::from_millis(took);
        // The server writes the date half-way.
        let date = Duration::from_secs_f64(server + took.as_secs_f64() / 2.0);
        ClockSample { sent, took, received: sent + took, date: Duration::from_secs(date.as_secs()) }
    }

    fn answer(skew: &mut ClockSkew, ahead: f64) -> Option<ClockChange> {
        skew.record_sample(&sample(ahead, 5), Instant::now(), 0.5)
    }

    #[test]
    fn a_skewed_clock_is_reported_once_and_its_correction_once() {
        let mut skew = ClockSkew::new(Instant::now(), 0.0);
        assert_eq!(skew.state(), None);
        assert_eq!([0.0, 1.0, -29.0].map(|ahead| answer(&mut skew, ahead)), [None; 3]);
        assert_eq!(answer(&mut skew, 90.0), None, "one answer changes nothing");
        assert_eq!(answer(&mut skew, 0.0), None);
        assert_eq!(answer(&mut skew, -90.0), None);
        assert!(matches!(answer(&mut skew, -90.0), Some(ClockChange::Skewed(seconds)) if seconds < -88.0));
        assert!(skew.state().unwrap().1);
        assert_eq!([-90.0, -25.0, 28.0, 0.0].map(|ahead| answer(&mut skew, ahead)), [None; 4], "not right yet");
        assert_eq!(answer(&mut skew, 0.0), Some(ClockChange::Corrected));
        assert_eq!(answer(&mut skew, 0.0), None);
    }

    #[test]
    fn a_clock_that_swings_around_the_limit_is_reported_once() {
        let mut skew = ClockSkew::new(Instant::now(), 0.0);
        let changes = (0..100).filter_map(|n| answer(&mut skew, if n % 4 < 2 { 33.0 } else { 27.0 })).count();
        assert_eq!(changes, 1);
    }

    #[test]
    fn a_clock_step_during_the_request_and_a_slow_answer_prove_no_skew() {
        let mut stepped = sample(0.0, 5);
        stepped.received += Duration::from_secs(3600);
        assert_eq!(stepped.certain_seconds(), None);
        stepped.received = stepped.sent - Duration::from_secs(1);
        assert_eq!(stepped.certain_seconds(), None);
        assert_eq!(sample(20.0, 60_000).certain_seconds(), Some(0.0), "an answer that took a minute");
    }

    #[test]
    fn requests_are_ten_minutes_apart_and_half_a_minute_after_a_contradicting_answer() {
        let (now, mut skew) = (Instant::now(), ClockSkew::new(Instant::now(), 0.0));
        for (ahead, pause) in
            [(0.0, INTERVAL), (90.0, RETRY_INTERVAL), (90.0, INTERVAL), (90.0, INTERVAL), (0.0, RETRY_INTERVAL)]
        {
            skew.record_sample(&sample(ahead, 5), now, 0.5);
            assert_eq!(skew.due(), now + pause, "{ahead}");
        }
        skew.record_failure(now, 0.5);
        assert_eq!(skew.due(), now + RETRY_INTERVAL);
    }

    proptest! {
        #[test]
        fn the_certain_skew_never_exceeds_the_real_skew(
            ahead in -100.0_f64..100.0, took in 0_u64..10_000, at in 0.0_f64..1.0, fraction in 0.0_f64..1.0,
        ) {
            let took = Duration::from_millis(took);
            let server = NOW as f64 + fraction;
            let sent = Duration::from_secs_f64(server + ahead);
            let date = Duration::from_secs((server + took.as_secs_f64() * at).floor() as u64);
            let sample = ClockSample { sent, took, received: sent + took, date };
            let certain = sample.certain_seconds().unwrap();
            prop_assert!(certain.abs() <= ahead.abs() + 1e-6, "{} of {}", certain, ahead);
            prop_assert!(certain == 0.0 || certain.signum() == ahead.signum());
            let slack = 1.0 + took.as_secs_f64();
            prop_assert!(certain.abs() >= ahead.abs() - slack - 1e-6, "{} of {}", certain, ahead);
        }
    }
}
