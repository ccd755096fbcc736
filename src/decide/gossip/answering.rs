//! What a neighbour asks is answered, from what is known here and can be proved.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::asking::MAX_OF;
use super::conduct::QUESTIONS;
use super::log::weight;
use super::roster::BUCKETS;
use super::{Notary, Protocol};
use crate::decide::inventory::Inventory;
use crate::model::{Bits, Item, PeerId, Question, Reply, Snapshot};

/// What the items of one snapshot may weigh, under the reply's limit of 8 MiB with room for the heads.
const MAX_REPLY: usize = 7 << 20;

/// What the introductions of one reply may take; the rest is asked for again.
const MAX_INTRODUCTIONS: usize = 1 << 20;

impl<N: Notary> Protocol<N> {
    /// A neighbour asks.
    pub fn asked(&mut self, from: PeerId, question: Question, table: &Inventory, now: Instant) -> Reply {
        let Some(member) = self.roster.get_mut(from) else { return Reply::Busy };
        if member.conduct.is_banned(now) || !member.conduct.questions.take(&QUESTIONS, now) {
            return Reply::Busy;
        }
        match question {
            Question::Compare(buckets) if buckets.len() == BUCKETS => {
                Reply::Marks(self.roster.differing(&buckets, self.own_mark().as_ref()))
            }
            // Of another release, with other buckets.
            Question::Compare(_) => Reply::Marks(self.roster.differing(&[], self.own_mark().as_ref())),
            Question::Introductions(peers) => self.introductions_of(&peers, now),
            Question::Entries { publisher, epoch, after } => Reply::Entries(self.recent.after(publisher, epoch, after)),
            Question::Snapshot(peers) => Reply::Snapshot(self.snapshot_of(&peers, table)),
            Question::Part => {
                member.links.part();
                Reply::Busy
            }
        }
    }

    fn introductions_of(&self, peers: &[PeerId], now: Instant) -> Reply {
        let (mut introductions, mut refutations) = (Vec::new(), Vec::new());
        let mut left = MAX_INTRODUCTIONS;
        for peer in peers.iter().take(MAX_OF) {
            let (introduction, refutation) = if *peer == self.own.peer {
                (self.introduction.clone(), (self.incarnation > 0).then(|| self.own_refutation()))
            } else {
                let Some(member) = self.member(*peer).filter(|member| member.is_vouched(now)) else { continue };
                (member.introduction.clone(), member.refutation.clone())
            };
            let Some(introduction) = introduction else { continue };
            // Its names and numbers take at most 500 bytes beside the credential.
            let Some(rest) = left.checked_sub(500 + introduction.credential.expose().len()) else { break };
            left = rest;
            introductions.push(introduction);
            refutations.extend(refutation);
        }
        Reply::Introductions(introductions, refutations)
    }

    /// What those hold of whom it is known and can be proved, as many of them as fit.
    fn snapshot_of(&self, peers: &[PeerId], table: &Inventory) -> Snapshot {
        let peers: BTreeSet<_> = peers.iter().take(MAX_OF).copied().collect();
        let own = self.log.head().filter(|_| peers.contains(&self.own.peer));
        let proved = |peer: &PeerId| self.member(*peer).and_then(|member| member.log.proof());
        let known: Vec<_> = peers.iter().filter_map(|peer| Some((*peer, proved(peer)?.clone()))).collect();
        // The own log first: it is short, and only we have it so soon.
        let mut of = known.len();
        loop {
            let publishers: Vec<_> = known[..of].iter().map(|(peer, _)| *peer).collect();
            let mut heads: Vec<_> = known[..of].iter().map(|(_, head)| head.clone()).collect();
            let mut items: BTreeMap<Item, Bits> = table.shared(&publishers).into_iter().collect();
            if let Some(own) = own {
                let number = heads.len();
                heads.push(own.clone());
                for item in self.log.items() {
                    items.entry(item.clone()).or_default().set(number);
                }
            }
            let bits = heads.len().div_ceil(8);
            if of == 0 || items.keys().map(|item| weight(item) + bits).sum::<usize>() <= MAX_REPLY {
                return Snapshot { heads, items: items.into_iter().collect() };
            }
            of /= 2;
        }
    }
}
