//! All nodes, the network between them, and simulated time.

use std::rc::Rc;
use std::time::{Duration, Instant};

use lighterman::decide::claim::{LeaseStep, ZoneLeader, zone_claim};
use lighterman::decide::piece_picker::{PiecePicker, PieceRequestId, Provider};
use lighterman::model::{PeerId, PieceMapUpdate, PieceRequest, Zone};
use lighterman::oci::{Digest, PieceLayout};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::lease_server::LeaseServer;
use super::network::{Network, StreamId};
use super::node::{NodeBehavior, SwarmNode};
use crate::simulation::event_queue::EventQueue;

/// The parameters of a simulation.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    pub(super) nodes: usize,
    pub(super) size: u64,
    /// Bytes per second, in each direction.
    pub(super) bandwidth: u64,
    pub(super) zones: usize,
    /// Shortest and longest time until a fetching node is visible as partial provider, in
    /// milliseconds.
    pub(super) gossip: [u64; 2],
    pub(super) seed: u64,
}

impl Setting {
    /// 256 MiB over links of 200 Mbit/s. Node 0 is the seed.
    pub(super) fn usual(nodes: usize, seed: u64) -> Self {
        Self { nodes, size: 256 << 20, bandwidth: 200_000_000 / 8, zones: 0, gossip: [500, 1500], seed }
    }
}

/// A scheduled event.
#[derive(Debug)]
pub(super) enum Event {
    Gossip { node: usize, round: u64 },
    Wake { node: usize },
    Request { from: usize, to: usize, request: PieceRequestId, piece_request: PieceRequest },
    Ended { to: usize, request: PieceRequestId, end: lighterman::decide::piece_picker::RequestEnd },
    Cancelled { from: usize, at: usize, request: PieceRequestId },
    Follow { from: usize, to: usize, begins: bool },
    PieceMapUpdate { from: usize, to: usize, update: Rc<PieceMapUpdate> },
    PeerDead { from: usize, to: usize },
    Flush { node: usize },
    LinkFree { node: usize },
    Received { stream: StreamId, from: usize, to: usize, request: PieceRequestId, piece: u32, bytes: u64 },
    Drip { stream: StreamId },
    Claim { node: usize, step: Option<LeaseStep> },
}

pub(super) struct SwarmSimulation {
    pub(super) setting: Setting,
    pub(super) digest: Digest,
    pub(super) layout: PieceLayout,
    pub(super) nodes: Vec<SwarmNode>,
    pub(super) network: Network,
    pub(super) server: LeaseServer,
    pub(super) now: u64,
    began: Instant,
    events: EventQueue<Event>,
    pub(super) rng: SmallRng,
    pub(super) cross_zone_bytes: u64,
    /// Useful bytes received in each half second.
    pub(super) useful_bytes: Vec<u64>,
    pub(super) numbers: std::collections::HashMap<PeerId, usize>,
}

/// Interval at which a node's provider list is updated, in microseconds.
const ROUND: u64 = 100_000;

impl SwarmSimulation {
    pub(super) fn new(setting: Setting) -> Self {
        let digest = Digest::of(b"layer");
        let layout = PieceLayout::for_size(setting.size);
        let began = Instant::now();
        let node = |number: usize| {
            let zone: Option<Zone> =
                (setting.zones > 0).then(|| format!("z{}", number % setting.zones).try_into().expect("a zone"));
            let peer = PeerId::from_public_key(*Digest::of(&number.to_le_bytes()).as_bytes());
            let mut picker = PiecePicker::new(zone.clone(), setting.seed * 1_000_003 + number as u64);
            picker.add_blob(digest, layout);
            picker.mark_hash_chain_ready(digest);
            let claim = zone.as_ref().map_or(digest, |zone| zone_claim(digest, zone));
            SwarmNode::new(peer, zone, picker, ZoneLeader::new(peer, claim, began), layout.piece_count())
        };
        let mut nodes: Vec<_> = (0..setting.nodes).map(node).collect();
        (0..layout.piece_count()).for_each(|piece| nodes[0].pieces.set(piece));
        (nodes[0].missing, nodes[0].done_at) = (0, Some(0));
        let mut swarm = Self {
            digest,
            layout,
            numbers: nodes.iter().enumerate().map(|(number, node)| (node.peer, number)).collect(),
            nodes,
            network: Network::new(setting.nodes, setting.bandwidth),
            server: LeaseServer::default(),
            now: 0,
            began,
            events: EventQueue::new(),
            rng: SmallRng::seed_from_u64(setting.seed),
            cross_zone_bytes: 0,
            useful_bytes: Vec::new(),
            setting,
        };
        for node in 1..swarm.nodes.len() {
            swarm.after(0, Event::Gossip { node, round: 0 });
        }
        swarm
    }

