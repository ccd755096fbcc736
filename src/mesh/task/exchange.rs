//! What the task says and hears on the mesh: announcements by gossip, snapshots by request and answer.

use std::fmt::Display;
use std::io;
use std::time::Instant;

use bytes::Bytes;
use libp2p::gossipsub::{self, MessageAcceptance, PublishError};
use libp2p::request_response::{self, OutboundRequestId};
use tracing::{debug, error, warn};

use super::super::follower::{self, Receipt, Replacement};
use super::super::stack::{SNAPSHOT, topic};
use super::{MARK_AFTER_SUBSCRIBER, MeshTask};
use crate::identity::libp2p_peer_id;
use crate::model::{ContentChange, MeshEvent, PeerId};
use crate::wire::{self, Announcement, Snapshot, SnapshotRequest, WireError};

/// Snapshots under way to us: of 8 MiB at most each, before and after decoding.
const MAX_SNAPSHOTS: usize = 2;

/// A snapshot on its way to us.
pub(super) struct Asked {
    pub(super) peer: PeerId,
    until: Instant,
}

impl MeshTask {
    pub(super) fn publish(&mut self, announcement: &Announcement) {
        let encoded = match wire::encode(announcement) {
            Ok(encoded) => encoded,
            // Its number is used up, so that peers find a gap and take a snapshot.
            Err(error) => return error!(%error, "an announcement cannot be sent"),
        };
        match self.swarm.behaviour_mut().gossip.publish(topic(), encoded) {
            // Nobody to tell; newcomers take a snapshot.
            Ok(_) | Err(PublishError::NoPeersSubscribedToTopic) => {}
            Err(error) => debug!(%error, sequence = announcement.sequence, "announcement lost; peers will ask"),
        }
    }

    pub(super) fn gossip_event(&mut self, event: gossipsub::Event, now: Instant) {
        match event {
            gossipsub::Event::Message { propagation_source, message_id, message } => {
                let acceptance = match self.receive(&message, now) {
                    Ok(()) => MessageAcceptance::Accept,
                    Err(reason) => {
                        debug!(from = %propagation_source, author = ?message.source, reason, "announcement refused");
                        self.metrics.gossip_refused(reason);
                        MessageAcceptance::Reject
                    }
                };
                let gossip = &mut self.swarm.behaviour_mut().gossip;
                gossip.report_message_validation_result(&message_id, &propagation_source, acceptance);
            }
            gossipsub::Event::Subscribed { .. } => self.mark_in = self.mark_in.min(MARK_AFTER_SUBSCRIBER),
            gossipsub::Event::SlowPeer { peer_id, .. } => debug!(peer = %peer_id, "too slow for all announcements"),
            gossipsub::Event::GossipsubNotSupported { peer_id } => {
                warn!(peer = %peer_id, "peer does not speak gossipsub")
            }
            gossipsub::Event::Unsubscribed { .. } => {}
        }
    }

