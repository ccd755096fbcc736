//! The bytes that may pass now, so that at most a rate passes over time.
//!
//! Not here: the waiting, and the order of the waiting transfers (the transfer adapter).

use std::time::{Duration, Instant};

use crate::util::token_bucket::{Rate, TokenBucket};

/// Bytes that one take may have. Small enough that many streams advance in step at a low rate;
/// large enough that takes cost nothing at a high rate: 10 Gbit/s are 19 000 takes a second.
pub const CHUNK: u64 = 64 << 10;

/// The lowest rate in bytes per second; a lower setting counts as this. The receiver aborts a
/// transfer below 64 KiB in ten seconds, and cannot see that a limit is the reason.
pub const MIN_RATE: u64 = 64 << 10;

/// Minimum rate of one transfer in bytes per second: five times the rate at which the receiver
/// aborts the transfer. Under a limit, so few transfers run that each gets this rate.
const MIN_TRANSFER_RATE: u64 = 32 << 10;

/// A rate of bytes, and the credit gathered under the rate.
#[derive(Debug, Clone)]
pub struct ByteBucket {
    bytes_per_second: u64,
    bucket: TokenBucket,
}

impl ByteBucket {
    /// A full bucket. `rate` is in bytes per second; 0 is no limit.
    pub fn new(rate: u64) -> Self {
        Self { bytes_per_second: at_least_min(rate), bucket: TokenBucket::default() }
    }

    /// Changes the rate. Gathered credit stays up to the new capacity; a time without a limit
    /// leaves none.
    pub fn set_rate(&mut self, rate: u64, now: Instant) {
        self.bucket.refill(self.rate(), now);
        self.bytes_per_second = at_least_min(rate);
    }

    /// Takes `bytes`, at most a [`CHUNK`], because the bucket may never hold more.
    ///
    /// # Errors
    /// The wait until the credit suffices if no other caller takes credit. The take changed
    /// nothing.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        if self.bytes_per_second == 0 { Ok(()) } else { self.bucket.take(bytes.min(CHUNK), self.rate(), now) }
    }

    /// Bytes that may pass at once after a pause: those of a quarter of a second, so that a late
    /// wake-up loses no credit, and at least a chunk, so that any take can succeed.
    pub fn capacity(&self) -> u64 {
        if self.bytes_per_second == 0 { 0 } else { (self.bytes_per_second / 4).max(CHUNK) }
    }

    fn rate(&self) -> Rate {
        Rate::per_second(self.capacity(), self.bytes_per_second)
    }
}

/// Transfers that may run at a time under a rate: each gets a worthwhile part, and one always runs.
pub fn concurrent_transfers(rate: u64) -> usize {
    match rate {
        0 => usize::MAX,
        rate => usize::try_from(rate.max(MIN_RATE) / MIN_TRANSFER_RATE).unwrap_or(usize::MAX),
    }
}

fn at_least_min(rate: u64) -> u64 {
    if rate == 0 { 0 } else { rate.max(MIN_RATE) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_full_bucket_gives_its_capacity_at_once_and_then_the_rate() {
        let start = Instant::now();
        let mut bucket = ByteBucket::new(8 * CHUNK);
        assert_eq!(bucket.capacity(), 2 * CHUNK, "the bytes of a quarter of a second");
        assert_eq!((bucket.take(CHUNK, start), bucket.take(CHUNK, start)), (Ok(()), Ok(())));
        assert_eq!(bucket.take(CHUNK, start), Err(SECOND / 8));
        assert_eq!(bucket.take(CHUNK, start + SECOND / 16), Err(SECOND / 16), "half of the credit is there");
        assert_eq!(bucket.take(CHUNK, start + SECOND / 8), Ok(()));
    }

    #[test]
    fn a_low_rate_still_lets_a_whole_chunk_through() {
        let start = Instant::now();
        let mut bucket = ByteBucket::new(1);
        assert_eq!(bucket.take(u64::MAX, start), Ok(()), "the take counts as one chunk");
        assert_eq!(bucket.take(CHUNK, start), Err(SECOND), "the lowest rate counts");
    }

    #[test]
    fn a_new_rate_is_in_force_at_once() {
        let start = Instant::now();
        let mut bucket = ByteBucket::new(MIN_RATE);
        bucket.take(CHUNK, start).unwrap();
        assert_eq!(bucket.take(CHUNK, start), Err(SECOND));
        bucket.set_rate(4 * MIN_RATE, start);
        assert_eq!(bucket.take(CHUNK, start), Err(SECOND / 4));
        bucket.set_rate(0, start);
        (0..1000).for_each(|_| bucket.take(CHUNK, start).unwrap());
        bucket.set_rate(MIN_RATE, start + 10 * SECOND);
        assert_eq!(bucket.take(CHUNK, start + 10 * SECOND), Err(SECOND), "the time without a limit leaves no credit");
    }

    #[test]
    fn every_transfer_under_a_limit_has_at_least_the_minimum_rate() {
        assert_eq!([0, 1, MIN_RATE, 3 * MIN_RATE].map(concurrent_transfers), [usize::MAX, 2, 2, 6]);
    }

    proptest! {
        #[test]
        fn any_window_passes_at_most_rate_times_time_plus_the_capacity(
            rate in prop_oneof![MIN_RATE..10 * MIN_RATE, 1_u64 << 20..2 << 30],
            takes in proptest::collection::vec((0..=CHUNK, 0_u64..200_000_000), 1..200),
        ) {
            let (start, mut now) = (Instant::now(), 0);
            let mut bucket = ByteBucket::new(rate);
            let mut passed = Vec::new();
            for (bytes, pause) in takes {
                now += pause;
                if bucket.take(bytes, start + Duration::from_nanos(now)).is_ok() {
                    passed.push((now, bytes));
                }
            }
            for first in 0..passed.len() {
                let mut sum = 0;
                for (at, bytes) in &passed[first..] {
                    sum += u128::from(*bytes) * 1_000_000_000;
                    let elapsed = u128::from(at - passed[first].0);
                    let allowed = elapsed * u128::from(rate) + u128::from(bucket.capacity()) * 1_000_000_000;
                    prop_assert!(sum <= allowed, "{sum} billionths of a byte where {allowed} are allowed");
                }
            }
        }

        #[test]
        fn a_take_succeeds_after_the_wait_that_the_bucket_gave(
            rates in proptest::collection::vec(1_u64..2 << 30, 1..20),
            bytes in 0..=2 * CHUNK,
        ) {
            let mut now = Instant::now();
            let mut bucket = ByteBucket::new(rates[0]);
            for rate in rates {
                bucket.set_rate(rate, now);
                if let Err(wait) = bucket.take(bytes, now) {
                    prop_assert!(wait <= SECOND, "a chunk takes a second at most: {wait:?}");
                    now += wait;
                    prop_assert_eq!(bucket.take(bytes, now), Ok(()));
                }
            }
        }

        #[test]
        fn frequent_takes_lose_no_credit(rate in MIN_RATE..2 << 30, attempts in 1_u32..1000) {
            let start = Instant::now();
            let mut bucket = ByteBucket::new(rate);
            while bucket.take(CHUNK, start).is_ok() {}
            let wait = bucket.take(CHUNK, start).unwrap_err();
            for attempt in 0..attempts {
                prop_assert!(bucket.take(CHUNK, start + wait * attempt / attempts).is_err() || wait.is_zero());
            }
            prop_assert_eq!(bucket.take(CHUNK, start + wait), Ok(()));
        }
    }
}
