//! gossipsub of one node, as in libp2p-gossipsub 0.50 (`behaviour.rs`, `config.rs`): the topic's
//! mesh, forwarding, IHAVE and IWANT. Scores, explicit peers, fan-out and peer exchange are not
//! used and left out.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use rand::rngs::SmallRng;
use rand::seq::{IteratorRandom, SliceRandom};

use super::Frame;

/// Index of a node in the simulation.
pub(crate) type NodeNumber = usize;

/// Index of a published message.
pub(crate) type MessageNumber = u32;

/// Target size of the mesh. The heartbeat grafts below the low mark, and prunes from the high mark
/// on.
const MESH_N: usize = 6;
const MESH_N_LOW: usize = 4;
const MESH_N_HIGH: usize = 12;
/// Least number of mesh peers that this node has dialed itself.
const MESH_OUTBOUND_MIN: usize = 2;

/// Number of peers outside the mesh that receive IHAVE: the larger of this number and this share.
const GOSSIP_LAZY: usize = 6;
const GOSSIP_FACTOR: f64 = 0.25;

/// Heartbeats for which messages are kept, and for which IHAVE names them.
const HISTORY_LENGTH: usize = 10;
const HISTORY_GOSSIP: usize = 6;

/// Back-off after a prune, with two heartbeats of slack, in microseconds.
const PRUNE_BACKOFF: u64 = 61_000_000;
/// Time until a message is requested again by IWANT, in microseconds.
const IWANT_FOLLOWUP_TIME: u64 = 3_000_000;
/// Time for which an IDONTWANT is kept, in microseconds.
const IDONTWANT_TIME: u64 = 3_000_000;

/// Messages above this size cause IDONTWANT (`idontwant_message_size_threshold`).
pub(crate) const IDONTWANT_THRESHOLD: usize = 1000;

/// Frames to send, by peer.
pub(crate) type OutgoingFrames = Vec<(NodeNumber, Frame)>;

/// The state of one topic.
#[derive(Debug, Default)]
pub(crate) struct Router {
    /// Subscribed peers, and whether this node dialed them.
    peers: BTreeMap<NodeNumber, bool>,
    mesh: BTreeSet<NodeNumber>,
    backoff: BTreeMap<NodeNumber, u64>,
    /// IDs received in the current period of 150 s, and in the period before.
    seen: [HashSet<MessageNumber>; 2],
    beats: u32,
    /// Messages of the last heartbeats, the newest first.
    history: [Vec<MessageNumber>; HISTORY_LENGTH],
    gossip_promises: HashMap<MessageNumber, u64>,
    dont_send: HashMap<(NodeNumber, MessageNumber), u64>,
}

impl Router {
    /// Handles the subscription of a peer.
    pub(crate) fn handle_subscription(&mut self, peer: NodeNumber, dialed: bool, now: u64) -> OutgoingFrames {
        self.peers.insert(peer, dialed);
        if self.mesh.len() < MESH_N_LOW && !self.is_backing_off(peer, now) && self.mesh.insert(peer) {
            return vec![(peer, Frame::Graft)];
        }
        Vec::new()
    }

    /// Removes a peer whose last connection is closed.
    pub(crate) fn remove_peer(&mut self, peer: NodeNumber) {
        self.peers.remove(&peer);
        self.mesh.remove(&peer);
        self.dont_send.retain(|(by, _), _| *by != peer);
    }

    /// Publishes this node's own message. A message that was seen already is not sent again.
    pub(crate) fn publish(&mut self, message: MessageNumber, rng: &mut SmallRng) -> OutgoingFrames {
        if self.has_seen(message) {
            return Vec::new();
        }
        self.seen[0].insert(message);
        self.history[0].push(message);
        let missing = MESH_N.saturating_sub(self.mesh.len());
        let others = self.peers.keys().filter(|peer| !self.mesh.contains(peer)).copied();
        let extra = others.choose_multiple(rng, missing);
        self.mesh.iter().copied().chain(extra).map(|peer| (peer, Frame::Message(message))).collect()
    }

    /// Handles a message from a peer. `None` for a duplicate. Otherwise the caller verifies the
    /// message, and sends the returned IDONTWANTs.
    pub(crate) fn handle_message(
        &mut self,
        message: MessageNumber,
        from: NodeNumber,
        large: bool,
    ) -> Option<OutgoingFrames> {
        if self.has_seen(message) {
            return None;
        }
        self.seen[0].insert(message);
        self.gossip_promises.remove(&message);
        let recipients =
            if large { self.mesh.iter().copied().filter(|peer| *peer != from).collect() } else { Vec::new() };
        Some(recipients.into_iter().map(|peer| (peer, Frame::IDontWant(message))).collect())
    }

    /// Forwards an accepted message.
    pub(crate) fn forward(&mut self, message: MessageNumber, from: NodeNumber) -> OutgoingFrames {
        self.history[0].push(message);
        let wanted = |peer: &NodeNumber| *peer != from && !self.dont_send.contains_key(&(*peer, message));
        self.mesh.iter().copied().filter(wanted).map(|peer| (peer, Frame::Message(message))).collect()
    }

    /// Handles GRAFT: the peer adds this node to its mesh.
    pub(crate) fn handle_graft(&mut self, peer: NodeNumber, now: u64) -> OutgoingFrames {
        let Some(dialed) = self.peers.get(&peer).copied() else { return Vec::new() };
        if self.mesh.contains(&peer) {
            return Vec::new();
        }
        if self.is_backing_off(peer, now) || (self.mesh.len() >= MESH_N_HIGH && !dialed) {
            self.backoff.insert(peer, now + PRUNE_BACKOFF);
            return vec![(peer, Frame::Prune)];
        }
        self.mesh.insert(peer);
        Vec::new()
    }

