//! Who was admitted, where they are, and the connections that exist.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::Connection;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::GreetError;
use super::codes::{DONE, LEAVING, SUPERSEDED, close};
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
pub(super) struct Peers {
    table: Mutex<HashMap<PeerId, Entry>>,
    /// A stolen credential that vouches for key after key meets this bound. Locked within `table`.
    pods: Mutex<PodKeys>,
}

/// What a peer was admitted by.
#[derive(Clone)]
pub(super) struct Standing {
    /// As the peer showed it.
    pub(super) credential: Credential,
    /// When the verdict is over, since 1970.
    pub(super) until: Duration,
    /// The UID of the pod that the credential is bound to; `None` where it is bound to none.
    pub(super) pod: Option<String>,
}

struct Entry {
    peer: Peer,
    standing: Standing,
    inbound: VecDeque<Connection>,
    outbound: Arc<Outbound>,
}

/// The table is full.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_PEERS} peers are known already")]
pub(super) struct Full;

impl Peers {
    /// Remembers an admitted peer, or where it is now.
    pub(super) fn remember(&self, peer: &Peer, standing: Standing) -> Result<(), Full> {
        let mut table = lock(&self.table);
        if !table.contains_key(&peer.id) && table.len() >= MAX_PEERS {
            return Err(Full);
        }
        self.displace(&mut table, peer.id, &standing);
        if let Some(entry) = table.get_mut(&peer.id) {
            entry.peer = peer.clone();
            entry.stands(standing);
        } else {
            let entry = Entry { peer: peer.clone(), standing, inbound: VecDeque::new(), outbound: Arc::default() };
            table.insert(peer.id, entry);
        }
        Ok(())
    }

    /// Drops the key that no longer counts now that this one was shown.
    fn displace(&self, table: &mut HashMap<PeerId, Entry>, peer: PeerId, standing: &Standing) {
        let Some(pod) = standing.pod.as_deref() else { return };
        let mut pods = lock(&self.pods);
        let known = table.get(&peer).map(|entry| &entry.standing);
        let before = known.and_then(|known| known.pod.as_deref());
        if before != Some(pod) {
            // The entry keeps the credential that lasts longer, with its pod.
            if known.is_some_and(|known| known.until > standing.until) {
                return;
            }
            if let Some(before) = before {
                pods.forget(before, peer);
            }
        }
        if let Some(displaced) = pods.shown(pod, peer)
            && let Some(entry) = table.remove(&displaced)
        {
            tracing::debug!(peer = %displaced, pod, "two other keys of its pod were shown since; the peer is forgotten");
            entry.close(b"its pod has other keys");
        }
    }

    /// Remembers where a peer is that was not met.
    pub(super) fn know(&self, peer: &Peer) -> Result<(), Full> {
        self.remember(peer, Standing { credential: Credential::default(), until: Duration::ZERO, pod: None })
    }

    /// When the verdict about the peer is over, since 1970; zero where there is none.
    pub(super) fn admitted_until(&self, peer: PeerId) -> Duration {
        lock(&self.table).get(&peer).map(|entry| entry.standing.until).unwrap_or_default()
    }

    /// The peer has shown something again. What counts is what lasts longest, for all its connections.
    pub(super) fn stands(&self, peer: PeerId, standing: Standing) {
        let mut table = lock(&self.table);
        if table.contains_key(&peer) {
            self.displace(&mut table, peer, &standing);
        }
        if let Some(entry) = table.get_mut(&peer) {
            entry.stands(standing);
        }
    }

    /// The peers with connections to us whose verdict is over by more than clocks may differ.
    pub(super) fn overdue(&self, now: Duration) -> Vec<(PeerId, Standing)> {
        let table = lock(&self.table);
        let is_over = |entry: &&Entry| entry.standing.until.saturating_add(LEEWAY) < now && !entry.inbound.is_empty();
        table.values().filter(is_over).map(|entry| (entry.peer.id, entry.standing.clone())).collect()
    }

