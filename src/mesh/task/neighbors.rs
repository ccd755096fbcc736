//! Rate limits and answers in progress, per neighbor.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::request_response::InboundRequestId;

use super::super::neighbor_rates::NeighborRateLimits;
use super::super::stack::{MAX_ANSWERING, MAX_SNAPSHOTS, MAX_TOTAL_SNAPSHOTS};
use crate::model::{PeerId, SyncRequest};
use crate::util::token_bucket::TokenBucket;

/// A peer that is or was connected.
#[derive(Default)]
struct Neighbor {
    messages: TokenBucket,
    bytes: TokenBucket,
    sync_requests: TokenBucket,
    ranges: TokenBucket,
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
        let neighbor = self.by_peer.entry(peer).or_default();
        neighbor.messages.try_take(1, self.limits.messages, now)
            && neighbor.bytes.try_take(bytes as u64, self.limits.bytes, now)
    }

    /// Whether the peer is within the limit with this sync request.
    pub(super) fn try_take_sync_request(&mut self, peer: PeerId, now: Instant) -> bool {
        self.by_peer.entry(peer).or_default().sync_requests.try_take(1, self.limits.sync_requests, now)
    }

    /// Whether the peer is within the limit with this request for a range.
    pub(super) fn try_take_range(&mut self, peer: PeerId, now: Instant) -> bool {
        self.by_peer.entry(peer).or_default().ranges.try_take(1, self.limits.ranges, now)
    }

    /// Records the answer as in progress, unless the peer has reached the limits of answers.
    pub(super) fn try_begin_answer(&mut self, peer: PeerId, id: InboundRequestId, request: &SyncRequest) -> bool {
        let is_snapshot = matches!(request, SyncRequest::Snapshot(_));
        let total_snapshots =
            self.by_peer.values().flat_map(|known| known.answering.values()).filter(|snapshot| **snapshot).count();
        if is_snapshot && total_snapshots >= MAX_TOTAL_SNAPSHOTS {
            return false;
        }
        let answering = &mut self.by_peer.entry(peer).or_default().answering;
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
        let limits = self.limits;
        self.by_peer.retain(|_, Neighbor { messages, bytes, sync_requests, ranges, answering }| {
            let is_idle = messages.is_full(limits.messages, now)
                && bytes.is_full(limits.bytes, now)
                && sync_requests.is_full(limits.sync_requests, now)
                && ranges.is_full(limits.ranges, now);
            !is_idle || !answering.is_empty()
        });
    }
}
