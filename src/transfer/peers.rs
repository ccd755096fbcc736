//! The admitted peers, their addresses, and the open connections.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quinn::Connection;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::close_codes::{AGENT_STOPS, DONE, SUPERSEDED, close};
use super::tuning::BLOBS_PER_PEER;
use crate::decide::pod_keys::PodKeys;
use crate::model::{Credential, MAX_MEMBERS, Peer, PeerId};
use crate::ports::{DialError, LEEWAY};

/// Entries at most: twice the members of the mesh, because a node that lost its key returns as
/// another peer.
const MAX_PEERS: usize = 2 * MAX_MEMBERS;

/// Inbound connections of one peer. A peer keeps one connection; a second exists while the peer's
/// joiner dials us, and connections from before a restart last until their idle timeout.
const MAX_INBOUND: usize = 4;

#[derive(Default)]
pub(super) struct PeerTable {
    table: Mutex<HashMap<PeerId, PeerEntry>>,
    /// Bounds the keys that one stolen credential can admit. Locked within `table`.
    pods: Mutex<PodKeys>,
}

/// The verdict about a peer, and the credential behind the verdict.
#[derive(Clone)]
pub(super) struct PeerAdmission {
    /// As the peer sent the credential.
    pub(super) credential: Credential,
    /// Expiry of the verdict, since 1970.
    pub(super) valid_until: Duration,
    /// The UID of the pod that the credential is bound to; `None` where it is bound to none.
    pub(super) pod: Option<String>,
}

struct PeerEntry {
    peer: Peer,
    admission: PeerAdmission,
    inbound: VecDeque<Connection>,
    outbound: Arc<Outbound>,
}

#[derive(Debug, thiserror::Error)]
#[error("the peer table is full ({MAX_PEERS} peers)")]
pub(super) struct PeerTableFull;

impl PeerTable {
    /// Adds an admitted peer, or updates its address and verdict.
    pub(super) fn insert(&self, peer: &Peer, admission: PeerAdmission) -> Result<(), PeerTableFull> {
        let mut table = self.table.lock();
        if !table.contains_key(&peer.id) && table.len() >= MAX_PEERS {
            return Err(PeerTableFull);
        }
        self.evict_superseded_key(&mut table, peer.id, &admission);
        if let Some(entry) = table.get_mut(&peer.id) {
            entry.peer = peer.clone();
            entry.extend_admission(admission);
        } else {
            let entry = PeerEntry { peer: peer.clone(), admission, inbound: VecDeque::new(), outbound: Arc::default() };
            table.insert(peer.id, entry);
        }
        Ok(())
    }

    /// Drops the oldest key of the pod when this key is one too many for the pod.
    fn evict_superseded_key(&self, table: &mut HashMap<PeerId, PeerEntry>, peer: PeerId, admission: &PeerAdmission) {
        let Some(pod) = admission.pod.as_deref() else { return };
        let mut pods = self.pods.lock();
        let known = table.get(&peer).map(|entry| &entry.admission);
        let previous_pod = known.and_then(|known| known.pod.as_deref());
        if previous_pod != Some(pod) {
            // The entry keeps the credential that lasts longer, with its pod.
            if known.is_some_and(|known| known.valid_until > admission.valid_until) {
                return;
            }
            if let Some(previous_pod) = previous_pod {
                pods.remove(previous_pod, peer);
            }
        }
        if let Some(displaced) = pods.record(pod, peer)
            && let Some(entry) = table.remove(&displaced)
        {
            tracing::debug!(peer = %displaced, pod, "peer removed: two newer keys of its pod were presented");
            entry.close(b"its pod has other keys");
        }
    }

    /// Records the address of a peer that was not admitted yet.
    pub(super) fn insert_address(&self, peer: &Peer) -> Result<(), PeerTableFull> {
        self.insert(peer, PeerAdmission { credential: Credential::default(), valid_until: Duration::ZERO, pod: None })
    }

    /// Expiry of the verdict about the peer, since 1970; zero without a verdict.
    pub(super) fn admitted_until(&self, peer: PeerId) -> Duration {
        self.table.lock().get(&peer).map(|entry| entry.admission.valid_until).unwrap_or_default()
    }

