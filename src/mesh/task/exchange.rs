//! What the task says and hears on the mesh: gossip, questions and answers.

use std::fmt::Display;
use std::time::Instant;

use libp2p::gossipsub::{self, MessageAcceptance, PublishError};
use libp2p::request_response::{self, InboundRequestId, OutboundFailure, OutboundRequestId, ResponseChannel};
use tracing::{debug, error, warn};

use super::MeshTask;
use crate::decide::gossip::{AskId, Verdict};
use crate::identity::{libp2p_peer_id, peer_id_of};
use crate::mesh::codec::wire_error;
use crate::mesh::stack::{ANSWER, topic};
use crate::model::{Gossip, MAX_MEMBERS, PeerId, Question, Reply};
use crate::wire::{self, Format, WireError};

/// A question that waits for its answer.
pub(super) struct Asked {
    ask: AskId,
    until: Instant,
}

/// What an event of ours about questions is about.
type QuestionEvent = request_response::Event<Vec<u8>, Reply>;

impl MeshTask {
    pub(super) fn publish(&mut self, message: &Gossip) {
        let versions = self.versions;
        self.publish_in(versions.current(), message);
        if let Some(previous) = versions.previous().filter(|previous| self.has_neighbour_of(*previous)) {
            self.publish_in(previous, message);
        }
    }

    /// Whether a neighbour reads this MAJOR and not the current one. An agent without such a neighbour does not publish for those
    /// farther away: they get what it says by asking a neighbour.
    fn has_neighbour_of(&self, previous: Format) -> bool {
        let (current, previous) = (topic(self.versions.current()).hash(), topic(previous).hash());
        let mut neighbours = self.swarm.behaviour().gossip.all_peers();
        neighbours.any(|(_, topics)| topics.contains(&&previous) && !topics.contains(&&current))
    }

    fn publish_in(&mut self, format: Format, message: &Gossip) {
        let encoded = match wire::encode_in(message, format) {
            Ok(encoded) => encoded,
            // Who misses it asks.
            Err(error) => return error!(%error, "a message cannot be published"),
        };
        match self.swarm.behaviour_mut().gossip.publish(topic(format), encoded) {
            Ok(_) => self.messages_out += 1,
            // Nobody to tell; newcomers ask. Or it was said before, by us or by somebody who relayed it.
            Err(PublishError::NoPeersSubscribedToTopic | PublishError::Duplicate) => {}
            Err(error) => debug!(%error, "a message is lost; who misses it asks"),
        }
    }

    pub(super) fn gossip_event(&mut self, event: gossipsub::Event, now: Instant) {
        match event {
            gossipsub::Event::Message { propagation_source, message_id, message } => {
                self.messages_in += 1;
                let acceptance = match peer_id_of(&propagation_source) {
                    Some(from) => self.judge(from, &message.data, now),
                    None => MessageAcceptance::Reject,
                };
                let accepted = matches!(acceptance, MessageAcceptance::Accept);
                let gossip = &mut self.swarm.behaviour_mut().gossip;
                if gossip.report_message_validation_result(&message_id, &propagation_source, acceptance) && accepted {
                    self.messages_out += 1;
                }
            }
            gossipsub::Event::SlowPeer { peer_id, .. } => debug!(peer = %peer_id, "too slow for all messages"),
            gossipsub::Event::GossipsubNotSupported { peer_id } => {
                warn!(peer = %peer_id, "peer does not speak gossipsub")
            }
            gossipsub::Event::Subscribed { .. } | gossipsub::Event::Unsubscribed { .. } => {}
        }
    }

    /// Judges a message, for us and for those to whom it would be passed on.
    fn judge(&mut self, from: PeerId, data: &[u8], now: Instant) -> MessageAcceptance {
        if !self.neighbours.may_say(from, data.len(), now) {
            self.nonsense(from, TOO_MANY, now);
            return MessageAcceptance::Ignore;
        }
        let (message, is_newer) = match wire::decode_for_relay::<Gossip>(data, self.versions) {
            Ok(read) => read,
            Err(error) if self.misread(from, &error, now) => return MessageAcceptance::Reject,
            Err(_) => return MessageAcceptance::Ignore,
        };
        let verdict = self.call(|protocol, table| match is_newer {
            false => protocol.gossip(from, message, table, now),
            true => protocol.gossip_of_later_release(from, message, table, now),
        });
        match verdict {
            Verdict::Accept => {
                self.table.moved();
                MessageAcceptance::Accept
            }
            Verdict::Ignore(reason) => {
                debug!(%from, reason, "message ignored");
                MessageAcceptance::Ignore
            }
            Verdict::Reject(reason) => {
                debug!(%from, reason, "message refused");
                self.metrics.gossip_refused(reason);
                MessageAcceptance::Reject
            }
        }
    }

