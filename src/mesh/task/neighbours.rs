//! What each neighbour has sent lately, and what it waits for.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::request_response::InboundRequestId;

use super::super::allowance::{Allowance, Limits};
use super::super::stack::{MAX_ANSWERING, MAX_SNAPSHOTS, MAX_SNAPSHOTS_OF_ALL};
use crate::model::{PeerId, Question};

/// One that is or was connected.
struct Neighbour {
    messages: Allowance,
    bytes: Allowance,
    questions: Allowance,
    ranges: Allowance,
    /// What is being answered, and whether that is a snapshot.
    answering: HashMap<InboundRequestId, bool>,
}

/// All of them. Kept until their allowances are full again, so that to connect again brings nothing; allowed peers only, so there
/// are not many.
pub(super) struct Neighbours {
    limits: Limits,
    known: HashMap<PeerId, Neighbour>,
}

impl Neighbours {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, known: HashMap::new() }
    }

    /// Whether it may send this message of gossip.
    pub(super) fn may_say(&mut self, peer: PeerId, bytes: usize, now: Instant) -> bool {
        let neighbour = self.entry(peer, now);
        neighbour.messages.take(1.0, now) && neighbour.bytes.take(bytes as f64, now)
    }

    /// Whether it may ask this question.
    pub(super) fn may_ask(&mut self, peer: PeerId, now: Instant) -> bool {
        self.entry(peer, now).questions.take(1.0, now)
    }

    /// Whether it may send this request for a range.
    pub(super) fn may_request(&mut self, peer: PeerId, now: Instant) -> bool {
        self.entry(peer, now).ranges.take(1.0, now)
    }

    /// Begins to answer it, unless as many of its questions are being answered as may be.
    pub(super) fn begin(&mut self, peer: PeerId, id: InboundRequestId, question: &Question, now: Instant) -> bool {
        let is_snapshot = matches!(question, Question::Snapshot(_));
        let all = self.known.values().flat_map(|known| known.answering.values()).filter(|is| **is).count();
        if is_snapshot && all >= MAX_SNAPSHOTS_OF_ALL {
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
    pub(super) fn end(&mut self, peer: PeerId, question: InboundRequestId) {
        if let Some(neighbour) = self.known.get_mut(&peer) {
            neighbour.answering.remove(&question);
        }
    }

    /// Forgets those that have sent little for a while.
    pub(super) fn forget_the_gone(&mut self, now: Instant) {
        self.known.retain(|_, Neighbour { messages, bytes, questions, ranges, answering }| {
            let rested = [messages, bytes, questions, ranges].into_iter().all(|allowance| allowance.is_full(now));
            !rested || !answering.is_empty()
        });
    }

    fn entry(&mut self, peer: PeerId, now: Instant) -> &mut Neighbour {
        let Limits { messages, bytes, questions, ranges } = self.limits;
        self.known.entry(peer).or_insert_with(|| Neighbour {
            messages: Allowance::new(messages, now),
            bytes: Allowance::new(bytes, now),
            questions: Allowance::new(questions, now),
            ranges: Allowance::new(ranges, now),
            answering: HashMap::new(),
        })
    }
}
