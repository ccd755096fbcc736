//! A cluster of a few agents: every message is delivered at once and in order, and gossip floods.
//! The tests check the protocol; the simulation checks its behavior on a network.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::super::fault::GossipFault;
use super::super::{
    CredentialRejection, CredentialVerifier, GossipVerdict, LocalAgent, MeshConnectionId, Output, PING_INTERVAL,
    Protocol, SyncRequestId, TICK, VerifiedCredential,
};
use crate::decide::inventory::Inventory;
use crate::model::{
    Credential, Gossip, InventoryChange, InventoryItem, Peer, PeerId, Signature, SyncReply, SyncRequest,
};
use crate::oci::Digest;

/// Signs with the digest of key and text. Every agent here could forge signatures; only tests of
/// forgery do.
#[derive(Debug, Clone)]
pub(super) struct TestVerifier(PeerId, Clock);

/// Time since the cluster's start.
type Clock = Rc<Cell<Duration>>;

pub(super) fn test_signature(signer: PeerId, message: &[u8]) -> Signature {
    let digest = *Digest::of(&[signer.public_key().as_slice(), message].concat()).as_bytes();
    Signature(digest, digest)
}

impl CredentialVerifier for TestVerifier {
    fn sign(&self, message: &[u8]) -> Signature {
        test_signature(self.0, message)
    }

    fn is_signed(&self, signer: PeerId, message: &[u8], signature: &Signature) -> bool {
        *signature == test_signature(signer, message)
    }

    /// `good SECONDS` admits until then, by the cluster's clock; `good SECONDS POD` also names a
    /// pod.
    fn verify_credential(&self, _: PeerId, credential: &Credential) -> Result<VerifiedCredential, CredentialRejection> {
        let mut words = credential.expose().split(' ').filter(|word| *word != "good");
        let until = words.next().and_then(|until| until.parse().ok()).ok_or(CredentialRejection::Rejected)?;
        let lifetime = Duration::from_secs(until).checked_sub(self.1.get()).ok_or(CredentialRejection::Rejected)?;
        Ok(VerifiedCredential { node: None, pod: words.next().map(Into::into), lifetime })
    }
}

pub(super) struct GossipNode {
    pub(super) protocol: Protocol<TestVerifier>,
    pub(super) inventory: Inventory,
    pub(super) up: BTreeSet<PeerId>,
    pub(super) faults: Vec<(PeerId, GossipFault, bool)>,
    pub(super) rejections: Vec<GossipFault>,
    pub(super) requests: Vec<SyncRequest>,
    allowed: BTreeSet<PeerId>,
    seen: BTreeSet<Vec<u8>>,
    /// The node neither sends nor receives, and closes nothing.
    pub(super) is_cut_off: bool,
    is_dead: bool,
}

/// Nodes by number.
pub(super) struct GossipCluster {
    pub(super) nodes: BTreeMap<u8, GossipNode>,
    pub(super) now: Instant,
    clock: Clock,
    connections: BTreeMap<MeshConnectionId, (u8, u8)>,
    next_connection: MeshConnectionId,
    ticks: u32,
    /// Changes the reply of a node.
    pub(super) tamper_reply: Option<fn(u8, SyncReply) -> SyncReply>,
}