    /// Counts a message that cannot be read. True when its sender is to blame.
    pub(super) fn misread(&mut self, from: PeerId, error: &WireError, now: Instant) -> bool {
        debug!(%from, %error, "a message cannot be read");
        let fault = match error {
            WireError::TooLong { .. } => "oversized",
            WireError::Malformed(_) => "malformed",
            // Of another release, or cut off by the network.
            WireError::Version { .. } => return self.let_be("other_version"),
            WireError::Unknown { .. } => return self.let_be("unknown"),
            WireError::Io(_) => return false,
        };
        self.nonsense(from, fault, now);
        true
    }

    fn let_be(&self, reason: &'static str) -> bool {
        self.metrics.gossip_refused(reason);
        false
    }

    pub(super) fn nonsense(&mut self, from: PeerId, fault: &'static str, now: Instant) {
        self.metrics.gossip_refused(fault);
        self.protocol.nonsense(from, fault, now);
    }

    /// Asks a neighbour.
    pub(super) fn put(&mut self, ask: AskId, peer: PeerId, question: &Question) {
        let now = Instant::now();
        let to = libp2p_peer_id(peer);
        let is_connected = self.links.values().any(|(_, owner)| *owner == peer);
        let encoded = wire::encode_in(question, self.versions.current());
        let encoded = encoded.inspect_err(|error| error!(%error, "a question cannot be asked"));
        // libp2p would dial who is not connected.
        let Some(encoded) = encoded.ok().filter(|_| is_connected) else {
            return self.protocol.unanswered(ask, now);
        };
        let request = self.swarm.behaviour_mut().questions.send_request(&to, encoded);
        // A little longer than libp2p itself waits.
        self.asked.insert(request, Asked { ask, until: now + ANSWER + ANSWER / 5 });
    }

    pub(super) fn question_event(&mut self, event: QuestionEvent, now: Instant) {
        use request_response::{Event, Message};
        match event {
            Event::Message { peer, message: Message::Request { request_id, request, channel }, .. } => {
                if let Some(from) = peer_id_of(&peer) {
                    self.answer(from, request_id, &request, channel, now);
                }
            }
            Event::Message { message: Message::Response { request_id, response }, .. } => {
                if let Some(Asked { ask, .. }) = self.asked.remove(&request_id) {
                    self.call(|protocol, table| protocol.answered(ask, response, table, now));
                    self.table.moved();
                }
            }
            Event::OutboundFailure { peer, request_id, error: OutboundFailure::UnsupportedProtocols, .. } => {
                self.let_be("other_version");
                if self.other_versions.len() < MAX_MEMBERS && self.other_versions.insert(peer) {
                    warn!(
                        %peer, versions = %self.versions,
                        "peer speaks no version of the gossip protocol that this agent speaks; upgrade the older of the two"
                    );
                }
                self.unanswered(request_id, &"no common version of the gossip protocol", now);
            }
            Event::OutboundFailure { peer, request_id, error, .. } => {
                if let (OutboundFailure::Io(error), Some(from)) = (&error, peer_id_of(&peer))
                    && let Some(error) = wire_error(error)
                {
                    self.misread(from, error, now);
                }
                self.unanswered(request_id, &error, now);
            }
            Event::InboundFailure { peer, request_id, error, .. } => {
                debug!(%peer, %error, "question not answered");
                if let Some(from) = peer_id_of(&peer) {
                    self.neighbours.end(from, request_id);
                }
            }
            Event::ResponseSent { peer, request_id, .. } => {
                if let Some(from) = peer_id_of(&peer) {
                    self.neighbours.end(from, request_id);
                }
            }
        }
    }

    fn answer(
        &mut self,
        from: PeerId,
        id: InboundRequestId,
        question: &[u8],
        channel: ResponseChannel<Reply>,
        now: Instant,
    ) {
        if !self.neighbours.may_ask(from, now) {
            return self.nonsense(from, TOO_MANY, now);
        }
        let reply = match wire::decode_in::<Question>(question, self.versions) {
            Ok(question) if self.neighbours.begin(from, id, &question, now) => {
                let Self { protocol, table, .. } = self;
                table.read(|inventory| protocol.asked(from, question, inventory, now))
            }
            Err(error) if self.misread(from, &error, now) => return,
            _ => Reply::Busy,
        };
        self.reply(channel, reply);
    }

    fn reply(&mut self, channel: ResponseChannel<Reply>, reply: Reply) {
        // Refused only when the one who asked is gone.
        drop(self.swarm.behaviour_mut().questions.send_response(channel, reply));
    }

    fn unanswered(&mut self, request: OutboundRequestId, error: &dyn Display, now: Instant) {
        if let Some(Asked { ask, .. }) = self.asked.remove(&request) {
            debug!(%error, "no answer");
            self.protocol.unanswered(ask, now);
        }
    }

    /// Gives up questions that libp2p lost: over a connection whose closing hangs it neither sends one nor lets it time out.
    pub(super) fn expire(&mut self, now: Instant) {
        let lost: Vec<_> = self.asked.iter().filter(|(_, asked)| asked.until <= now).map(|(id, _)| *id).collect();
        for request in lost {
            self.unanswered(request, &"asked over a dead connection", now);
        }
    }
}

/// More than an honest neighbour sends.
pub(super) const TOO_MANY: &str = "too_many";
