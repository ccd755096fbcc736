//! Whether UDP is blocked between this node and its peers while TCP is open. Blobs come over QUIC
//! (UDP) and gossip over TCP, so such a firewall leaves a mesh in which every member lives and no
//! image can be fetched.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Other nodes that have to be silent over UDP and answer over TCP, where there are so many. A
/// single node may have a fault of its own.
const WITNESSES: usize = 3;

/// Probes without an answer, so that one lost handshake says nothing where there is one other
/// node.
const MIN_FAILED_PROBES: u32 = 3;

/// Interval of probes while a peer answers. A probe is one handshake.
const PROBE_INTERVAL: Duration = Duration::from_secs(20);

/// Interval of probes while no peer answers. With a handshake's timeout of 3 s, three probes take
/// 15 s. So a block is found within 24 s and these 15 s.
const PROBE_INTERVAL_SUSPICIOUS: Duration = Duration::from_secs(2);

/// Interval of probes while UDP is blocked.
const PROBE_INTERVAL_BLOCKED: Duration = Duration::from_secs(10);

/// Most addresses without an answer that are kept.
const MAX_SILENT: usize = 16;

/// The finding of one probe of one other node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpProbe {
    /// An answer over UDP.
    Answered,
    /// No answer over UDP.
    Silent {
        /// Whether a TCP connection could be opened.
        tcp: bool,
    },
}

/// UDP is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpBlock {
    /// When the first of the probes without an answer ended.
    pub since: Instant,
    /// Nodes that answer over TCP and not over UDP.
    pub nodes: usize,
}

/// The probes since the last answer.
#[derive(Debug, Clone)]
pub struct UdpPath {
    due: Instant,
    silent_since: Option<Instant>,
    failed_probes: u32,
    /// The last finding about each address: whether TCP was open.
    silent: BTreeMap<SocketAddr, bool>,
    blocked: Option<UdpBlock>,
}

impl UdpPath {
    /// A path without a probe. `chance` is random, in 0..1.
    pub fn new(now: Instant, chance: f64) -> Self {
        Self {
            due: now + PROBE_INTERVAL.mul_f64(chance),
            silent_since: None,
            failed_probes: 0,
            silent: BTreeMap::new(),
            blocked: None,
        }
    }

    /// When the next probe is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// The targets with the most news: targets that were not silent yet, if there are any.
    pub fn prefer(&self, targets: &[SocketAddr]) -> Vec<SocketAddr> {
        let fresh: Vec<_> = targets.iter().filter(|target| !self.silent.contains_key(target)).copied().collect();
        if fresh.is_empty() { targets.to_vec() } else { fresh }
    }

    /// No node could be probed.
    pub fn record_skipped_probe(&mut self, now: Instant, chance: f64) {
        self.due = now + spread(PROBE_INTERVAL, chance);
    }

    /// A probe ended. `targets` are the other nodes that could have been probed.
    pub fn record_probe(&mut self, target: SocketAddr, probe: UdpProbe, targets: usize, now: Instant, chance: f64) {
        match probe {
            UdpProbe::Answered => {
                (self.silent_since, self.failed_probes, self.blocked) = (None, 0, None);
                self.silent.clear();
            }
            UdpProbe::Silent { tcp } => {
                self.silent_since.get_or_insert(now);
                self.failed_probes = self.failed_probes.saturating_add(1);
                if self.silent.len() < MAX_SILENT || self.silent.contains_key(&target) {
                    self.silent.insert(target, tcp);
                }
                self.blocked = self.evaluate(targets);
            }
        }
        let pause = match (self.blocked, self.silent_since) {
            (Some(_), _) => PROBE_INTERVAL_BLOCKED,
            (None, Some(_)) if self.silent.len() < MAX_SILENT => PROBE_INTERVAL_SUSPICIOUS,
            // Many are silent over TCP as well: the nodes are gone, or the network is.
            _ => PROBE_INTERVAL,
        };
        self.due = now + spread(pause, chance);
    }

    /// The block, as far as the probes show.
    pub fn blocked(&self) -> Option<UdpBlock> {
        self.blocked
    }

    fn evaluate(&self, targets: usize) -> Option<UdpBlock> {
        let nodes = self.silent.values().filter(|tcp| **tcp).count();
        let is_enough = self.failed_probes >= MIN_FAILED_PROBES && nodes >= WITNESSES.min(targets.max(1));
        self.silent_since.filter(|_| is_enough).map(|since| UdpBlock { since, nodes })
    }
}