    /// Closes what the peer dialled.
    pub(super) fn end_inbound(&self, peer: PeerId) {
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
    pub(super) fn keep_inbound(&self, peer: PeerId, connection: &Connection) {
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
    pub(super) fn drop_inbound(&self, peer: PeerId, connection: &Connection) {
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
        let mut at = table.values().filter(|entry| entry.peer.transfer == address && entry.standing.until > now);
        at.find(|entry| entry.outbound.line().is_some()).map(|entry| entry.peer.clone())
    }

    pub(super) fn get(&self, peer: PeerId) -> Option<Peer> {
        lock(&self.table).get(&peer).map(|entry| entry.peer.clone())
    }

    pub(super) fn all(&self) -> Vec<Peer> {
        lock(&self.table).values().map(|entry| entry.peer.clone()).collect()
    }

    /// Drops the peer, its address and its connections.
    pub(super) fn forget(&self, peer: PeerId) {
        if let Some(entry) = lock(&self.table).remove(&peer) {
            if let Some(pod) = &entry.standing.pod {
                lock(&self.pods).forget(pod, peer);
            }
            entry.close(b"forgotten");
        }
    }

    /// Closes every connection.
    pub(super) fn leave(&self) {
        lock(&self.table).values().for_each(|entry| entry.close(LEAVING));
    }

    /// Closes our connections that nobody has used for a while.
    pub(super) fn sweep(&self, unused: Duration) {
        for entry in lock(&self.table).values() {
            entry.outbound.close_if_unused(unused);
        }
    }
}

impl Entry {
    fn stands(&mut self, standing: Standing) {
        if standing.until >= self.standing.until {
            let pod = standing.pod.or(self.standing.pod.take());
            self.standing = Standing { pod, ..standing };
        }
    }

    fn close(&self, reason: &[u8]) {
        self.outbound.close(reason);
        self.inbound.iter().for_each(|connection| close(connection, DONE, reason));
    }
}

/// A connection that we dialled. Whoever uses it holds a clone of the `Arc` around it, which is how it is known to be
/// in use.
pub(super) type Line = Arc<Connection>;

/// The one connection that we dial to a peer.
pub(super) struct Outbound {
    line: Mutex<Option<(Line, Instant)>>,
    /// Held while dialling, so that everybody else waits for the outcome; counts the dials that failed and keeps the
    /// last error.
    pub(super) dialling: tokio::sync::Mutex<()>,
    failed: Mutex<(u64, Option<GreetError>)>,
    /// One permit for each blob that comes at a time.
    pub(super) blobs: Semaphore,
}

impl Default for Outbound {
    fn default() -> Self {
        Self {
            line: Mutex::default(),
            dialling: tokio::sync::Mutex::default(),
            failed: Mutex::default(),
            blobs: Semaphore::new(BLOBS_PER_PEER),
        }
    }
}

impl Outbound {
    /// The live connection.
    pub(super) fn line(&self) -> Option<Line> {
        let mut slot = lock(&self.line);
        let (line, used) = slot.as_mut().filter(|(line, _)| line.close_reason().is_none())?;
        *used = Instant::now();
        Some(line.clone())
    }

    /// Takes a new connection, unless there is a live one: then that one is kept and the new one closed.
    pub(super) fn keep(&self, connection: Connection) -> Line {
        let mut slot = lock(&self.line);
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
        lock(&self.failed).0
    }

    /// Why the last dial failed, if one did since `seen` were counted: those who waited for it share its outcome
    /// instead of dialling one after the other.
    pub(super) fn failed_since(&self, seen: u64) -> Option<GreetError> {
        let failed = lock(&self.failed);
        failed.1.clone().filter(|_| failed.0 != seen)
    }

    pub(super) fn fail(&self, error: GreetError) {
        let mut failed = lock(&self.failed);
        *failed = (failed.0 + 1, Some(error));
    }

    /// Forgets the connection without closing it for those who use it.
    fn retire(&self) {
        let retired = lock(&self.line).take().filter(|(line, _)| Arc::strong_count(line) == 1);
        if let Some((line, _)) = retired {
            close(&line, DONE, b"another credential");
        }
    }

    fn close(&self, reason: &[u8]) {
        if let Some((line, _)) = lock(&self.line).take() {
            close(&line, DONE, reason);
        }
    }

    fn close_if_unused(&self, unused: Duration) {
        let mut slot = lock(&self.line);
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
