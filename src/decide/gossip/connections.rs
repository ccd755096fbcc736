//! The connections to one neighbour: whether it answers, and when to dial it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{MeshConnectionId, back_off};

/// Ticks without an answer after which a neighbour is silent. The next ping goes out [`super::PING_INTERVAL`] after the last answer, so a
/// healthy one has a second to answer it, and a dead one is found 1 to 2 s after its death: its neighbours agree within 3 s.
///
/// Ticks are counted, not time: if it is we who were starved, few ticks passed, and nobody is accused.
const SILENT_TICKS: u32 = 7;

/// Ticks that a lost connection may take to come back before it counts as silence.
const LOST_TICKS: u32 = 6;

/// Ticks of patience for a neighbour that was accused and refuted, four for each time, and the most.
const TICKS_PER_REFUTATION: u32 = 4;
const MAX_EXTRA_TICKS: u32 = 12;

/// How long a refutation buys patience.
const REFUTATION_LIFE: Duration = Duration::from_secs(600);

/// A dial that nobody reported the end of is forgotten.
const MAX_DIAL_TIME: Duration = Duration::from_secs(15);

/// The connections to one member, and the way there.
#[derive(Debug, Clone, Default)]
pub(super) struct MemberConnections {
    open: BTreeMap<MeshConnectionId, MemberConnection>,
    /// Since when it is dialled or greeted.
    dialling_since: Option<Instant>,
    dial_at: Option<Instant>,
    failed_dials: u32,
    /// Ticks since the last connection broke without a word.
    lost_ticks: Option<u32>,
    /// It is tried because somebody says that it is silent.
    is_suspected: bool,
    /// Of two connections the one over which it had answered broke.
    broke_while_answering: bool,
    /// It said that it closes.
    is_close_announced: bool,
    refutations: u32,
    refuted_at: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
struct MemberConnection {
    /// It has answered over this connection. One that the other side does not admit opens, then closes.
    has_answered: bool,
    silent_ticks: u32,
}

/// What an answered ping shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PingOutcome {
    /// The first answer in a while.
    First,
    /// Nothing new.
    Repeated,
}

