//! Requests for ranges: those of this agent, and those of the neighbors, which a [`RangeServer`]
//! answers beside the task.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use libp2p::request_response::{self, InboundRequestId, OutboundFailure, OutboundRequestId, ResponseChannel};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::{debug, error};

use super::MeshTask;
use crate::decide::gossip::GossipFault;
use crate::decide::transport_choice::{MAX_RANGES_OF_A_PEER, RANGE};
use crate::identity::{libp2p_peer_id, peer_id_of};
use crate::mesh::codec::wire_error;
use crate::mesh::ranges::{RangeError, RangeResponse, RangeServer};
use crate::mesh::stack::{MAX_SERVED_RANGES, RANGE_TIMEOUT};
use crate::model::PeerId;
use crate::util::clock;
use crate::wire::{self, Answer, Request, WireError};

/// The open requests.
#[derive(Default)]
pub(super) struct RangeRequests {
    server: Option<Arc<dyn RangeServer>>,
    serving: JoinSet<ReadyResponse>,
    /// Requests of neighbors until their responses are sent, at most [`MAX_SERVED_RANGES`].
    answering: HashMap<InboundRequestId, (PeerId, Instant)>,
    /// Requests of this agent, whose number the callers bound.
    pending: HashMap<OutboundRequestId, PendingRange>,
}

/// A request of this agent.
struct PendingRange {
    answer: oneshot::Sender<Result<RangeResponse, RangeError>>,
    deadline: Instant,
}

/// A response and its channel.
pub(super) struct ReadyResponse {
    channel: ResponseChannel<RangeResponse>,
    response: RangeResponse,
}

type RangeEvent = request_response::Event<Vec<u8>, RangeResponse>;

impl RangeRequests {
    /// The next response of the server; pending while no request is being served.
    pub(super) async fn next_response(&mut self) -> Option<ReadyResponse> {
        match self.serving.join_next().await {
            Some(Ok(served)) => Some(served),
            Some(Err(error)) => {
                // The response channel is gone, so libp2p reports the request as failed.
                error!(%error, "the task of a range request failed");
                None
            }
            None => std::future::pending().await,
        }
    }

    /// Ends requests that libp2p lost. libp2p reports nothing for a connection whose close hangs.
    pub(super) fn expire(&mut self, now: Instant) {
        let expired: Vec<_> =
            self.pending.iter().filter(|(_, range)| range.deadline <= now).map(|(id, _)| *id).collect();
        for id in expired {
            self.fail(id, RangeError::NoAnswer("the request timed out".into()));
        }
        self.answering.retain(|_, (_, since)| now.saturating_duration_since(*since) < 2 * RANGE_TIMEOUT);
    }

    /// A peer may request the next range before libp2p reports here that the last range was sent,
    /// so twice [`MAX_RANGES_OF_A_PEER`] may be open.
    fn has_room(&self, peer: PeerId) -> bool {
        let of_peer = self.answering.values().filter(|(owner, _)| *owner == peer).count();
        of_peer < 2 * MAX_RANGES_OF_A_PEER && self.answering.len() < MAX_SERVED_RANGES
    }

    fn fail(&mut self, id: OutboundRequestId, error: RangeError) {
        if let Some(PendingRange { answer, .. }) = self.pending.remove(&id) {
            // The send fails only when the caller is gone.
            let _ = answer.send(Err(error));
        }
    }
}

impl MeshTask {
    /// Answers requests for ranges by this server. Without a server the answer is
    /// [`Answer::Absent`].
    #[must_use]
    pub fn with_range_server(mut self, server: Arc<dyn RangeServer>) -> Self {
        self.ranges.server = Some(server);
        self
    }

    fn is_neighbor(&self, peer: PeerId) -> bool {
        self.links.values().any(|(_, owner)| *owner == peer)
    }

