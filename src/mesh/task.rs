//! The task that drives the protocol: libp2p's events, the agent's calls and the clock go in, and
//! the protocol's outputs come out.

mod events;
mod exchange;
mod neighbors;
mod ranges;

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use futures::StreamExt;
use libp2p::Swarm;
use libp2p::request_response::OutboundRequestId;
use libp2p::swarm::ConnectionId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use self::neighbors::Neighbors;
use self::ranges::RangeRequests;
use super::gossip_crypto::GossipCrypto;
use super::shared_inventory::SharedInventory;
use super::stack::Behaviour;
use super::{Command, ConnectedPeers, MeshOptions, multiaddr};
use crate::decide::gossip::{GossipFault, MeshConnectionId, Output, Protocol, TICK};
use crate::decide::inventory::Inventory;
use crate::identity::libp2p_peer_id;
use crate::metrics::Metrics;
use crate::model::{MeshStatus, Peer, PeerId};
use crate::ports::MembershipEvent;
use crate::util::clock;
use crate::wire::Versions;

/// Events that wait for the agent. When the queue is full, libp2p waits too. All events are small.
const MAX_PENDING_EVENTS: usize = 64;

/// The task of the mesh.
pub struct MeshTask {
    swarm: Swarm<Behaviour>,
    connections: TaskTracker,
    commands: mpsc::Receiver<Command>,
    protocol: Protocol<GossipCrypto>,
    inventory: SharedInventory,
    metrics: Metrics,
    neighbors: Neighbors,
    /// Open connections, with the protocol's identifiers.
    links: HashMap<ConnectionId, (MeshConnectionId, PeerId)>,
    next_link: MeshConnectionId,
    /// Dials in flight.
    dials: HashMap<ConnectionId, PeerId>,
    /// Sync requests in flight.
    open_requests: HashMap<OutboundRequestId, exchange::OpenRequest>,
    ranges: RangeRequests,
    connected: ConnectedPeers,
    pending_events: VecDeque<MembershipEvent>,
    messages_in: u64,
    messages_out: u64,
    versions: Versions,
    /// Peers whose unsupported versions were logged; at most `MAX_MEMBERS`.
    other_versions: HashSet<libp2p::PeerId>,
}

impl MeshTask {
    #[expect(clippy::too_many_arguments, reason = "each argument is a part of the task, and there is one caller")]
    pub(super) fn new(
        swarm: Swarm<Behaviour>,
        connections: TaskTracker,
        commands: mpsc::Receiver<Command>,
        protocol: Protocol<GossipCrypto>,
        inventory: SharedInventory,
        metrics: Metrics,
        options: MeshOptions,
        connected: ConnectedPeers,
    ) -> Self {
        let MeshOptions { rate_limits, versions } = options;
        Self {
            swarm,
            connections,
            commands,
            protocol,
            inventory,
            metrics,
            neighbors: Neighbors::new(rate_limits),
            links: HashMap::new(),
            next_link: 0,
            dials: HashMap::new(),
            open_requests: HashMap::new(),
            ranges: RangeRequests::default(),
            connected,
            pending_events: VecDeque::new(),
            messages_in: 0,
            messages_out: 0,
            versions,
            other_versions: HashSet::new(),
        }
    }

