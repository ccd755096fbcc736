//! Upload slots: the order in which a node serves requests, and its choice of pieces. Bytes are
//! shared fairly between peers, and small blobs do not wait behind large ones.
//!
//! Not here: the sending.

mod send_counts;

use std::collections::{BTreeMap, HashMap};

use crate::model::PeerId;
use crate::oci::Digest;

pub use send_counts::SendCounts;

/// Waiting requests of one peer: those of sixteen recoveries, with the piece picker's four requests
/// in flight each.
const MAX_WAITING_OF_PEER: usize = 64;
/// Waiting requests of all peers; each is a stream and a task. One provider has room for a thousand
/// nodes.
const MAX_WAITING: usize = 1024;
/// Above this number of waiting requests, a peer may have one. A dozen peers with
/// [`MAX_WAITING_OF_PEER`] requests each leave room for 256 others.
const CROWDED: usize = MAX_WAITING * 3 / 4;

/// Bytes after which all earlier bytes count half, so "recent" means some seconds on most networks.
const HALF_LIFE: u64 = 256 << 20;

/// Identifies a request until its end.
pub type UploadTicket = u64;

/// The queue has no room; the peer gets the answer "busy".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the upload queue of this node is full")]
pub struct UploadQueueFull;

/// Requests that wait, and requests that are served.
#[derive(Debug)]
pub struct UploadSlots {
    per_blob: usize,
    per_node: usize,
    next_ticket: UploadTicket,
    requests: BTreeMap<UploadTicket, UploadRequest>,
    waiting: usize,
    running: usize,
    small_running: usize,
    running_by_blob: HashMap<Digest, usize>,
    accounts: HashMap<PeerId, PeerAccount>,
    bytes_until_decay: u64,
}

#[derive(Debug)]
struct UploadRequest {
    peer: PeerId,
    digest: Digest,
    is_small: bool,
    is_running: bool,
}

/// Recent bytes and current requests of a peer.
#[derive(Debug, Default)]
struct PeerAccount {
    bytes: u64,
    waiting: usize,
    running: usize,
}

impl UploadSlots {
    /// Limits of served requests per blob and per node, at least 1 each. Blobs of one piece do not
    /// count here and have a second `per_node` limit of their own.
    pub fn new(per_blob: usize, per_node: usize) -> Self {
        Self {
            per_blob: per_blob.max(1),
            per_node: per_node.max(1),
            next_ticket: 0,
            requests: BTreeMap::new(),
            waiting: 0,
            running: 0,
            small_running: 0,
            running_by_blob: HashMap::new(),
            accounts: HashMap::new(),
            bytes_until_decay: HALF_LIFE,
        }
    }