    /// Records a new verdict. The verdict that lasts longest counts, for all connections of the
    /// peer.
    pub(super) fn record_admission(&self, peer: PeerId, admission: PeerAdmission) {
        let mut table = self.table.lock();
        if table.contains_key(&peer) {
            self.evict_superseded_key(&mut table, peer, &admission);
        }
        if let Some(entry) = table.get_mut(&peer) {
            entry.extend_admission(admission);
        }
    }

    /// Peers with inbound connections whose verdict expired longer ago than clocks may differ.
    pub(super) fn expired(&self, now: Duration) -> Vec<(PeerId, PeerAdmission)> {
        let table = self.table.lock();
        let is_expired =
            |entry: &&PeerEntry| entry.admission.valid_until.saturating_add(LEEWAY) < now && !entry.inbound.is_empty();
        table.values().filter(is_expired).map(|entry| (entry.peer.id, entry.admission.clone())).collect()
    }

    pub(super) fn close_inbound(&self, peer: PeerId) {
        if let Some(entry) = self.table.lock().get_mut(&peer) {
            for connection in entry.inbound.drain(..) {
                close(&connection, DONE, b"the credential has ended");
            }
        }
    }

    /// Retires our connections after a change of our credential: running transfers continue, and
    /// the next request dials with the new credential.
    pub(super) fn retire_outbound(&self) {
        for entry in self.table.lock().values() {
            entry.outbound.retire();
        }
    }

    /// Counts a connection that the peer dialed. Beyond [`MAX_INBOUND`] the oldest one is closed.
    pub(super) fn add_inbound(&self, peer: PeerId, connection: &Connection) {
        let mut table = self.table.lock();
        let Some(entry) = table.get_mut(&peer) else {
            // The peer was removed between its admission and now.
            return close(connection, DONE, b"forgotten");
        };
        entry.inbound.push_back(connection.clone());
        if entry.inbound.len() > MAX_INBOUND
            && let Some(oldest) = entry.inbound.pop_front()
        {
            close(&oldest, SUPERSEDED, b"too many connections");
        }
    }

    pub(super) fn remove_inbound(&self, peer: PeerId, connection: &Connection) {
        if let Some(entry) = self.table.lock().get_mut(&peer) {
            entry.inbound.retain(|other| other.stable_id() != connection.stable_id());
        }
    }

    /// The peer's address, and the state of our connection to the peer.
    pub(super) fn find(&self, peer: PeerId) -> Option<(SocketAddr, Arc<Outbound>)> {
        self.table.lock().get(&peer).map(|entry| (entry.peer.transfer, entry.outbound.clone()))
    }

    /// The peer to which we have a connection at this address, while the verdict about the peer
    /// lasts.
    pub(super) fn connected_at(&self, address: SocketAddr, now: Duration) -> Option<Peer> {
        let table = self.table.lock();
        let mut matching =
            table.values().filter(|entry| entry.peer.transfer == address && entry.admission.valid_until > now);
        matching.find(|entry| entry.outbound.connection().is_some()).map(|entry| entry.peer.clone())
    }

    pub(super) fn get(&self, peer: PeerId) -> Option<Peer> {
        self.table.lock().get(&peer).map(|entry| entry.peer.clone())
    }

    pub(super) fn all(&self) -> Vec<Peer> {
        self.table.lock().values().map(|entry| entry.peer.clone()).collect()
    }

    /// Drops the peer with its address, its connections and its place among the keys of the pod.
    pub(super) fn remove(&self, peer: PeerId) {
        if let Some(entry) = self.table.lock().remove(&peer) {
            if let Some(pod) = &entry.admission.pod {
                self.pods.lock().remove(pod, peer);
            }
            entry.close(b"forgotten");
        }
    }

    pub(super) fn close_all(&self) {
        self.table.lock().values().for_each(|entry| entry.close(AGENT_STOPS));
    }

    /// Closes our connections that were unused for this long.
    pub(super) fn close_unused(&self, unused: Duration) {
        for entry in self.table.lock().values() {
            entry.outbound.close_if_unused(unused);
        }
    }
}

