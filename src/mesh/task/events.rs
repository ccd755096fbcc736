//! libp2p's events about connections, as calls of the protocol.

use std::time::Instant;

use libp2p::swarm::{ConnectionId, SwarmEvent};
use tracing::{debug, error, warn};

use super::MeshTask;
use crate::identity::peer_id_of;
use crate::mesh::stack::BehaviourEvent;
use crate::util::clock;

impl MeshTask {
    pub(super) fn handle_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = clock::now();
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, .. } => {
                self.connection_opened(&peer_id, connection_id, now);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, cause, .. } => {
                debug!(peer = %peer_id, ?cause, "connection closed");
                self.connection_ended(connection_id);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                debug!(peer = ?peer_id, %error, "dial failed");
                if let Some(peer) = self.dials.remove(&connection_id) {
                    self.with_inventory(|protocol, inventory| protocol.dial_failed(peer, inventory, now));
                }
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, peer_id, error, .. } => {
                debug!(from = %send_back_addr, peer = ?peer_id, %error, "inbound connection failed");
            }
            SwarmEvent::ListenerClosed { reason, .. } => {
                error!(?reason, "gossip no longer listens; this agent must dial its peers")
            }
            SwarmEvent::ListenerError { error, .. } => warn!(%error, "gossip cannot accept connections at the moment"),
            SwarmEvent::Behaviour(event) => self.behaviour_event(event, now),
            _ => {}
        }
    }

    fn connection_opened(&mut self, peer_id: &libp2p::PeerId, connection: ConnectionId, now: Instant) {
        self.dials.remove(&connection);
        // A peer that is not allowed gets so far only when denied during the handshake.
        let is_allowed = self.swarm.behaviour().admitted.allowed_peers().contains(peer_id);
        let Some(peer) = peer_id_of(peer_id).filter(|_| is_allowed) else {
            self.swarm.close_connection(connection);
            return;
        };
        let link = self.next_link;
        self.next_link += 1;
        self.links.insert(connection, (link, peer));
        self.connected.set(peer, true);
        self.protocol.connection_opened(link, peer, now);
    }

    /// Reports the end of a connection to the protocol once, at its close or when the close begins.
    pub(super) fn connection_ended(&mut self, connection: ConnectionId) {
        if let Some((link, peer)) = self.links.remove(&connection) {
            self.connected.set(peer, self.links.values().any(|(_, owner)| *owner == peer));
            self.protocol.connection_closed(link, peer, clock::now());
        }
    }

    fn behaviour_event(&mut self, event: BehaviourEvent, now: Instant) {
        match event {
            BehaviourEvent::Ping(event) => match event.result {
                // A connection that is being closed may still answer, but is no longer in `links`.
                Ok(_) => {
                    if let Some(&(link, peer)) = self.links.get(&event.connection) {
                        self.with_inventory(|protocol, inventory| {
                            protocol.record_ping_answer(link, peer, inventory, now)
                        });
                    }
                }
                Err(error) => debug!(peer = %event.peer, %error, "ping failed"),
            },
            BehaviourEvent::Gossip(event) => self.gossip_event(event, now),
            BehaviourEvent::Questions(event) => self.sync_event(event, now),
            BehaviourEvent::Ranges(event) => self.range_event(event, now),
            // These behaviors only decide and emit no events.
            BehaviourEvent::Limits(never) | BehaviourEvent::Admitted(never) => match never {},
        }
    }
}
