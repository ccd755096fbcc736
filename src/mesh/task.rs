//! The task that drives the mesh: libp2p's events, the agent's calls, and the clock, into one [`MeshEvent`] after another.

mod exchange;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use futures::StreamExt;
use libp2p::Swarm;
use libp2p::request_response::OutboundRequestId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, SwarmEvent};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use super::follower::Follower;
use super::log::Log;
use super::member::{Heard, Member};
use super::stack::{Behaviour, BehaviourEvent, topic};
use super::{Command, multiaddr};
use crate::identity::{libp2p_peer_id, peer_id_of};
use crate::metrics::Metrics;
use crate::model::{MeshEvent, Peer, PeerId};

/// How often the clock is looked at; [`super::member::SILENT_TICKS`] counts these.
const TICK: Duration = Duration::from_millis(250);

/// Ticks from one batch of announcements to the next: changes are gathered for up to a second.
const GATHER: u32 = 4;
/// Ticks until an empty announcement follows a batch, in case the batch's last message was lost to somebody.
const MARK_AFTER_BATCH: u32 = 20;
/// Ticks until one greets a new subscriber: its snapshot may be older than what it could not hear yet.
const MARK_AFTER_SUBSCRIBER: u32 = 4;
/// Ticks until the next one otherwise: the longest that anything stays lost.
const MARK_WHEN_IDLE: u32 = 240;

/// Events that wait for the agent. Past that, libp2p waits too. Most are some changes; 64 snapshots of 1500 items are 10 MiB.
const MAX_EVENTS: usize = 64;
/// Dials under way. A cluster that starts is connected in a few rounds.
const MAX_DIALS: usize = 16;
/// Peers admitted at a time: Kubernetes supports 5000 nodes.
const MAX_MEMBERS: usize = 5000;
/// How long the side with the larger PeerId leaves the dial to the other, to have one connection rather than two.
const COURTESY: Duration = Duration::from_secs(1);

/// Drives the mesh while it runs.
pub struct MeshTask {
    swarm: Swarm<Behaviour>,
    connections: TaskTracker,
    commands: mpsc::Receiver<Command>,
    own: PeerId,
    log: Log,
    metrics: Metrics,
    members: HashMap<PeerId, Member>,
    /// Whom we asked for a snapshot.
    asked: HashMap<OutboundRequestId, exchange::Asked>,
    outbox: VecDeque<MeshEvent>,
    gather_in: u32,
    mark_in: u32,
}

impl MeshTask {
    pub(super) fn new(
        swarm: Swarm<Behaviour>,
        connections: TaskTracker,
        commands: mpsc::Receiver<Command>,
        own: PeerId,
        epoch: u64,
        metrics: Metrics,
    ) -> Self {
        Self {
            swarm,
            connections,
            commands,
            own,
            log: Log::new(epoch),
            metrics,
            members: HashMap::new(),
            asked: HashMap::new(),
            outbox: VecDeque::new(),
            gather_in: GATHER,
            mark_in: MARK_WHEN_IDLE,
        }
    }