    pub(super) fn request_range(
        &mut self,
        peer: PeerId,
        request: &Request,
        answer: oneshot::Sender<Result<RangeResponse, RangeError>>,
    ) {
        // libp2p would dial a peer without a connection.
        let encoded = match wire::encode(request) {
            Ok(encoded) if self.is_neighbor(peer) => encoded,
            Ok(_) => return drop(answer.send(Err(RangeError::NotConnected))),
            Err(error) => return drop(answer.send(Err(RangeError::Malformed(error.to_string())))),
        };
        let id = self.swarm.behaviour_mut().ranges.send_request(&libp2p_peer_id(peer), encoded);
        // A little longer than libp2p's own timeout.
        let deadline = clock::now() + RANGE_TIMEOUT + RANGE_TIMEOUT / 5;
        self.ranges.pending.insert(id, PendingRange { answer, deadline });
    }

    pub(super) fn range_event(&mut self, event: RangeEvent, now: Instant) {
        use request_response::{Event, Message};
        match event {
            Event::Message { peer, message: Message::Request { request_id, request, channel }, .. } => {
                // A peer that was just denied may still have streams.
                if let Some(from) = peer_id_of(&peer).filter(|from| self.is_neighbor(*from)) {
                    self.serve_range(from, request_id, &request, channel, now);
                }
            }
            Event::Message { message: Message::Response { request_id, response }, .. } => {
                if let Some(PendingRange { answer, .. }) = self.ranges.pending.remove(&request_id) {
                    let _ = answer.send(Ok(response));
                }
            }
            Event::OutboundFailure { request_id, error, .. } => {
                // A stream that ends early was cut off, which is no fault of the peer.
                let is_malformed = |io| wire_error(io).is_some_and(|error| !matches!(error, WireError::Io(_)));
                let error = match &error {
                    OutboundFailure::Io(io) if is_malformed(io) => RangeError::Malformed(io.to_string()),
                    other => RangeError::NoAnswer(other.to_string()),
                };
                self.ranges.fail(request_id, error);
            }
            Event::InboundFailure { peer, request_id, error, .. } => {
                debug!(%peer, %error, "range not sent");
                self.ranges.answering.remove(&request_id);
            }
            Event::ResponseSent { request_id, .. } => drop(self.ranges.answering.remove(&request_id)),
        }
    }

    fn serve_range(
        &mut self,
        from: PeerId,
        id: InboundRequestId,
        request: &[u8],
        channel: ResponseChannel<RangeResponse>,
        now: Instant,
    ) {
        if !self.neighbors.try_take_range(from, now) {
            return self.report_fault(from, GossipFault::TooMany, now);
        }
        let request = match wire::decode::<Request>(request) {
            Ok(request) if is_range_request(&request) => request,
            Ok(_) => return self.report_fault(from, GossipFault::Malformed, now),
            Err(error) => {
                self.record_unreadable(from, &error, now);
                return;
            }
        };
        let Some(server) = self.ranges.server.clone() else {
            return self.send_range_response(ReadyResponse { channel, response: Answer::Absent.into() });
        };
        if !self.ranges.has_room(from) {
            return self.send_range_response(ReadyResponse { channel, response: Answer::Busy.into() });
        }
        self.ranges.answering.insert(id, (from, now));
        self.ranges.serving.spawn(async move {
            let range = server.serve(from, request).await;
            ReadyResponse { channel, response: range }
        });
    }

    pub(super) fn send_range_response(&mut self, ReadyResponse { channel, response: range }: ReadyResponse) {
        // The send fails only when the connection is gone.
        drop(self.swarm.behaviour_mut().ranges.send_response(channel, range));
    }
}

/// Whether neighbors may send this request over the mesh.
fn is_range_request(request: &Request) -> bool {
    match request {
        Request::Have(_) | Request::HashChain(_) => true,
        Request::Get { length, .. } => *length <= RANGE,
        Request::Pieces { .. } | Request::Follow(_) => false,
    }
}
