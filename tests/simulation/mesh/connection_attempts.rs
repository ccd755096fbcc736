//! Processes that start, end, and connect: the QUIC handshake, the libp2p dial, and seed addresses.

use std::time::Duration;

use lighterman::decide::gossip::MeshConnectionId;
use lighterman::model::PeerId;
use rand::Rng;

use super::connections::Connection;
use super::credentials::{TOKEN_LIFETIME, credential};
use super::gossipsub::NodeNumber;
use super::node::TrafficKind;
use super::{Event, Frame, HEARTBEAT, Mesh, Micros, TOKEN_RENEWAL, message_sizes, micros};

/// Deadline of the QUIC handshake.
const QUIC_TIMEOUT: Duration = Duration::from_secs(3);

/// Deadline of TCP and noise together.
const LIBP2P_TIMEOUT: Duration = Duration::from_secs(5);

/// Processing time for signatures and the API server's TokenReview, on each side.
const ADMISSION_TIME: Micros = 3_000;

/// Interval of dials to seeds that are not members: while the node has no neighbor, and afterwards.
const FIRST_JOIN: Micros = 1_000_000;
const JOIN: Micros = 10_000_000;

/// A QUIC handshake or a libp2p dial between two agents.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionAttempt {
    from: (NodeNumber, u32),
    to: (NodeNumber, u32),
    step: AttemptStep,
    by_address: bool,
}

#[derive(Debug, Clone, Copy)]
enum AttemptStep {
    /// The Hello arrives at the other agent.
    Hello,
    /// The other agent's answer arrives.
    Welcome,
    /// The libp2p dial arrives at the other agent.
    Dialed,
    /// The libp2p connection is established. False if the other agent rejects the connection.
    Connected(MeshConnectionId, bool),
    /// No answer arrives.
    Failed,
}

impl ConnectionAttempt {
    /// The process at which the step happens.
    pub(super) fn at(&self) -> (NodeNumber, u32) {
        match self.step {
            AttemptStep::Hello | AttemptStep::Dialed => self.to,
            AttemptStep::Welcome | AttemptStep::Connected(..) | AttemptStep::Failed => self.from,
        }
    }
}

impl Mesh {
    /// Starts a node's agent with the node's content and these seed addresses.
    pub(crate) fn start(&mut self, node: NodeNumber, seeds: &[NodeNumber]) {
        let (now, instant, seed) = (self.now, self.instant(), self.rng.random());
        self.nodes[node].start(now, instant, seed);
        self.nodes[node].seeds = seeds.to_vec();
        self.introduce(node);
        let items: Vec<_> = self.nodes[node].items.iter().copied().collect();
        self.announce(node, &items, &[]);
        self.start_timers(node);
    }

    /// Starts the agent's timers, each at a random moment.
    pub(super) fn start_timers(&mut self, node: NodeNumber) {
        let generation = self.nodes[node].generation;
        let tick = self.now + self.jitter(250_000);
        self.schedule(tick, Event::Tick(node, generation));
        let beat = self.now + self.jitter(HEARTBEAT);
        self.schedule(beat, Event::Heartbeat(node, generation));
        let renewal = self.now + self.jitter(TOKEN_RENEWAL);
        self.schedule(renewal, Event::RenewToken(node, generation));
        if !self.nodes[node].seeds.is_empty() {
            self.schedule(self.now, Event::Join(node, generation));
        }
    }

    /// SIGKILL: the kernel closes the process's connections.
    pub(crate) fn kill(&mut self, node: NodeNumber) {
        let Some(agent) = self.nodes[node].agent.take() else { return };
        for connection in agent.neighbors.into_values().flatten() {
            let side = usize::from(self.connections[connection as usize].ends[0].0 != node);
            self.send(connection, side, Frame::Closed);
            self.connections[connection as usize].open[side] = false;
        }
    }

    /// SIGTERM: the agent publishes a leave notice, and ends 200 ms later.
    pub(crate) fn leave(&mut self, node: NodeNumber) {
        self.with_protocol(node, |protocol, _, _| protocol.leave());
        self.run_for(Duration::from_millis(200));
        self.kill(node);
    }

