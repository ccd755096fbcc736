//! Requests for ranges: those of this agent, and those of the neighbours, which a [`RangeServer`]
//! answers beside the task.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use libp2p::request_response::{self, InboundRequestId, OutboundFailure, OutboundRequestId, ResponseChannel};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::{debug, error};

use super::MeshTask;
use super::exchange::TOO_MANY;
use crate::decide::way::{MAX_RANGES_OF_A_PEER, RANGE};
use crate::identity::{libp2p_peer_id, peer_id_of};
use crate::mesh::codec::wire_error;
use crate::mesh::ranges::{Range, RangeError, RangeServer};
use crate::mesh::stack::{MAX_SERVED_RANGES, RANGE_TIME};
use crate::model::PeerId;
use crate::wire::{self, Answer, Request, WireError};

/// The open requests.
#[derive(Default)]
pub(super) struct Ranges {
    server: Option<Arc<dyn RangeServer>>,
    serving: JoinSet<Served>,
    /// Requests of neighbours until their responses are sent, at most [`MAX_SERVED_RANGES`].
    open: HashMap<InboundRequestId, (PeerId, Instant)>,
    /// Requests of this agent, whose number the callers bound.
    wanted: HashMap<OutboundRequestId, Wanted>,
}

/// A request of this agent.
struct Wanted {
    answer: oneshot::Sender<Result<Range, RangeError>>,
    until: Instant,
}

/// A range that was read, and the way back.
pub(super) struct Served {
    channel: ResponseChannel<Range>,
    range: Range,
}

/// An event of libp2p about ranges.
type RangeEvent = request_response::Event<Vec<u8>, Range>;

impl Ranges {
    /// The next range that was read; pending while none is being read.
    pub(super) async fn served(&mut self) -> Option<Served> {
        match self.serving.join_next().await {
            Some(Ok(served)) => Some(served),
            Some(Err(error)) => {
                // The response channel is gone, so libp2p reports the request as failed.
                error!(%error, "a range was not read");
                None
            }
            None => std::future::pending().await,
        }
    }

    /// Ends requests that libp2p lost. libp2p reports nothing of a connection whose closing hangs.
    pub(super) fn expire(&mut self, now: Instant) {
        let lost: Vec<_> = self.wanted.iter().filter(|(_, wanted)| wanted.until <= now).map(|(id, _)| *id).collect();
        for id in lost {
            self.fail(id, RangeError::NoAnswer("the time is over".into()));
        }
        self.open.retain(|_, (_, since)| now.saturating_duration_since(*since) < 2 * RANGE_TIME);
    }

    /// A peer may request the next range before libp2p reports here that the last one was sent, so
    /// twice [`MAX_RANGES_OF_A_PEER`] may be open.
    fn has_room(&self, peer: PeerId) -> bool {
        let of_peer = self.open.values().filter(|(owner, _)| *owner == peer).count();
        of_peer < 2 * MAX_RANGES_OF_A_PEER && self.open.len() < MAX_SERVED_RANGES
    }

    fn fail(&mut self, id: OutboundRequestId, error: RangeError) {
        if let Some(Wanted { answer, .. }) = self.wanted.remove(&id) {
            // Refused only when the caller is gone.
            let _ = answer.send(Err(error));
        }
    }
}

impl MeshTask {
    /// Answers requests for ranges by this server. Without one the answer is that no blob is here.
    #[must_use]
    pub fn serving(mut self, server: Arc<dyn RangeServer>) -> Self {
        self.ranges.server = Some(server);
        self
    }

    fn is_neighbour(&self, peer: PeerId) -> bool {
        self.links.values().any(|(_, owner)| *owner == peer)
    }

    pub(super) fn request_range(
        &mut self,
        peer: PeerId,
        request: &Request,
        answer: oneshot::Sender<Result<Range, RangeError>>,
    ) {
        // libp2p would dial a peer that is not connected.
        let encoded = match wire::encode(request) {
            Ok(encoded) if self.is_neighbour(peer) => encoded,
            Ok(_) => return drop(answer.send(Err(RangeError::NotConnected))),
            Err(error) => return drop(answer.send(Err(RangeError::Malformed(error.to_string())))),
        };
        let id = self.swarm.behaviour_mut().ranges.send_request(&libp2p_peer_id(peer), encoded);
        // A little longer than libp2p itself waits.
        let until = Instant::now() + RANGE_TIME + RANGE_TIME / 5;
        self.ranges.wanted.insert(id, Wanted { answer, until });
    }

    pub(super) fn range_event(&mut self, event: RangeEvent, now: Instant) {
        use request_response::{Event, Message};
        match event {
            Event::Message { peer, message: Message::Request { request_id, request, channel }, .. } => {
                // A peer that was denied just now may still have streams.
                if let Some(from) = peer_id_of(&peer).filter(|from| self.is_neighbour(*from)) {
                    self.serve_range(from, request_id, &request, channel, now);
                }
            }
            Event::Message { message: Message::Response { request_id, response }, .. } => {
                if let Some(Wanted { answer, .. }) = self.ranges.wanted.remove(&request_id) {
                    let _ = answer.send(Ok(response));
                }
            }
            Event::OutboundFailure { request_id, error, .. } => {
                // A stream that ends too early was cut off, which is no fault of the peer.
                let is_wrong = |io| wire_error(io).is_some_and(|error| !matches!(error, WireError::Io(_)));
                let error = match &error {
                    OutboundFailure::Io(io) if is_wrong(io) => RangeError::Malformed(io.to_string()),
                    other => RangeError::NoAnswer(other.to_string()),
                };
                self.ranges.fail(request_id, error);
            }
            Event::InboundFailure { peer, request_id, error, .. } => {
                debug!(%peer, %error, "range not sent");
                self.ranges.open.remove(&request_id);
            }
            Event::ResponseSent { request_id, .. } => drop(self.ranges.open.remove(&request_id)),
        }
    }

    fn serve_range(
        &mut self,
        from: PeerId,
        id: InboundRequestId,
        request: &[u8],
        channel: ResponseChannel<Range>,
        now: Instant,
    ) {
        if !self.neighbours.may_request(from, now) {
            return self.nonsense(from, TOO_MANY, now);
        }
        let request = match wire::decode::<Request>(request) {
            Ok(request) if is_served(&request) => request,
            Ok(_) => return self.nonsense(from, "malformed", now),
            Err(error) => {
                self.misread(from, &error, now);
                return;
            }
        };
        let Some(server) = self.ranges.server.clone() else {
            return self.respond(Served { channel, range: Answer::Absent.into() });
        };
        if !self.ranges.has_room(from) {
            return self.respond(Served { channel, range: Answer::Busy.into() });
        }
        self.ranges.open.insert(id, (from, now));
        self.ranges.serving.spawn(async move {
            let range = server.serve(from, request).await;
            Served { channel, range }
        });
    }

    pub(super) fn respond(&mut self, Served { channel, range }: Served) {
        // Refused only when the connection is gone.
        drop(self.swarm.behaviour_mut().ranges.send_response(channel, range));
    }
}

/// Whether neighbours may request this over the mesh.
fn is_served(request: &Request) -> bool {
    match request {
        Request::Have(_) | Request::Chain(_) => true,
        Request::Get { length, .. } => *length <= RANGE,
        Request::Pieces { .. } | Request::Follow(_) => false,
    }
}