/// Within a fifth of the pause on either side, so that nodes do not probe in step.
fn spread(pause: Duration, chance: f64) -> Duration {
    pause.mul_f64(0.8 + 0.4 * chance)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long a probe without an answer takes.
    const DIAL: Duration = Duration::from_secs(3);

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 4701))
    }

    /// Probes the targets in turn for so long; `answers` is what each of them does.
    fn probe(
        path: &mut UdpPath,
        from: Instant,
        time: Duration,
        targets: &[SocketAddr],
        answers: impl Fn(SocketAddr) -> UdpProbe,
    ) -> Option<Instant> {
        let mut now = from;
        for round in 0.. {
            now = now.max(path.due());
            if now > from + time {
                break;
            }
            let preferred = path.prefer(targets);
            let target = preferred[round % preferred.len()];
            let found = answers(target);
            if found != UdpProbe::Answered {
                now += DIAL;
            }
            path.record_probe(target, found, targets.len(), now, 1.0);
            if path.blocked().is_some() {
                return Some(now);
            }
        }
        None
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn blocked_udp_is_found_within_a_minute_in_clusters_of_any_size() {
        for nodes in [1, 2, 3, 50] {
            let targets: Vec<_> = (0..nodes).map(at).collect();
            let start = Instant::now();
            let mut path = UdpPath::new(start, 1.0);
            assert_eq!(probe(&mut path, start, 10 * MINUTE, &targets, |_| UdpProbe::Answered), None);
            // The last answer came just now, so the whole pause lies ahead.
            let blocked_at = start + 10 * MINUTE;
            path.record_probe(targets[0], UdpProbe::Answered, targets.len(), blocked_at, 1.0);
            let found = probe(&mut path, blocked_at, MINUTE, &targets, |_| UdpProbe::Silent { tcp: true });
            assert!(found.is_some_and(|found| found <= blocked_at + MINUTE), "{nodes} other nodes");
        }
    }

    #[test]
    fn a_single_silent_node_among_others_is_no_block() {
        let targets: Vec<_> = (0..4).map(at).collect();
        let mut path = UdpPath::new(Instant::now(), 0.5);
        let answers = |target| if target == at(0) { UdpProbe::Silent { tcp: true } } else { UdpProbe::Answered };
        assert_eq!(probe(&mut path, Instant::now(), 60 * MINUTE, &targets, answers), None);
    }

    #[test]
    fn nodes_that_are_silent_over_tcp_as_well_are_no_block() {
        let targets: Vec<_> = (0..4).map(at).collect();
        let mut path = UdpPath::new(Instant::now(), 0.5);
        let found = probe(&mut path, Instant::now(), 60 * MINUTE, &targets, |_| UdpProbe::Silent { tcp: false });
        assert_eq!(found, None);
    }

    #[test]
    fn an_answer_ends_a_block() {
        let (mut path, now) = (UdpPath::new(Instant::now(), 0.5), Instant::now());
        for _ in 0..MIN_FAILED_PROBES {
            path.record_probe(at(1), UdpProbe::Silent { tcp: true }, 1, now, 0.5);
        }
        assert_eq!(path.blocked(), Some(UdpBlock { since: now, nodes: 1 }));
        assert!(path.due() <= now + PROBE_INTERVAL_BLOCKED.mul_f64(1.2));
        path.record_probe(at(1), UdpProbe::Answered, 1, now, 0.5);
        assert_eq!(path.blocked(), None);
    }

    #[test]
    fn two_lost_handshakes_with_the_only_other_node_are_no_block() {
        let (mut path, now) = (UdpPath::new(Instant::now(), 0.5), Instant::now());
        for _ in 1..MIN_FAILED_PROBES {
            path.record_probe(at(1), UdpProbe::Silent { tcp: true }, 1, now, 0.5);
        }
        assert_eq!(path.blocked(), None);
    }

    #[test]
    fn addresses_without_an_answer_are_bounded() {
        let (mut path, now) = (UdpPath::new(Instant::now(), 0.5), Instant::now());
        (0..=255).for_each(|last| path.record_probe(at(last), UdpProbe::Silent { tcp: false }, 256, now, 0.5));
        assert_eq!(path.silent.len(), MAX_SILENT);
    }
}
