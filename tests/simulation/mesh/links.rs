//! Connections: TCP as the protocols above it feel it. Nothing is lost or overtakes on a connection, but where the network is cut what was
//! sent waits until TCP tries again, and who ends a connection is not heard.

use std::rc::Rc;
use std::time::Duration;

use lighterman::decide::gossip::{AskId, LinkId};
use lighterman::model::{PeerId, Question, Reply};

use super::bytes::{self, Unacknowledged};
use super::node::{Kind, Traffic};
use super::router::{NodeNumber, Sending};
use super::{Event, Frame, Mesh, Micros, micros};

/// Between nodes of one zone and of two, one way, before jitter of up to half of it.
const NEAR: Micros = 200;
const FAR: Micros = 1000;

/// Bytes per microsecond of one connection: 1 Gbit/s.
const SPEED: usize = 125;

/// TCP's first wait before it sends again; each next one is twice as long.
const RESEND: Micros = 200_000;

/// More frames are not kept while nothing gets through; gossipsub's queue is no longer either.
const MAX_STUCK: usize = 256;

/// How long a question may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection between two processes; the first has dialled.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) ends: [(NodeNumber, u32); 2],
    /// Whether the side holds it for open.
    pub(crate) open: [bool; 2],
    /// When what the side sent last arrives.
    arrives: [Micros; 2],
    /// What the side sent and could not be delivered, and since when.
    stuck: [Vec<Frame>; 2],
    stuck_since: [Micros; 2],
    /// What has come to the side.
    unacknowledged: [Unacknowledged; 2],
}

impl Link {
    /// Nothing arrives at the dialler before this.
    pub(crate) fn new(ends: [(NodeNumber, u32); 2], known: Micros) -> Self {
        Self {
            ends,
            open: [false; 2],
            arrives: [0, known],
            stuck: [Vec::new(), Vec::new()],
            stuck_since: [0; 2],
            unacknowledged: [Unacknowledged::default(); 2],
        }
    }

    pub(crate) fn end(&self, side: usize) -> (NodeNumber, u32) {
        self.ends[side]
    }

    /// Which side a node is on.
    fn side_of(&self, node: NodeNumber) -> usize {
        usize::from(self.ends[0].0 != node)
    }
}

impl Mesh {
    /// Whether packets between two nodes vanish.
    pub(crate) fn is_cut(&self, one: NodeNumber, other: NodeNumber) -> bool {
        let (one, other) = (&self.nodes[one], &self.nodes[other]);
        one.silent || other.silent || one.side != other.side
    }

    /// How long a packet takes now.
    pub(super) fn latency(&mut self, one: NodeNumber, other: NodeNumber) -> Micros {
        let usual = if self.nodes[one].zone == self.nodes[other].zone { NEAR } else { FAR };
        usual + self.jitter(usual / 2)
    }

    pub(super) fn send_all(&mut self, node: NodeNumber, sending: Sending) {
        for (peer, frame) in sending {
            let link = self.nodes[node].agent.as_ref().and_then(|agent| agent.link_to(peer));
            if let Some(link) = link {
                let side = self.links[link as usize].side_of(node);
                self.send(link, side, frame);
            }
        }
    }

    pub(super) fn send(&mut self, link: LinkId, side: usize, frame: Frame) {
        let [(one, _), (other, _)] = self.links[link as usize].ends;
        if !self.links[link as usize].open[side] {
            return;
        }
        if self.is_cut(one, other) {
            self.keep(link, side, frame);
        } else {
            self.pass(link, side, frame, 0);
        }
    }

