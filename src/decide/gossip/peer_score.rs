//! Faults of members, bans, and rate limits on members' messages.

use std::time::{Duration, Instant};

use super::fault::GossipFault;
use crate::util::token_bucket::{Rate, TokenBucket};

/// Points at which a member is banned, and the time in which points fall to a half. A broken disk
/// or a broken release makes some points, and a lying member makes any number.
const BAN_POINTS: f64 = 100.0;
const HALF_LIFE: Duration = Duration::from_secs(60);

/// Duration of a ban.
const BAN_DURATION: Duration = Duration::from_secs(600);

/// Faults, ban and rate limits of one member.
#[derive(Debug, Clone, Default)]
pub(super) struct PeerScore {
    points: f64,
    updated_at: Option<Instant>,
    banned_until: Option<Instant>,
    /// The member's own entries, and its requests.
    pub(super) entries: TokenBucket,
    pub(super) requests: TokenBucket,
    pub(super) suspicions: TokenBucket,
    /// The member's statements about itself: introductions, refutations.
    pub(super) introductions: TokenBucket,
    pub(super) refutations: TokenBucket,
}

impl PeerScore {
    /// Records a fault. Returns the duration of the ban if this fault causes a ban.
    pub(super) fn record_fault(&mut self, fault: GossipFault, now: Instant) -> Option<Duration> {
        let since = self.updated_at.map_or(Duration::ZERO, |at| now.duration_since(at));
        self.points *= 0.5f64.powf(since.as_secs_f64() / HALF_LIFE.as_secs_f64());
        self.points += fault.points();
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

    /// Remaining time of the ban.
    pub(super) fn banned_for(&self, now: Instant) -> Option<Duration> {
        self.banned_until.filter(|until| *until > now).map(|until| until.duration_since(now))
    }
}

/// A publisher gathers changes for a second and makes at most 16 entries of one batch. A restart or
/// a healed partition brings some batches at once.
pub(super) const ENTRY_LIMIT: Rate = Rate::per_second(64, 16);

/// A new member of 5000 nodes requests 20 pages of introductions and 20 of snapshots. Later,
/// neighbors send a few requests a minute.
pub(super) const REQUEST_LIMIT: Rate = Rate::per_second(64, 4);

/// A rack that loses its switch: a node has some dozens of neighbors, and suspects all of them.
pub(super) const SUSPICION_LIMIT: Rate = Rate::per_second(64, 4);

/// A credential is renewed every three quarters of an hour. A node that is starved, or moves,
/// introduces itself or refutes more often.
pub(super) const INTRODUCTION_LIMIT: Rate = Rate { burst: 16, tokens: 1, period: Duration::from_secs(5) };