    /// Runs until `stop`, or until the receiver of `events` is dropped; then leaves the mesh within
    /// one and a half seconds.
    ///
    /// The task takes calls of [`super::Mesh`] even while `events` is full, so one task may make
    /// calls and receive events in turn.
    pub async fn run(mut self, events: mpsc::Sender<MembershipEvent>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        // A stalled task skips the missed ticks: each tick stands for a chance of peers to answer.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.perform_outputs();
            tokio::select! {
                () = stop.cancelled() => break,
                permit = events.reserve(), if !self.pending_events.is_empty() => match (permit, self.pending_events.pop_front()) {
                    (Ok(permit), Some(event)) => permit.send(event),
                    _ => break,
                },
                command = self.commands.recv(), if !self.commands.is_closed() || !self.commands.is_empty() => {
                    if let Some(command) = command {
                        self.handle_command(command);
                    }
                }
                event = self.swarm.select_next_some(), if self.has_room() => self.handle_event(event),
                Some(served) = self.ranges.next_response() => self.send_range_response(served),
                // While libp2p waits for the agent, no message arrives, so no time passes for the
                // protocol either.
                _ = ticks.tick(), if self.has_room() => self.tick(),
            }
        }
        self.leave().await;
    }

    fn has_room(&self) -> bool {
        self.pending_events.len() < MAX_PENDING_EVENTS
    }

    fn handle_command(&mut self, command: Command) {
        let now = clock::now();
        match command {
            Command::Admit(peer, life) => {
                self.with_inventory(|protocol, inventory| protocol.admit(peer, life, inventory, now))
            }
            Command::RevokeAdmission(peer) => {
                self.with_inventory(|protocol, inventory| protocol.remove_peer(peer, inventory, now))
            }
            Command::Unreachable(peer) => {
                self.with_inventory(|protocol, inventory| protocol.dial_failed(peer, inventory, now))
            }
            Command::Rejected(peer) => self.protocol.rejected_by_peer(peer, now),
            Command::Suspect(peer) => {
                self.with_inventory(|protocol, inventory| protocol.suspect_provider(peer, inventory, now))
            }
            Command::Announce(changes) => {
                let left_out = self.protocol.announce(changes);
                if left_out > 0 {
                    warn!(left_out, "this node has more content than an agent can announce; peers do not see the rest");
                }
            }
            Command::Introduce { credential, transfer, gossip, zone } => {
                self.protocol.introduce(credential, transfer, gossip, zone, now);
            }
            // The send fails only when the caller is gone.
            Command::Range(peer, request, answer) => self.request_range(peer, &request, answer),
            Command::Status(answer) => drop(answer.send(self.status(now))),
        }
    }

    fn tick(&mut self) {
        let now = clock::now();
        self.expire(now);
        self.ranges.expire(now);
        self.neighbors.evict_idle(now);
        self.with_inventory(|protocol, inventory| protocol.tick(inventory, now));
    }

    fn status(&self, now: Instant) -> MeshStatus {
        let mut status = self.inventory.read(|inventory| self.protocol.status(inventory, now));
        (status.messages_in, status.messages_out) = (self.messages_in, self.messages_out);
        self.metrics.items_announced(status.items);
        status
    }

    /// Calls the protocol with exclusive access to the inventory.
    fn with_inventory<T>(&mut self, call: impl FnOnce(&mut Protocol<GossipCrypto>, &mut Inventory) -> T) -> T {
        let Self { protocol, inventory: table, .. } = self;
        table.modify(|inventory| call(protocol, inventory))
    }

    /// Performs all outputs of the protocol.
    fn perform_outputs(&mut self) {
        while let Some(output) = self.protocol.next() {
            match output {
                Output::Publish(message) => self.publish(&message),
                Output::Request(id, peer, request) => self.send_sync_request(id, peer, &request),
                Output::Handshake(peer) => self.pending_events.push_back(MembershipEvent::Handshake(peer)),
                Output::Dial(peer) => self.dial(&peer),
                Output::Close(link, peer) => self.close(link, peer),
                Output::Allow(peer) => {
                    self.swarm.behaviour_mut().admitted.allow_peer(libp2p_peer_id(peer));
                }
                Output::Deny(peer) => self.deny(peer),
                Output::Up(peer) => {
                    debug!(peer = %peer.id, node = %peer.node, address = %peer.transfer, "peer is up");
                    self.emit(MembershipEvent::Up(peer));
                }
                Output::Down(peer, reason) => {
                    debug!(%peer, reason, "peer is down");
                    self.emit(MembershipEvent::Down(peer));
                }
                Output::SharedKey(node) => self.pending_events.push_back(MembershipEvent::SharedKey(node)),
                Output::Fault { peer, fault, banned } => self.record_fault(peer, fault, banned),
            }
        }
    }

    fn emit(&mut self, event: MembershipEvent) {
        self.inventory.mark_changed();
        self.pending_events.push_back(event);
    }

    fn record_fault(&self, peer: PeerId, fault: GossipFault, banned: Option<Duration>) {
        let fault = fault.label();
        debug!(%peer, fault, "peer is at fault");
        self.metrics.peer_at_fault(fault);
        if let Some(banned) = banned {
            self.metrics.peer_banned();
            warn!(%peer, fault, seconds = banned.as_secs(), "peer misbehaves and is banned for a while");
        }
    }

    fn dial(&mut self, peer: &Peer) {
        let options = DialOpts::peer_id(libp2p_peer_id(peer.id))
            .addresses(vec![multiaddr(peer.gossip)])
            // A connection whose close hangs does not prevent another dial.
            .condition(PeerCondition::Always)
            // A dial from the listening port would collide with the peer's dial, and with the
            // previous connection in TIME_WAIT.
            .allocate_new_port()
            .build();
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => drop(self.dials.insert(connection, peer.id)),
            Err(error) => {
                debug!(peer = %peer.id, %error, "libp2p rejected a dial");
                self.with_inventory(|protocol, inventory| protocol.dial_failed(peer.id, inventory, clock::now()));
            }
        }
    }

    fn close(&mut self, link: MeshConnectionId, peer: PeerId) {
        let connection = self.links.iter().find(|(_, open)| **open == (link, peer)).map(|(connection, _)| *connection);
        if let Some(connection) = connection {
            self.close_connection(connection);
        }
    }

    fn deny(&mut self, peer: PeerId) {
        self.swarm.behaviour_mut().admitted.disallow_peer(libp2p_peer_id(peer));
        let links = self.links.iter().filter(|(_, (_, owner))| *owner == peer);
        for connection in links.map(|(connection, _)| *connection).collect::<Vec<_>>() {
            self.close_connection(connection);
        }
    }

    /// Closes a connection. For the protocol the connection ends at once, because the network may
    /// drop the close too.
    fn close_connection(&mut self, connection: ConnectionId) {
        self.swarm.close_connection(connection);
        self.connection_ended(connection);
    }

    /// Publishes the leave message, so that peers need not detect the end by a timeout.
    async fn leave(mut self) {
        self.protocol.leave();
        // Other outputs concern only an agent that stays.
        while let Some(output) = self.protocol.next() {
            if let Output::Publish(message) = output {
                self.publish(&message);
            }
        }
        // libp2p does not report the end of the sends, so the task drives libp2p for a fixed time.
        if self.swarm.connected_peers().next().is_some() {
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, async { while self.swarm.next().await.is_some() {} }).await;
        }
        let connected: Vec<_> = self.swarm.connected_peers().copied().collect();
        for peer in connected {
            // The call fails only when the connection has just closed.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let disconnected = async {
            while self.swarm.connected_peers().next().is_some() {
                self.swarm.select_next_some().await;
            }
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, disconnected).await;
        // The drop ends the tasks of all connections.
        drop(self.swarm);
        self.connections.close();
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.connections.wait()).await;
    }
}

/// Time for each third of [`MeshTask::leave`]. A peer that has not received the message by then is
/// unlikely to receive it later.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(450);
