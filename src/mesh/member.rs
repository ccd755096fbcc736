//! One admitted peer: its connections, whether it is up, and when to dial it. No I/O; time and ticks come from the task.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::swarm::ConnectionId;

use super::backoff;
use super::follower::Follower;
use crate::model::Peer;

/// Ticks without an answer after which a connection is dead. A ping goes out a second after the last answer, so a healthy
/// peer has 1.75 s to answer it, however starved, and a dead one is found within 3 s at ticks of 250 ms.
///
/// Ticks are counted, not time: if it is we who were starved, few ticks passed, and nobody is accused.
pub(super) const SILENT_TICKS: u32 = 12;

/// An admitted peer.
pub(super) struct Member {
    /// Who it is and where.
    pub(super) peer: Peer,
    /// Its log, while it is up.
    pub(super) follower: Option<Follower>,
    links: HashMap<ConnectionId, Link>,
    dialing: Option<ConnectionId>,
    dial_at: Instant,
    /// Connections that came to nothing, in a row.
    attempts: u32,
}

/// One connection.
struct Link {
    /// The peer has answered over it. A dialler that the other side does not admit sees its connection open, then close.
    proved: bool,
    silent: u32,
}

/// What an answered ping shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The peer is up, from now on.
    Up,
    /// There is another connection to it, perhaps from another process.
    Again,
    /// Nothing new.
    Alive,
}

impl Member {
    /// Just admitted, to be dialled from `dial_at` on.
    pub(super) fn new(peer: Peer, dial_at: Instant) -> Self {
        Self { peer, follower: None, links: HashMap::new(), dialing: None, dial_at, attempts: 0 }
    }

    /// Whether it answers over some connection.
    pub(super) fn is_up(&self) -> bool {
        self.links.values().any(|link| link.proved)
    }

    /// Admitted again, so it is alive and perhaps elsewhere: forgets failures and dials from `dial_at` on, or before if it would have.
    pub(super) fn renew(&mut self, peer: Peer, dial_at: Instant) {
        self.peer = peer;
        self.dial_at = self.dial_at.min(dial_at);
        self.attempts = 0;
    }

    /// Whether to dial now.
    pub(super) fn wants_dial(&self, now: Instant) -> bool {
        self.links.is_empty() && !self.is_dialing() && self.dial_at <= now
    }

    /// Whether a dial is under way.
    pub(super) fn is_dialing(&self) -> bool {
        self.dialing.is_some()
    }

    /// A dial began.
    pub(super) fn dialing(&mut self, connection: ConnectionId) {
        self.dialing = Some(connection);
    }

    /// A dial failed, or could not begin.
    pub(super) fn dial_failed(&mut self, connection: ConnectionId, now: Instant, jitter: f64) {
        if self.dialing == Some(connection) {
            self.dialing = None;
            self.retreat(now, jitter);
        }
    }

    /// A connection is open, from either side.
    pub(super) fn opened(&mut self, connection: ConnectionId) {
        if self.dialing == Some(connection) {
            self.dialing = None;
        }
        self.links.insert(connection, Link { proved: false, silent: 0 });
    }

    /// The peer answered over this connection.
    pub(super) fn heard(&mut self, connection: ConnectionId) -> Heard {
        let was_up = self.is_up();
        // One that was given up as silent may still speak. It is being closed, and counts no more.
        let Some(link) = self.links.get_mut(&connection) else { return Heard::Alive };
        link.silent = 0;
        self.attempts = 0;
        match (std::mem::replace(&mut link.proved, true), was_up) {
            (true, _) => Heard::Alive,
            (false, true) => Heard::Again,
            (false, false) => Heard::Up,
        }
    }

    /// A connection closed. True when the peer is down by that.
    pub(super) fn closed(&mut self, connection: ConnectionId, now: Instant, jitter: f64) -> bool {
        let was_up = self.is_up();
        if self.links.remove(&connection).is_some() && self.links.is_empty() {
            self.retreat(now, jitter);
        }
        was_up && !self.is_up()
    }

