//! One node: what stays when its agent's process ends, and the process.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use lighterman::decide::gossip::{AskId, LinkId, Own, Protocol};
use lighterman::decide::inventory::Inventory;
use lighterman::model::{Peer, PeerId};
use lighterman::oci::Digest;

use super::Micros;
use super::bytes::ACK;
use super::catalogue::ItemNumber;
use super::notary::Key;
use super::router::{NodeNumber, Router};

/// How many failure domains the nodes are in.
pub(crate) const ZONES: usize = 3;

/// A node of the cluster.
pub(crate) struct Node {
    /// Its agent, as it introduces itself.
    pub(crate) peer: Peer,
    /// Which failure domain it is in.
    pub(crate) zone: usize,
    /// Counts its processes.
    pub(crate) life: u32,
    /// Its process, while it runs.
    pub(crate) agent: Option<Agent>,
    /// What is really there.
    pub(crate) held: BTreeSet<ItemNumber>,
    /// What has ever been there.
    pub(crate) ever_held: BTreeSet<ItemNumber>,
    /// Until then its process does not get the processor.
    pub(crate) awake_at: Micros,
    /// Only nodes of the same side can reach each other.
    pub(crate) side: u8,
    /// Its link is down.
    pub(crate) silent: bool,
    /// Its release has that kind of message.
    pub(crate) knows_farewells: bool,
    /// Its replies are nonsense.
    pub(crate) lies: bool,
    /// Whom it greets until it knows somebody.
    pub(crate) seeds: Vec<NodeNumber>,
    pub(crate) traffic: Traffic,
    /// Gossip messages that came, each once.
    pub(crate) heard: u64,
}

/// A running process.
pub(crate) struct Agent {
    pub(crate) protocol: Protocol<Key>,
    pub(crate) table: Inventory,
    pub(crate) router: Router,
    /// Whom its libp2p lets in.
    pub(crate) allowed: BTreeSet<NodeNumber>,
    pub(crate) neighbours: BTreeMap<NodeNumber, Vec<LinkId>>,
    /// Questions that wait for an answer, and over which connection.
    pub(crate) asked: BTreeMap<AskId, Option<LinkId>>,
}

/// What a byte on the link was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Message,
    Control,
    Ping,
    Exchange,
    Connecting,
    Ack,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] =
        [Self::Message, Self::Control, Self::Ping, Self::Exchange, Self::Connecting, Self::Ack];
}

/// Bytes on a node's link since the start, by [`Kind`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) received: [u64; Kind::ALL.len()],
    pub(crate) sent: u64,
}

impl Traffic {
    pub(crate) fn receive(&mut self, kind: Kind, bytes: usize) {
        self.received[kind as usize] += bytes as u64;
    }

    pub(crate) fn send(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    pub(crate) fn acks(&mut self, sender: &mut Self, acks: usize) {
        self.receive(Kind::Ack, acks * ACK);
        sender.send(acks * ACK);
    }

    pub(crate) fn total(&self) -> u64 {
        self.received.iter().sum()
    }

    pub(crate) fn since(&self, before: &Self) -> Self {
        let received = std::array::from_fn(|kind| self.received[kind] - before.received[kind]);
        Self { received, sent: self.sent - before.sent }
    }
}

impl Node {
    /// A node whose agent does not run yet.
    pub(crate) fn new(number: NodeNumber, held: BTreeSet<ItemNumber>) -> Self {
        let [_, high, middle, low] = u32::try_from(number).expect("fewer nodes than 2^32").to_be_bytes();
        let zone = number % ZONES;
        let address = |port| SocketAddr::new(Ipv4Addr::new(10, high, middle, low).into(), port);
        let peer = Peer {
            id: PeerId::from_public_key(*Digest::of(format!("key of {number}").as_bytes()).as_bytes()),
            node: format!("node-{number}").parse().expect("a node's name"),
            zone: Some(format!("zone-{zone}").parse().expect("a zone's name")),
            transfer: address(4701),
            gossip: address(4701),
        };
        Self {
            peer,
            zone,
            life: 0,
            agent: None,
            ever_held: held.clone(),
            held,
            awake_at: 0,
            side: 0,
            silent: false,
            knows_farewells: true,
            lies: false,
            seeds: Vec::new(),
            traffic: Traffic::default(),
            heard: 0,
        }
    }

    /// Its agent's process, just started, which has not introduced itself yet. A later one has a larger epoch.
    pub(crate) fn start(&mut self, now: Micros, instant: Instant, seed: u64) {
        self.life += 1;
        let own = Own {
            peer: self.peer.id,
            // Nodes' clocks are in microseconds since 1970.
            epoch: 1_700_000_000_000_000 + now,
            node: self.peer.node.clone(),
            release: "0.1.0".parse().expect("a release"),
        };
        self.agent = Some(Agent {
            protocol: Protocol::new(own, Key(self.peer.id), seed, instant),
            table: Inventory::default(),
            router: Router::default(),
            allowed: BTreeSet::new(),
            neighbours: BTreeMap::new(),
            asked: BTreeMap::new(),
        });
    }
}

impl Agent {
    /// A connection with this peer, when there is one.
    pub(crate) fn link_to(&self, peer: NodeNumber) -> Option<LinkId> {
        self.neighbours.get(&peer)?.first().copied()
    }
}
