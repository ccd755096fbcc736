//! Connections with the properties of TCP. No frame is lost or reordered on a connection. While the
//! network is cut, sent frames wait for TCP's next retransmission, and the end of a process is not
//! noticed.

use std::rc::Rc;
use std::time::Duration;

use lighterman::decide::gossip::{MeshConnectionId, SyncRequestId};
use lighterman::model::{PeerId, SyncReply, SyncRequest};

use super::gossipsub::{NodeNumber, OutgoingFrames};
use super::message_sizes::{self, Unacknowledged};
use super::node::{Traffic, TrafficKind};
use super::{Event, Frame, Mesh, Micros, micros};

/// One-way latency within a zone and between zones, without jitter of up to half of the latency.
const LATENCY_IN_ZONE: Micros = 200;
const LATENCY_ACROSS_ZONES: Micros = 1000;

/// Bandwidth of one connection in bytes per microsecond: 1 Gbit/s.
const BANDWIDTH: usize = 125;

/// TCP's first retransmission time-out. Each further time-out is twice as long.
const RESEND: Micros = 200_000;

/// Most frames that each side keeps while the network is cut. gossipsub's own send queue is not
/// longer.
const MAX_UNDELIVERED: usize = 256;

/// Deadline of a request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// A connection between two processes. Side 0 has dialed.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) ends: [(NodeNumber, u32); 2],
    /// Whether the connection is open for each side.
    pub(crate) open: [bool; 2],
    /// Arrival time of the last frame that each side sent.
    arrives: [Micros; 2],
    /// Frames of each side that could not be delivered, and the time of the first.
    undelivered: [Vec<Frame>; 2],
    undelivered_since: [Micros; 2],
    /// Received bytes of each side that are not acknowledged.
    unacknowledged: [Unacknowledged; 2],
}

impl Connection {
    /// No frame arrives at the dialer before the time `known`.
    pub(crate) fn new(ends: [(NodeNumber, u32); 2], known: Micros) -> Self {
        Self {
            ends,
            open: [false; 2],
            arrives: [0, known],
            undelivered: [Vec::new(), Vec::new()],
            undelivered_since: [0; 2],
            unacknowledged: [Unacknowledged::default(); 2],
        }
    }

    pub(crate) fn end(&self, side: usize) -> (NodeNumber, u32) {
        self.ends[side]
    }

    /// The side of a node.
    fn side_of(&self, node: NodeNumber) -> usize {
        usize::from(self.ends[0].0 != node)
    }
}

impl Mesh {
    /// Whether packets between two nodes are dropped.
    pub(crate) fn is_unreachable(&self, one: NodeNumber, other: NodeNumber) -> bool {
        let (one, other) = (&self.nodes[one], &self.nodes[other]);
        one.is_link_down || other.is_link_down || one.partition != other.partition
    }

    /// One-way latency of a packet at this moment.
    pub(super) fn latency(&mut self, one: NodeNumber, other: NodeNumber) -> Micros {
        let usual = if self.nodes[one].zone == self.nodes[other].zone { LATENCY_IN_ZONE } else { LATENCY_ACROSS_ZONES };
        usual + self.jitter(usual / 2)
    }

    pub(super) fn send_all(&mut self, node: NodeNumber, sending: OutgoingFrames) {
        for (peer, frame) in sending {
            let connection = self.nodes[node].agent.as_ref().and_then(|agent| agent.connection_to(peer));
            if let Some(connection) = connection {
                let side = self.connections[connection as usize].side_of(node);
                self.send(connection, side, frame);
            }
        }
    }

    pub(super) fn send(&mut self, connection: MeshConnectionId, side: usize, frame: Frame) {
        let [(one, _), (other, _)] = self.connections[connection as usize].ends;
        if !self.connections[connection as usize].open[side] {
            return;
        }
        if self.is_unreachable(one, other) {
            self.buffer(connection, side, frame);
        } else {
            self.transmit(connection, side, frame, 0);
        }
    }

    /// Schedules the arrival of a frame, after earlier frames of this side.
    fn transmit(&mut self, connection: MeshConnectionId, side: usize, frame: Frame, delay: Micros) {
        let [(one, _), (other, _)] = self.connections[connection as usize].ends;
        let (from, to) = if side == 0 { (one, other) } else { (other, one) };
        let (kind, bytes) = self.frame_bytes(&frame);
        let latency = self.latency(one, other);
        let state = &mut self.connections[connection as usize];
        let at = state.arrives[side].max(self.now + delay + latency + (bytes / BANDWIDTH) as Micros);
        state.arrives[side] = at;
        let acks_from_sender = state.unacknowledged[side].sent(self.now);
        let acks_from_receiver = state.unacknowledged[1 - side].received(bytes, at);
        self.nodes[from].traffic.send(bytes);
        self.nodes[to].traffic.receive(kind, bytes);
        self.acknowledge(from, to, acks_from_sender);
        self.acknowledge(to, from, acks_from_receiver);
        self.schedule(at, Event::Arrive(connection, 1 - side, frame));
    }

