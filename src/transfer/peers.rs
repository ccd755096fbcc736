//! Who was admitted, where they are, and the connections that exist.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::Connection;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::DialError;
use super::close_codes::{AGENT_STOPS, DONE, SUPERSEDED, close};
use super::tuning::BLOBS_PER_PEER;
use crate::decide::pod_keys::PodKeys;
use crate::model::{Credential, MAX_MEMBERS, Peer, PeerId};
use crate::ports::LEEWAY;

/// Peers known at most: twice the members of the mesh, because a node that lost its key comes back as
/// another peer.
const MAX_PEERS: usize = 2 * MAX_MEMBERS;

/// Connections that one peer may have to us. It keeps one; a second appears while it greets us, and those that a
/// restart left behind last until their idle timeout.
const MAX_INBOUND: usize = 4;

/// The table of peers.
#[derive(Default)]
pub(super) struct PeerTable {
    table: Mutex<HashMap<PeerId, PeerEntry>>,
    /// A stolen credential that vouches for key after key meets this bound. Locked within `table`.
    pods: Mutex<PodKeys>,
}

/// What a peer was admitted by.
#[derive(Clone)]
pub(super) struct PeerAdmission {
    /// As the peer showed it.
    pub(super) credential: Credential,
    /// When the verdict is over, since 1970.
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

/// The table is full.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_PEERS} peers are known already")]
pub(super) struct PeerTableFull;

impl PeerTable {
    /// Remembers an admitted peer, or where it is now.
    pub(super) fn insert(&self, peer: &Peer, admission: PeerAdmission) -> Result<(), PeerTableFull> {
        let mut table = lock(&self.table);
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

    /// Drops the key that no longer counts now that this one was shown.
    fn evict_superseded_key(&self, table: &mut HashMap<PeerId, PeerEntry>, peer: PeerId, admission: &PeerAdmission) {
        let Some(pod) = admission.pod.as_deref() else { return };
        let mut pods = lock(&self.pods);
        let known = table.get(&peer).map(|entry| &entry.admission);
        let before = known.and_then(|known| known.pod.as_deref());
        if before != Some(pod) {
            // The entry keeps the credential that lasts longer, with its pod.
            if known.is_some_and(|known| known.valid_until > admission.valid_until) {
                return;
            }
            if let Some(before) = before {
                pods.remove(before, peer);
            }
        }
        if let Some(displaced) = pods.record(pod, peer)
            && let Some(entry) = table.remove(&displaced)
        {
            tracing::debug!(peer = %displaced, pod, "two other keys of its pod were shown since; the peer is forgotten");
            entry.close(b"its pod has other keys");
        }
    }

    /// Remembers where a peer is that was not met.
    pub(super) fn insert_address(&self, peer: &Peer) -> Result<(), PeerTableFull> {
        self.insert(peer, PeerAdmission { credential: Credential::default(), valid_until: Duration::ZERO, pod: None })
    }

    /// When the verdict about the peer is over, since 1970; zero where there is none.
    pub(super) fn admitted_until(&self, peer: PeerId) -> Duration {
        lock(&self.table).get(&peer).map(|entry| entry.admission.valid_until).unwrap_or_default()
    }

    /// The peer has shown something again. What counts is what lasts longest, for all its connections.
    pub(super) fn record_admission(&self, peer: PeerId, admission: PeerAdmission) {
        let mut table = lock(&self.table);
        if table.contains_key(&peer) {
            self.evict_superseded_key(&mut table, peer, &admission);
        }
        if let Some(entry) = table.get_mut(&peer) {
            entry.extend_admission(admission);
        }
    }

    /// The peers with connections to us whose verdict is over by more than clocks may differ.
    pub(super) fn expired(&self, now: Duration) -> Vec<(PeerId, PeerAdmission)> {
        let table = lock(&self.table);
        let is_over =
            |entry: &&PeerEntry| entry.admission.valid_until.saturating_add(LEEWAY) < now && !entry.inbound.is_empty();
        table.values().filter(is_over).map(|entry| (entry.peer.id, entry.admission.clone())).collect()
    }

    /// Closes what the peer dialled.
    pub(super) fn close_inbound(&self, peer: PeerId) {
        if let Some(entry) = lock(&self.table).get_mut(&peer) {
            for connection in entry.inbound.drain(..) {
                close(&connection, DONE, b"the credential has ended");
            }
        }
    }

    /// Another credential is to be shown from now on: what runs on the connections that we dialled goes on, what is new dials.
    pub(super) fn retire_outbound(&self) {
        for entry in lock(&self.table).values() {
            entry.outbound.retire();
        }
    }

    /// Counts a connection that the peer dialled; its oldest one makes room.
    pub(super) fn add_inbound(&self, peer: PeerId, connection: &Connection) {
        let mut table = lock(&self.table);
        let Some(entry) = table.get_mut(&peer) else {
            // Forgotten between its admission and now.
            return close(connection, DONE, b"forgotten");
        };
        entry.inbound.push_back(connection.clone());
        if entry.inbound.len() > MAX_INBOUND
            && let Some(oldest) = entry.inbound.pop_front()
        {
            close(&oldest, SUPERSEDED, b"too many connections");
        }
    }

    /// A connection that the peer dialled has ended.
    pub(super) fn remove_inbound(&self, peer: PeerId, connection: &Connection) {
        if let Some(entry) = lock(&self.table).get_mut(&peer) {
            entry.inbound.retain(|other| other.stable_id() != connection.stable_id());
        }
    }

    /// The address of a peer, and the slot for our connection to it.
    pub(super) fn find(&self, peer: PeerId) -> Option<(SocketAddr, Arc<Outbound>)> {
        lock(&self.table).get(&peer).map(|entry| (entry.peer.transfer, entry.outbound.clone()))
    }

    /// The peer to which we have a connection at this address, if the verdict about it lasts.
    pub(super) fn connected_at(&self, address: SocketAddr, now: Duration) -> Option<Peer> {
        let table = lock(&self.table);
        let mut at = table.values().filter(|entry| entry.peer.transfer == address && entry.admission.valid_until > now);
        at.find(|entry| entry.outbound.connection().is_some()).map(|entry| entry.peer.clone())
    }

    pub(super) fn get(&self, peer: PeerId) -> Option<Peer> {
        lock(&self.table).get(&peer).map(|entry| entry.peer.clone())
    }

    pub(super) fn all(&self) -> Vec<Peer> {
        lock(&self.table).values().map(|entry| entry.peer.clone()).collect()
    }

    /// Drops the peer, its address and its connections.
    pub(super) fn remove(&self, peer: PeerId) {
        if let Some(entry) = lock(&self.table).remove(&peer) {
            if let Some(pod) = &entry.admission.pod {
                lock(&self.pods).remove(pod, peer);
            }
            entry.close(b"forgotten");
        }
    }

    /// Closes every connection.
    pub(super) fn close_all(&self) {
        lock(&self.table).values().for_each(|entry| entry.close(AGENT_STOPS));
    }

    /// Closes our connections that nobody has used for a while.
    pub(super) fn close_unused(&self, unused: Duration) {
        for entry in lock(&self.table).values() {
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

/// A connection that we dialled. Whoever uses it holds a clone of the `Arc` around it, which is how it is known to be
/// in use.
pub(super) type SharedConnection = Arc<Connection>;

/// The one connection that we dial to a peer.
pub(super) struct Outbound {
    connection: Mutex<Option<(SharedConnection, Instant)>>,
    /// Held while dialling, so that everybody else waits for the outcome; counts the dials that failed and keeps the
    /// last error.
    pub(super) dial_lock: tokio::sync::Mutex<()>,
    dial_failures: Mutex<(u64, Option<DialError>)>,
    /// One permit for each blob that comes at a time.
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
    /// The live connection.
    pub(super) fn connection(&self) -> Option<SharedConnection> {
        let mut slot = lock(&self.connection);
        let (line, used) = slot.as_mut().filter(|(line, _)| line.close_reason().is_none())?;
        *used = Instant::now();
        Some(line.clone())
    }

    /// Takes a new connection, unless there is a live one: then that one is kept and the new one closed.
    pub(super) fn insert(&self, connection: Connection) -> SharedConnection {
        let mut slot = lock(&self.connection);
        if let Some((line, _)) = slot.as_ref().filter(|(line, _)| line.close_reason().is_none()) {
            close(&connection, DONE, b"there is another");
            return line.clone();
        }
        let line = Arc::new(connection);
        *slot = Some((line.clone(), Instant::now()));
        line
    }

    /// How many dials have failed.
    pub(super) fn failures(&self) -> u64 {
        lock(&self.dial_failures).0
    }

    /// Why the last dial failed, if one did since `seen` were counted: those who waited for it share its outcome
    /// instead of dialling one after the other.
    pub(super) fn failed_since(&self, seen: u64) -> Option<DialError> {
        let failed = lock(&self.dial_failures);
        failed.1.clone().filter(|_| failed.0 != seen)
    }

    pub(super) fn record_failure(&self, error: DialError) {
        let mut failed = lock(&self.dial_failures);
        *failed = (failed.0 + 1, Some(error));
    }

    /// Forgets the connection without closing it for those who use it.
    fn retire(&self) {
        let retired = lock(&self.connection).take().filter(|(line, _)| Arc::strong_count(line) == 1);
        if let Some((line, _)) = retired {
            close(&line, DONE, b"another credential");
        }
    }

    fn close(&self, reason: &[u8]) {
        if let Some((line, _)) = lock(&self.connection).take() {
            close(&line, DONE, reason);
        }
    }

    fn close_if_unused(&self, unused: Duration) {
        let mut slot = lock(&self.connection);
        let Some((line, used)) = slot.as_mut() else { return };
        if Arc::strong_count(line) > 1 {
            *used = Instant::now();
        } else if used.elapsed() >= unused || line.close_reason().is_some() {
            close(line, DONE, b"not used");
            *slot = None;
        }
    }
}

/// Nothing that runs under these locks panics half-way through a change, so a poisoned one is as good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
