//! When an agent resolves the names of its peers. Gossip brings every member, so an agent needs DNS
//! at the start and when it is short of peers. Each look-up of 5000 agents is two queries for the
//! cluster's DNS servers.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::util::backoff::Backoff;

/// An agent with this many peers is not short of peers: gossip brings all other members. One round
/// of handshakes meets as many peers.
pub const ENOUGH_PEERS: usize = 8;

/// The first pauses. The DNS server has a new pod within a second or two.
const MIN_PAUSE: Duration = Duration::from_secs(1);

/// So many look-ups have [`MIN_PAUSE`] between them; then the pause doubles.
const ROUNDS_AT_MIN_PAUSE: u32 = 10;

/// The longest pause of an agent that is short of peers, and the pause of one that is not. Two
/// halves of a cluster that lost each other for longer than the mesh looks for dead members find
/// each other by such a look-up. Four look-ups of an hour are eight queries, for A and AAAA
/// records.
const MAX_PAUSE: Duration = Duration::from_secs(900);

/// A shortage begins for all agents of a network at once; their first look-ups are spread over
/// this time.
const SPREAD: Duration = Duration::from_secs(10);

/// When names are resolved next.
#[derive(Debug, Clone)]
pub struct DnsSchedule {
    due: Instant,
    /// Other agents in the last answer; `None` before an answer, and where DNS gave none.
    listed_agents: Option<usize>,
    peers: usize,
    /// Look-ups since the agent last had enough peers for [`MAX_PAUSE`]. A peer that comes and goes
    /// does not shorten the pauses.
    rounds: u32,
    /// When the last look-up ended; before the first one, the start.
    last_lookup: Instant,
    /// Since when the agent has had enough peers.
    enough_since: Option<Instant>,
}

impl DnsSchedule {
    /// The first look-up is due at once.
    pub fn new(now: Instant) -> Self {
        Self { due: now, listed_agents: None, peers: 0, rounds: 0, last_lookup: now, enough_since: None }
    }

    /// When the next look-up is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Whether this agent has fewer peers than the last answer lets it expect.
    pub fn is_short(&self) -> bool {
        self.peers < self.listed_agents.unwrap_or(ENOUGH_PEERS).min(ENOUGH_PEERS)
    }

    /// Records the number of peers that are up. `chance` is random, in 0..1.
    pub fn record_peers(&mut self, peers: usize, now: Instant, chance: f64) {
        self.peers = peers;
        match (self.is_short(), self.enough_since) {
            (false, None) => {
                self.enough_since = Some(now);
                self.due = self.last_lookup + spread(MAX_PAUSE, chance);
            }
            (true, Some(since)) => {
                self.enough_since = None;
                if now.saturating_duration_since(since) >= MAX_PAUSE {
                    // No short pauses, as at a start: DNS has had the others' addresses for long.
                    self.rounds = ROUNDS_AT_MIN_PAUSE;
                    self.due = self.due.min(now + SPREAD.mul_f64(chance));
                } else {
                    self.due = self.due.min(self.last_lookup + spread(pause(self.rounds), chance));
                }
            }
            _ => {}
        }
    }

    /// A look-up ended and listed so many other agents ([`count_agents`]); `None` where no server
    /// answered.
    pub fn record_lookup(&mut self, listed: Option<usize>, now: Instant, chance: f64) {
        self.listed_agents = listed.filter(|others| *others > 0).or(self.listed_agents);
        self.rounds = self.rounds.saturating_add(1);
        self.last_lookup = now;
        let is_short = self.is_short();
        self.enough_since = if is_short { None } else { Some(self.enough_since.unwrap_or(now)) };
        self.due = now + spread(if is_short { pause(self.rounds) } else { MAX_PAUSE }, chance);
    }
}

/// The number of agents with these addresses. A dual-stack node is listed once for each family, so
/// the larger family counts.
pub fn count_agents(addresses: &[SocketAddr]) -> usize {
    let ipv6 = addresses.iter().filter(|address| address.is_ipv6()).count();
    ipv6.max(addresses.len() - ipv6)
}

/// The pause after so many look-ups of one shortage.
fn pause(rounds: u32) -> Duration {
    Backoff { first: MIN_PAUSE, longest: MAX_PAUSE }.wait(rounds.saturating_sub(ROUNDS_AT_MIN_PAUSE))
}

/// Within a fifth of the pause on either side, so that agents which started together do not stay
/// in step.
fn spread(pause: Duration, chance: f64) -> Duration {
    pause.mul_f64(0.8 + 0.4 * chance)
}

#[cfg(test)]
mod tests;
