//! Requests for missing content: what to request, from which neighbor, and when.

use std::collections::BTreeMap;
use std::time::Instant;

use rand::seq::{IteratorRandom, SliceRandom};

use super::follower::MissingEntries;
use super::{COMPARE_INTERVAL, CredentialVerifier, Output, Protocol};
use crate::model::{PeerId, SyncRequest};

/// Requests in flight, without comparisons.
const MAX_REQUESTS: usize = 4;

/// Snapshot requests among these, with replies of at most 8 MiB each.
const MAX_SNAPSHOTS: usize = 2;

/// Members in one request, for introductions of 1.5 KiB each or for snapshots.
pub(super) const MAX_MEMBERS_PER_REQUEST: usize = 256;

/// A request in flight.
#[derive(Debug, Clone)]
pub(super) struct PendingRequest {
    /// The neighbor that has to answer.
    pub(super) peer: PeerId,
    pub(super) request: SyncRequest,
}

impl<N: CredentialVerifier> Protocol<N> {
    /// Compares summaries with a random neighbor, every [`COMPARE_INTERVAL`].
    pub(super) fn compare_if_due(&mut self, now: Instant) {
        if self.compare_at > now {
            return;
        }
        self.compare_at = now + COMPARE_INTERVAL.mul_f64(0.8 + 0.2 * self.jitter());
        let neighbor = self.random_neighbor();
        if let Some(peer) = neighbor {
            self.compare_with(peer);
        }
    }

    pub(super) fn compare_with(&mut self, peer: PeerId) {
        let buckets = self.membership.buckets(self.own_summary().as_ref());
        self.send_request(peer, SyncRequest::Compare(buckets));
    }

    fn random_neighbor(&mut self) -> Option<PeerId> {
        self.membership.neighbors().map(|member| member.peer.id).choose(&mut self.rng)
    }

    pub(super) fn send_request(&mut self, peer: PeerId, request: SyncRequest) {
        self.last_request += 1;
        self.in_flight.insert(self.last_request, PendingRequest { peer, request: request.clone() });
        self.push_output(Output::Request(self.last_request, peer, request));
    }

    /// Requests missing content, with at most [`MAX_REQUESTS`] requests in flight.
    pub(super) fn request_missing(&mut self, now: Instant) {
        let is_counted =
            |pending: &PendingRequest| !matches!(pending.request, SyncRequest::Compare(_) | SyncRequest::Disconnect);
        while self.in_flight.values().filter(|pending| is_counted(pending)).count() < MAX_REQUESTS {
            if !self.send_introductions_request() && !self.send_log_request(now) {
                return;
            }
        }
    }

    /// Requests missing introductions from one neighbor. True when there were any.
    fn send_introductions_request(&mut self) -> bool {
        // One request per neighbor at a time, so a neighbor that never answers does not block the
        // others.
        let is_requested = |source: &PeerId| {
            let is_introductions_request = |pending: &PendingRequest| {
                pending.peer == *source && matches!(pending.request, SyncRequest::Introductions(_))
            };
            self.in_flight.values().any(is_introductions_request)
        };
        let introductions_in_flight =
            self.in_flight.values().filter(|pending| matches!(pending.request, SyncRequest::Introductions(_))).count();
        let source = self.missing_introductions.values().find(|source| !is_requested(source)).copied();
        let Some(source) = source.filter(|_| introductions_in_flight < MAX_REQUESTS / 2) else { return false };
        let of_source = self.missing_introductions.iter().filter(|(_, from)| **from == source).map(|(peer, _)| *peer);
        let peers: Vec<_> = of_source.take(MAX_MEMBERS_PER_REQUEST).collect();
        self.missing_introductions.retain(|peer, _| !peers.contains(peer));
        if self.is_neighbor(source) {
            self.send_request(source, SyncRequest::Introductions(peers));
        }
        true
    }

    fn is_neighbor(&self, peer: PeerId) -> bool {
        self.member(peer).is_some_and(|member| member.connections.is_answering())
    }

    /// Requests entries of one log, or snapshots of several logs.
    fn send_log_request(&mut self, now: Instant) -> bool {
        if self.behind.is_empty() {
            return false;
        }
        let is_snapshot = |pending: &&PendingRequest| matches!(pending.request, SyncRequest::Snapshot(_));
        let may_snapshot = self.in_flight.values().filter(is_snapshot).count() < MAX_SNAPSHOTS;
        let mut snapshots: BTreeMap<PeerId, Vec<PeerId>> = BTreeMap::new();
        let mut entries = None;
        let random_peer = self.random_neighbor();
        for publisher in &self.behind {
            let Some(member) = self.member(*publisher) else { continue };
            let Some((need, source)) = member.log.due_request(now) else { continue };
            // First the neighbor that announced the entries, then the publisher, then any neighbor.
            let known = source.filter(|source| self.is_neighbor(*source));
            let publisher_if_neighbor = || Some(*publisher).filter(|publisher| self.is_neighbor(*publisher));
            let Some(peer) = known.or_else(publisher_if_neighbor).or(random_peer) else { continue };
            match need {
                MissingEntries::Entries(after) => {
                    let epoch = member.epoch();
                    entries = Some((peer, *publisher, SyncRequest::Entries { publisher: *publisher, epoch, after }));
                    break;
                }
                MissingEntries::Snapshot if may_snapshot => snapshots.entry(peer).or_default().push(*publisher),
                MissingEntries::Snapshot => {}
            }
        }
        let largest = snapshots.into_iter().max_by_key(|(_, publishers)| publishers.len());
        let (peer, publishers, request) = match (entries, largest) {
            (Some((peer, publisher, request)), _) => (peer, vec![publisher], request),
            (None, Some((peer, mut publishers))) => {
                // A log that no neighbor can send may spoil a whole reply. The next request mixes
                // other logs, and fewer of them.
                let attempts = |peer: &PeerId| self.member(*peer).map_or(0, |member| member.log.attempts());
                let max_attempts = publishers.iter().map(attempts).max().unwrap_or(0);
                publishers.shuffle(&mut self.rng);
                publishers.truncate((MAX_MEMBERS_PER_REQUEST >> max_attempts.min(8)).max(1));
                (peer, publishers.clone(), SyncRequest::Snapshot(publishers))
            }
            (None, None) => return false,
        };
        for publisher in publishers {
            if let Some(member) = self.membership.get_mut(publisher) {
                member.log.mark_requested();
            }
        }
        self.send_request(peer, request);
        true
    }
}
