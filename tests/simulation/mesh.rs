//! Agents on a simulated network: each is a real [`Protocol`] with a real [`Inventory`]; time, connections, gossipsub, and what can befall
//! them are modelled. One thread, one source of randomness: the same seed gives the same run.
//!
//! Not modelled: processor time (but for a node that is starved on purpose), bandwidth (but for the time that large replies take), and
//! noise, TLS and tokens (but for their bytes).

mod bytes;
mod catalogue;
mod converged;
mod links;
mod meeting;
mod node;
mod notary;
mod router;
mod truth;

use std::rc::Rc;
use std::time::{Duration, Instant};

use lighterman::decide::gossip::{AskId, LinkId, Output, PROBE, Protocol, TICK, Verdict};
use lighterman::decide::inventory::Inventory;
use lighterman::model::{Gossip, PeerId, Question, Reply};
use lighterman::oci::Digest;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::agenda::Agenda;
use catalogue::Catalogue;
pub(crate) use catalogue::ItemNumber;
use links::Link;
use node::Node;
pub(crate) use node::Traffic;
use notary::Key;
pub(crate) use notary::credential;
use router::MessageNumber;
pub(crate) use router::NodeNumber;
pub(crate) use truth::shares;

/// Since the simulation's start, in microseconds.
pub(crate) type Micros = u64;

/// In simulated microseconds.
pub(crate) fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).expect("a simulation does not last so long")
}

/// Gossipsub's heartbeat.
const HEARTBEAT: Micros = 1_000_000;

/// A ServiceAccount token is renewed when four fifths of its hour are over, as kubelet renews its own.
const RENEWAL: Micros = 48 * 60 * 1_000_000;

/// What goes over a connection.
#[derive(Debug, Clone)]
pub(crate) enum Frame {
    /// gossipsub: a message.
    Message(MessageNumber),
    /// gossipsub: IHAVE.
    Have(Rc<[MessageNumber]>),
    /// gossipsub: IWANT.
    Want(Rc<[MessageNumber]>),
    /// gossipsub: IDONTWANT.
    Unwanted(MessageNumber),
    /// gossipsub: the topic is subscribed.
    Subscribe,
    /// gossipsub: GRAFT.
    Graft,
    /// gossipsub: PRUNE.
    Prune,
    /// libp2p ping.
    Ping,
    /// Its answer.
    Pong,
    /// A question, on a stream of its own.
    Ask(AskId, Rc<Question>),
    /// Its answer.
    Answer(AskId, Rc<Reply>),
    /// The connection's end: FIN or RST.
    Closed,
}

/// What happens at a node. The number counts a node's processes: what was meant for an earlier one is void.
#[derive(Debug)]
enum Event {
    Tick(NodeNumber, u32),
    Heartbeat(NodeNumber, u32),
    Renew(NodeNumber, u32),
    Ping(LinkId, usize),
    Arrive(LinkId, usize, Frame),
    TimedOut(NodeNumber, u32, AskId),
    Meeting(meeting::Meeting),
    Join(NodeNumber, u32),
}

/// A message of gossipsub, and what it weighs.
struct Published {
    gossip: Gossip,
    bytes: usize,
}

/// A member's inventory lost another, or somebody was blamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) at: Micros,
    pub(crate) by: NodeNumber,
    pub(crate) of: NodeNumber,
    pub(crate) verdict: Judged,
}