    /// Judges an announcement, for us and for those to whom it would be forwarded. Gossipsub has checked its author's signature.
    fn receive(&mut self, message: &gossipsub::Message, now: Instant) -> Result<(), &'static str> {
        let author = message.source.and_then(|source| self.member(&source)).ok_or("unknown_author")?;
        let announcement: Announcement = wire::decode(&message.data).map_err(|error| label(&error))?;
        let Some(follower) = &mut author.follower else {
            // Out of our reach, not necessarily of others'.
            return follower::check(&announcement);
        };
        let received = follower.receive(announcement, now);
        let id = author.peer.id;
        match received {
            Receipt::Next(changes) => self.changed(id, changes),
            Receipt::Held | Receipt::Late => {}
            Receipt::Refused(reason) => return Err(reason),
        }
        Ok(())
    }

    fn changed(&mut self, peer: PeerId, changes: Vec<ContentChange>) {
        if !changes.is_empty() {
            self.outbox.push_back(MeshEvent::Changed(peer, changes));
        }
    }

    pub(super) fn snapshot_event(&mut self, event: request_response::Event<SnapshotRequest, Bytes>, now: Instant) {
        use request_response::{Event, Message, OutboundFailure};
        match event {
            Event::Message { peer, message: Message::Request { channel, .. }, .. } => {
                if self.member(&peer).is_none() {
                    return;
                }
                match self.log.snapshot() {
                    // Refused only when the one who asked is gone.
                    Ok(encoded) => drop(self.swarm.behaviour_mut().snapshots.send_response(channel, encoded)),
                    Err(error) => {
                        error!(%error, "our own snapshot cannot be sent; peers do not see what this node holds")
                    }
                }
            }
            Event::Message { message: Message::Response { request_id, response }, .. } => {
                if let Some(asked) = self.asked.remove(&request_id) {
                    self.answered(asked.peer, &response, now);
                }
            }
            Event::OutboundFailure { request_id, error, .. } => {
                if matches!(&error, OutboundFailure::Io(error) if error.kind() == io::ErrorKind::InvalidData) {
                    self.metrics.gossip_refused("snapshot_too_long");
                }
                self.unanswered(request_id, &error, now);
            }
            Event::InboundFailure { peer, error, .. } => debug!(%peer, %error, "snapshot not sent"),
            Event::ResponseSent { .. } => {}
        }
        self.ask(now);
    }

    fn unanswered(&mut self, request: OutboundRequestId, error: &dyn Display, now: Instant) {
        let Some(Asked { peer, .. }) = self.asked.remove(&request) else { return };
        debug!(%peer, %error, "no snapshot");
        if let Some(follower) = self.members.get_mut(&peer).and_then(|member| member.follower.as_mut()) {
            follower.failed(now, rand::random());
        }
    }

    /// Gives up questions that libp2p lost: over a connection whose closing hangs it neither sends one nor lets it time out.
    pub(super) fn expire(&mut self, now: Instant) {
        let lost: Vec<_> = self.asked.iter().filter(|(_, asked)| asked.until <= now).map(|(id, _)| *id).collect();
        for request in lost {
            self.unanswered(request, &"asked over a dead connection", now);
        }
    }

    fn answered(&mut self, peer: PeerId, response: &[u8], now: Instant) {
        let Some(follower) = self.members.get_mut(&peer).and_then(|member| member.follower.as_mut()) else { return };
        let replaced = match wire::decode::<Snapshot>(response) {
            Ok(snapshot) => follower.replace(snapshot, now, rand::random()),
            Err(error) => {
                follower.failed(now, rand::random());
                Err(label(&error))
            }
        };
        match replaced {
            Ok(None) => {}
            Ok(Some(Replacement { items, changes })) => {
                debug!(%peer, items = items.len(), "took a snapshot");
                self.outbox.push_back(MeshEvent::Snapshot(peer, items));
                self.changed(peer, changes);
            }
            Err(reason) => {
                warn!(%peer, reason, "snapshot refused; is the peer of another version?");
                self.metrics.gossip_refused(reason);
            }
        }
    }

    /// Asks for the snapshots that are due, as many at a time as may be.
    pub(super) fn ask(&mut self, now: Instant) {
        for (id, member) in &mut self.members {
            if self.asked.len() >= MAX_SNAPSHOTS {
                return;
            }
            let Some(follower) = member.follower.as_mut().filter(|follower| follower.asks(now)) else { continue };
            follower.asked();
            let snapshots = &mut self.swarm.behaviour_mut().snapshots;
            let request = snapshots.send_request(&libp2p_peer_id(*id), SnapshotRequest);
            // A little longer than libp2p itself waits.
            self.asked.insert(request, Asked { peer: *id, until: now + SNAPSHOT + SNAPSHOT / 5 });
        }
    }
}

fn label(error: &WireError) -> &'static str {
    match error {
        WireError::Version(_) => "other_version",
        WireError::TooLong { .. } => "too_long",
        WireError::Malformed(_) | WireError::Io(_) => "malformed",
    }
}