    /// Introduces the agent with a credential and addresses. A later call may change them.
    pub(super) fn introduce(&mut self, node: NodeNumber) {
        let peer = self.nodes[node].peer.clone();
        // A renewed token differs from the earlier token.
        let token = credential(peer.id, self.now);
        self.with_protocol(node, |protocol, _, now| {
            protocol.introduce(token, peer.transfer, peer.gossip, peer.zone, now)
        });
    }

    /// Dials the seeds that are not alive in the inventory, as the agent does with addresses from
    /// DNS.
    pub(super) fn join(&mut self, node: NodeNumber, generation: u32) {
        for seed in self.nodes[node].seeds.clone() {
            if seed != node && !self.considers_alive(node, seed) {
                let peer = self.nodes[seed].peer.id;
                // The seed is only an address: a failed handshake is not reported to the protocol.
                self.connect_quic(node, peer, true);
            }
        }
        let is_alone = self.nodes[node].agent.as_ref().is_none_or(|agent| agent.neighbors.is_empty());
        let wait = if is_alone { FIRST_JOIN } else { JOIN };
        let at = self.now + wait + self.jitter(wait / 5);
        self.schedule(at, Event::Join(node, generation));
    }

    fn attempt(&self, from: NodeNumber, to: PeerId, by_address: bool) -> Option<ConnectionAttempt> {
        let to = self.number(to)?;
        let end = |node: NodeNumber| (node, self.nodes[node].generation);
        Some(ConnectionAttempt { from: end(from), to: end(to), step: AttemptStep::Hello, by_address })
    }

    fn schedule_step(&mut self, attempt: ConnectionAttempt, step: AttemptStep, after: Micros) {
        self.schedule(self.now + after, Event::Connection(ConnectionAttempt { step, ..attempt }));
    }

    /// Starts a QUIC handshake. A failed handshake by address is not reported to the protocol.
    pub(super) fn connect_quic(&mut self, node: NodeNumber, peer: PeerId, by_address: bool) {
        let Some(attempt) = self.attempt(node, peer, by_address) else { return };
        let delay = self.latency(node, attempt.to.0);
        if self.is_unreachable(node, attempt.to.0) {
            return self.schedule_step(attempt, AttemptStep::Failed, micros(QUIC_TIMEOUT));
        }
        // QUIC's handshake takes three one-way latencies, then the Hello is admitted.
        self.schedule_step(attempt, AttemptStep::Hello, 3 * delay + ADMISSION_TIME);
    }

    pub(super) fn dial(&mut self, node: NodeNumber, peer: PeerId) {
        let Some(attempt) = self.attempt(node, peer, false) else { return };
        let delay = self.latency(node, attempt.to.0);
        let allowed = self.nodes[node].agent.as_ref().is_some_and(|agent| agent.admitted.contains(&attempt.to.0));
        if !allowed {
            return self.schedule_step(attempt, AttemptStep::Failed, 0);
        }
        if self.is_unreachable(node, attempt.to.0) {
            return self.schedule_step(attempt, AttemptStep::Failed, micros(LIBP2P_TIMEOUT));
        }
        // TCP, the negotiation of noise, and three noise messages.
        self.schedule_step(attempt, AttemptStep::Dialed, 7 * delay);
    }

