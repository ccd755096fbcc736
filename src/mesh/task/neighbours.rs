//! What each neighbour has sent lately, and what it waits for.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::request_response::InboundRequestId;

use super::super::neighbour_budget::{NeighbourBudget, NeighbourRateLimits};
use super::super::stack::{MAX_ANSWERING, MAX_SNAPSHOTS, MAX_SNAPSHOTS_IN_ALL};
use crate::model::{PeerId, SyncRequest};

/// One that is or was connected.
struct Neighbour {
    messages: NeighbourBudget,
    bytes: NeighbourBudget,
    questions: NeighbourBudget,
    ranges: NeighbourBudget,
    /// What is being answered, and whether that is a snapshot.
    answering: HashMap<InboundRequestId, bool>,
}

/// All of them. Kept until their allowances are full again, so that to connect again brings nothing; allowed peers only, so there
/// are not many.
pub(super) struct Neighbours {
    limits: NeighbourRateLimits,
    by_peer: HashMap<PeerId, Neighbour>,
}

impl Neighbours {
    pub(super) fn new(limits: NeighbourRateLimits) -> Self {
        Self { limits, by_peer: HashMap::new() }
    }

    /// Whether it may send this message of gossip.
    pub(super) fn try_take_message(&mut self, peer: PeerId, bytes: usize, now: Instant) -> bool {
        let neighbour = self.entry(peer, now);
        neighbour.messages.try_take(1.0, now) && neighbour.bytes.try_take(bytes as f64, now)
    }

    /// Whether it may ask this question.
    pub(super) fn try_take_question(&mut self, peer: PeerId, now: Instant) -> bool {
        self.entry(peer, now).questions.try_take(1.0, now)
    }

    /// Whether it may send this request for a range.
    pub(super) fn try_take_range(&mut self, peer: PeerId, now: Instant) -> bool {
        self.entry(peer, now).ranges.try_take(1.0, now)
    }

    /// Begins to answer it, unless as many of its questions are being answered as may be.
    pub(super) fn try_begin_answer(
        &mut self,
        peer: PeerId,
        id: InboundRequestId,
        question: &SyncRequest,
        now: Instant,
    ) -> bool {
        let is_snapshot = matches!(question, SyncRequest::Snapshot(_));
        let all = self.by_peer.values().flat_map(|known| known.answering.values()).filter(|is| **is).count();
        if is_snapshot && all >= MAX_SNAPSHOTS_IN_ALL {
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

    /// The answer is given, or cannot be.
    pub(super) fn finish_answer(&mut self, peer: PeerId, question: InboundRequestId) {
        if let Some(neighbour) = self.by_peer.get_mut(&peer) {
            neighbour.answering.remove(&question);
        }
    }

    /// Forgets those that have sent little for a while.
    pub(super) fn evict_idle(&mut self, now: Instant) {
        self.by_peer.retain(|_, Neighbour { messages, bytes, questions, ranges, answering }| {
            let rested = [messages, bytes, questions, ranges].into_iter().all(|budget| budget.is_full(now));
            !rested || !answering.is_empty()
        });
    }

    fn entry(&mut self, peer: PeerId, now: Instant) -> &mut Neighbour {
        let NeighbourRateLimits { messages, bytes, questions, ranges } = self.limits;
        self.by_peer.entry(peer).or_insert_with(|| Neighbour {
            messages: NeighbourBudget::new(messages, now),
            bytes: NeighbourBudget::new(bytes, now),
            questions: NeighbourBudget::new(questions, now),
            ranges: NeighbourBudget::new(ranges, now),
            answering: HashMap::new(),
        })
    }
}