impl MemberConnections {
    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.open.is_empty() && self.lost_ticks.is_none() && self.dialling_since.is_none()
    }

    /// Whether it answers over some connection.
    pub(super) fn is_answering(&self) -> bool {
        self.open.values().any(|link| link.has_answered)
    }

    pub(super) fn is_connected(&self) -> bool {
        !self.open.is_empty()
    }

    /// Heard within the last second.
    pub(super) fn has_answered_recently(&self) -> bool {
        self.open.values().any(|link| link.has_answered && link.silent_ticks <= SILENT_TICKS / 2)
    }

    pub(super) fn insert(&mut self, link: MeshConnectionId) {
        // Its key answered, so it lives, even if it closes at once because it does not let us in.
        (self.dialling_since, self.lost_ticks, self.is_suspected) = (None, None, false);
        self.is_close_announced = false;
        self.open.insert(link, MemberConnection::default());
    }

    pub(super) fn record_answer(&mut self, link: MeshConnectionId) -> PingOutcome {
        let was_proved = self.is_answering();
        // One that was given up as silent may still speak. It is being closed, and counts no more.
        let Some(link) = self.open.get_mut(&link) else { return PingOutcome::Repeated };
        (link.has_answered, link.silent_ticks) = (true, 0);
        (self.failed_dials, self.lost_ticks, self.is_suspected, self.broke_while_answering) = (0, None, false, false);
        if was_proved { PingOutcome::Repeated } else { PingOutcome::First }
    }

    /// A connection closed. True when that is a reason to look after the member at once.
    pub(super) fn remove(&mut self, link: MeshConnectionId, now: Instant, jitter: f64) -> bool {
        let was_proved = self.is_answering();
        if self.open.remove(&link).is_none() {
            return false;
        }
        self.broke_while_answering |= was_proved && !self.is_answering();
        if self.is_connected() {
            return false;
        }
        let suspicious = std::mem::take(&mut self.broke_while_answering) && !self.is_close_announced;
        if suspicious {
            self.lost_ticks = Some(0);
        } else {
            self.back_off(now, jitter);
        }
        suspicious
    }

    /// It says that it closes its connections and lives on.
    pub(super) fn mark_close_announced(&mut self) {
        self.is_close_announced = true;
    }

    /// Closes everything; the numbers of what was open are returned.
    pub(super) fn take_all(&mut self) -> Vec<MeshConnectionId> {
        (self.lost_ticks, self.dialling_since, self.is_suspected, self.broke_while_answering) =
            (None, None, false, false);
        std::mem::take(&mut self.open).into_keys().collect()
    }

    /// Time passes. True when the neighbour has been silent for too long.
    pub(super) fn tick(&mut self, now: Instant) -> bool {
        if self.dialling_since.is_some_and(|since| now.duration_since(since) > MAX_DIAL_TIME) {
            self.dialling_since = None;
        }
        if self.open.is_empty() && self.lost_ticks.is_none() {
            return false;
        }
        let patience = self.extra_ticks(now);
        if let Some(lost) = &mut self.lost_ticks {
            *lost += 1;
            return *lost >= LOST_TICKS + patience;
        }
        self.open.values_mut().for_each(|link| link.silent_ticks += 1);
        self.open.values().all(|link| link.silent_ticks >= SILENT_TICKS + patience)
    }

    fn extra_ticks(&mut self, now: Instant) -> u32 {
        if self.refuted_at.is_some_and(|at| now.duration_since(at) > REFUTATION_LIFE) {
            (self.refutations, self.refuted_at) = (0, None);
        }
        (self.refutations * TICKS_PER_REFUTATION).min(MAX_EXTRA_TICKS)
    }

    /// It answered an accusation: it lives, and is slower than we thought.
    pub(super) fn record_refutation(&mut self, now: Instant) {
        self.refutations = (self.refutations + 1).min(MAX_EXTRA_TICKS);
        self.refuted_at = Some(now);
        self.open.values_mut().for_each(|link| link.silent_ticks = 0);
        self.lost_ticks = None;
    }

    /// Whether to dial or greet now.
    pub(super) fn may_dial(&self, now: Instant) -> bool {
        self.open.is_empty() && self.dialling_since.is_none() && self.dial_at.is_none_or(|at| at <= now)
    }

    pub(super) fn is_dialling(&self) -> bool {
        self.dialling_since.is_some()
    }

    pub(super) fn begin_dial(&mut self, now: Instant) {
        self.dialling_since = Some(now);
    }

    /// It may be tried from then on; before, if it might have been anyway.
    pub(super) fn allow_dial_from(&mut self, at: Instant) {
        self.dial_at = self.dial_at.map_or(Some(at), |before| Some(before.min(at)));
    }

    /// Tries before now do not count.
    pub(super) fn reset_back_off(&mut self) {
        (self.failed_dials, self.dial_at) = (0, None);
    }

    /// It was greeted: the next step may begin. When, the last greeting does not put off.
    pub(super) fn end_handshake(&mut self) {
        (self.dialling_since, self.lost_ticks, self.is_suspected) = (None, None, false);
    }

    /// Somebody says that it is silent: if it cannot be reached from here either, that counts as a lost connection, also when it is being
    /// tried already. False when it is connected.
    pub(super) fn mark_suspected(&mut self) -> bool {
        let is_alone = self.open.is_empty();
        if is_alone {
            (self.is_suspected, self.dial_at) = (true, None);
        }
        is_alone
    }

    /// It answered and would not have us. That is a sign of life, and a reason to wait.
    pub(super) fn record_rejection(&mut self, now: Instant, jitter: f64) {
        (self.dialling_since, self.lost_ticks, self.is_suspected) = (None, None, false);
        self.back_off(now, jitter);
    }

    /// A try came to nothing. True when it was to find out what became of a lost connection.
    pub(super) fn record_failed_dial(&mut self, now: Instant, jitter: f64) -> bool {
        self.dialling_since = None;
        self.back_off(now, jitter);
        std::mem::take(&mut self.is_suspected) || self.lost_ticks.is_some()
    }

    /// Tries in a row that came to nothing.
    pub(super) fn failed_dials(&self) -> u32 {
        self.failed_dials
    }

    fn back_off(&mut self, now: Instant, jitter: f64) {
        self.dial_at = Some(now + back_off(self.failed_dials, jitter));
        self.failed_dials = self.failed_dials.saturating_add(1);
    }
}