    /// Time passes. The connections over which nothing was heard for too long, to be closed.
    pub(super) fn tick(&mut self) -> Vec<ConnectionId> {
        self.links.values_mut().for_each(|link| link.silent += 1);
        let silent = self.links.iter().filter(|(_, link)| link.silent >= SILENT_TICKS);
        silent.map(|(connection, _)| *connection).collect()
    }

    fn retreat(&mut self, now: Instant, jitter: f64) {
        self.dial_at = now + backoff(self.attempts, jitter);
        self.attempts = self.attempts.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::PeerId;

    fn member(now: Instant) -> Member {
        let address = ([127, 0, 0, 1], 1).into();
        let id = PeerId::from_public_key([1; 32]);
        Member::new(Peer { id, node: "node".parse().unwrap(), transfer: address, gossip: address }, now)
    }

    fn connection(number: usize) -> ConnectionId {
        ConnectionId::new_unchecked(number)
    }

    #[test]
    fn a_connection_that_was_never_answered_makes_nobody_up() {
        let now = Instant::now();
        let mut member = member(now);
        member.opened(connection(1));
        assert!(!member.is_up());
        assert!(!member.closed(connection(1), now, 0.0), "what was not up does not go down");
    }

    #[test]
    fn a_peer_is_up_from_the_first_answer_until_the_last_connection_closes() {
        let now = Instant::now();
        let mut member = member(now);
        member.opened(connection(1));
        member.opened(connection(2));
        assert_eq!(member.heard(connection(1)), Heard::Up);
        assert_eq!(member.heard(connection(1)), Heard::Alive);
        assert_eq!(member.heard(connection(2)), Heard::Again);
        assert!(!member.closed(connection(1), now, 0.0));
        assert!(member.closed(connection(2), now, 0.0));
        assert!(!member.closed(connection(2), now, 0.0), "only once");
    }

    #[test]
    fn silence_closes_a_connection_and_an_answer_breaks_it() {
        let now = Instant::now();
        let mut member = member(now);
        member.opened(connection(1));
        for _ in 1..SILENT_TICKS {
            assert_eq!(member.tick(), []);
        }
        member.heard(connection(1));
        for _ in 1..SILENT_TICKS {
            assert_eq!(member.tick(), []);
        }
        assert_eq!(member.tick(), [connection(1)]);
        assert!(member.closed(connection(1), now, 0.0));
        assert_eq!(member.heard(connection(1)), Heard::Alive, "its last words come too late");
        assert!(!member.is_up());
    }

    #[test]
    fn a_peer_out_of_reach_is_dialled_more_and_more_rarely_and_at_once_when_admitted_again() {
        let mut now = Instant::now();
        let mut member = member(now);
        for wait in [1, 2, 4, 8, 16, 30, 30] {
            assert!(member.wants_dial(now));
            member.dialing(connection(wait as usize));
            assert!(!member.wants_dial(now), "one dial at a time");
            member.dial_failed(connection(wait as usize), now, 1.0);
            let wait = Duration::from_secs(wait);
            assert!(!member.wants_dial(now + wait - Duration::from_millis(1)));
            now += wait;
        }
        member.dialing(connection(99));
        member.dial_failed(connection(99), now, 1.0);
        assert!(!member.wants_dial(now));
        member.renew(member.peer.clone(), now);
        assert!(member.wants_dial(now));
        member.renew(member.peer.clone(), now + Duration::from_secs(1));
        assert!(member.wants_dial(now), "to be admitted again and again puts nothing off");
    }

    #[test]
    fn a_peer_that_refuses_us_is_not_dialled_in_a_hurry() {
        let mut now = Instant::now();
        let mut member = member(now);
        for wait in [1, 2, 4] {
            member.dialing(connection(wait as usize));
            member.opened(connection(wait as usize));
            assert!(!member.wants_dial(now + Duration::from_secs(60)), "while it is connected");
            member.closed(connection(wait as usize), now, 1.0);
            now += Duration::from_secs(wait);
            assert!(member.wants_dial(now) && !member.wants_dial(now - Duration::from_millis(1)));
        }
    }
}
