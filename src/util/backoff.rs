//! Exponential back-off. The caller counts the failures and draws the jitter, so that decisions are
//! pure and tests are exact.

use std::time::Duration;

/// Waits between retries: the first, doubled by each further failure up to the longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The wait after the first failure.
    pub first: Duration,
    /// The wait that no number of failures exceeds.
    pub longest: Duration,
}

impl Backoff {
    /// The wait after one more failure than `failures`.
    pub fn wait(self, failures: u32) -> Duration {
        let factor = 1_u32.checked_shl(failures).unwrap_or(u32::MAX);
        self.first.saturating_mul(factor).min(self.longest)
    }

    /// The same wait, less up to half by `jitter` (random, in 0..1), so that the retries of many
    /// agents do not stay in step.
    pub fn jittered_wait(self, failures: u32, jitter: f64) -> Duration {
        self.wait(failures).mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BACKOFF: Backoff = Backoff { first: Duration::from_secs(2), longest: Duration::from_secs(60) };

    #[test]
    fn the_wait_doubles_up_to_the_longest() {
        let waits = [0, 1, 4, 5, 31, 32, u32::MAX].map(|failures| BACKOFF.wait(failures).as_secs());
        assert_eq!(waits, [2, 4, 32, 60, 60, 60, 60]);
    }

    proptest! {
        #[test]
        fn jitter_leaves_from_a_half_to_the_whole_of_the_wait(failures: u32, jitter in -1.0..2.0) {
            let (whole, jittered) = (BACKOFF.wait(failures), BACKOFF.jittered_wait(failures, jitter));
            prop_assert!(whole / 2 <= jittered && jittered <= whole);
        }
    }
}
