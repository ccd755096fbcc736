//! Log lines for peers that go up and down: one line each, and one summary where a cluster starts
//! or a network is cut.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::{NodeName, Peer, PeerId};

/// Lines in a [`WINDOW`]; further changes are counted.
const MAX_LINES: usize = 20;

/// The time that one summary covers.
const WINDOW: Duration = Duration::from_secs(1);

/// Changes of the last second.
#[derive(Default)]
pub(super) struct MembershipLog {
    window_end: Option<Instant>,
    lines: usize,
    omitted_up: usize,
    omitted_down: usize,
}

impl MembershipLog {
    pub(super) fn peer_up(&mut self, peer: &Peer, now: Instant) {
        if self.take_line(now) {
            tracing::info!(peer = %peer.id, node = %peer.node, zone = peer.zone.as_ref().map(display), "peer up");
        } else {
            self.omitted_up += 1;
        }
    }

    pub(super) fn peer_down(&mut self, peer: PeerId, node: Option<&NodeName>, now: Instant) {
        if self.take_line(now) {
            tracing::info!(%peer, node = node.map(display), "peer down");
        } else {
            self.omitted_down += 1;
        }
    }

    /// When [`MembershipLog::write_summary`] is due, if a peer changed.
    pub(super) fn due(&self) -> Option<Instant> {
        self.window_end
    }

    /// Ends the second.
    pub(super) fn write_summary(&mut self) {
        let Self { omitted_up: up, omitted_down: down, .. } = std::mem::take(self);
        if up + down > 0 {
            tracing::info!(up, down, "more peers went up and down in the same second");
        }
    }

    /// Counts one line. Returns whether the line may be written.
    fn take_line(&mut self, now: Instant) -> bool {
        if self.window_end.is_some_and(|ends| now >= ends) {
            self.write_summary();
        }
        self.window_end.get_or_insert(now + WINDOW);
        self.lines += 1;
        self.lines <= MAX_LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_changes_have_a_line_each_and_the_rest_are_counted() {
        let (mut log, now) = (MembershipLog::default(), Instant::now());
        let peers_down = |log: &mut MembershipLog, times, now| {
            (0..times).for_each(|_| log.peer_down(PeerId::from_public_key([1; 32]), None, now));
        };
        assert_eq!(log.due(), None);
        peers_down(&mut log, MAX_LINES, now);
        assert_eq!((log.omitted_down, log.due()), (0, Some(now + WINDOW)));
        peers_down(&mut log, 7, now + WINDOW / 2);
        assert_eq!(log.omitted_down, 7);
        peers_down(&mut log, 1, now + WINDOW);
        assert_eq!((log.omitted_down, log.lines), (0, 1), "a new second");
        log.write_summary();
        assert_eq!(log.due(), None);
    }
}
