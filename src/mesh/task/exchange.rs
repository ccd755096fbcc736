//! Messages of the mesh: gossip, sync requests and replies.

use std::fmt::Display;
use std::time::Instant;

use libp2p::gossipsub::{self, MessageAcceptance, PublishError};
use libp2p::request_response::{self, InboundRequestId, OutboundFailure, OutboundRequestId, ResponseChannel};
use tracing::{debug, error, warn};

use super::MeshTask;
use crate::decide::gossip::{GossipFault, GossipVerdict, SyncRequestId};
use crate::identity::{libp2p_peer_id, peer_id_of};
use crate::mesh::codec::wire_error;
use crate::mesh::stack::{SYNC_TIMEOUT, topic};
use crate::model::{Gossip, MAX_MEMBERS, PeerId, SyncReply, SyncRequest};
use crate::util::clock;
use crate::wire::{self, Format, WireError};

/// A sync request in flight.
pub(super) struct OpenRequest {
    sync_request_id: SyncRequestId,
    deadline: Instant,
}

type SyncEvent = request_response::Event<Vec<u8>, SyncReply>;

impl MeshTask {
    pub(super) fn publish(&mut self, message: &Gossip) {
        let versions = self.versions;
        self.publish_in_format(versions.current(), message);
        if let Some(previous) = versions.previous().filter(|previous| self.has_neighbor_of(*previous)) {
            self.publish_in_format(previous, message);
        }
    }

    /// Whether a neighbor reads this MAJOR and not the current MAJOR. Without such a neighbor the
    /// agent does not publish in the previous format: agents farther away get the entries by
    /// requests to their neighbors.
    fn has_neighbor_of(&self, previous: Format) -> bool {
        let (current, previous) = (topic(self.versions.current()).hash(), topic(previous).hash());
        let mut neighbors = self.swarm.behaviour().gossip.all_peers();
        neighbors.any(|(_, topics)| topics.contains(&&previous) && !topics.contains(&&current))
    }

    fn publish_in_format(&mut self, format: Format, message: &Gossip) {
        let encoded = match wire::encode_in(message, format) {
            Ok(encoded) => encoded,
            // A peer that misses the message requests the entries.
            Err(error) => return error!(%error, "a message cannot be published"),
        };
        match self.swarm.behaviour_mut().gossip.publish(topic(format), encoded) {
            Ok(_) => self.messages_out += 1,
            // Without subscribers there is no receiver, and new members request the entries. A
            // duplicate was published before, by this agent or by a relay.
            Err(PublishError::NoPeersSubscribedToTopic | PublishError::Duplicate) => {}
            Err(error) => debug!(%error, "a message is lost; peers request the missing entries"),
        }
    }

    pub(super) fn gossip_event(&mut self, event: gossipsub::Event, now: Instant) {
        match event {
            gossipsub::Event::Message { propagation_source, message_id, message } => {
                self.messages_in += 1;
                let acceptance = match peer_id_of(&propagation_source) {
                    Some(from) => self.validate(from, &message.data, now),
                    None => MessageAcceptance::Reject,
                };
                let accepted = matches!(acceptance, MessageAcceptance::Accept);
                let gossip = &mut self.swarm.behaviour_mut().gossip;
                if gossip.report_message_validation_result(&message_id, &propagation_source, acceptance) && accepted {
                    self.messages_out += 1;
                }
            }
            gossipsub::Event::SlowPeer { peer_id, .. } => {
                debug!(peer = %peer_id, "the peer is too slow for all messages")
            }
            gossipsub::Event::GossipsubNotSupported { peer_id } => {
                warn!(peer = %peer_id, "the peer does not support gossipsub")
            }
            gossipsub::Event::Subscribed { .. } | gossipsub::Event::Unsubscribed { .. } => {}
        }
    }

    /// Validates a message, for this agent and before a relay.
    fn validate(&mut self, from: PeerId, data: &[u8], now: Instant) -> MessageAcceptance {
        if !self.neighbors.try_take_message(from, data.len(), now) {
            self.report_fault(from, GossipFault::TooMany, now);
            return MessageAcceptance::Ignore;
        }
        let (message, is_newer) = match wire::decode_for_relay::<Gossip>(data, self.versions) {
            Ok(read) => read,
            Err(error) if self.record_unreadable(from, &error, now) => return MessageAcceptance::Reject,
            Err(_) => return MessageAcceptance::Ignore,
        };
        let verdict = self.with_inventory(|protocol, inventory| match is_newer {
            false => protocol.receive_gossip(from, message, inventory, now),
            true => protocol.receive_gossip_of_later_release(from, message, inventory, now),
        });
        match verdict {
            GossipVerdict::Accept => {
                self.inventory.mark_changed();
                MessageAcceptance::Accept
            }
            GossipVerdict::Ignore(reason) => {
                debug!(%from, reason, "message ignored");
                MessageAcceptance::Ignore
            }
            GossipVerdict::Reject(fault) => {
                debug!(%from, fault = fault.label(), "message rejected");
                self.metrics.gossip_rejected(fault.label());
                MessageAcceptance::Reject
            }
        }
    }

    /// Counts a message that cannot be read. True for a fault of the sender.
    pub(super) fn record_unreadable(&mut self, from: PeerId, error: &WireError, now: Instant) -> bool {
        debug!(%from, %error, "a message cannot be read");
        let fault = match error {
            WireError::TooLong { .. } => GossipFault::Oversized,
            WireError::Malformed(_) => GossipFault::Malformed,
            // A message of another release, or cut off by the network, is no fault.
            WireError::Version { .. } => return self.record_ignored("other_version"),
            WireError::Unknown { .. } => return self.record_ignored("unknown"),
            WireError::Io(_) => return false,
        };
        self.report_fault(from, fault, now);
        true
    }