    /// Handles PRUNE: the peer removes this node from its mesh.
    pub(crate) fn handle_prune(&mut self, peer: NodeNumber, now: u64) {
        self.mesh.remove(&peer);
        self.backoff.insert(peer, now + PRUNE_BACKOFF);
    }

    /// Handles IHAVE: requests the messages that are missing.
    pub(crate) fn handle_ihave(&mut self, peer: NodeNumber, messages: &[MessageNumber], now: u64) -> OutgoingFrames {
        let missing = |id: &MessageNumber| !self.has_seen(*id) && !self.gossip_promises.contains_key(id);
        let wanted: Vec<_> = messages.iter().copied().filter(missing).collect();
        self.gossip_promises.extend(wanted.iter().map(|id| (*id, now + IWANT_FOLLOWUP_TIME)));
        if wanted.is_empty() { Vec::new() } else { vec![(peer, Frame::IWant(wanted.into()))] }
    }

    /// Handles IWANT: sends the messages that are still kept.
    pub(crate) fn handle_iwant(&self, peer: NodeNumber, messages: &[MessageNumber]) -> OutgoingFrames {
        let is_cached = |id: &MessageNumber| self.history.iter().any(|window| window.contains(id));
        let wanted = |id: &MessageNumber| is_cached(id) && !self.dont_send.contains_key(&(peer, *id));
        messages.iter().copied().filter(wanted).map(|id| (peer, Frame::Message(id))).collect()
    }

    /// Handles IDONTWANT: the peer has this message already.
    pub(crate) fn handle_idontwant(&mut self, peer: NodeNumber, message: MessageNumber, now: u64) {
        self.dont_send.insert((peer, message), now + IDONTWANT_TIME);
    }

    /// Runs once a second.
    pub(crate) fn heartbeat(&mut self, now: u64, rng: &mut SmallRng) -> OutgoingFrames {
        self.beats += 1;
        if self.beats.is_multiple_of(150) {
            self.seen.swap(0, 1);
            self.seen[0].clear();
        }
        self.backoff.retain(|_, until| *until > now);
        self.gossip_promises.retain(|_, until| *until > now);
        self.dont_send.retain(|_, until| *until > now);
        let mut sending = Vec::new();
        if self.mesh.len() < MESH_N_LOW {
            self.graft(MESH_N - self.mesh.len(), |_| true, now, rng, &mut sending);
        }
        if self.mesh.len() >= MESH_N_HIGH {
            self.prune(now, rng, &mut sending);
        }
        let dialed = self.mesh.iter().filter(|peer| self.is_outbound(**peer)).count();
        if self.mesh.len() >= MESH_N_LOW && dialed < MESH_OUTBOUND_MIN {
            self.graft(MESH_OUTBOUND_MIN - dialed, |dialed| dialed, now, rng, &mut sending);
        }
        self.emit_gossip(rng, &mut sending);
        self.history.rotate_right(1);
        self.history[0].clear();
        sending
    }

    fn has_seen(&self, message: MessageNumber) -> bool {
        self.seen.iter().any(|seen| seen.contains(&message))
    }

    fn is_outbound(&self, peer: NodeNumber) -> bool {
        self.peers.get(&peer).is_some_and(|dialed| *dialed)
    }

    fn is_backing_off(&self, peer: NodeNumber, now: u64) -> bool {
        self.backoff.get(&peer).is_some_and(|until| *until > now)
    }

    fn graft(
        &mut self,
        count: usize,
        fits: impl Fn(bool) -> bool,
        now: u64,
        rng: &mut SmallRng,
        sending: &mut OutgoingFrames,
    ) {
        let free = self
            .peers
            .iter()
            .filter(|(peer, dialed)| fits(**dialed) && !self.mesh.contains(peer) && !self.is_backing_off(**peer, now));
        let chosen = free.map(|(peer, _)| *peer).choose_multiple(rng, count);
        sending.extend(chosen.iter().map(|peer| (*peer, Frame::Graft)));
        self.mesh.extend(chosen);
    }

    fn prune(&mut self, now: u64, rng: &mut SmallRng, sending: &mut OutgoingFrames) {
        let mut peers: Vec<_> = self.mesh.iter().copied().collect();
        peers.shuffle(rng);
        let mut dialed = peers.iter().filter(|peer| self.is_outbound(**peer)).count();
        for peer in peers {
            if self.mesh.len() == MESH_N {
                break;
            }
            if self.is_outbound(peer) {
                if dialed <= MESH_OUTBOUND_MIN {
                    continue;
                }
                dialed -= 1;
            }
            self.mesh.remove(&peer);
            self.backoff.insert(peer, now + PRUNE_BACKOFF);
            sending.push((peer, Frame::Prune));
        }
    }

    fn emit_gossip(&self, rng: &mut SmallRng, sending: &mut OutgoingFrames) {
        let recent: Vec<_> = self.history[..HISTORY_GOSSIP].iter().flatten().copied().collect();
        if recent.is_empty() {
            return;
        }
        let others: Vec<_> = self.peers.keys().filter(|peer| !self.mesh.contains(peer)).copied().collect();
        let count = GOSSIP_LAZY.max((GOSSIP_FACTOR * others.len() as f64) as usize);
        let announced: std::rc::Rc<[_]> = recent.into();
        sending.extend(
            others
                .into_iter()
                .choose_multiple(rng, count)
                .into_iter()
                .map(|peer| (peer, Frame::IHave(announced.clone()))),
        );
    }
}
