//! Rate limits and answers in progress, per neighbor.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::request_response::InboundRequestId;

use super::super::neighbor_budget::{NeighborBudget, NeighborRateLimits};
use super::super::stack::{MAX_ANSWERING, MAX_SNAPSHOTS, MAX_TOTAL_SNAPSHOTS};
use crate::model::{PeerId, SyncRequest};

/// A peer that is or was connected.
struct Neighbor {
    messages: NeighborBudget,
    bytes: NeighborBudget,
    sync_requests: NeighborBudget,
    ranges: NeighborBudget,
    /// The requests that are being answered; true for a snapshot.
    answering: HashMap<InboundRequestId, bool>,
}

/// All neighbors. An entry stays until its budgets are full again, so a reconnect resets no budget.
/// Only allowed peers have entries, so the number is small.
pub(super) struct Neighbors {
    limits: NeighborRateLimits,
    by_peer: HashMap<PeerId, Neighbor>,
}

impl Neighbors {
    pub(super) fn new(limits: NeighborRateLimits) -> Self {
        Self { limits, by_peer: HashMap::new() }
    }

    /// Whether the peer is within the limits with this gossip message.
    pub(super) fn try_take_message(&mut self, peer: PeerId, bytes: usize, now: Instant) -> bool {
        let neighbor = self.entry(peer, now);
        neighbor.messages.try_take(1.0, now) && neighbor.bytes.try_take(bytes as f64, now)
    }

    /// Whether the peer is within the limit with this sync request.
    pub(super) fn try_take_sync_request(&mut self, peer: PeerId, now: Instant) -> bool {
        self.entry(peer, now).sync_requests.try_take(1.0, now)
    }

    /// Whether the peer is within the limit with this request for a range.
    pub(super) fn try_take_range(&mut self, peer: PeerId, now: Instant) -> bool {
        self.entry(peer, now).ranges.try_take(1.0, now)
    }

    /// Records the answer as in progress, unless the peer has reached the limits of answers.
    pub(super) fn try_begin_answer(
        &mut self,
        peer: PeerId,
        id: InboundRequestId,
        request: &SyncRequest,
        now: Instant,
    ) -> bool {
        let is_snapshot = matches!(request, SyncRequest::Snapshot(_));
        let total_snapshots =
            self.by_peer.values().flat_map(|known| known.answering.values()).filter(|snapshot| **snapshot).count();
        if is_snapshot && total_snapshots >= MAX_TOTAL_SNAPSHOTS {
            return false;
        }
        let answering = &mut self.entry(peer, now).answering;
        let snapshots = answering.values().filter(|is_snapshot| **is_snapshot).count();
        let fits = answering.len() < MAX_ANSWERING && (!is_snapshot || snapshots < MAX_SNAPSHOTS);
        if fits {
            answering.insert(id, is_snapshot);
        }
        fits
    }

    /// The answer was sent, or has failed.
    pub(super) fn finish_answer(&mut self, peer: PeerId, id: InboundRequestId) {
        if let Some(neighbor) = self.by_peer.get_mut(&peer) {
            neighbor.answering.remove(&id);
        }
    }

    /// Removes peers with full budgets and no answers in progress.
    pub(super) fn evict_idle(&mut self, now: Instant) {
        self.by_peer.retain(|_, Neighbor { messages, bytes, sync_requests: questions, ranges, answering }| {
            let is_idle = [messages, bytes, questions, ranges].into_iter().all(|budget| budget.is_full(now));
            !is_idle || !answering.is_empty()
        });
    }

    fn entry(&mut self, peer: PeerId, now: Instant) -> &mut Neighbor {
        let NeighborRateLimits { messages, bytes, sync_requests: questions, ranges } = self.limits;
        self.by_peer.entry(peer).or_insert_with(|| Neighbor {
            messages: NeighborBudget::new(messages, now),
            bytes: NeighborBudget::new(bytes, now),
            sync_requests: NeighborBudget::new(questions, now),
            ranges: NeighborBudget::new(ranges, now),
            answering: HashMap::new(),
        })
    }
}
