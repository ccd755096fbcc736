//! What members did that no honest one does, and how much any of them may send.

use std::time::{Duration, Instant};

/// Points at which a member is banned, and how long it takes for half of them to be forgotten. A disk or a release that is broken makes
/// some; a liar makes as many as it pleases.
const BAN_POINTS: f64 = 100.0;
const HALF_LIFE: Duration = Duration::from_secs(60);

/// How long nothing of a banned member is accepted.
const BAN_DURATION: Duration = Duration::from_secs(600);

/// What a misdeed counts. What a broken neighbour may have passed on in good faith counts less than what it must have made itself.
fn points(fault: &str) -> f64 {
    match fault {
        "contradiction" => 100.0,
        "forged" | "oversized" | "malformed" => 34.0,
        "snapshot_mismatch" => 20.0,
        "too_many" => 5.0,
        _ => 10.0,
    }
}

/// One member's record.
#[derive(Debug, Clone, Default)]
pub(super) struct PeerScore {
    points: f64,
    updated_at: Option<Instant>,
    banned_until: Option<Instant>,
    /// Its own entries, and what it asks.
    pub(super) entries: MessageLimiter,
    pub(super) requests: MessageLimiter,
    pub(super) suspicions: MessageLimiter,
    /// What it says of itself: introductions, refutations.
    pub(super) introductions: MessageLimiter,
    pub(super) refutations: MessageLimiter,
}

impl PeerScore {
    /// Counts a misdeed; how long it is banned, if it is by this.
    pub(super) fn record_fault(&mut self, fault: &'static str, now: Instant) -> Option<Duration> {
        let since = self.updated_at.map_or(Duration::ZERO, |at| now.duration_since(at));
        self.points *= 0.5f64.powf(since.as_secs_f64() / HALF_LIFE.as_secs_f64());
        self.points += points(fault);
        self.updated_at = Some(now);
        if self.points < BAN_POINTS || self.is_banned(now) {
            return None;
        }
        self.banned_until = Some(now + BAN_DURATION);
        Some(BAN_DURATION)
    }

    pub(super) fn is_banned(&self, now: Instant) -> bool {
        self.banned_until.is_some_and(|until| until > now)
    }

    /// For how much longer.
    pub(super) fn banned_for(&self, now: Instant) -> Option<Duration> {
        self.banned_until.filter(|until| *until > now).map(|until| until.duration_since(now))
    }
}

/// So many at once, and so many a second.
#[derive(Debug, Clone, Default)]
pub(super) struct MessageLimiter {
    used: f64,
    at: Option<Instant>,
}

/// A rate and its burst.
pub(super) struct MessageLimit {
    pub(super) burst: f64,
    pub(super) per_second: f64,
}

/// A publisher gathers for a second and makes at most 16 entries of one batch; a restart, or a partition that heals, brings some batches at
/// once.
pub(super) const ENTRY_LIMIT: MessageLimit = MessageLimit { burst: 64.0, per_second: 16.0 };

/// A newcomer to 5000 nodes asks for 20 pages of introductions and 20 of snapshots; afterwards neighbours ask a few times a minute.
pub(super) const REQUEST_LIMIT: MessageLimit = MessageLimit { burst: 64.0, per_second: 4.0 };

/// A rack that loses its switch: a node has some dozens of neighbours.
pub(super) const SUSPICION_LIMIT: MessageLimit = MessageLimit { burst: 64.0, per_second: 4.0 };

/// A credential is renewed every three quarters of an hour; a node that is starved, or moves, has more to say.
pub(super) const INTRODUCTION_LIMIT: MessageLimit = MessageLimit { burst: 16.0, per_second: 0.2 };

impl MessageLimiter {
    /// Takes one, if there is one.
    pub(super) fn try_take(&mut self, rate: &MessageLimit, now: Instant) -> bool {
        let passed = self.at.map_or(0.0, |at| now.duration_since(at).as_secs_f64());
        self.at = Some(now);
        self.used = (self.used - passed * rate.per_second).max(0.0);
        if self.used + 1.0 > rate.burst {
            return false;
        }
        self.used += 1.0;
        true
    }
}