    fn acknowledge(&mut self, from: NodeNumber, to: NodeNumber, acks: usize) {
        let mut sender = Traffic::default();
        self.nodes[to].traffic.acks(&mut sender, acks);
        self.nodes[from].traffic.sent += sender.sent;
    }

    fn buffer(&mut self, id: MeshConnectionId, side: usize, frame: Frame) {
        let now = self.now;
        let connection = &mut self.connections[id as usize];
        if connection.undelivered[side].is_empty() {
            connection.undelivered_since[side] = now;
        }
        // The end of the connection is always delivered, however late.
        if connection.undelivered[side].len() < MAX_UNDELIVERED || matches!(frame, Frame::Closed) {
            connection.undelivered[side].push(frame);
        }
    }

    /// Buffers a frame that would arrive while the network is cut. Returns whether the frame was
    /// buffered.
    pub(super) fn is_lost(&mut self, connection: MeshConnectionId, side: usize, frame: &Frame) -> bool {
        let [(one, _), (other, _)] = self.connections[connection as usize].ends;
        let lost = self.is_unreachable(one, other);
        if lost {
            self.buffer(connection, 1 - side, frame.clone());
        }
        lost
    }

    /// Schedules buffered frames for TCP's next retransmission, where the network is no longer cut.
    pub(crate) fn resend(&mut self) {
        for number in 0..self.connections.len() {
            let [(one, _), (other, _)] = self.connections[number].ends;
            if self.is_unreachable(one, other) {
                continue;
            }
            for side in 0..2 {
                let stuck = std::mem::take(&mut self.connections[number].undelivered[side]);
                let since = self.connections[number].undelivered_since[side];
                let mut wait = RESEND;
                let mut again = since + wait;
                while again < self.now {
                    wait = (wait * 2).min(120_000_000);
                    again += wait;
                }
                for frame in stuck {
                    self.transmit(number as MeshConnectionId, side, frame, again - self.now);
                }
            }
        }
    }

    /// Handles an event for a process that has ended: the kernel resets connections, and a dial
    /// fails.
    pub(super) fn handle_undeliverable(&mut self, event: Event) {
        match event {
            Event::Arrive(connection, side, frame) if !matches!(frame, Frame::Closed) => self.reset(connection, side),
            Event::Connection(attempt) => self.handle_unanswered(attempt),
            _ => {}
        }
    }

    /// Sends RST to the other side.
    fn reset(&mut self, connection: MeshConnectionId, side: usize) {
        if self.connections[connection as usize].open[1 - side] {
            self.transmit(connection, side, Frame::Closed, 0);
        }
    }

    pub(super) fn receive_frame(&mut self, connection: MeshConnectionId, side: usize, node: NodeNumber, frame: Frame) {
        if !self.connections[connection as usize].open[side] {
            if !matches!(frame, Frame::Closed) {
                self.reset(connection, side);
            }
            return;
        }
        let (from, _) = self.connections[connection as usize].end(1 - side);
        let (now, peer) = (self.now, self.nodes[from].peer.id);
        let dialed = side == 0;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let router = &mut agent.router;
        let sending = match frame {
            Frame::Message(message) => return self.receive_gossip(node, from, message),
            Frame::Ping => return self.send(connection, side, Frame::Pong),
            Frame::Pong => {
                self.with_protocol(node, |protocol, inventory, now| {
                    protocol.record_ping_answer(connection, peer, inventory, now)
                });
                return self.schedule_probe(connection, side);
            }
            Frame::Request(id, request) => return self.reply(connection, side, node, peer, id, &request),
            Frame::Response(id, reply) => return self.receive_response(node, id, &reply),
            Frame::Closed => return self.end_side(connection, side),
            Frame::IHave(messages) => router.handle_ihave(from, &messages, now),
            Frame::IWant(messages) => router.handle_iwant(from, &messages),
            Frame::Subscribe => router.handle_subscription(from, dialed, now),
            Frame::Graft => router.handle_graft(from, now),
            Frame::Prune => {
                router.handle_prune(from, now);
                Vec::new()
            }
            Frame::IDontWant(message) => {
                router.handle_idontwant(from, message, now);
                Vec::new()
            }
        };
        self.send_all(node, sending);
    }

