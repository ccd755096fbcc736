//! When an agent resolves the names of its peers. The mesh tells of every member, so DNS is
//! needed at the start, and by an agent that is short of peers. Each look-up of 5000 agents is
//! two queries for the cluster's DNS servers.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// An agent with this many peers is not short of peers: the mesh tells it of all others. As many
/// as one round of greetings meets.
pub const ENOUGH: usize = 8;

/// The first pauses. The DNS server learns of a new pod within a second or two.
const FIRST: Duration = Duration::from_secs(1);

/// So many look-ups have [`FIRST`] between them; then the pause doubles.
const FIRST_ROUNDS: u32 = 10;

/// The longest pause of an agent that is short of peers, and the pause of one that is not. Two
/// halves of a cluster that lost each other for longer than the mesh looks for dead members find
/// each other by such a look-up. Four look-ups of an hour are eight queries, for A and AAAA
/// records.
const LAST: Duration = Duration::from_secs(900);

/// A shortage begins for all agents of a network at once; their first look-ups are spread over
/// this time.
const SPREAD: Duration = Duration::from_secs(10);

/// When names are resolved next.
#[derive(Debug, Clone)]
pub struct Schedule {
    due: Instant,
    /// Other agents in the last answer; `None` before there is one, and where DNS gave none.
    listed: Option<usize>,
    peers: usize,
    /// Look-ups since the agent last had enough peers for [`LAST`]. A peer that comes and goes
    /// does not shorten the pauses.
    rounds: u32,
    /// When the last look-up ended; before the first one, the start.
    last: Instant,
    /// Since when there have been enough peers.
    enough_since: Option<Instant>,
}

impl Schedule {
    /// The first look-up is due at once.
    pub fn new(now: Instant) -> Self {
        Self { due: now, listed: None, peers: 0, rounds: 0, last: now, enough_since: None }
    }

    /// When the next look-up is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Whether this agent has fewer peers than the last answer lets it expect.
    pub fn is_short(&self) -> bool {
        self.peers < self.listed.unwrap_or(ENOUGH).min(ENOUGH)
    }

    /// The number of peers that are up. `chance` is random, in 0..1.
    pub fn observe(&mut self, peers: usize, now: Instant, chance: f64) {
        self.peers = peers;
        match (self.is_short(), self.enough_since) {
            (false, None) => {
                self.enough_since = Some(now);
                self.due = self.last + spread(LAST, chance);
            }
            (true, Some(since)) => {
                self.enough_since = None;
                if now.saturating_duration_since(since) >= LAST {
                    // Beyond the pauses of a start: DNS has known the others for long.
                    self.rounds = FIRST_ROUNDS;
                    self.due = self.due.min(now + SPREAD.mul_f64(chance));
                } else {
                    self.due = self.due.min(self.last + spread(pause(self.rounds), chance));
                }
            }
            _ => {}
        }
    }

    /// A look-up ended and listed so many others ([`agents`]); `None` where no server answered.
    pub fn resolved(&mut self, listed: Option<usize>, now: Instant, chance: f64) {
        self.listed = listed.filter(|others| *others > 0).or(self.listed);
        self.rounds = self.rounds.saturating_add(1);
        self.last = now;
        let is_short = self.is_short();
        self.enough_since = if is_short { None } else { Some(self.enough_since.unwrap_or(now)) };
        self.due = now + spread(if is_short { pause(self.rounds) } else { LAST }, chance);
    }
}

/// How many agents have these addresses. A node of dual stack is listed once for each family, so
/// the larger family counts.
pub fn agents(addresses: &[SocketAddr]) -> usize {
    let ipv6 = addresses.iter().filter(|address| address.is_ipv6()).count();
    ipv6.max(addresses.len() - ipv6)
}

/// The pause after so many look-ups of one shortage.
fn pause(rounds: u32) -> Duration {
    FIRST.saturating_mul(1 << rounds.saturating_sub(FIRST_ROUNDS).min(10)).min(LAST)
}

/// Within a fifth of the pause on either side, so that agents which started together do not stay
/// in step.
fn spread(pause: Duration, chance: f64) -> Duration {
    pause.mul_f64(0.8 + 0.4 * chance)
}

#[cfg(test)]
mod tests;
