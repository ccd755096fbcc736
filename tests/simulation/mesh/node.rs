//! A node: the state that outlives the agent's process, and the process.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use lighterman::decide::gossip::{LocalAgent, MeshConnectionId, Protocol, SyncRequestId};
use lighterman::decide::inventory::Inventory;
use lighterman::model::{Peer, PeerId};
use lighterman::oci::Digest;

use super::Micros;
use super::catalogue::ItemNumber;
use super::credentials::SimulatedKey;
use super::gossipsub::{NodeNumber, Router};
use super::message_sizes::ACK;

/// Number of zones.
pub(crate) const ZONES: usize = 3;

pub(crate) struct SimulatedNode {
    /// The agent's introduction of itself.
    pub(crate) peer: Peer,
    pub(crate) zone: usize,
    /// Number of processes that ran on this node so far.
    pub(crate) generation: u32,
    /// The agent's process, while it runs.
    pub(crate) agent: Option<SimulatedAgent>,
    /// The items that the node has.
    pub(crate) items: BTreeSet<ItemNumber>,
    /// The items that the node ever had.
    pub(crate) past_items: BTreeSet<ItemNumber>,
    /// The process gets no processor time until then.
    pub(crate) starved_until: Micros,
    /// Nodes reach each other only within the same partition.
    pub(crate) partition: u8,
    pub(crate) is_link_down: bool,
    /// Whether the node's release supports leave notices.
    pub(crate) supports_leave: bool,
    /// Whether the node sends false replies.
    pub(crate) is_liar: bool,
    /// Addresses that the agent dials until it has members.
    pub(crate) seeds: Vec<NodeNumber>,
    pub(crate) traffic: Traffic,
    /// Gossip messages received, without duplicates.
    pub(crate) messages_received: u64,
}

pub(crate) struct SimulatedAgent {
    pub(crate) protocol: Protocol<SimulatedKey>,
    pub(crate) inventory: Inventory,
    pub(crate) router: Router,
    /// Peers whose libp2p connections the agent accepts.
    pub(crate) admitted: BTreeSet<NodeNumber>,
    pub(crate) neighbors: BTreeMap<NodeNumber, Vec<MeshConnectionId>>,
    /// Requests in flight, and their connections.
    pub(crate) pending_requests: BTreeMap<SyncRequestId, Option<MeshConnectionId>>,
}

/// The purpose of bytes on the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TrafficKind {
    Message,
    Control,
    Ping,
    Exchange,
    Connecting,
    Ack,
}

impl TrafficKind {
    pub(crate) const ALL: [Self; 6] =
        [Self::Message, Self::Control, Self::Ping, Self::Exchange, Self::Connecting, Self::Ack];
}

/// Bytes on a node's link since the start, by [`TrafficKind`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) received: [u64; TrafficKind::ALL.len()],
    pub(crate) sent: u64,
}

impl Traffic {
    pub(crate) fn receive(&mut self, kind: TrafficKind, bytes: usize) {
        self.received[kind as usize] += bytes as u64;
    }

    pub(crate) fn send(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    pub(crate) fn acks(&mut self, sender: &mut Self, acks: usize) {
        self.receive(TrafficKind::Ack, acks * ACK);
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

impl SimulatedNode {
    /// A node without a running agent.
    pub(crate) fn new(number: NodeNumber, items: BTreeSet<ItemNumber>) -> Self {
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
            generation: 0,
            agent: None,
            past_items: items.clone(),
            items,
            starved_until: 0,
            partition: 0,
            is_link_down: false,
            supports_leave: true,
            is_liar: false,
            seeds: Vec::new(),
            traffic: Traffic::default(),
            messages_received: 0,
        }
    }

    /// Starts the agent's process, which has not introduced itself yet. A later process has a
    /// larger epoch.
    pub(crate) fn start(&mut self, now: Micros, instant: Instant, seed: u64) {
        self.generation += 1;
        let local = LocalAgent {
            peer: self.peer.id,
            // Epochs are in microseconds since 1970.
            epoch: 1_700_000_000_000_000 + now,
            node: self.peer.node.clone(),
            release: "0.1.0".parse().expect("a release"),
        };
        self.agent = Some(SimulatedAgent {
            protocol: Protocol::new(local, SimulatedKey(self.peer.id), seed, instant),
            inventory: Inventory::default(),
            router: Router::default(),
            admitted: BTreeSet::new(),
            neighbors: BTreeMap::new(),
            pending_requests: BTreeMap::new(),
        });
    }
}

impl SimulatedAgent {
    /// A connection to this peer, if one is open.
    pub(crate) fn connection_to(&self, peer: NodeNumber) -> Option<MeshConnectionId> {
        self.neighbors.get(&peer)?.first().copied()
    }
}