    /// Puts a frame on the way, after what was sent before.
    fn pass(&mut self, link: LinkId, side: usize, frame: Frame, delay: Micros) {
        let [(one, _), (other, _)] = self.links[link as usize].ends;
        let (from, to) = if side == 0 { (one, other) } else { (other, one) };
        let (kind, bytes) = self.weigh(&frame);
        let latency = self.latency(one, other);
        let link_state = &mut self.links[link as usize];
        let at = link_state.arrives[side].max(self.now + delay + latency + (bytes / SPEED) as Micros);
        link_state.arrives[side] = at;
        let acks_from_sender = link_state.unacknowledged[side].sent(self.now);
        let acks_from_receiver = link_state.unacknowledged[1 - side].received(bytes, at);
        self.nodes[from].traffic.send(bytes);
        self.nodes[to].traffic.receive(kind, bytes);
        self.acknowledge(from, to, acks_from_sender);
        self.acknowledge(to, from, acks_from_receiver);
        self.schedule(at, Event::Arrive(link, 1 - side, frame));
    }

    fn acknowledge(&mut self, from: NodeNumber, to: NodeNumber, acks: usize) {
        let mut sender = Traffic::default();
        self.nodes[to].traffic.acks(&mut sender, acks);
        self.nodes[from].traffic.sent += sender.sent;
    }

    fn keep(&mut self, link: LinkId, side: usize, frame: Frame) {
        let now = self.now;
        let link = &mut self.links[link as usize];
        if link.stuck[side].is_empty() {
            link.stuck_since[side] = now;
        }
        // The end is always heard of, in the end.
        if link.stuck[side].len() < MAX_STUCK || matches!(frame, Frame::Closed) {
            link.stuck[side].push(frame);
        }
    }

    /// Whether the network is cut between the two ends of a connection just when this would arrive.
    pub(super) fn is_lost(&mut self, link: LinkId, side: usize, frame: &Frame) -> bool {
        let [(one, _), (other, _)] = self.links[link as usize].ends;
        let lost = self.is_cut(one, other);
        if lost {
            self.keep(link, 1 - side, frame.clone());
        }
        lost
    }

    /// Packets pass again: what waited is sent when TCP tries the next time.
    pub(crate) fn resend(&mut self) {
        for number in 0..self.links.len() {
            let [(one, _), (other, _)] = self.links[number].ends;
            if self.is_cut(one, other) {
                continue;
            }
            for side in 0..2 {
                let stuck = std::mem::take(&mut self.links[number].stuck[side]);
                let since = self.links[number].stuck_since[side];
                let mut wait = RESEND;
                let mut again = since + wait;
                while again < self.now {
                    wait = (wait * 2).min(120_000_000);
                    again += wait;
                }
                for frame in stuck {
                    self.pass(number as LinkId, side, frame, again - self.now);
                }
            }
        }
    }

    /// Nobody is there to take an event: who sent to a process that ended learns that.
    pub(super) fn nobody(&mut self, event: Event) {
        match event {
            Event::Arrive(link, side, frame) if !matches!(frame, Frame::Closed) => self.reset(link, side),
            Event::Meeting(meeting) => self.nobody_met(meeting),
            _ => {}
        }
    }

    /// The other end is told that there is nothing here.
    fn reset(&mut self, link: LinkId, side: usize) {
        if self.links[link as usize].open[1 - side] {
            self.pass(link, side, Frame::Closed, 0);
        }
    }

    pub(super) fn arrive(&mut self, link: LinkId, side: usize, node: NodeNumber, frame: Frame) {
        if !self.links[link as usize].open[side] {
            if !matches!(frame, Frame::Closed) {
                self.reset(link, side);
            }
            return;
        }
        let (from, _) = self.links[link as usize].end(1 - side);
        let (now, peer) = (self.now, self.nodes[from].peer.id);
        let dialled = side == 0;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let router = &mut agent.router;
        let sending = match frame {
            Frame::Message(message) => return self.hear(node, from, message),
            Frame::Ping => return self.send(link, side, Frame::Pong),
            Frame::Pong => {
                self.tell(node, |protocol, table, now| protocol.heard(link, peer, table, now));
                return self.probe_again(link, side);
            }
            Frame::Ask(ask, question) => return self.reply(link, side, node, peer, ask, &question),
            Frame::Answer(ask, reply) => return self.answered(node, ask, &reply),
            Frame::Closed => return self.closed(link, side),
            Frame::Have(messages) => router.told(from, &messages, now),
            Frame::Want(messages) => router.asked(from, &messages),
            Frame::Subscribe => router.joined(from, dialled, now),
            Frame::Graft => router.grafted(from, now),
            Frame::Prune => {
                router.pruned(from, now);
                Vec::new()
            }
            Frame::Unwanted(message) => {
                router.declined(from, message, now);
                Vec::new()
            }
        };
        self.send_all(node, sending);
    }