/// What was said of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Judged {
    Up,
    Down(&'static str),
    Blamed(&'static str, bool),
    /// A message passed on by it was refused.
    Rejected(&'static str),
}

/// The whole cluster.
pub(crate) struct Mesh {
    pub(crate) now: Micros,
    began: Instant,
    pub(crate) rng: SmallRng,
    agenda: Agenda<Event>,
    pub(crate) nodes: Vec<Node>,
    numbers: std::collections::HashMap<PeerId, NodeNumber>,
    links: Vec<Link>,
    published: Vec<Published>,
    names: std::collections::HashMap<Digest, MessageNumber>,
    pub(crate) catalogue: Catalogue,
    pub(crate) judgements: Vec<Judgement>,
    /// How many messages of each kind were published.
    pub(crate) told: [usize; 5],
}

impl Mesh {
    /// Nodes without agents, spread over `zones`. Half of a node's images are among those that most have.
    pub(crate) fn new(nodes: usize, images: usize, images_each: usize, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let catalogue = Catalogue::new(images, &mut rng);
        let nodes: Vec<_> = (0..nodes).map(|number| Node::new(number, catalogue.pick(images_each, &mut rng))).collect();
        let numbers = nodes.iter().enumerate().map(|(number, node)| (node.peer.id, number)).collect();
        Self {
            now: 0,
            began: Instant::now(),
            rng,
            agenda: Agenda::new(),
            nodes,
            numbers,
            links: Vec::new(),
            published: Vec::new(),
            names: std::collections::HashMap::new(),
            catalogue,
            judgements: Vec::new(),
            told: [0; 5],
        }
    }

    /// One node more, with so many images.
    pub(crate) fn add_node(&mut self, images: usize) -> NodeNumber {
        let number = self.nodes.len();
        let held = self.catalogue.pick(images, &mut self.rng);
        self.nodes.push(Node::new(number, held));
        self.numbers.insert(self.nodes[number].peer.id, number);
        number
    }

    /// The simulated moment.
    pub(crate) fn instant(&self) -> Instant {
        self.began + Duration::from_micros(self.now)
    }

    /// The node with this key.
    pub(crate) fn number(&self, peer: PeerId) -> Option<NodeNumber> {
        self.numbers.get(&peer).copied()
    }

    /// Lets time pass.
    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.now + micros(time);
        while let Some((at, event)) = self.agenda.next(end) {
            self.now = at;
            self.happen(event);
        }
        self.now = end;
    }

    /// Lets time pass until it is so, for at most `patience`; how long that took, or `None` when it did not come.
    ///
    /// It is looked at 20 times a second, so the answer is that much too large at most.
    pub(crate) fn run_until(
        &mut self,
        patience: Duration,
        mut is_so: impl FnMut(&mut Self) -> bool,
    ) -> Option<Duration> {
        let began = self.now;
        while !is_so(self) {
            if self.now - began > micros(patience) {
                return None;
            }
            self.run_for(Duration::from_millis(50));
        }
        Some(Duration::from_micros(self.now - began))
    }

    fn schedule(&mut self, at: Micros, event: Event) {
        self.agenda.note(at, event);
    }

    fn jitter(&mut self, most: Micros) -> Micros {
        self.rng.random_range(0..most.max(1))
    }

    /// Whether this process still runs; a starved one gets the event later.
    fn is_due(&mut self, node: NodeNumber, life: u32) -> Option<bool> {
        let node = &self.nodes[node];
        (node.life == life && node.agent.is_some()).then_some(node.awake_at <= self.now)
    }

    fn happen(&mut self, event: Event) {
        let (node, life) = match &event {
            Event::Tick(node, life) | Event::Heartbeat(node, life) | Event::Renew(node, life) => (*node, *life),
            Event::TimedOut(node, life, _) | Event::Join(node, life) => (*node, *life),
            Event::Ping(link, side) => self.links[*link as usize].end(*side),
            Event::Arrive(link, side, frame) => {
                if self.is_lost(*link, *side, frame) {
                    return;
                }
                self.links[*link as usize].end(*side)
            }
            Event::Meeting(meeting) => meeting.at(),
        };
        match self.is_due(node, life) {
            Some(true) => self.act(node, life, event),
            Some(false) => {
                let later = self.nodes[node].awake_at;
                self.schedule(later, event);
            }
            None => self.nobody(event),
        }
    }

    fn act(&mut self, node: NodeNumber, life: u32, event: Event) {
        match event {
            Event::Tick(..) => {
                self.tell(node, |protocol, table, now| protocol.tick(table, now));
                self.schedule(self.now + micros(TICK), Event::Tick(node, life));
            }
            Event::Heartbeat(..) => {
                let (now, rng) = (self.now, &mut self.rng);
                let sending = self.nodes[node].agent.as_mut().map(|agent| agent.router.heartbeat(now, rng));
                self.send_all(node, sending.unwrap_or_default());
                self.schedule(self.now + HEARTBEAT, Event::Heartbeat(node, life));
            }
            Event::Renew(..) => {
                self.introduce(node);
                self.schedule(self.now + RENEWAL, Event::Renew(node, life));
            }
            Event::Ping(link, side) => self.send(link, side, Frame::Ping),
            Event::Arrive(link, side, frame) => self.arrive(link, side, node, frame),
            Event::TimedOut(_, _, ask) => self.give_up(node, ask),
            Event::Meeting(meeting) => self.meet(meeting),
            Event::Join(..) => self.join(node, life),
        }
    }

    /// Reports something to a node's protocol, and does what it wants done.
    pub(crate) fn tell<R>(
        &mut self,
        node: NodeNumber,
        report: impl FnOnce(&mut Protocol<Key>, &mut Inventory, Instant) -> R,
    ) -> Option<R> {
        let now = self.instant();
        let agent = self.nodes[node].agent.as_mut()?;
        let result = report(&mut agent.protocol, &mut agent.table, now);
        self.follow(node);
        Some(result)
    }

    /// Does what a node's protocol wants done.
    fn follow(&mut self, node: NodeNumber) {
        while let Some(output) = self.nodes[node].agent.as_mut().and_then(|agent| agent.protocol.next()) {
            match output {
                Output::Publish(gossip) => self.publish(node, gossip),
                Output::Ask(ask, peer, question) => self.ask(node, ask, peer, question),
                Output::Greet(peer) => self.greet(node, peer.id, false),
                Output::Dial(peer) => self.dial(node, peer.id),
                Output::Close(link, _) => self.close(link, node),
                Output::Allow(peer) => self.allow(node, peer, true),
                Output::Deny(peer) => self.allow(node, peer, false),
                Output::Up(peer) => self.judge(node, peer.id, Judged::Up),
                Output::Down(peer, why) => self.judge(node, peer, Judged::Down(why)),
                Output::SharedKey(_) => {}
                Output::Blame { peer, fault, banned } => {
                    self.judge(node, peer, Judged::Blamed(fault, banned.is_some()));
                }
            }
        }
    }

    fn judge(&mut self, by: NodeNumber, peer: PeerId, verdict: Judged) {
        if let Some(of) = self.number(peer) {
            self.judgements.push(Judgement { at: self.now, by, of, verdict });
        }
    }

    /// Gives a message to the node's gossipsub, whether its protocol wanted that or not.
    pub(crate) fn publish(&mut self, node: NodeNumber, gossip: Gossip) {
        let kind = match &gossip {
            Gossip::Entry(_) => 0,
            Gossip::Introduction(_) => 1,
            Gossip::Suspicion(_) => 2,
            Gossip::Refutation(_) => 3,
            Gossip::Farewell(_) => 4,
        };
        self.told[kind] += 1;
        let next = MessageNumber::try_from(self.published.len()).expect("fewer messages than 2^32");
        // Messages of the same content have the same name.
        let number = *self.names.entry(bytes::name_of(&gossip)).or_insert(next);
        if number == next {
            let bytes = bytes::of_gossip(&gossip);
            self.published.push(Published { gossip, bytes });
        }
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let sending = agent.router.publish(number, &mut self.rng);
        self.send_all(node, sending);
    }

    /// A gossipsub message came.
    fn hear(&mut self, node: NodeNumber, from: NodeNumber, message: MessageNumber) {
        let published = &self.published[message as usize];
        let large = bytes::message(published.bytes) > router::LARGE;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let Some(declining) = agent.router.received(message, from, large) else { return };
        self.send_all(node, declining);
        let gossip = self.published[message as usize].gossip.clone();
        if matches!(gossip, Gossip::Farewell(_)) && !self.nodes[node].knows_farewells {
            return;
        }
        let sender = self.nodes[from].peer.id;
        self.nodes[node].heard += 1;
        let verdict = self.tell(node, |protocol, table, now| protocol.gossip(sender, gossip, table, now));
        match verdict {
            Some(Verdict::Accept) => {
                let Some(agent) = &mut self.nodes[node].agent else { return };
                let sending = agent.router.accepted(message, from);
                self.send_all(node, sending);
            }
            Some(Verdict::Reject(why)) => {
                self.judgements.push(Judgement { at: self.now, by: node, of: from, verdict: Judged::Rejected(why) });
            }
            Some(Verdict::Ignore(_)) | None => {}
        }
    }

    /// After this a connection is asked again whether it lives.
    fn probe_again(&mut self, link: LinkId, side: usize) {
        self.schedule(self.now + micros(PROBE), Event::Ping(link, side));
    }
}
