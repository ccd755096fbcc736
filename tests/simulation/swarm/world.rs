//! All nodes, what is on its way between them, and the time.

use std::rc::Rc;
use std::time::{Duration, Instant};

use lighterman::decide::claim::{Crossing, Step, zone_claim};
use lighterman::decide::pieces::{AskId, Candidate, Pool};
use lighterman::model::{Availability, Order, PeerId, Zone};
use lighterman::oci::{Cut, Digest};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::lease::Server;
use super::network::{Network, StreamId};
use super::node::{Kind, Node};
use crate::simulation::agenda::Agenda;

/// What is simulated.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    pub(super) nodes: usize,
    pub(super) size: u64,
    /// Bytes per second, each way.
    pub(super) bandwidth: u64,
    pub(super) zones: usize,
    /// Within these milliseconds after it began a node is known to be fetching.
    pub(super) gossip: [u64; 2],
    pub(super) seed: u64,
}

impl Setting {
    /// 256 MiB over 200 Mbit/s; node 0 has them.
    pub(super) fn usual(nodes: usize, seed: u64) -> Self {
        Self { nodes, size: 256 << 20, bandwidth: 200_000_000 / 8, zones: 0, gossip: [500, 1500], seed }
    }
}

/// Something that will happen.
#[derive(Debug)]
pub(super) enum Event {
    Gossip { node: usize, round: u64 },
    Wake { node: usize },
    Request { from: usize, to: usize, ask: AskId, order: Order },
    Refused { to: usize, ask: AskId, how: lighterman::decide::pieces::End },
    Dropped { from: usize, at: usize, ask: AskId },
    Follow { from: usize, to: usize, begins: bool },
    Word { from: usize, to: usize, word: Rc<Availability> },
    Gone { from: usize, to: usize },
    Flush { node: usize },
    LinkFree { node: usize },
    Received { stream: StreamId, from: usize, to: usize, ask: AskId, piece: u32, bytes: u64 },
    Drip { stream: StreamId },
    Claim { node: usize, step: Option<Step> },
}

pub(super) struct World {
    pub(super) setting: Setting,
    pub(super) digest: Digest,
    pub(super) cut: Cut,
    pub(super) nodes: Vec<Node>,
    pub(super) network: Network,
    pub(super) server: Server,
    pub(super) now: u64,
    began: Instant,
    events: Agenda<Event>,
    pub(super) rng: SmallRng,
    pub(super) crossed: u64,
    /// Useful bytes received in each half second.
    pub(super) course: Vec<u64>,
    pub(super) numbers: std::collections::HashMap<PeerId, usize>,
}

/// How often a node's table of who fetches is brought up to date, in microseconds.
const ROUND: u64 = 100_000;

impl World {
    pub(super) fn new(setting: Setting) -> Self {
        let digest = Digest::of(b"layer");
        let cut = Cut::usual(setting.size);
        let began = Instant::now();
        let node = |number: usize| {
            let zone: Option<Zone> =
                (setting.zones > 0).then(|| format!("z{}", number % setting.zones).try_into().expect("a zone"));
            let peer = PeerId::from_public_key(*Digest::of(&number.to_le_bytes()).as_bytes());
            let mut pool = Pool::new(zone.clone(), setting.seed * 1_000_003 + number as u64);
            pool.add(digest, cut);
            pool.lists(digest);
            let claim = zone.as_ref().map_or(digest, |zone| zone_claim(digest, zone));
            Node::new(peer, zone, pool, Crossing::new(peer, claim, began), cut.pieces())
        };
        let mut nodes: Vec<_> = (0..setting.nodes).map(node).collect();
        (0..cut.pieces()).for_each(|piece| nodes[0].held.set(piece));
        (nodes[0].missing, nodes[0].done_at) = (0, Some(0));
        let mut world = Self {
            digest,
            cut,
            numbers: nodes.iter().enumerate().map(|(number, node)| (node.peer, number)).collect(),
            nodes,
            network: Network::new(setting.nodes, setting.bandwidth),
            server: Server::default(),
            now: 0,
            began,
            events: Agenda::new(),
            rng: SmallRng::seed_from_u64(setting.seed),
            crossed: 0,
            course: Vec::new(),
            setting,
        };
        for node in 1..world.nodes.len() {
            world.after(0, Event::Gossip { node, round: 0 });
        }
        world
    }

    pub(super) fn after(&mut self, micros: u64, event: Event) {
        self.events.note(self.now + micros, event);
    }

    pub(super) fn instant(&self) -> Instant {
        self.began + Duration::from_micros(self.now)
    }

    pub(super) fn micros(&self, at: Instant) -> u64 {
        // Rounded up: at that moment it is time.
        at.saturating_duration_since(self.began).as_nanos().div_ceil(1000) as u64
    }

    /// One way, in microseconds.
    pub(super) fn latency(&self, one: usize, other: usize) -> u64 {
        if self.nodes[one].zone == self.nodes[other].zone { 500 } else { 2000 }
    }

    /// Runs until a condition holds; false when so many seconds were not enough.
    pub(super) fn run_until(&mut self, seconds: f64, holds: impl Fn(&Self) -> bool) -> bool {
        let until = self.now + (seconds * 1e6) as u64;
        while !holds(self) {
            let Some((at, event)) = self.events.next(until) else { return false };
            self.now = at;
            self.happens(event);
        }
        true
    }

    /// How long it takes to send it over a link once, in microseconds.
    pub(super) fn unit(&self) -> f64 {
        self.setting.size as f64 / self.setting.bandwidth as f64 * 1e6
    }

    /// All that live and are honest have everything.
    pub(super) fn is_done(&self) -> bool {
        let all = &self.nodes;
        all.iter().all(|node| node.done_at.is_some() || !node.is_alive || node.kind == Kind::Liar)
    }

    /// The table of who has it and who fetches it, as this node knows it now.
    fn candidates(&self, observer: usize) -> Vec<Candidate> {
        let [least, most] = self.setting.gossip;
        let known = |other: &usize| {
            let chance = (observer as u64 * 1_000_033 + *other as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let delay = least * 1000 + chance * 1000 % ((most - least).max(1) * 1000);
            *other != observer && self.nodes[*other].is_alive && (*other == 0 || delay <= self.now)
        };
        let candidate = |other: usize| {
            let node = &self.nodes[other];
            Candidate { peer: node.peer, zone: node.zone.clone(), whole: other == 0, standing: 0 }
        };
        (0..self.nodes.len()).filter(known).map(candidate).collect()
    }

    pub(super) fn learns(&mut self, node: usize) {
        let list = self.candidates(node);
        let now = self.instant();
        let (digest, zone) = (self.digest, self.nodes[node].zone.clone());
        let own: Vec<_> = list.iter().filter(|one| one.zone == zone && !one.whole).map(|one| one.peer).collect();
        let this = &mut self.nodes[node];
        this.pool.candidates(digest, &list);
        this.crossing.learn(&own, now);
    }

    pub(super) fn gossips(&mut self, node: usize, round: u64) {
        if self.nodes[node].done_at.is_some() || !self.nodes[node].is_alive {
            return;
        }
        self.learns(node);
        self.drive(node);
        if round * ROUND < self.setting.gossip[1] * 1000 {
            self.after(ROUND, Event::Gossip { node, round: round + 1 });
        }
    }

    /// It is gone. The others find out within a second or two.
    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].is_alive = false;
        for other in 0..self.nodes.len() {
            let later = self.rng.random_range(500_000..1_500_000);
            if other != node {
                self.after(later, Event::Gone { from: node, to: other });
            }
        }
    }
}
