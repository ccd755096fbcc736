//! The connections to one neighbour: whether it answers, and when to dial it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{LinkId, pause};

/// Ticks without an answer after which a neighbour is silent. The next ping goes out [`super::PROBE`] after the last answer, so a
/// healthy one has a second to answer it, and a dead one is found 1 to 2 s after its death: its neighbours agree within 3 s.
///
/// Ticks are counted, not time: if it is we who were starved, few ticks passed, and nobody is accused.
const SILENT_TICKS: u32 = 7;

/// Ticks that a lost connection may take to come back before it counts as silence.
const LOST_TICKS: u32 = 6;

/// Ticks of patience for a neighbour that was accused and refuted, four for each time, and the most.
const PATIENCE: u32 = 4;
const MOST_PATIENCE: u32 = 12;

/// How long a refutation buys patience.
const FORGIVEN: Duration = Duration::from_secs(600);

/// A dial that nobody reported the end of is forgotten.
const LONGEST_DIAL: Duration = Duration::from_secs(15);

/// The connections to one member, and the way there.
#[derive(Debug, Clone, Default)]
pub(super) struct Links {
    open: BTreeMap<LinkId, Link>,
    /// Since when it is dialled or greeted.
    trying: Option<Instant>,
    try_at: Option<Instant>,
    attempts: u32,
    /// Ticks since the last connection broke without a word.
    lost: Option<u32>,
    /// It is tried because somebody says that it is silent.
    doubted: bool,
    /// Of two connections the one over which it had answered broke.
    broken: bool,
    /// It said that it closes.
    parted: bool,
    refuted: u32,
    refuted_at: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
struct Link {
    /// It has answered over this connection. One that the other side does not admit opens, then closes.
    proved: bool,
    silent: u32,
}

/// What an answered ping shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The first answer in a while.
    First,
    /// Nothing new.
    Alive,
}

impl Links {
    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.open.is_empty() && self.lost.is_none() && self.trying.is_none()
    }

    /// Whether it answers over some connection.
    pub(super) fn proved(&self) -> bool {
        self.open.values().any(|link| link.proved)
    }

    pub(super) fn any(&self) -> bool {
        !self.open.is_empty()
    }

    /// Heard within the last second.
    pub(super) fn fresh(&self) -> bool {
        self.open.values().any(|link| link.proved && link.silent <= SILENT_TICKS / 2)
    }

    pub(super) fn opened(&mut self, link: LinkId) {
        // Its key answered, so it lives, even if it closes at once because it does not let us in.
        (self.trying, self.lost, self.doubted) = (None, None, false);
        self.parted = false;
        self.open.insert(link, Link::default());
    }

    pub(super) fn heard(&mut self, link: LinkId) -> Heard {
        let was_proved = self.proved();
        // One that was given up as silent may still speak. It is being closed, and counts no more.
        let Some(link) = self.open.get_mut(&link) else { return Heard::Alive };
        (link.proved, link.silent) = (true, 0);
        (self.attempts, self.lost, self.doubted, self.broken) = (0, None, false, false);
        if was_proved { Heard::Alive } else { Heard::First }
    }

    /// A connection closed. True when that is a reason to look after the member at once.
    pub(super) fn closed(&mut self, link: LinkId, now: Instant, jitter: f64) -> bool {
        let was_proved = self.proved();
        if self.open.remove(&link).is_none() {
            return false;
        }
        self.broken |= was_proved && !self.proved();
        if self.any() {
            return false;
        }
        let suspicious = std::mem::take(&mut self.broken) && !self.parted;
        if suspicious {
            self.lost = Some(0);
        } else {
            self.retreat(now, jitter);
        }
        suspicious
    }

    /// It says that it closes its connections and lives on.
    pub(super) fn part(&mut self) {
        self.parted = true;
    }

    /// Closes everything; the numbers of what was open are returned.
    pub(super) fn drop_all(&mut self) -> Vec<LinkId> {
        (self.lost, self.trying, self.doubted, self.broken) = (None, None, false, false);
        std::mem::take(&mut self.open).into_keys().collect()
    }

    /// Time passes. True when the neighbour has been silent for too long.
    pub(super) fn tick(&mut self, now: Instant) -> bool {
        if self.trying.is_some_and(|since| now.duration_since(since) > LONGEST_DIAL) {
            self.trying = None;
        }
        if self.open.is_empty() && self.lost.is_none() {
            return false;
        }
        let patience = self.patience(now);
        if let Some(lost) = &mut self.lost {
            *lost += 1;
            return *lost >= LOST_TICKS + patience;
        }
        self.open.values_mut().for_each(|link| link.silent += 1);
        self.open.values().all(|link| link.silent >= SILENT_TICKS + patience)
    }

    fn patience(&mut self, now: Instant) -> u32 {
        if self.refuted_at.is_some_and(|at| now.duration_since(at) > FORGIVEN) {
            (self.refuted, self.refuted_at) = (0, None);
        }
        (self.refuted * PATIENCE).min(MOST_PATIENCE)
    }

    /// It answered an accusation: it lives, and is slower than we thought.
    pub(super) fn refuted(&mut self, now: Instant) {
        self.refuted = (self.refuted + 1).min(MOST_PATIENCE);
        self.refuted_at = Some(now);
        self.open.values_mut().for_each(|link| link.silent = 0);
        self.lost = None;
    }

    /// Whether to dial or greet now.
    pub(super) fn may_try(&self, now: Instant) -> bool {
        self.open.is_empty() && self.trying.is_none() && self.try_at.is_none_or(|at| at <= now)
    }

    pub(super) fn is_trying(&self) -> bool {
        self.trying.is_some()
    }

    pub(super) fn trying(&mut self, now: Instant) {
        self.trying = Some(now);
    }

    /// It may be tried from then on; before, if it might have been anyway.
    pub(super) fn try_from(&mut self, at: Instant) {
        self.try_at = self.try_at.map_or(Some(at), |before| Some(before.min(at)));
    }

    /// Tries before now do not count.
    pub(super) fn try_anew(&mut self) {
        (self.attempts, self.try_at) = (0, None);
    }

    /// It was greeted: the next step may begin. When, the last greeting does not put off.
    pub(super) fn greeted(&mut self) {
        (self.trying, self.lost, self.doubted) = (None, None, false);
    }

    /// Somebody says that it is silent: if it cannot be reached from here either, that counts as a lost connection, also when it is being
    /// tried already. False when it is connected.
    pub(super) fn doubt(&mut self) -> bool {
        let is_alone = self.open.is_empty();
        if is_alone {
            (self.doubted, self.try_at) = (true, None);
        }
        is_alone
    }

    /// It answered and would not have us. That is a sign of life, and a reason to wait.
    pub(super) fn declined(&mut self, now: Instant, jitter: f64) {
        (self.trying, self.lost, self.doubted) = (None, None, false);
        self.retreat(now, jitter);
    }

    /// A try came to nothing. True when it was to find out what became of a lost connection.
    pub(super) fn failed(&mut self, now: Instant, jitter: f64) -> bool {
        self.trying = None;
        self.retreat(now, jitter);
        std::mem::take(&mut self.doubted) || self.lost.is_some()
    }

    /// Tries in a row that came to nothing.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    fn retreat(&mut self, now: Instant, jitter: f64) {
        self.try_at = Some(now + pause(self.attempts, jitter));
        self.attempts = self.attempts.saturating_add(1);
    }
}