pub(super) fn id(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

pub(super) fn blob(number: u8) -> InventoryItem {
    InventoryItem::Blob(Digest::of(&[number]))
}

pub(super) fn peer(number: u8) -> Peer {
    let address = ([10, 0, 0, number], 4701).into();
    Peer { id: id(number), node: format!("n{number}").parse().unwrap(), zone: None, transfer: address, gossip: address }
}

fn encoded(message: &Gossip) -> Vec<u8> {
    format!("{message:?}").into_bytes()
}

impl GossipCluster {
    /// Agents that have introduced themselves and have no other member.
    pub(super) fn unconnected(numbers: impl IntoIterator<Item = u8>) -> Self {
        let mut cluster = Self {
            nodes: BTreeMap::new(),
            now: Instant::now(),
            clock: Clock::default(),
            connections: BTreeMap::new(),
            next_connection: 0,
            ticks: 0,
            tamper_reply: None,
        };
        numbers.into_iter().for_each(|number| cluster.start_node(number, 1, "good 86400"));
        cluster
    }

    /// Agents that have all members and all items: each agent announces one blob of its own.
    pub(super) fn converged(numbers: std::ops::RangeInclusive<u8>) -> Self {
        let mut cluster = Self::unconnected(numbers.clone());
        let first = *numbers.start();
        for number in numbers.clone().skip(1) {
            cluster.connect(first, number);
        }
        for number in numbers {
            cluster.announce(number, [blob(number)]);
        }
        cluster.advance(Duration::from_secs(30));
        cluster
    }

    pub(super) fn start_node(&mut self, number: u8, epoch: u64, credential: &str) {
        let peer = peer(number);
        let local = LocalAgent { peer: peer.id, epoch, node: peer.node, release: "0.1.0".parse().unwrap() };
        let mut protocol = Protocol::new(local, TestVerifier(peer.id, Rc::clone(&self.clock)), number.into(), self.now);
        protocol.introduce(Credential::new(credential.into()), peer.transfer, peer.gossip, None, self.now);
        let member = GossipNode {
            protocol,
            inventory: Inventory::default(),
            up: BTreeSet::new(),
            faults: Vec::new(),
            rejections: Vec::new(),
            requests: Vec::new(),
            allowed: BTreeSet::new(),
            seen: BTreeSet::new(),
            is_cut_off: false,
            is_dead: false,
        };
        self.nodes.insert(number, member);
    }

    pub(super) fn node(&mut self, number: u8) -> &mut GossipNode {
        self.nodes.get_mut(&number).unwrap()
    }

    /// Both nodes admit each other, as after a handshake.
    pub(super) fn connect(&mut self, a: u8, b: u8) {
        let now = self.now;
        for (one, other) in [(a, b), (b, a)] {
            let member = self.node(one);
            member.protocol.admit(peer(other), Duration::from_secs(86_400), &mut member.inventory, now);
        }
        self.deliver_all();
    }

    pub(super) fn announce(&mut self, number: u8, items: impl IntoIterator<Item = InventoryItem>) {
        self.node(number).protocol.announce(items.into_iter().map(InventoryChange::Added).collect());
    }

    /// The providers of the blob `number`, as `according_to` has them.
    pub(super) fn providers(&self, according_to: u8, number: u8) -> Vec<PeerId> {
        self.nodes[&according_to].inventory.blob_providers(Digest::of(&[number]))
    }

    /// The members that are up, as `according_to` has them.
    pub(super) fn up(&self, according_to: u8) -> Vec<u8> {
        self.nodes[&according_to].up.iter().map(|peer| peer.public_key()[0]).collect()
    }

    /// Closes the connections of two nodes, with notice, so neither suspects the other.
    pub(super) fn disconnect(&mut self, a: u8, b: u8) {
        let ended: Vec<_> = self.connections.iter().filter(|(_, ends)| **ends == (a, b) || **ends == (b, a)).collect();
        for connection in ended.into_iter().map(|(connection, _)| *connection).collect::<Vec<_>>() {
            self.connections.remove(&connection);
            let now = self.now;
            for (one, other) in [(a, b), (b, a)] {
                let member = self.node(one);
                member.protocol.answer(id(other), SyncRequest::Disconnect, &member.inventory, now);
                member.protocol.connection_closed(connection, id(other), now);
            }
        }
    }

    /// Opens another connection of two nodes, over which neither answers.
    pub(super) fn connect_twice(&mut self, a: u8, b: u8) {
        self.next_connection += 1;
        let (connection, now) = (self.next_connection, self.now);
        self.connections.insert(connection, (a, b));
        self.node(a).protocol.connection_opened(connection, id(b), now);
        self.node(b).protocol.connection_opened(connection, id(a), now);
    }

    /// Time since the cluster's start.
    pub(super) fn elapsed(&self) -> Duration {
        self.clock.get()
    }

    /// Ends the process. The system closes its connections.
    pub(super) fn kill(&mut self, number: u8) {
        self.node(number).is_dead = true;
        let ended: Vec<_> = self.connections.iter().filter(|(_, ends)| ends.0 == number || ends.1 == number).collect();
        let ended: Vec<_> = ended.into_iter().map(|(connection, ends)| (*connection, *ends)).collect();
        for (connection, (a, b)) in ended {
            self.connections.remove(&connection);
            let now = self.now;
            let other = if a == number { b } else { a };
            self.node(other).protocol.connection_closed(connection, id(number), now);
        }
        self.deliver_all();
    }

    pub(super) fn advance(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += TICK;
            self.clock.set(self.clock.get() + TICK);
            self.ticks += 1;
            let now = self.now;
            for member in self.nodes.values_mut().filter(|member| !member.is_dead) {
                member.protocol.tick(&mut member.inventory, now);
            }
            self.deliver_all();
            if self.ticks.is_multiple_of((PING_INTERVAL.as_millis() / TICK.as_millis()) as u32) {
                for (connection, (a, b)) in self.connections.clone() {
                    if self.is_reachable(a, b) {
                        for (one, other) in [(a, b), (b, a)] {
                            let member = self.nodes.get_mut(&one).unwrap();
                            member.protocol.record_ping_answer(connection, id(other), &mut member.inventory, now);
                        }
                    }
                }
                self.deliver_all();
            }
        }
    }

    fn is_reachable(&self, a: u8, b: u8) -> bool {
        [a, b].iter().all(|number| !self.nodes[number].is_cut_off && !self.nodes[number].is_dead)
    }

    /// Publishes a message from this node, valid or not.
    pub(super) fn publish_from(&mut self, number: u8, message: Gossip) {
        self.flood(number, message);
        self.deliver_all();
    }

    pub(super) fn deliver_all(&mut self) {
        let mut busy = true;
        while busy {
            busy = false;
            for number in self.nodes.keys().copied().collect::<Vec<_>>() {
                while let Some(output) = self.node(number).protocol.next() {
                    busy = true;
                    self.execute(number, output);
                }
            }
        }
    }

    fn execute(&mut self, number: u8, output: Output) {
        let now = self.now;
        match output {
            Output::Publish(message) => self.flood(number, message),
            Output::Request(request_id, of, request) => self.deliver_request(number, request_id, of, request),
            Output::Handshake(peer) => {
                let other = peer.id.public_key()[0];
                if self.is_reachable(number, other) {
                    self.handshake(number, other);
                } else {
                    self.dial_failed(number, peer.id);
                }
            }
            Output::Dial(peer) => {
                let other = peer.id.public_key()[0];
                let is_allowed = self.nodes[&other].allowed.contains(&id(number));
                if self.is_reachable(number, other) && is_allowed {
                    self.next_connection += 1;
                    let connection = self.next_connection;
                    self.connections.insert(connection, (number, other));
                    self.node(number).protocol.connection_opened(connection, peer.id, now);
                    self.node(other).protocol.connection_opened(connection, id(number), now);
                } else {
                    self.dial_failed(number, peer.id);
                }
            }
            Output::Close(connection, peer) => {
                self.connections.remove(&connection);
                let other = peer.public_key()[0];
                if self.is_reachable(number, other) {
                    self.node(other).protocol.connection_closed(connection, id(number), now);
                }
            }
            Output::Allow(peer) => drop(self.node(number).allowed.insert(peer)),
            Output::Deny(peer) => drop(self.node(number).allowed.remove(&peer)),
            Output::Up(peer) => drop(self.node(number).up.insert(peer.id)),
            Output::Down(peer, _) => drop(self.node(number).up.remove(&peer)),
            Output::SharedKey(_) => {}
            Output::Fault { peer, fault, banned } => self.node(number).faults.push((peer, fault, banned.is_some())),
        }
    }

    fn handshake(&mut self, a: u8, b: u8) {
        let now = self.now;
        for (one, other) in [(b, a), (a, b)] {
            let member = self.node(one);
            member.protocol.admit(peer(other), Duration::from_secs(86_400), &mut member.inventory, now);
        }
    }

    fn dial_failed(&mut self, number: u8, other: PeerId) {
        let now = self.now;
        let member = self.node(number);
        member.protocol.dial_failed(other, &mut member.inventory, now);
    }

    fn deliver_request(&mut self, number: u8, request_id: SyncRequestId, to: PeerId, request: SyncRequest) {
        let now = self.now;
        let other = to.public_key()[0];
        let is_connected = self.connections.values().any(|ends| *ends == (number, other) || *ends == (other, number));
        self.node(number).requests.push(request.clone());
        if !self.is_reachable(number, other) || !is_connected {
            return self.node(number).protocol.record_request_failure(request_id, now);
        }
        let member = self.node(other);
        let reply = member.protocol.answer(id(number), request, &member.inventory, now);
        let reply = self.tamper_reply.map_or(reply.clone(), |tamper| tamper(other, reply));
        let member = self.node(number);
        member.protocol.receive_reply(request_id, reply, &mut member.inventory, now);
    }

    /// Floods a message: every node relays its first accepted copy.
    fn flood(&mut self, from: u8, message: Gossip) {
        let text = encoded(&message);
        self.node(from).seen.insert(text.clone());
        let mut senders = VecDeque::from([from]);
        while let Some(sender) = senders.pop_front() {
            let ends = self.connections.values().filter_map(|(a, b)| match (*a == sender, *b == sender) {
                (true, _) => Some(*b),
                (_, true) => Some(*a),
                _ => None,
            });
            for other in ends.collect::<BTreeSet<_>>() {
                let now = self.now;
                if !self.is_reachable(sender, other) || !self.node(other).seen.insert(text.clone()) {
                    continue;
                }
                let member = self.node(other);
                match member.protocol.receive_gossip(id(sender), message.clone(), &mut member.inventory, now) {
                    GossipVerdict::Accept => senders.push_back(other),
                    GossipVerdict::Ignore(_) => {}
                    GossipVerdict::Reject(fault) => member.rejections.push(fault),
                }
            }
        }
    }
}