    pub(super) fn advance(&mut self, attempt: ConnectionAttempt) {
        let ConnectionAttempt { from: (from, _), to: (to, _), step, by_address } = attempt;
        let delay = self.latency(from, to);
        if self.is_unreachable(from, to) && !matches!(step, AttemptStep::Failed) {
            return self.schedule_step(attempt, AttemptStep::Failed, micros(QUIC_TIMEOUT));
        }
        match step {
            AttemptStep::Hello => {
                self.count_traffic(from, to, message_sizes::QUIC_HANDSHAKE);
                let peer = self.nodes[from].peer.clone();
                self.with_protocol(to, |protocol, inventory, now| protocol.admit(peer, TOKEN_LIFETIME, inventory, now));
                self.schedule_step(attempt, AttemptStep::Welcome, delay);
            }
            AttemptStep::Welcome => {
                let peer = self.nodes[to].peer.clone();
                self.with_protocol(from, |protocol, inventory, now| {
                    protocol.admit(peer, TOKEN_LIFETIME, inventory, now)
                });
            }
            AttemptStep::Dialed => {
                self.count_traffic(from, to, message_sizes::CONNECTING);
                let is_admitted = self.nodes[to].agent.as_ref().is_some_and(|agent| agent.admitted.contains(&from));
                let connection = self.connections.len() as MeshConnectionId;
                // Frames of the listener arrive after the dialer has the connection.
                self.connections.push(Connection::new([attempt.from, attempt.to], self.now + delay));
                self.schedule_step(attempt, AttemptStep::Connected(connection, is_admitted), delay);
                if is_admitted {
                    self.open(connection, 1);
                }
            }
            AttemptStep::Connected(connection, is_admitted) => {
                self.open(connection, 0);
                if !is_admitted {
                    self.schedule(self.now + delay, Event::Arrive(connection, 0, Frame::Closed));
                }
            }
            AttemptStep::Failed if by_address => {}
            AttemptStep::Failed => {
                let peer = self.nodes[to].peer.id;
                self.with_protocol(from, |protocol, inventory, now| protocol.dial_failed(peer, inventory, now));
            }
        }
    }

    /// Handles a Hello or dial to a process that does not run. The kernel refuses a dial, and a
    /// Hello gets no answer.
    pub(super) fn handle_unanswered(&mut self, attempt: ConnectionAttempt) {
        let (from, to) = (attempt.from.0, attempt.to.0);
        // Another process may run there since.
        if self.nodes[to].agent.is_some() && matches!(attempt.step, AttemptStep::Hello | AttemptStep::Dialed) {
            let restarted = ConnectionAttempt { to: (to, self.nodes[to].generation), ..attempt };
            return self.schedule_step(restarted, attempt.step, 0);
        }
        let delay = self.latency(from, to);
        match attempt.step {
            AttemptStep::Hello => self.schedule_step(attempt, AttemptStep::Failed, micros(QUIC_TIMEOUT)),
            AttemptStep::Dialed => self.schedule_step(attempt, AttemptStep::Failed, delay),
            AttemptStep::Connected(connection, _) => {
                self.schedule(self.now + delay, Event::Arrive(connection, 1, Frame::Closed))
            }
            AttemptStep::Welcome | AttemptStep::Failed => {}
        }
    }

    fn count_traffic(&mut self, one: NodeNumber, other: NodeNumber, bytes: usize) {
        for node in [one, other] {
            self.nodes[node].traffic.receive(TrafficKind::Connecting, bytes);
            self.nodes[node].traffic.send(bytes);
        }
    }

    /// Opens the connection for one side, which subscribes and starts to ping.
    fn open(&mut self, connection: MeshConnectionId, side: usize) {
        self.connections[connection as usize].open[side] = true;
        let [near, far] = [side, 1 - side].map(|side| self.connections[connection as usize].end(side).0);
        let peer = self.nodes[far].peer.id;
        let Some(agent) = &mut self.nodes[near].agent else { return };
        agent.neighbors.entry(far).or_default().push(connection);
        self.with_protocol(near, |protocol, _, now| protocol.connection_opened(connection, peer, now));
        self.send(connection, side, Frame::Subscribe);
        self.send(connection, side, Frame::Ping);
    }

    pub(super) fn allow(&mut self, node: NodeNumber, peer: PeerId, is_allowed: bool) {
        let Some(peer) = self.number(peer) else { return };
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if is_allowed {
            agent.admitted.insert(peer);
            return;
        }
        agent.admitted.remove(&peer);
        for connection in agent.neighbors.get(&peer).cloned().unwrap_or_default() {
            self.close(connection, node);
        }
    }
}