    fn frame_bytes(&self, frame: &Frame) -> (TrafficKind, usize) {
        match frame {
            Frame::Message(message) => {
                (TrafficKind::Message, message_sizes::publish(self.published[*message as usize].bytes))
            }
            Frame::IHave(messages) => (TrafficKind::Control, message_sizes::ihave(messages.len())),
            Frame::IWant(messages) => (TrafficKind::Control, message_sizes::iwant(messages.len())),
            Frame::IDontWant(_) => (TrafficKind::Control, message_sizes::iwant(1)),
            Frame::Subscribe | Frame::Graft | Frame::Prune => (TrafficKind::Control, message_sizes::graft()),
            Frame::Ping | Frame::Pong => (TrafficKind::Ping, message_sizes::ping()),
            Frame::Request(_, request) => (TrafficKind::Exchange, message_sizes::of_request(request)),
            Frame::Response(_, reply) => (TrafficKind::Exchange, message_sizes::of_reply(reply)),
            Frame::Closed => (TrafficKind::Connecting, message_sizes::ACK),
        }
    }

    pub(super) fn send_request(&mut self, node: NodeNumber, id: SyncRequestId, peer: PeerId, request: SyncRequest) {
        let connection = self.number(peer).and_then(|peer| self.nodes[node].agent.as_ref()?.connection_to(peer));
        let generation = self.nodes[node].generation;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        agent.pending_requests.insert(id, connection);
        let Some(connection) = connection else {
            return self.schedule(self.now, Event::TimedOut(node, generation, id));
        };
        self.schedule(self.now + micros(REQUEST_DEADLINE), Event::TimedOut(node, generation, id));
        let side = self.connections[connection as usize].side_of(node);
        self.send(connection, side, Frame::Request(id, Rc::new(request)));
    }

    fn reply(
        &mut self,
        connection: MeshConnectionId,
        side: usize,
        node: NodeNumber,
        from: PeerId,
        id: SyncRequestId,
        request: &SyncRequest,
    ) {
        let request = request.clone();
        let mut reply =
            self.with_protocol(node, |protocol, inventory, now| protocol.answer(from, request, inventory, now));
        if self.nodes[node].is_liar {
            reply = reply.map(|reply| self.falsify(reply));
        }
        if let Some(reply) = reply {
            self.send(connection, side, Frame::Response(id, Rc::new(reply)));
        }
    }

    fn receive_response(&mut self, node: NodeNumber, id: SyncRequestId, reply: &SyncReply) {
        let waits = self.nodes[node].agent.as_mut().and_then(|agent| agent.pending_requests.remove(&id));
        if waits.is_some() {
            self.with_protocol(node, |protocol, inventory, now| {
                protocol.receive_reply(id, reply.clone(), inventory, now)
            });
        }
    }

    pub(super) fn time_out(&mut self, node: NodeNumber, id: SyncRequestId) {
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if agent.pending_requests.remove(&id).is_some() {
            self.with_protocol(node, |protocol, _, now| protocol.record_request_failure(id, now));
        }
    }

    /// Closes the connection from the side of `node`.
    pub(super) fn close(&mut self, connection: MeshConnectionId, node: NodeNumber) {
        let side = self.connections[connection as usize].side_of(node);
        self.send(connection, side, Frame::Closed);
        self.end_side(connection, side);
    }

    /// Ends the connection for one side.
    pub(super) fn end_side(&mut self, connection: MeshConnectionId, side: usize) {
        if !std::mem::take(&mut self.connections[connection as usize].open[side]) {
            return;
        }
        let (node, _) = self.connections[connection as usize].end(side);
        let (other, _) = self.connections[connection as usize].end(1 - side);
        let peer = self.nodes[other].peer.id;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if let Some(connections) = agent.neighbors.get_mut(&other) {
            connections.retain(|open| *open != connection);
            if connections.is_empty() {
                agent.neighbors.remove(&other);
                agent.router.remove_peer(other);
            }
        }
        let ids: Vec<_> =
            agent.pending_requests.iter().filter(|(_, used)| **used == Some(connection)).map(|(id, _)| *id).collect();
        self.with_protocol(node, |protocol, _, now| protocol.connection_closed(connection, peer, now));
        for id in ids {
            self.time_out(node, id);
        }
    }
}
