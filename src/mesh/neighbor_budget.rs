//! Rate limits for one neighbor. The task counts before decoding or verifying anything. Pure; the
//! time is an argument.

use std::time::Instant;

/// A token bucket: the burst, and the refill per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RateLimit {
    pub(super) burst: f64,
    pub(super) per_second: f64,
}

/// The rate limits of every neighbor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NeighborRateLimits {
    /// Gossip messages.
    pub(super) messages: RateLimit,
    /// Bytes of gossip messages.
    pub(super) bytes: RateLimit,
    /// Sync requests.
    pub(super) sync_requests: RateLimit,
    /// Requests for ranges of blobs.
    pub(super) ranges: RateLimit,
}

impl NeighborRateLimits {
    /// Far above the needs of an honest mesh, because an excess is a fault.
    pub(super) const DEFAULT: Self = Self {
        // A thousand nodes start together, each with 16 entries, and all entries come through one
        // neighbor. Then 5000 nodes, the maximum of Kubernetes, publish an entry a second each.
        messages: RateLimit { burst: 16_384.0, per_second: 5_000.0 },
        // As above: an entry of 128 blobs has 4.7 KiB, so that start has 75 MiB. Then more than a
        // link of 100 Mbit/s carries.
        bytes: RateLimit { burst: (96 << 20) as f64, per_second: (16 << 20) as f64 },
        // A neighbor that was cut off requests the entries of each of 256 members, two at a time,
        // and then the entries that are still missing.
        sync_requests: RateLimit { burst: 256.0, per_second: 64.0 },
        // Eight images of the largest size at once, then 8.6 Gbit/s in ranges of 256 KiB.
        ranges: RateLimit { burst: 8_192.0, per_second: 4_096.0 },
    };
}

/// The rest of a rate limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct NeighborBudget {
    rate: RateLimit,
    tokens: f64,
    refilled_at: Instant,
}

impl NeighborBudget {
    /// A full budget.
    pub(super) fn new(rate: RateLimit, now: Instant) -> Self {
        Self { rate, tokens: rate.burst, refilled_at: now }
    }

    /// Takes `amount`, or nothing when less is left.
    pub(super) fn try_take(&mut self, amount: f64, now: Instant) -> bool {
        self.refill(now);
        let fits = amount <= self.tokens;
        if fits {
            self.tokens -= amount;
        }
        fits
    }

    /// Whether the budget is full again.
    pub(super) fn is_full(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.tokens >= self.rate.burst
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.refilled_at).as_secs_f64();
        self.tokens = self.rate.burst.min(self.tokens + passed * self.rate.per_second);
        self.refilled_at = self.refilled_at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_per_second() {
        let start = Instant::now();
        let mut budget = NeighborBudget::new(RateLimit { burst: 3.0, per_second: 2.0 }, start);
        assert!((0..3).all(|_| budget.try_take(1.0, start)));
        assert!(!budget.try_take(1.0, start), "the burst is over");
        let later = start + Duration::from_millis(500);
        assert!(budget.try_take(1.0, later) && !budget.try_take(1.0, later));
        assert!(!budget.is_full(later));
        let much_later = later + Duration::from_secs(60);
        assert!(budget.is_full(much_later));
        assert!(!budget.try_take(4.0, much_later), "the budget does not grow past the burst");
        assert!(budget.try_take(3.0, much_later), "a rejected amount takes nothing");
    }
}
