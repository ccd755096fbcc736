//! What is missing here, whom to ask for it, and when.

use std::collections::BTreeMap;
use std::time::Instant;

use rand::seq::{IteratorRandom, SliceRandom};

use super::follower::Need;
use super::{COMPARE, Notary, Output, Protocol};
use crate::model::{PeerId, Question};

/// Questions under way, comparisons not counted.
const MAX_ASKED: usize = 4;

/// Of these, snapshots: of 8 MiB at most each.
const MAX_SNAPSHOTS: usize = 2;

/// Members in one question, for introductions of 1.5 KiB and for snapshots.
pub(super) const MAX_OF: usize = 256;

/// A question that is under way.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    /// Whom.
    pub(super) of: PeerId,
    pub(super) question: Question,
}

impl<N: Notary> Protocol<N> {
    /// Compares marks with a random neighbour, now and then.
    pub(super) fn compare_sometimes(&mut self, now: Instant) {
        if self.compare_at > now {
            return;
        }
        self.compare_at = now + COMPARE.mul_f64(0.8 + 0.2 * self.jitter());
        let neighbour = self.a_neighbour();
        if let Some(peer) = neighbour {
            self.compare_with(peer);
        }
    }

    pub(super) fn compare_with(&mut self, peer: PeerId) {
        let buckets = self.roster.buckets(self.own_mark().as_ref());
        self.question(peer, Question::Compare(buckets));
    }

    fn a_neighbour(&mut self) -> Option<PeerId> {
        self.roster.neighbours().map(|member| member.peer.id).choose(&mut self.rng)
    }

    pub(super) fn question(&mut self, peer: PeerId, question: Question) {
        self.asks += 1;
        self.asked.insert(self.asks, Asked { of: peer, question: question.clone() });
        self.output(Output::Ask(self.asks, peer, question));
    }

    /// Asks for what is missing, as much at a time as may be.
    pub(super) fn ask(&mut self, now: Instant) {
        let under_way = |asked: &Asked| !matches!(asked.question, Question::Compare(_) | Question::Part);
        while self.asked.values().filter(|asked| under_way(asked)).count() < MAX_ASKED {
            if !self.ask_who() && !self.ask_what(now) {
                return;
            }
        }
    }

    /// Asks one neighbour for the introductions that it has and we have not.
    fn ask_who(&mut self) -> bool {
        // One question to each at a time: who never answers keeps nobody else from being asked.
        let is_asked = |source: &PeerId| {
            let who = |asked: &Asked| asked.of == *source && matches!(asked.question, Question::Introductions(_));
            self.asked.values().any(who)
        };
        let who = self.asked.values().filter(|asked| matches!(asked.question, Question::Introductions(_))).count();
        let source = self.unknown.values().find(|source| !is_asked(source)).copied();
        let Some(source) = source.filter(|_| who < MAX_ASKED / 2) else { return false };
        let of_source = self.unknown.iter().filter(|(_, from)| **from == source).map(|(peer, _)| *peer);
        let peers: Vec<_> = of_source.take(MAX_OF).collect();
        self.unknown.retain(|peer, _| !peers.contains(peer));
        if self.is_neighbour(source) {
            self.question(source, Question::Introductions(peers));
        }
        true
    }

    fn is_neighbour(&self, peer: PeerId) -> bool {
        self.member(peer).is_some_and(|member| member.links.proved())
    }

    /// Asks for entries of one log, or for snapshots of several.
    fn ask_what(&mut self, now: Instant) -> bool {
        if self.behind.is_empty() {
            return false;
        }
        let is_snapshot = |asked: &&Asked| matches!(asked.question, Question::Snapshot(_));
        let may_snapshot = self.asked.values().filter(is_snapshot).count() < MAX_SNAPSHOTS;
        let mut snapshots: BTreeMap<PeerId, Vec<PeerId>> = BTreeMap::new();
        let mut entries = None;
        let any = self.a_neighbour();
        for publisher in &self.behind {
            let Some(member) = self.member(*publisher) else { continue };
            let Some((need, source)) = member.log.need(now) else { continue };
            // Who spoke of it, or the publisher itself, or anybody.
            let known = source.filter(|source| self.is_neighbour(*source));
            let itself = || Some(*publisher).filter(|publisher| self.is_neighbour(*publisher));
            let Some(peer) = known.or_else(itself).or(any) else { continue };
            match need {
                Need::Entries(after) => {
                    let epoch = member.epoch();
                    entries = Some((peer, *publisher, Question::Entries { publisher: *publisher, epoch, after }));
                    break;
                }
                Need::Snapshot if may_snapshot => snapshots.entry(peer).or_default().push(*publisher),
                Need::Snapshot => {}
            }
        }
        let most = snapshots.into_iter().max_by_key(|(_, publishers)| publishers.len());
        let (peer, publishers, question) = match (entries, most) {
            (Some((peer, publisher, question)), _) => (peer, vec![publisher], question),
            (None, Some((peer, mut publishers))) => {
                // One whose part cannot be had may spoil a whole answer: the next time with others, and with fewer.
                let attempts = |peer: &PeerId| self.member(*peer).map_or(0, |member| member.log.attempts());
                let most = publishers.iter().map(attempts).max().unwrap_or(0);
                publishers.shuffle(&mut self.rng);
                publishers.truncate((MAX_OF >> most.min(8)).max(1));
                (peer, publishers.clone(), Question::Snapshot(publishers))
            }
            (None, None) => return false,
        };
        for publisher in publishers {
            if let Some(member) = self.roster.get_mut(publisher) {
                member.log.ask();
            }
        }
        self.question(peer, question);
        true
    }
}
