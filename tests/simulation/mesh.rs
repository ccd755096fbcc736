//! Agents on a simulated network. Each agent is a real [`Protocol`] with a real [`Inventory`].
//! Time, connections, gossipsub, and faults of the network are modelled. One thread and one source
//! of randomness: the same seed gives the same run.
//!
//! Not modelled: processor time (except for a starved node), bandwidth (except for the time that
//! large replies take), and noise, TLS and tokens (except for their bytes).

mod catalogue;
mod connection_attempts;
mod connections;
mod converged;
mod credentials;
mod expectations;
mod gossipsub;
mod message_sizes;
mod node;

use std::rc::Rc;
use std::time::{Duration, Instant};

use lighterman::decide::gossip::{
    GossipVerdict, MeshConnectionId, Output, PING_INTERVAL, Protocol, SyncRequestId, TICK,
};
use lighterman::decide::inventory::Inventory;
use lighterman::model::{Gossip, PeerId, SyncReply, SyncRequest};
use lighterman::oci::Digest;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::event_queue::EventQueue;
use catalogue::Catalogue;
pub(crate) use catalogue::ItemNumber;
use connections::Connection;
use credentials::SimulatedKey;
pub(crate) use credentials::credential;
pub(crate) use expectations::shares;
use gossipsub::MessageNumber;
pub(crate) use gossipsub::NodeNumber;
use node::SimulatedNode;
pub(crate) use node::Traffic;

/// Microseconds since the start of the simulation.
pub(crate) type Micros = u64;

pub(crate) fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).expect("the simulated time fits into 64 bits")
}

/// Interval of gossipsub's heartbeat.
const HEARTBEAT: Micros = 1_000_000;

/// A ServiceAccount token is renewed after four fifths of the hour, as the kubelet renews mounted
/// tokens.
const TOKEN_RENEWAL: Micros = 48 * 60 * 1_000_000;

/// A frame on a connection.
#[derive(Debug, Clone)]
pub(crate) enum Frame {
    /// gossipsub: a message.
    Message(MessageNumber),
    /// gossipsub: IHAVE.
    IHave(Rc<[MessageNumber]>),
    /// gossipsub: IWANT.
    IWant(Rc<[MessageNumber]>),
    /// gossipsub: IDONTWANT.
    IDontWant(MessageNumber),
    /// gossipsub: the topic is subscribed.
    Subscribe,
    /// gossipsub: GRAFT.
    Graft,
    /// gossipsub: PRUNE.
    Prune,
    /// libp2p ping.
    Ping,
    /// Answer to a ping.
    Pong,
    /// A request, on a stream of its own.
    Request(SyncRequestId, Rc<SyncRequest>),
    /// Answer to a request.
    Response(SyncRequestId, Rc<SyncReply>),
    /// The connection's end: FIN or RST.
    Closed,
}

/// An event at a node. The number is the generation of the node's process: an event for an earlier
/// process is undeliverable.
#[derive(Debug)]
enum Event {
    Tick(NodeNumber, u32),
    Heartbeat(NodeNumber, u32),
    RenewToken(NodeNumber, u32),
    Ping(MeshConnectionId, usize),
    Arrive(MeshConnectionId, usize, Frame),
    TimedOut(NodeNumber, u32, SyncRequestId),
    Connection(connection_attempts::ConnectionAttempt),
    Join(NodeNumber, u32),
}

/// A gossipsub message and the size of its encoding.
struct PublishedMessage {
    gossip: Gossip,
    bytes: usize,
}

/// A change of a member in another member's inventory, or a fault that was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Observation {
    pub(crate) at: Micros,
    pub(crate) observer: NodeNumber,
    pub(crate) subject: NodeNumber,
    pub(crate) change: ObservedChange,
}