    pub(super) fn after(&mut self, micros: u64, event: Event) {
        self.events.schedule(self.now + micros, event);
    }

    pub(super) fn instant(&self) -> Instant {
        self.began + Duration::from_micros(self.now)
    }

    pub(super) fn micros(&self, at: Instant) -> u64 {
        // Rounded up, so that the moment has passed at the returned time.
        at.saturating_duration_since(self.began).as_nanos().div_ceil(1000) as u64
    }

    /// One-way latency in microseconds.
    pub(super) fn latency(&self, one: usize, other: usize) -> u64 {
        if self.nodes[one].zone == self.nodes[other].zone { 500 } else { 2000 }
    }

    /// Runs until the condition holds. False if it does not hold within this time.
    pub(super) fn run_until(&mut self, seconds: f64, condition: impl Fn(&Self) -> bool) -> bool {
        let until = self.now + (seconds * 1e6) as u64;
        while !condition(self) {
            let Some((at, event)) = self.events.next(until) else { return false };
            self.now = at;
            self.handle_event(event);
        }
        true
    }

    /// Time in which a link carries the blob once, in microseconds.
    pub(super) fn unit(&self) -> f64 {
        self.setting.size as f64 / self.setting.bandwidth as f64 * 1e6
    }

    /// Whether all live honest nodes have the whole blob.
    pub(super) fn is_done(&self) -> bool {
        let all = &self.nodes;
        all.iter().all(|node| node.done_at.is_some() || !node.is_alive || node.behavior == NodeBehavior::Liar)
    }

    /// The provider list of a node at this moment.
    fn providers(&self, observer: usize) -> Vec<Provider> {
        let [min_delay, max_delay] = self.setting.gossip;
        let is_known = |other: &usize| {
            let chance = (observer as u64 * 1_000_033 + *other as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let delay = min_delay * 1000 + chance * 1000 % ((max_delay - min_delay).max(1) * 1000);
            *other != observer && self.nodes[*other].is_alive && (*other == 0 || delay <= self.now)
        };
        let candidate = |other: usize| {
            let node = &self.nodes[other];
            Provider { peer: node.peer, zone: node.zone.clone(), is_whole: other == 0, standing: 0 }
        };
        (0..self.nodes.len()).filter(is_known).map(candidate).collect()
    }

    pub(super) fn update_providers(&mut self, node: usize) {
        let providers = self.providers(node);
        let now = self.instant();
        let (digest, zone) = (self.digest, self.nodes[node].zone.clone());
        let own_zone: Vec<_> = providers
            .iter()
            .filter(|provider| provider.zone == zone && !provider.is_whole)
            .map(|provider| provider.peer)
            .collect();
        let this = &mut self.nodes[node];
        this.picker.set_providers(digest, &providers);
        this.zone_leader.set_fetching(&own_zone, now);
    }

    pub(super) fn run_gossip_round(&mut self, node: usize, round: u64) {
        if self.nodes[node].done_at.is_some() || !self.nodes[node].is_alive {
            return;
        }
        self.update_providers(node);
        self.drive(node);
        if round * ROUND < self.setting.gossip[1] * 1000 {
            self.after(ROUND, Event::Gossip { node, round: round + 1 });
        }
    }

    /// Kills a node. Each other node detects the death after 0.5 to 1.5 s.
    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].is_alive = false;
        for other in 0..self.nodes.len() {
            let later = self.rng.random_range(500_000..1_500_000);
            if other != node {
                self.after(later, Event::PeerDead { from: node, to: other });
            }
        }
    }
}
