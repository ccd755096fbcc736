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
    Dialled,
    /// The libp2p connection is established. False if the other agent rejects the connection.
    Connected(MeshConnectionId, bool),
    /// No answer arrives.
    Failed,
}

impl ConnectionAttempt {
    /// The process at which the step happens.
    pub(super) fn at(&self) -> (NodeNumber, u32) {
        match self.step {
            AttemptStep::Hello | AttemptStep::Dialled => self.to,
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
        let held: Vec<_> = self.nodes[node].items.iter().copied().collect();
        self.announce(node, &held, &[]);
        self.start_timers(node);
    }

    /// Starts the agent's timers, each at a random moment.
    pub(super) fn start_timers(&mut self, node: NodeNumber) {
        let life = self.nodes[node].generation;
        let tick = self.now + self.jitter(250_000);
        self.schedule(tick, Event::Tick(node, life));
        let beat = self.now + self.jitter(HEARTBEAT);
        self.schedule(beat, Event::Heartbeat(node, life));
        let renewal = self.now + self.jitter(TOKEN_RENEWAL);
        self.schedule(renewal, Event::RenewToken(node, life));
        if !self.nodes[node].seeds.is_empty() {
            self.schedule(self.now, Event::Join(node, life));
        }
    }

    /// SIGKILL: the kernel closes the process's connections.
    pub(crate) fn kill(&mut self, node: NodeNumber) {
        let Some(agent) = self.nodes[node].agent.take() else { return };
        for link in agent.neighbors.into_values().flatten() {
            let side = usize::from(self.connections[link as usize].ends[0].0 != node);
            self.send(link, side, Frame::Closed);
            self.connections[link as usize].open[side] = false;
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
        let shown = credential(peer.id, self.now);
        self.with_protocol(node, |protocol, _, now| {
            protocol.introduce(shown, peer.transfer, peer.gossip, peer.zone, now)
        });
    }

    /// Dials the seeds that are not alive in the inventory, as the agent does with addresses from
    /// DNS.
    pub(super) fn join(&mut self, node: NodeNumber, life: u32) {
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
        self.schedule(at, Event::Join(node, life));
    }

    fn attempt(&self, from: NodeNumber, to: PeerId, by_address: bool) -> Option<ConnectionAttempt> {
        let to = self.number(to)?;
        let end = |node: NodeNumber| (node, self.nodes[node].generation);
        Some(ConnectionAttempt { from: end(from), to: end(to), step: AttemptStep::Hello, by_address })
    }

    fn later(&mut self, meeting: ConnectionAttempt, step: AttemptStep, after: Micros) {
        self.schedule(self.now + after, Event::Connection(ConnectionAttempt { step, ..meeting }));
    }

    /// Starts a QUIC handshake. A failed handshake by address is not reported to the protocol.
    pub(super) fn connect_quic(&mut self, node: NodeNumber, peer: PeerId, by_address: bool) {
        let Some(meeting) = self.attempt(node, peer, by_address) else { return };
        let there = self.latency(node, meeting.to.0);
        if self.is_cut(node, meeting.to.0) {
            return self.later(meeting, AttemptStep::Failed, micros(QUIC_TIMEOUT));
        }
        // QUIC's handshake takes three one-way latencies, then the Hello is admitted.
        self.later(meeting, AttemptStep::Hello, 3 * there + ADMISSION_TIME);
    }

    pub(super) fn dial(&mut self, node: NodeNumber, peer: PeerId) {
        let Some(meeting) = self.attempt(node, peer, false) else { return };
        let there = self.latency(node, meeting.to.0);
        let allowed = self.nodes[node].agent.as_ref().is_some_and(|agent| agent.admitted.contains(&meeting.to.0));
        if !allowed {
            return self.later(meeting, AttemptStep::Failed, 0);
        }
        if self.is_cut(node, meeting.to.0) {
            return self.later(meeting, AttemptStep::Failed, micros(LIBP2P_TIMEOUT));
        }
        // TCP, the negotiation of noise, and three noise messages.
        self.later(meeting, AttemptStep::Dialled, 7 * there);
    }

    pub(super) fn advance(&mut self, meeting: ConnectionAttempt) {
        let ConnectionAttempt { from: (from, _), to: (to, _), step, by_address } = meeting;
        let back = self.latency(from, to);
        if self.is_cut(from, to) && !matches!(step, AttemptStep::Failed) {
            return self.later(meeting, AttemptStep::Failed, micros(QUIC_TIMEOUT));
        }
        match step {
            AttemptStep::Hello => {
                self.count_traffic(from, to, message_sizes::QUIC_HANDSHAKE);
                let peer = self.nodes[from].peer.clone();
                self.with_protocol(to, |protocol, table, now| protocol.admit(peer, TOKEN_LIFETIME, table, now));
                self.later(meeting, AttemptStep::Welcome, back);
            }
            AttemptStep::Welcome => {
                let peer = self.nodes[to].peer.clone();
                self.with_protocol(from, |protocol, table, now| protocol.admit(peer, TOKEN_LIFETIME, table, now));
            }
            AttemptStep::Dialled => {
                self.count_traffic(from, to, message_sizes::CONNECTING);
                let wanted = self.nodes[to].agent.as_ref().is_some_and(|agent| agent.admitted.contains(&from));
                let link = self.connections.len() as MeshConnectionId;
                // Frames of the listener arrive after the dialer has the connection.
                self.connections.push(Connection::new([meeting.from, meeting.to], self.now + back));
                self.later(meeting, AttemptStep::Connected(link, wanted), back);
                if wanted {
                    self.open(link, 1);
                }
            }
            AttemptStep::Connected(link, wanted) => {
                self.open(link, 0);
                if !wanted {
                    self.schedule(self.now + back, Event::Arrive(link, 0, Frame::Closed));
                }
            }
            AttemptStep::Failed if by_address => {}
            AttemptStep::Failed => {
                let peer = self.nodes[to].peer.id;
                self.with_protocol(from, |protocol, table, now| protocol.dial_failed(peer, table, now));
            }
        }
    }

    /// Handles a Hello or dial to a process that does not run. The kernel refuses a dial, and a
    /// Hello gets no answer.
    pub(super) fn handle_unanswered(&mut self, meeting: ConnectionAttempt) {
        let (from, to) = (meeting.from.0, meeting.to.0);
        // Another process may run there since.
        if self.nodes[to].agent.is_some() && matches!(meeting.step, AttemptStep::Hello | AttemptStep::Dialled) {
            let anew = ConnectionAttempt { to: (to, self.nodes[to].generation), ..meeting };
            return self.later(anew, meeting.step, 0);
        }
        let back = self.latency(from, to);
        match meeting.step {
            AttemptStep::Hello => self.later(meeting, AttemptStep::Failed, micros(QUIC_TIMEOUT)),
            AttemptStep::Dialled => self.later(meeting, AttemptStep::Failed, back),
            AttemptStep::Connected(link, _) => self.schedule(self.now + back, Event::Arrive(link, 1, Frame::Closed)),
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
    fn open(&mut self, link: MeshConnectionId, side: usize) {
        self.connections[link as usize].open[side] = true;
        let [near, far] = [side, 1 - side].map(|side| self.connections[link as usize].end(side).0);
        let peer = self.nodes[far].peer.id;
        let Some(agent) = &mut self.nodes[near].agent else { return };
        agent.neighbors.entry(far).or_default().push(link);
        self.with_protocol(near, |protocol, _, now| protocol.connection_opened(link, peer, now));
        self.send(link, side, Frame::Subscribe);
        self.send(link, side, Frame::Ping);
    }

    pub(super) fn allow(&mut self, node: NodeNumber, peer: PeerId, may: bool) {
        let Some(peer) = self.number(peer) else { return };
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if may {
            agent.admitted.insert(peer);
            return;
        }
        agent.admitted.remove(&peer);
        for link in agent.neighbors.get(&peer).cloned().unwrap_or_default() {
            self.close(link, node);
        }
    }
}