    fn weigh(&self, frame: &Frame) -> (Kind, usize) {
        match frame {
            Frame::Message(message) => (Kind::Message, bytes::publish(self.published[*message as usize].bytes)),
            Frame::Have(messages) => (Kind::Control, bytes::have(messages.len())),
            Frame::Want(messages) => (Kind::Control, bytes::want(messages.len())),
            Frame::Unwanted(_) => (Kind::Control, bytes::want(1)),
            Frame::Subscribe | Frame::Graft | Frame::Prune => (Kind::Control, bytes::graft()),
            Frame::Ping | Frame::Pong => (Kind::Ping, bytes::ping()),
            Frame::Ask(_, question) => (Kind::Exchange, bytes::of_question(question)),
            Frame::Answer(_, reply) => (Kind::Exchange, bytes::of_reply(reply)),
            Frame::Closed => (Kind::Connecting, bytes::ACK),
        }
    }

    pub(super) fn ask(&mut self, node: NodeNumber, ask: AskId, peer: PeerId, question: Question) {
        let link = self.number(peer).and_then(|peer| self.nodes[node].agent.as_ref()?.link_to(peer));
        let life = self.nodes[node].life;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        agent.asked.insert(ask, link);
        let Some(link) = link else { return self.schedule(self.now, Event::TimedOut(node, life, ask)) };
        self.schedule(self.now + micros(PATIENCE), Event::TimedOut(node, life, ask));
        let side = self.links[link as usize].side_of(node);
        self.send(link, side, Frame::Ask(ask, Rc::new(question)));
    }

    fn reply(&mut self, link: LinkId, side: usize, node: NodeNumber, from: PeerId, ask: AskId, question: &Question) {
        let question = question.clone();
        let mut reply = self.tell(node, |protocol, table, now| protocol.asked(from, question, table, now));
        if self.nodes[node].lies {
            reply = reply.map(|reply| self.garbled(reply));
        }
        if let Some(reply) = reply {
            self.send(link, side, Frame::Answer(ask, Rc::new(reply)));
        }
    }

    fn answered(&mut self, node: NodeNumber, ask: AskId, reply: &Reply) {
        let waits = self.nodes[node].agent.as_mut().and_then(|agent| agent.asked.remove(&ask));
        if waits.is_some() {
            self.tell(node, |protocol, table, now| protocol.answered(ask, reply.clone(), table, now));
        }
    }

    pub(super) fn give_up(&mut self, node: NodeNumber, ask: AskId) {
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if agent.asked.remove(&ask).is_some() {
            self.tell(node, |protocol, _, now| protocol.unanswered(ask, now));
        }
    }

    /// One side ends it.
    pub(super) fn close(&mut self, link: LinkId, node: NodeNumber) {
        let side = self.links[link as usize].side_of(node);
        self.send(link, side, Frame::Closed);
        self.closed(link, side);
    }

    /// It is over for one side.
    pub(super) fn closed(&mut self, link: LinkId, side: usize) {
        if !std::mem::take(&mut self.links[link as usize].open[side]) {
            return;
        }
        let (node, _) = self.links[link as usize].end(side);
        let (other, _) = self.links[link as usize].end(1 - side);
        let peer = self.nodes[other].peer.id;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if let Some(links) = agent.neighbours.get_mut(&other) {
            links.retain(|open| *open != link);
            if links.is_empty() {
                agent.neighbours.remove(&other);
                agent.router.left(other);
            }
        }
        let asks: Vec<_> = agent.asked.iter().filter(|(_, over)| **over == Some(link)).map(|(ask, _)| *ask).collect();
        self.tell(node, |protocol, _, now| protocol.closed(link, peer, now));
        for ask in asks {
            self.give_up(node, ask);
        }
    }
}
