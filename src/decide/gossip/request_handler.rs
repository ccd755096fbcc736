//! Answers the requests of neighbors, from the contents of this agent that can be proved.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::local_log::weight;
use super::membership_table::BUCKETS;
use super::peer_score::REQUEST_LIMIT;
use super::requests::MAX_MEMBERS_PER_REQUEST;
use super::{CredentialVerifier, Protocol};
use crate::decide::inventory::Inventory;
use crate::model::{Bits, InventoryItem, InventorySnapshot, PeerId, SyncReply, SyncRequest};

/// Most weight of the items in one snapshot. A reply has at most 8 MiB, and the heads need the
/// rest.
const MAX_SNAPSHOT_WEIGHT: usize = 7 << 20;

/// Most bytes of introductions in one reply. The neighbor requests the rest again.
const MAX_INTRODUCTIONS: usize = 1 << 20;

impl<N: CredentialVerifier> Protocol<N> {
    /// Answers a request of a neighbor.
    pub fn answer(&mut self, from: PeerId, request: SyncRequest, inventory: &Inventory, now: Instant) -> SyncReply {
        let Some(member) = self.membership.get_mut(from) else { return SyncReply::Busy };
        if member.score.is_banned(now) || !member.score.requests.try_take(1, REQUEST_LIMIT, now) {
            return SyncReply::Busy;
        }
        match request {
            SyncRequest::Compare(buckets) if buckets.len() == BUCKETS => {
                SyncReply::Summaries(self.membership.differing_summaries(&buckets, self.own_summary().as_ref()))
            }
            // A release with other buckets gets all summaries.
            SyncRequest::Compare(_) => {
                SyncReply::Summaries(self.membership.differing_summaries(&[], self.own_summary().as_ref()))
            }
            SyncRequest::Introductions(peers) => self.introductions_reply(&peers, now),
            SyncRequest::Entries { publisher, epoch, after } => {
                SyncReply::Entries(self.recent.after(publisher, epoch, after))
            }
            SyncRequest::Snapshot(peers) => SyncReply::Snapshot(self.snapshot_reply(&peers, inventory)),
            SyncRequest::Disconnect => {
                member.connections.mark_close_announced();
                SyncReply::Busy
            }
        }
    }

    fn introductions_reply(&self, peers: &[PeerId], now: Instant) -> SyncReply {
        let (mut introductions, mut refutations) = (Vec::new(), Vec::new());
        let mut left = MAX_INTRODUCTIONS;
        for peer in peers.iter().take(MAX_MEMBERS_PER_REQUEST) {
            let (introduction, refutation) = if *peer == self.local.peer {
                (self.introduction.clone(), (self.incarnation > 0).then(|| self.own_refutation()))
            } else {
                let Some(member) = self.member(*peer).filter(|member| member.has_valid_credential(now)) else {
                    continue;
                };
                (member.introduction.clone(), member.refutation.clone())
            };
            let Some(introduction) = introduction else { continue };
            // Names and numbers take at most 500 bytes beside the credential.
            let Some(rest) = left.checked_sub(500 + introduction.credential.expose().len()) else { break };
            left = rest;
            introductions.push(introduction);
            refutations.extend(refutation);
        }
        SyncReply::Introductions(introductions, refutations)
    }

    /// The items of the requested members whose logs can be proved, as many members as fit.
    fn snapshot_reply(&self, peers: &[PeerId], inventory: &Inventory) -> InventorySnapshot {
        let peers: BTreeSet<_> = peers.iter().take(MAX_MEMBERS_PER_REQUEST).copied().collect();
        let own = self.log.head().filter(|_| peers.contains(&self.local.peer));
        let head_of = |peer: &PeerId| self.member(*peer).and_then(|member| member.log.complete_head());
        let known: Vec<_> = peers.iter().filter_map(|peer| Some((*peer, head_of(peer)?.clone()))).collect();
        // Other logs are left out until the rest fits. A requested own log stays: it is short, and
        // no other agent has it so soon.
        let mut included = known.len();
        loop {
            let publishers: Vec<_> = known[..included].iter().map(|(peer, _)| *peer).collect();
            let mut heads: Vec<_> = known[..included].iter().map(|(_, head)| head.clone()).collect();
            let mut items: BTreeMap<InventoryItem, Bits> = inventory.shared_items(&publishers).into_iter().collect();
            if let Some(own) = own {
                let number = heads.len();
                heads.push(own.clone());
                for item in self.log.items() {
                    items.entry(item.clone()).or_default().set(number);
                }
            }
            let bits = heads.len().div_ceil(8);
            if included == 0 || items.keys().map(|item| weight(item) + bits).sum::<usize>() <= MAX_SNAPSHOT_WEIGHT {
                return InventorySnapshot { heads, items: items.into_iter().collect() };
            }
            included /= 2;
        }
    }
}