    fn record_ignored(&self, reason: &'static str) -> bool {
        self.metrics.gossip_rejected(reason);
        false
    }

    pub(super) fn report_fault(&mut self, from: PeerId, fault: GossipFault, now: Instant) {
        self.metrics.gossip_rejected(fault.label());
        self.protocol.record_fault(from, fault, now);
    }

    /// Sends a sync request to a neighbor.
    pub(super) fn send_sync_request(&mut self, sync_request_id: SyncRequestId, peer: PeerId, request: &SyncRequest) {
        let now = clock::now();
        let to = libp2p_peer_id(peer);
        let is_connected = self.links.values().any(|(_, owner)| *owner == peer);
        let encoded = wire::encode_in(request, self.versions.current());
        let encoded = encoded.inspect_err(|error| error!(%error, "a sync request cannot be encoded"));
        // libp2p would dial a peer without a connection.
        let Some(encoded) = encoded.ok().filter(|_| is_connected) else {
            return self.protocol.record_request_failure(sync_request_id, now);
        };
        let outbound_id = self.swarm.behaviour_mut().questions.send_request(&to, encoded);
        // A little longer than libp2p's own timeout.
        self.open_requests
            .insert(outbound_id, OpenRequest { sync_request_id, deadline: now + SYNC_TIMEOUT + SYNC_TIMEOUT / 5 });
    }

    pub(super) fn sync_event(&mut self, event: SyncEvent, now: Instant) {
        use request_response::{Event, Message};
        match event {
            Event::Message { peer, message: Message::Request { request_id, request, channel }, .. } => {
                if let Some(from) = peer_id_of(&peer) {
                    self.answer(from, request_id, &request, channel, now);
                }
            }
            Event::Message { message: Message::Response { request_id, response }, .. } => {
                if let Some(OpenRequest { sync_request_id, .. }) = self.open_requests.remove(&request_id) {
                    self.with_inventory(|protocol, inventory| {
                        protocol.receive_reply(sync_request_id, response, inventory, now)
                    });
                    self.inventory.mark_changed();
                }
            }
            Event::OutboundFailure { peer, request_id, error: OutboundFailure::UnsupportedProtocols, .. } => {
                self.record_ignored("other_version");
                if self.other_versions.len() < MAX_MEMBERS && self.other_versions.insert(peer) {
                    warn!(
                        %peer, versions = %self.versions,
                        "peer speaks no version of the gossip protocol that this agent speaks; upgrade the older of the two"
                    );
                }
                self.record_unanswered(request_id, &"no common version of the gossip protocol", now);
            }
            Event::OutboundFailure { peer, request_id, error, .. } => {
                if let (OutboundFailure::Io(error), Some(from)) = (&error, peer_id_of(&peer))
                    && let Some(error) = wire_error(error)
                {
                    self.record_unreadable(from, error, now);
                }
                self.record_unanswered(request_id, &error, now);
            }
            Event::InboundFailure { peer, request_id, error, .. } => {
                debug!(%peer, %error, "the reply to a sync request was not sent");
                if let Some(from) = peer_id_of(&peer) {
                    self.neighbors.finish_answer(from, request_id);
                }
            }
            Event::ResponseSent { peer, request_id, .. } => {
                if let Some(from) = peer_id_of(&peer) {
                    self.neighbors.finish_answer(from, request_id);
                }
            }
        }
    }

    fn answer(
        &mut self,
        from: PeerId,
        id: InboundRequestId,
        request: &[u8],
        channel: ResponseChannel<SyncReply>,
        now: Instant,
    ) {
        if !self.neighbors.try_take_sync_request(from, now) {
            return self.report_fault(from, GossipFault::TooMany, now);
        }
        let reply = match wire::decode_in::<SyncRequest>(request, self.versions) {
            Ok(request) if self.neighbors.try_begin_answer(from, id, &request) => {
                let Self { protocol, inventory: table, .. } = self;
                table.read(|inventory| protocol.answer(from, request, inventory, now))
            }
            Err(error) if self.record_unreadable(from, &error, now) => return,
            _ => SyncReply::Busy,
        };
        self.reply(channel, reply);
    }

    fn reply(&mut self, channel: ResponseChannel<SyncReply>, reply: SyncReply) {
        // The send fails only when the connection is gone.
        drop(self.swarm.behaviour_mut().questions.send_response(channel, reply));
    }

    fn record_unanswered(&mut self, id: OutboundRequestId, error: &dyn Display, now: Instant) {
        if let Some(OpenRequest { sync_request_id, .. }) = self.open_requests.remove(&id) {
            debug!(%error, "a sync request has no reply");
            self.protocol.record_request_failure(sync_request_id, now);
        }
    }

    /// Ends requests that libp2p lost: on a connection whose close hangs, libp2p neither sends a
    /// request nor reports a timeout.
    pub(super) fn expire(&mut self, now: Instant) {
        let expired: Vec<_> =
            self.open_requests.iter().filter(|(_, open)| open.deadline <= now).map(|(id, _)| *id).collect();
        for id in expired {
            self.record_unanswered(id, &"the request was lost on a dead connection", now);
        }
    }
}
