//! The connections to one member: whether the member answers, and when to dial.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{BACKOFF, MeshConnectionId};

/// Ticks without an answer after which a neighbor is silent. The next ping goes out
/// [`super::PING_INTERVAL`] after the last answer, so a healthy neighbor has a second to answer. A
/// dead one is found 1 to 2 s after its death, and its neighbors agree within 3 s.
///
/// Ticks are counted, not time: a starved agent counts few ticks, and suspects no neighbor.
const SILENT_TICKS: u32 = 7;

/// Ticks in which a lost connection may come back before the loss counts as silence.
const LOST_TICKS: u32 = 6;

/// Extra ticks for a neighbor that was suspected and refuted: four for each refutation, at most 12.
const TICKS_PER_REFUTATION: u32 = 4;
const MAX_EXTRA_TICKS: u32 = 12;

/// How long a refutation gives a neighbor extra ticks.
const REFUTATION_LIFE: Duration = Duration::from_secs(600);

/// After so long, a dial without a reported end counts as over.
const MAX_DIAL_TIME: Duration = Duration::from_secs(15);

/// The connections to one member, and the state of its dials.
#[derive(Debug, Clone, Default)]
pub(super) struct MemberConnections {
    open: BTreeMap<MeshConnectionId, MemberConnection>,
    /// Start of the present handshake or dial.
    dialing_since: Option<Instant>,
    dial_at: Option<Instant>,
    failed_dials: u32,
    /// Ticks since the last connection broke without an announced close.
    lost_ticks: Option<u32>,
    /// The member is dialed because another member suspects it.
    is_suspected: bool,
    /// Of two connections, the connection over which the member had answered broke.
    broke_while_answering: bool,
    /// The member announced that it closes its connections.
    is_close_announced: bool,
    refutations: u32,
    refuted_at: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
struct MemberConnection {
    /// The member answered over this connection. A member that rejects the peer opens the
    /// connection and then closes it.
    has_answered: bool,
    silent_ticks: u32,
}

/// The news in a ping answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PingOutcome {
    /// The first answer over any present connection.
    First,
    /// The member was answering before.
    Repeated,
}

impl MemberConnections {
    /// Whether there is no connection, no lost connection and no dial.
    pub(super) fn is_idle(&self) -> bool {
        self.open.is_empty() && self.lost_ticks.is_none() && self.dialing_since.is_none()
    }

    /// Whether the member answers over some connection.
    pub(super) fn is_answering(&self) -> bool {
        self.open.values().any(|connection| connection.has_answered)
    }

    pub(super) fn is_connected(&self) -> bool {
        !self.open.is_empty()
    }

    /// Whether an answer came within the last second.
    pub(super) fn has_answered_recently(&self) -> bool {
        self.open.values().any(|connection| connection.has_answered && connection.silent_ticks <= SILENT_TICKS / 2)
    }

    pub(super) fn insert(&mut self, connection: MeshConnectionId) {
        // The peer proved its key, so the peer is alive, even if it rejects this agent and closes.
        (self.dialing_since, self.lost_ticks, self.is_suspected) = (None, None, false);
        self.is_close_announced = false;
        self.open.insert(connection, MemberConnection::default());
    }

    pub(super) fn record_answer(&mut self, connection: MeshConnectionId) -> PingOutcome {
        let was_answering = self.is_answering();
        // A connection given up as silent may still bring an answer, which does not count.
        let Some(connection) = self.open.get_mut(&connection) else { return PingOutcome::Repeated };
        (connection.has_answered, connection.silent_ticks) = (true, 0);
        (self.failed_dials, self.lost_ticks, self.is_suspected, self.broke_while_answering) = (0, None, false, false);
        if was_answering { PingOutcome::Repeated } else { PingOutcome::First }
    }

    /// A connection closed. True when the member has to be dialed at once.
    pub(super) fn remove(&mut self, connection: MeshConnectionId, now: Instant, jitter: f64) -> bool {
        let was_answering = self.is_answering();
        if self.open.remove(&connection).is_none() {
            return false;
        }
        self.broke_while_answering |= was_answering && !self.is_answering();
        if self.is_connected() {
            return false;
        }
        let is_suspicious = std::mem::take(&mut self.broke_while_answering) && !self.is_close_announced;
        if is_suspicious {
            self.lost_ticks = Some(0);
        } else {
            self.back_off(now, jitter);
        }
        is_suspicious
    }