    /// Runs until `stop`, or until nobody takes the events any more; then leaves within a second.
    ///
    /// Calls of [`super::Mesh`] are taken even while `events` is full, so one task may make calls and take events in turn.
    pub async fn run(mut self, events: mpsc::Sender<MeshEvent>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        // After a stall there is nothing to catch up with: ticks stand for chances that peers had to be heard.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                permit = events.reserve(), if !self.outbox.is_empty() => match (permit, self.outbox.pop_front()) {
                    (Ok(permit), Some(event)) => permit.send(event),
                    _ => break,
                },
                command = self.commands.recv(), if !self.commands.is_closed() || !self.commands.is_empty() => {
                    if let Some(command) = command {
                        self.command(command);
                    }
                }
                event = self.swarm.select_next_some(), if self.has_room() => self.event(event),
                _ = ticks.tick() => self.tick(),
            }
        }
        self.leave().await;
    }

    fn has_room(&self) -> bool {
        self.outbox.len() < MAX_EVENTS
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Admit(peer) => self.admit(peer),
            Command::Dismiss(peer) => self.dismiss(peer),
            Command::Announce(changes) => {
                let left_out = self.log.record(changes);
                if left_out > 0 {
                    warn!(left_out, "this node holds more than can be announced; the rest is not offered to peers");
                }
                self.metrics.announcing(self.log.len());
            }
        }
    }

    fn admit(&mut self, peer: Peer) {
        let now = Instant::now();
        let dial_at = if self.own < peer.id { now } else { now + COURTESY };
        if let Some(member) = self.members.get_mut(&peer.id) {
            if member.is_up() && member.peer != peer {
                self.outbox.push_back(MeshEvent::Up(peer.clone()));
            }
            member.renew(peer, dial_at);
        } else if peer.id == self.own {
            debug!("not connecting to ourselves");
        } else if self.members.len() == MAX_MEMBERS {
            warn!(peer = %peer.id, node = %peer.node, "more than {MAX_MEMBERS} peers; this one is left out");
        } else {
            self.swarm.behaviour_mut().admitted.allow_peer(libp2p_peer_id(peer.id));
            self.members.insert(peer.id, Member::new(peer, dial_at));
        }
    }

    fn dismiss(&mut self, peer: PeerId) {
        // Closes its connections too; what they still say finds no member.
        self.swarm.behaviour_mut().admitted.disallow_peer(libp2p_peer_id(peer));
        if let Some(member) = self.members.remove(&peer)
            && member.is_up()
        {
            self.down(peer, &member.peer, "dismissed");
        }
    }

    fn event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, .. } => {
                if let Some(member) = self.member(&peer_id) {
                    member.opened(connection_id);
                }
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, cause, .. } => {
                debug!(peer = %peer_id, ?cause, "connection closed");
                self.closed(&peer_id, connection_id, now, "connection closed");
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id: Some(peer_id), error } => {
                debug!(peer = %peer_id, %error, "dial failed");
                if let Some(member) = self.member(&peer_id) {
                    member.dial_failed(connection_id, now, rand::random());
                }
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, peer_id, error, .. } => {
                debug!(from = %send_back_addr, peer = ?peer_id, %error, "connection refused");
            }
            SwarmEvent::ListenerClosed { reason, .. } => {
                error!(?reason, "gossip no longer listens; peers must be dialled")
            }
            SwarmEvent::ListenerError { error, .. } => warn!(%error, "gossip cannot accept connections at the moment"),
            SwarmEvent::Behaviour(event) => self.behaviour_event(event, now),
            _ => {}
        }
    }

    fn behaviour_event(&mut self, event: BehaviourEvent, now: Instant) {
        match event {
            BehaviourEvent::Ping(event) => match event.result {
                Ok(_) => self.heard(&event.peer, event.connection, now),
                Err(error) => debug!(peer = %event.peer, %error, "ping failed"),
            },
            BehaviourEvent::Gossip(event) => self.gossip_event(event, now),
            BehaviourEvent::Snapshots(event) => self.snapshot_event(event, now),
            // They only decide and have nothing to tell.
            BehaviourEvent::Limits(never) | BehaviourEvent::Admitted(never) => match never {},
        }
    }

    fn heard(&mut self, peer: &libp2p::PeerId, connection: ConnectionId, now: Instant) {
        let Some(member) = self.member(peer) else { return };
        match member.heard(connection) {
            Heard::Alive => {}
            Heard::Again => {
                if let Some(follower) = &mut member.follower {
                    follower.doubt(now);
                }
                self.ask(now);
            }
            Heard::Up => {
                member.follower = Some(Follower::new(now));
                let peer = member.peer.clone();
                info!(peer = %peer.id, node = %peer.node, address = %peer.gossip, "peer is up");
                self.outbox.push_back(MeshEvent::Up(peer));
                self.count_peers();
                self.ask(now);
            }
        }
    }

    fn closed(&mut self, peer: &libp2p::PeerId, connection: ConnectionId, now: Instant, reason: &'static str) {
        let Some(member) = self.member(peer) else { return };
        if member.closed(connection, now, rand::random()) {
            member.follower = None;
            let peer = member.peer.clone();
            self.down(peer.id, &peer, reason);
        }
    }

    fn down(&mut self, id: PeerId, peer: &Peer, reason: &'static str) {
        self.asked.retain(|_, asked| asked.peer != id);
        info!(peer = %id, node = %peer.node, reason, "peer is down");
        self.outbox.push_back(MeshEvent::Down(id));
        self.count_peers();
    }

    fn count_peers(&self) {
        self.metrics.peers_connected(self.members.values().filter(|member| member.is_up()).count());
    }

    fn tick(&mut self) {
        let now = Instant::now();
        // While libp2p waits for us, nobody can be heard.
        if self.has_room() {
            self.close_silent(now);
        }
        self.dial(now);
        self.expire(now);
        self.ask(now);
        self.gather_in = self.gather_in.saturating_sub(1);
        self.mark_in = self.mark_in.saturating_sub(1);
        if self.gather_in == 0 {
            self.gather_in = GATHER;
            if self.log.is_behind() {
                self.mark_in = MARK_AFTER_BATCH;
                let announcements = self.log.announce();
                announcements.iter().for_each(|announcement| self.publish(announcement));
            }
        }
        if self.mark_in == 0 {
            self.mark_in = MARK_WHEN_IDLE;
            let mark = self.log.mark();
            self.publish(&mark);
        }
    }

    fn close_silent(&mut self, now: Instant) {
        let silent = self.members.iter_mut().flat_map(|(id, member)| {
            let id = libp2p_peer_id(*id);
            member.tick().into_iter().map(move |connection| (id, connection))
        });
        for (id, connection) in silent.collect::<Vec<_>>() {
            // The network may swallow the closing too; the peer is down for us at once.
            self.swarm.close_connection(connection);
            self.closed(&id, connection, now, "does not answer");
        }
    }

    fn dial(&mut self, now: Instant) {
        let mut under_way = self.members.values().filter(|member| member.is_dialing()).count();
        for (id, member) in &mut self.members {
            if under_way >= MAX_DIALS {
                return;
            }
            if !member.wants_dial(now) {
                continue;
            }
            let options = DialOpts::peer_id(libp2p_peer_id(*id))
                .addresses(vec![multiaddr(member.peer.gossip)])
                // One whose closing hangs does not count.
                .condition(PeerCondition::Always)
                // Dialling from the listening port would collide with the other side's dial, and with our last one's TIME_WAIT.
                .allocate_new_port()
                .build();
            let connection = options.connection_id();
            member.dialing(connection);
            under_way += 1;
            if let Err(error) = self.swarm.dial(options) {
                debug!(peer = %id, %error, "dial refused");
                member.dial_failed(connection, now, rand::random());
            }
        }
    }

    fn member(&mut self, peer: &libp2p::PeerId) -> Option<&mut Member> {
        self.members.get_mut(&peer_id_of(peer)?)
    }

    /// Takes leave, so that peers need not find out from our silence.
    async fn leave(mut self) {
        self.swarm.behaviour_mut().gossip.unsubscribe(&topic());
        let connected: Vec<_> = self.swarm.connected_peers().copied().collect();
        for peer in connected {
            // Fails only when the connection closed just now.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let gone = async {
            while self.swarm.connected_peers().next().is_some() {
                self.swarm.select_next_some().await;
            }
        };
        let _ = tokio::time::timeout(PARTING, gone).await;
        // Ends the tasks of all connections.
        drop(self.swarm);
        self.connections.close();
        let _ = tokio::time::timeout(PARTING, self.connections.wait()).await;
    }
}

/// For either half of leaving; a peer that does not take it in this time would not later.
const PARTING: Duration = Duration::from_millis(450);