    /// Adds a peer's request for a blob of `pieces` pieces. [`UploadSlots::start_next`] starts the
    /// request.
    ///
    /// # Errors
    /// [`UploadQueueFull`] at the limit of waiting requests.
    pub fn enqueue(&mut self, peer: PeerId, digest: Digest, pieces: usize) -> Result<UploadTicket, UploadQueueFull> {
        let account = self.accounts.get(&peer).map_or(0, |account| account.waiting);
        let limit = if self.waiting < CROWDED { MAX_WAITING_OF_PEER } else { 1 };
        if self.waiting >= MAX_WAITING || account >= limit {
            return Err(UploadQueueFull);
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting += 1;
        self.accounts.entry(peer).or_default().waiting += 1;
        self.requests.insert(ticket, UploadRequest { peer, digest, is_small: pieces <= 1, is_running: false });
        Ok(ticket)
    }

    /// The next request to serve, if a waiting request has a free slot.
    pub fn start_next(&mut self) -> Option<UploadTicket> {
        if self.waiting == 0 || (self.running >= self.per_node && self.small_running >= self.per_node) {
            return None;
        }
        let waiting = self.requests.iter().filter(|(_, request)| !request.is_running && self.has_slot(request));
        let (&ticket, _) = waiting.min_by_key(|(ticket, request)| {
            let account = &self.accounts[&request.peer];
            (!request.is_small, account.running, account.bytes, **ticket)
        })?;
        let request = self.requests.get_mut(&ticket)?;
        request.is_running = true;
        self.waiting -= 1;
        let account = self.accounts.entry(request.peer).or_default();
        (account.waiting, account.running) = (account.waiting - 1, account.running + 1);
        if request.is_small {
            self.small_running += 1;
        } else {
            self.running += 1;
            *self.running_by_blob.entry(request.digest).or_default() += 1;
        }
        Some(ticket)
    }

    fn has_slot(&self, request: &UploadRequest) -> bool {
        let of_blob = || self.running_by_blob.get(&request.digest).copied().unwrap_or(0);
        if request.is_small {
            self.small_running < self.per_node
        } else {
            self.running < self.per_node && of_blob() < self.per_blob
        }
    }

    /// Records bytes sent for a request.
    pub fn record_sent(&mut self, ticket: UploadTicket, bytes: u64) {
        let Some(request) = self.requests.get(&ticket) else { return };
        let account = self.accounts.entry(request.peer).or_default();
        account.bytes = account.bytes.saturating_add(bytes);
        self.bytes_until_decay = self.bytes_until_decay.saturating_sub(bytes);
        if self.bytes_until_decay == 0 {
            self.bytes_until_decay = HALF_LIFE;
            self.accounts.values_mut().for_each(|account| account.bytes /= 2);
            self.accounts.retain(|_, account| account.bytes > 0 || account.waiting + account.running > 0);
        }
    }

    /// Removes a request, served or abandoned, and frees its slot.
    pub fn remove(&mut self, ticket: UploadTicket) {
        let Some(request) = self.requests.remove(&ticket) else { return };
        let account = self.accounts.entry(request.peer).or_default();
        if !request.is_running {
            account.waiting -= 1;
            self.waiting -= 1;
        } else {
            account.running -= 1;
            if request.is_small {
                self.small_running -= 1;
            } else {
                self.running -= 1;
                self.release_blob(request.digest);
            }
        }
        // A peer without recent bytes and requests needs no account.
        if is_account_empty(&self.accounts, request.peer) {
            self.accounts.remove(&request.peer);
        }
    }

    fn release_blob(&mut self, digest: Digest) {
        if let Some(running) = self.running_by_blob.get_mut(&digest) {
            *running -= 1;
            if *running == 0 {
                self.running_by_blob.remove(&digest);
            }
        }
    }
}

fn is_account_empty(peers: &HashMap<PeerId, PeerAccount>, peer: PeerId) -> bool {
    peers.get(&peer).is_some_and(|account| account.bytes == 0 && account.waiting + account.running == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_public_key([n; 32])
    }

    fn blob(n: u8) -> Digest {
        Digest::of(&[n])
    }

    #[test]
    fn requests_are_served_up_to_the_limits_of_a_blob_and_of_the_node() {
        let mut slots = UploadSlots::new(2, 3);
        let enqueue_three = |slots: &mut UploadSlots, n| {
            (0..3).map(|p| slots.enqueue(peer(p), blob(n), 9).unwrap()).collect::<Vec<_>>()
        };
        let (one, other) = (enqueue_three(&mut slots, 1), enqueue_three(&mut slots, 2));
        let served: Vec<_> = std::iter::from_fn(|| slots.start_next()).collect();
        // A peer that is being served waits for peers that are not.
        assert_eq!(served, [one[0], one[1], other[2]]);
        slots.remove(one[2]);
        slots.remove(one[0]);
        assert_eq!((slots.start_next(), slots.start_next()), (Some(other[0]), None));
        served.into_iter().chain(one).chain(other).for_each(|ticket| slots.remove(ticket));
        assert!(slots.accounts.is_empty() && slots.running_by_blob.is_empty() && slots.waiting + slots.running == 0);
    }

    #[test]
    fn the_peer_with_the_least_recent_bytes_is_served_first() {
        let mut slots = UploadSlots::new(1, 1);
        let mut got = [0_u64; 3];
        let mut tickets = HashMap::new();
        for n in [0, 0, 0, 0, 0, 0, 1, 1, 1, 2] {
            tickets.insert(slots.enqueue(peer(n), blob(1), 9).unwrap(), n);
        }
        // Peer 0 takes pieces three times as large.
        for _ in 0..6 {
            let ticket = slots.start_next().unwrap();
            let n = usize::from(tickets[&ticket]);
            let bytes = if n == 0 { 3 } else { 1 };
            got[n] += bytes;
            slots.record_sent(ticket, bytes);
            slots.remove(ticket);
        }
        assert_eq!(got, [6, 3, 1]);
        slots.record_sent(slots.next_ticket - 1, HALF_LIFE);
        let ticket = slots.enqueue(peer(1), blob(1), 9).unwrap();
        slots.record_sent(ticket, HALF_LIFE);
        assert_eq!(slots.accounts[&peer(0)].bytes, 3, "earlier bytes count half");
    }

    #[test]
    fn a_small_blob_never_waits_behind_large_ones() {
        let mut slots = UploadSlots::new(4, 4);
        (0..10).for_each(|n| assert!(slots.enqueue(peer(n), blob(n), 100).is_ok()));
        while slots.start_next().is_some() {}
        let small = slots.enqueue(peer(1), blob(99), 1).unwrap();
        assert_eq!(slots.start_next(), Some(small));
    }

    #[test]
    fn waiting_requests_are_bounded_for_a_peer_and_in_all() {
        let mut slots = UploadSlots::new(4, 16);
        let accepted = (0..100).filter(|_| slots.enqueue(peer(0), blob(0), 9).is_ok()).count();
        assert_eq!(accepted, 64);
        let greedy = (1..16).flat_map(|n| [n; 64]).filter(|n| slots.enqueue(peer(*n), blob(0), 9).is_ok());
        assert_eq!(greedy.count(), 768 - 64 + 4, "the last four peers have one request each");
        let late = (16..=255).filter(|n| slots.enqueue(peer(*n), blob(0), 9).is_ok());
        assert_eq!(late.count(), 240, "a peer without a waiting request gets a place");
        assert!(slots.enqueue(peer(255), blob(0), 9).is_err());
        while slots.waiting >= CROWDED {
            let ticket = slots.start_next().unwrap();
            slots.remove(ticket);
        }
        assert!(slots.enqueue(peer(255), blob(0), 9).is_ok());
    }
}
