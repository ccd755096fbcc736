//! Token bucket: tokens that may be taken now, so that at most a rate is taken over time.
//!
//! Over any window of t at most tokens * t / period + burst tokens are taken, exactly: credit is an
//! integer, and only existing credit is taken. Not here: the waiting.

use std::time::{Duration, Instant};

/// Credit of one token. The credit of a nanosecond is then a whole number for any whole number of
/// tokens per second.
const TOKEN: u128 = 1_000_000_000_000_000_000;

/// The limit of a [`TokenBucket`]: `burst` tokens at once, and then `tokens` in each `period`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Most tokens that are taken at once, after a pause.
    pub burst: u64,
    /// Tokens per period; 0 leaves the bucket with its burst.
    pub tokens: u64,
    /// Not zero.
    pub period: Duration,
}

impl Rate {
    /// `burst` tokens at once, and then `tokens` per second.
    pub const fn per_second(burst: u64, tokens: u64) -> Self {
        Self { burst, tokens, period: Duration::from_secs(1) }
    }

    fn max_credit(self) -> u128 {
        u128::from(self.burst) * TOKEN
    }

    fn credit_per_nanosecond(self) -> u128 {
        u128::from(self.tokens) * TOKEN / self.period.as_nanos()
    }
}

/// The credit of one bucket. Each call names the rate, which may change between calls. The default
/// bucket is full.
#[derive(Debug, Clone, Default)]
pub struct TokenBucket {
    credit: u128,
    /// `None` before the first call: the bucket is full then.
    refilled_at: Option<Instant>,
}

impl TokenBucket {
    /// Takes the tokens, or nothing. More tokens than the burst are never taken.
    ///
    /// # Errors
    /// The wait until the credit suffices if no other caller takes credit.
    pub fn take(&mut self, tokens: u64, rate: Rate, now: Instant) -> Result<(), Duration> {
        self.refill(rate, now);
        let wanted = u128::from(tokens) * TOKEN;
        match self.credit.checked_sub(wanted) {
            Some(left) => {
                self.credit = left;
                Ok(())
            }
            // Rounded up, so the credit suffices after the wait.
            None => Err(match rate.credit_per_nanosecond() {
                0 => Duration::MAX,
                gain => nanoseconds((wanted - self.credit).div_ceil(gain)),
            }),
        }
    }

    /// Takes the tokens, or nothing and returns false.
    pub fn try_take(&mut self, tokens: u64, rate: Rate, now: Instant) -> bool {
        self.take(tokens, rate, now).is_ok()
    }

    /// Whether the bucket has its whole burst.
    pub fn is_full(&mut self, rate: Rate, now: Instant) -> bool {
        self.refill(rate, now);
        self.credit == rate.max_credit()
    }

    /// Adds the credit since the last call. A clock that stands still or goes back adds no credit.
    pub fn refill(&mut self, rate: Rate, now: Instant) {
        let before = self.refilled_at.unwrap_or(now);
        let credit = self.refilled_at.map_or(u128::MAX, |_| self.credit);
        let gained = now.saturating_duration_since(before).as_nanos().saturating_mul(rate.credit_per_nanosecond());
        self.credit = credit.saturating_add(gained).min(rate.max_credit());
        self.refilled_at = Some(before.max(now));
    }
}

fn nanoseconds(count: u128) -> Duration {
    Duration::from_nanos(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rates() -> impl Strategy<Value = Rate> {
        let periods = prop_oneof![Just(Duration::from_secs(1)), (1_u64..400).prop_map(Duration::from_secs)];
        let tokens = prop_oneof![1_u64..100, 1_u64 << 16..2 << 30];
        (1_u64..1 << 30, tokens, periods).prop_map(|(burst, tokens, period)| Rate { burst, tokens, period })
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let start = Instant::now();
        let (mut bucket, rate) = (TokenBucket::default(), Rate::per_second(3, 2));
        assert!((0..3).all(|_| bucket.try_take(1, rate, start)));
        assert!(!bucket.try_take(1, rate, start), "the burst is over");
        let later = start + Duration::from_millis(500);
        assert!(bucket.try_take(1, rate, later) && !bucket.try_take(1, rate, later));
        assert!(!bucket.is_full(rate, later));
        let much_later = later + Duration::from_secs(60);
        assert!(bucket.is_full(rate, much_later));
        assert!(!bucket.try_take(4, rate, much_later), "the credit does not grow past the burst");
        assert!(bucket.try_take(3, rate, much_later), "a rejected take takes nothing");
    }

    #[test]
    fn a_rate_of_zero_leaves_the_burst() {
        let start = Instant::now();
        let (mut bucket, rate) = (TokenBucket::default(), Rate::per_second(1, 0));
        assert!(bucket.try_take(1, rate, start));
        assert_eq!(bucket.take(1, rate, start + Duration::from_secs(1 << 20)), Err(Duration::MAX));
    }

    #[test]
    fn a_smaller_burst_counts_at_once_and_a_larger_burst_adds_no_credit() {
        let start = Instant::now();
        let [small, large] = [2, 8].map(|burst| Rate { burst, tokens: 1, period: Duration::from_secs(20) });
        let mut bucket = TokenBucket::default();
        bucket.refill(large, start);
        assert!(bucket.try_take(2, small, start) && !bucket.try_take(1, large, start));
        assert_eq!(bucket.take(1, large, start), Err(large.period));
    }

    proptest! {
        #[test]
        fn any_window_passes_at_most_rate_times_time_plus_the_burst(
            rate in rates(),
            takes in proptest::collection::vec((0..1_u64 << 20, 0_u64..200_000_000), 1..200),
        ) {
            let (start, mut now) = (Instant::now(), 0);
            let mut bucket = TokenBucket::default();
            let mut passed = Vec::new();
            for (tokens, pause) in takes {
                now += pause;
                if bucket.take(tokens, rate, start + Duration::from_nanos(now)).is_ok() {
                    passed.push((now, tokens));
                }
            }
            for first in 0..passed.len() {
                let mut sum = 0;
                for (at, tokens) in &passed[first..] {
                    sum += u128::from(*tokens) * TOKEN;
                    let allowed =
                        u128::from(at - passed[first].0) * rate.credit_per_nanosecond() + rate.max_credit();
                    prop_assert!(sum <= allowed, "{sum} where {allowed} are allowed");
                }
            }
        }

        #[test]
        fn a_take_succeeds_after_the_wait_that_the_bucket_gave_and_not_before(rates in proptest::collection::vec(rates(), 1..20)) {
            let mut now = Instant::now();
            let mut bucket = TokenBucket::default();
            bucket.refill(Rate::per_second(0, 0), now);
            for rate in rates {
                let tokens = rate.burst.min(1000);
                if let Err(wait) = bucket.take(tokens, rate, now) {
                    let early = wait - Duration::from_nanos(1);
                    prop_assert!(bucket.take(tokens, rate, now + early).is_err());
                    now += wait;
                    prop_assert_eq!(bucket.take(tokens, rate, now), Ok(()));
                }
            }
        }
    }
}