impl PeerEntry {
    fn extend_admission(&mut self, admission: PeerAdmission) {
        if admission.valid_until >= self.admission.valid_until {
            let pod = admission.pod.or(self.admission.pod.take());
            self.admission = PeerAdmission { pod, ..admission };
        }
    }

    fn close(&self, reason: &[u8]) {
        self.outbound.close(reason);
        self.inbound.iter().for_each(|connection| close(connection, DONE, reason));
    }
}

/// A connection that we dialed. Each user holds a clone of the `Arc`, so the count of clones shows
/// whether the connection is in use.
pub(super) type SharedConnection = Arc<Connection>;

/// Our single connection to a peer.
pub(super) struct Outbound {
    connection: Mutex<Option<(SharedConnection, Instant)>>,
    /// Held during a dial, so that other callers wait for the outcome.
    pub(super) dial_lock: tokio::sync::Mutex<()>,
    /// The number of failed dials, and the last error.
    dial_failures: Mutex<(u64, Option<DialError>)>,
    /// One permit for each concurrent fetch.
    pub(super) fetch_permits: Semaphore,
}

impl Default for Outbound {
    fn default() -> Self {
        Self {
            connection: Mutex::default(),
            dial_lock: tokio::sync::Mutex::default(),
            dial_failures: Mutex::default(),
            fetch_permits: Semaphore::new(BLOBS_PER_PEER),
        }
    }
}

impl Outbound {
    /// The live connection, which then counts as used.
    pub(super) fn connection(&self) -> Option<SharedConnection> {
        let mut slot = self.connection.lock();
        let (connection, last_used) = slot.as_mut().filter(|(connection, _)| connection.close_reason().is_none())?;
        *last_used = Instant::now();
        Some(connection.clone())
    }

    /// Whether a connection is open, which then does not count as used.
    pub(super) fn has_connection(&self) -> bool {
        self.connection.lock().as_ref().is_some_and(|(connection, _)| connection.close_reason().is_none())
    }

    /// Stores a new connection. With a live connection in place, the new one is closed.
    pub(super) fn insert(&self, connection: Connection) -> SharedConnection {
        let mut slot = self.connection.lock();
        if let Some((existing, _)) = slot.as_ref().filter(|(existing, _)| existing.close_reason().is_none()) {
            close(&connection, DONE, b"there is another");
            return existing.clone();
        }
        let shared = Arc::new(connection);
        *slot = Some((shared.clone(), Instant::now()));
        shared
    }

    /// The number of failed dials.
    pub(super) fn failures(&self) -> u64 {
        self.dial_failures.lock().0
    }

    /// The error of the last dial, when a dial failed after `seen` were counted. Waiting callers
    /// share that outcome instead of dialing one after another.
    pub(super) fn failed_since(&self, failures_before: u64) -> Option<DialError> {
        let dial_failures = self.dial_failures.lock();
        dial_failures.1.clone().filter(|_| dial_failures.0 != failures_before)
    }

    pub(super) fn record_failure(&self, error: DialError) {
        let mut dial_failures = self.dial_failures.lock();
        *dial_failures = (dial_failures.0 + 1, Some(error));
    }

    /// Drops the connection, and closes an unused one. Running transfers keep their clones.
    fn retire(&self) {
        let retired = self.connection.lock().take().filter(|(connection, _)| Arc::strong_count(connection) == 1);
        if let Some((connection, _)) = retired {
            close(&connection, DONE, b"another credential");
        }
    }

    fn close(&self, reason: &[u8]) {
        if let Some((connection, _)) = self.connection.lock().take() {
            close(&connection, DONE, reason);
        }
    }

    fn close_if_unused(&self, unused: Duration) {
        let mut slot = self.connection.lock();
        let Some((connection, last_used)) = slot.as_mut() else { return };
        if Arc::strong_count(connection) > 1 {
            *last_used = Instant::now();
        } else if last_used.elapsed() >= unused || connection.close_reason().is_some() {
            close(connection, DONE, b"not used");
            *slot = None;
        }
    }
}