    /// The member announced that it closes its connections and stays a member.
    pub(super) fn mark_close_announced(&mut self) {
        self.is_close_announced = true;
    }

    /// Takes all connections, which the caller closes, and ends the dial.
    pub(super) fn take_all(&mut self) -> Vec<MeshConnectionId> {
        (self.lost_ticks, self.dialing_since, self.is_suspected, self.broke_while_answering) =
            (None, None, false, false);
        std::mem::take(&mut self.open).into_keys().collect()
    }

    /// Counts a tick. True when the member has been silent for too long.
    pub(super) fn tick(&mut self, now: Instant) -> bool {
        if self.dialing_since.is_some_and(|since| now.duration_since(since) > MAX_DIAL_TIME) {
            self.dialing_since = None;
        }
        if self.open.is_empty() && self.lost_ticks.is_none() {
            return false;
        }
        let extra = self.extra_ticks(now);
        if let Some(lost) = &mut self.lost_ticks {
            *lost += 1;
            return *lost >= LOST_TICKS + extra;
        }
        self.open.values_mut().for_each(|connection| connection.silent_ticks += 1);
        self.open.values().all(|connection| connection.silent_ticks >= SILENT_TICKS + extra)
    }

    fn extra_ticks(&mut self, now: Instant) -> u32 {
        if self.refuted_at.is_some_and(|at| now.duration_since(at) > REFUTATION_LIFE) {
            (self.refutations, self.refuted_at) = (0, None);
        }
        (self.refutations * TICKS_PER_REFUTATION).min(MAX_EXTRA_TICKS)
    }

    /// The member refuted a suspicion: alive, and slower than expected.
    pub(super) fn record_refutation(&mut self, now: Instant) {
        self.refutations = (self.refutations + 1).min(MAX_EXTRA_TICKS);
        self.refuted_at = Some(now);
        self.open.values_mut().for_each(|connection| connection.silent_ticks = 0);
        self.lost_ticks = None;
    }

    /// Whether a handshake or a dial may begin now.
    pub(super) fn may_dial(&self, now: Instant) -> bool {
        self.open.is_empty() && self.dialing_since.is_none() && self.dial_at.is_none_or(|at| at <= now)
    }

    pub(super) fn is_dialing(&self) -> bool {
        self.dialing_since.is_some()
    }

    pub(super) fn begin_dial(&mut self, now: Instant) {
        self.dialing_since = Some(now);
    }

    /// Permits a dial from `at` on, or from the earlier time that is set.
    pub(super) fn allow_dial_from(&mut self, at: Instant) {
        self.dial_at = self.dial_at.map_or(Some(at), |before| Some(before.min(at)));
    }

    /// Forgets earlier failed dials.
    pub(super) fn reset_back_off(&mut self) {
        (self.failed_dials, self.dial_at) = (0, None);
    }

    /// The handshake ended, and a dial may follow: a handshake itself causes no back-off.
    pub(super) fn end_handshake(&mut self) {
        (self.dialing_since, self.lost_ticks, self.is_suspected) = (None, None, false);
    }

    /// Another member suspects this one. If the dial fails, also a dial in flight, the failure
    /// counts as a lost connection. False when a connection is open.
    pub(super) fn mark_suspected(&mut self) -> bool {
        let is_alone = self.open.is_empty();
        if is_alone {
            (self.is_suspected, self.dial_at) = (true, None);
        }
        is_alone
    }

    /// The peer answered and rejected this agent. The answer is a sign of life; the next dial backs
    /// off.
    pub(super) fn record_rejection(&mut self, now: Instant, jitter: f64) {
        (self.dialing_since, self.lost_ticks, self.is_suspected) = (None, None, false);
        self.back_off(now, jitter);
    }

    /// A handshake or a dial failed. True when the dial was to decide about a lost connection or a
    /// suspicion.
    pub(super) fn record_failed_dial(&mut self, now: Instant, jitter: f64) -> bool {
        self.dialing_since = None;
        self.back_off(now, jitter);
        std::mem::take(&mut self.is_suspected) || self.lost_ticks.is_some()
    }

    /// Failed dials in a row.
    pub(super) fn failed_dials(&self) -> u32 {
        self.failed_dials
    }

    fn back_off(&mut self, now: Instant, jitter: f64) {
        self.dial_at = Some(now + BACKOFF.jittered_wait(self.failed_dials, jitter));
        self.failed_dials = self.failed_dials.saturating_add(1);
    }
}