/// The change of the subject, as the observer's protocol reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ObservedChange {
    Up,
    Down(&'static str),
    Faulted(&'static str, bool),
    /// The observer rejected a message that the subject forwarded.
    Rejected(&'static str),
}

pub(crate) struct Mesh {
    pub(crate) now: Micros,
    began: Instant,
    pub(crate) rng: SmallRng,
    events: EventQueue<Event>,
    pub(crate) nodes: Vec<SimulatedNode>,
    numbers: std::collections::HashMap<PeerId, NodeNumber>,
    connections: Vec<Connection>,
    published: Vec<PublishedMessage>,
    names: std::collections::HashMap<Digest, MessageNumber>,
    pub(crate) catalogue: Catalogue,
    pub(crate) observations: Vec<Observation>,
    /// Number of published messages of each kind.
    pub(crate) published_by_kind: [usize; 5],
}

impl Mesh {
    /// Nodes without agents, spread over `ZONES`. Half of a node's images are among the most common
    /// quarter.
    pub(crate) fn new(nodes: usize, images: usize, images_each: usize, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let catalogue = Catalogue::new(images, &mut rng);
        let nodes: Vec<_> =
            (0..nodes).map(|number| SimulatedNode::new(number, catalogue.pick(images_each, &mut rng))).collect();
        let numbers = nodes.iter().enumerate().map(|(number, node)| (node.peer.id, number)).collect();
        Self {
            now: 0,
            began: Instant::now(),
            rng,
            events: EventQueue::new(),
            nodes,
            numbers,
            connections: Vec::new(),
            published: Vec::new(),
            names: std::collections::HashMap::new(),
            catalogue,
            observations: Vec::new(),
            published_by_kind: [0; 5],
        }
    }

    /// Adds a node with this number of images.
    pub(crate) fn add_node(&mut self, images: usize) -> NodeNumber {
        let number = self.nodes.len();
        let items = self.catalogue.pick(images, &mut self.rng);
        self.nodes.push(SimulatedNode::new(number, items));
        self.numbers.insert(self.nodes[number].peer.id, number);
        number
    }

    pub(crate) fn instant(&self) -> Instant {
        self.began + Duration::from_micros(self.now)
    }

    /// The number of the node with this PeerId.
    pub(crate) fn number(&self, peer: PeerId) -> Option<NodeNumber> {
        self.numbers.get(&peer).copied()
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.now + micros(time);
        while let Some((at, event)) = self.events.next(end) {
            self.now = at;
            self.handle_event(event);
        }
        self.now = end;
    }

    /// Runs until the condition holds, for at most `deadline`. Returns the time that this took, or
    /// `None` after the deadline.
    ///
    /// The condition is checked every 50 ms, so the time is too large by at most 50 ms.
    pub(crate) fn run_until(
        &mut self,
        deadline: Duration,
        mut condition: impl FnMut(&mut Self) -> bool,
    ) -> Option<Duration> {
        let began = self.now;
        while !condition(self) {
            if self.now - began > micros(deadline) {
                return None;
            }
            self.run_for(Duration::from_millis(50));
        }
        Some(Duration::from_micros(self.now - began))
    }

    fn schedule(&mut self, at: Micros, event: Event) {
        self.events.schedule(at, event);
    }

    fn jitter(&mut self, max: Micros) -> Micros {
        self.rng.random_range(0..max.max(1))
    }

    /// `None` if this process has ended; otherwise whether the process gets processor time now. A
    /// starved process gets the event later.
    fn may_run(&mut self, node: NodeNumber, generation: u32) -> Option<bool> {
        let node = &self.nodes[node];
        (node.generation == generation && node.agent.is_some()).then_some(node.starved_until <= self.now)
    }

    fn handle_event(&mut self, event: Event) {
        let (node, generation) = match &event {
            Event::Tick(node, generation)
            | Event::Heartbeat(node, generation)
            | Event::RenewToken(node, generation) => (*node, *generation),
            Event::TimedOut(node, generation, _) | Event::Join(node, generation) => (*node, *generation),
            Event::Ping(connection, side) => self.connections[*connection as usize].end(*side),
            Event::Arrive(connection, side, frame) => {
                if self.is_lost(*connection, *side, frame) {
                    return;
                }
                self.connections[*connection as usize].end(*side)
            }
            Event::Connection(attempt) => attempt.at(),
        };
        match self.may_run(node, generation) {
            Some(true) => self.run_event(node, generation, event),
            Some(false) => {
                let later = self.nodes[node].starved_until;
                self.schedule(later, event);
            }
            None => self.handle_undeliverable(event),
        }
    }

    fn run_event(&mut self, node: NodeNumber, generation: u32, event: Event) {
        match event {
            Event::Tick(..) => {
                self.with_protocol(node, |protocol, inventory, now| protocol.tick(inventory, now));
                self.schedule(self.now + micros(TICK), Event::Tick(node, generation));
            }
            Event::Heartbeat(..) => {
                let (now, rng) = (self.now, &mut self.rng);
                let sending = self.nodes[node].agent.as_mut().map(|agent| agent.router.heartbeat(now, rng));
                self.send_all(node, sending.unwrap_or_default());
                self.schedule(self.now + HEARTBEAT, Event::Heartbeat(node, generation));
            }
            Event::RenewToken(..) => {
                self.introduce(node);
                self.schedule(self.now + TOKEN_RENEWAL, Event::RenewToken(node, generation));
            }
            Event::Ping(connection, side) => self.send(connection, side, Frame::Ping),
            Event::Arrive(connection, side, frame) => self.receive_frame(connection, side, node, frame),
            Event::TimedOut(_, _, id) => self.time_out(node, id),
            Event::Connection(attempt) => self.advance(attempt),
            Event::Join(..) => self.join(node, generation),
        }
    }

    /// Calls a node's protocol, and executes the protocol's outputs.
    pub(crate) fn with_protocol<R>(
        &mut self,
        node: NodeNumber,
        operation: impl FnOnce(&mut Protocol<SimulatedKey>, &mut Inventory, Instant) -> R,
    ) -> Option<R> {
        let now = self.instant();
        let agent = self.nodes[node].agent.as_mut()?;
        let result = operation(&mut agent.protocol, &mut agent.inventory, now);
        self.perform_outputs(node);
        Some(result)
    }

    /// Executes the outputs of a node's protocol.
    fn perform_outputs(&mut self, node: NodeNumber) {
        while let Some(output) = self.nodes[node].agent.as_mut().and_then(|agent| agent.protocol.next()) {
            match output {
                Output::Publish(gossip) => self.publish(node, gossip),
                Output::Request(id, peer, request) => self.send_request(node, id, peer, request),
                Output::Handshake(peer) => self.connect_quic(node, peer.id, false),
                Output::Dial(peer) => self.dial(node, peer.id),
                Output::Close(connection, _) => self.close(connection, node),
                Output::Allow(peer) => self.allow(node, peer, true),
                Output::Deny(peer) => self.allow(node, peer, false),
                Output::Up(peer) => self.observe(node, peer.id, ObservedChange::Up),
                Output::Down(peer, reason) => self.observe(node, peer, ObservedChange::Down(reason)),
                Output::SharedKey(_) => {}
                Output::Fault { peer, fault, banned } => {
                    self.observe(node, peer, ObservedChange::Faulted(fault.label(), banned.is_some()));
                }
            }
        }
    }

    fn observe(&mut self, observer: NodeNumber, peer: PeerId, change: ObservedChange) {
        if let Some(subject) = self.number(peer) {
            self.observations.push(Observation { at: self.now, observer, subject, change });
        }
    }

    /// Publishes a message by the node's gossipsub, also a message that the protocol did not
    /// output.
    pub(crate) fn publish(&mut self, node: NodeNumber, gossip: Gossip) {
        let kind = match &gossip {
            Gossip::Entry(_) => 0,
            Gossip::Introduction(_) => 1,
            Gossip::Suspicion(_) => 2,
            Gossip::Refutation(_) => 3,
            Gossip::Leave(_) => 4,
        };
        self.published_by_kind[kind] += 1;
        let next = MessageNumber::try_from(self.published.len()).expect("fewer messages than 2^32");
        // Messages of the same content have the same message ID.
        let number = *self.names.entry(message_sizes::message_id(&gossip)).or_insert(next);
        if number == next {
            let bytes = message_sizes::of_gossip(&gossip);
            self.published.push(PublishedMessage { gossip, bytes });
        }
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let sending = agent.router.publish(number, &mut self.rng);
        self.send_all(node, sending);
    }

    /// Handles a gossipsub message from a peer.
    fn receive_gossip(&mut self, node: NodeNumber, from: NodeNumber, message: MessageNumber) {
        let published = &self.published[message as usize];
        let is_large = message_sizes::message(published.bytes) > gossipsub::IDONTWANT_THRESHOLD;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let Some(declining) = agent.router.handle_message(message, from, is_large) else { return };
        self.send_all(node, declining);
        let gossip = self.published[message as usize].gossip.clone();
        if matches!(gossip, Gossip::Leave(_)) && !self.nodes[node].supports_leave {
            return;
        }
        let sender = self.nodes[from].peer.id;
        self.nodes[node].messages_received += 1;
        let verdict = self
            .with_protocol(node, |protocol, inventory, now| protocol.receive_gossip(sender, gossip, inventory, now));
        match verdict {
            Some(GossipVerdict::Accept) => {
                let Some(agent) = &mut self.nodes[node].agent else { return };
                let sending = agent.router.forward(message, from);
                self.send_all(node, sending);
            }
            Some(GossipVerdict::Reject(reason)) => {
                self.observations.push(Observation {
                    at: self.now,
                    observer: node,
                    subject: from,
                    change: ObservedChange::Rejected(reason.label()),
                });
            }
            Some(GossipVerdict::Ignore(_)) | None => {}
        }
    }

    /// Schedules the next ping of a connection.
    fn schedule_probe(&mut self, connection: MeshConnectionId, side: usize) {
        self.schedule(self.now + micros(PING_INTERVAL), Event::Ping(connection, side));
    }
}
