//! How much one neighbour may send, whatever it is. Counted before anything is decoded or verified. Pure; the time is an argument.

use std::time::Instant;

/// What may come: so much at once, and so much each second after that.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rate {
    pub(super) burst: f64,
    pub(super) per_second: f64,
}

/// The rates that a neighbour has to keep to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Limits {
    /// Gossip messages.
    pub(super) messages: Rate,
    /// Their bytes.
    pub(super) bytes: Rate,
    /// Questions.
    pub(super) questions: Rate,
    /// Requests for ranges of blobs.
    pub(super) ranges: Rate,
}

impl Limits {
    /// Far above what an honest mesh needs, because whoever exceeds them is blamed.
    pub(super) const DEFAULT: Self = Self {
        // A thousand nodes start together, each with 16 entries, and all come through one neighbour. Then 5000 nodes, as many as
        // Kubernetes supports, tell an entry a second each.
        messages: Rate { burst: 16_384.0, per_second: 5_000.0 },
        // The same: an entry of 128 blobs has 4.7 KiB, and that start 75 MiB. Then more than a link of 100 Mbit/s carries.
        bytes: Rate { burst: (96 << 20) as f64, per_second: (16 << 20) as f64 },
        // A neighbour that was cut off asks for each of 256 members' entries, two at a time; what it misses after that it asks for again.
        questions: Rate { burst: 256.0, per_second: 64.0 },
        // Eight images of the largest size at once, then 8.6 Gbit/s in ranges of 256 KiB.
        ranges: Rate { burst: 8_192.0, per_second: 4_096.0 },
    };
}

/// What is left of a rate.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    rate: Rate,
    left: f64,
    at: Instant,
}

impl Allowance {
    /// All of it.
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, left: rate.burst, at: now }
    }

    /// Takes so much, or nothing when less is left.
    pub(super) fn take(&mut self, amount: f64, now: Instant) -> bool {
        self.refill(now);
        let fits = amount <= self.left;
        if fits {
            self.left -= amount;
        }
        fits
    }

    /// Whether all of it is there again.
    pub(super) fn is_full(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.left >= self.rate.burst
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = self.rate.burst.min(self.left + passed * self.rate.per_second);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_passes_and_then_as_much_as_each_second_brings() {
        let start = Instant::now();
        let mut allowance = Allowance::new(Rate { burst: 3.0, per_second: 2.0 }, start);
        assert!((0..3).all(|_| allowance.take(1.0, start)));
        assert!(!allowance.take(1.0, start), "the burst is over");
        let later = start + Duration::from_millis(500);
        assert!(allowance.take(1.0, later) && !allowance.take(1.0, later));
        assert!(!allowance.is_full(later));
        let much_later = later + Duration::from_secs(60);
        assert!(allowance.is_full(much_later));
        assert!(!allowance.take(4.0, much_later), "it does not grow past the burst");
        assert!(allowance.take(3.0, much_later), "what did not fit took nothing");
    }
}
