//! A mesh in memory: every admitted peer is up until the peer is reported or revoked.

use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::model::{Credential, InventoryChange, MeshStatus, Peer, PeerId, Zone};
use crate::ports::{MembershipEvent, MeshCommands, MeshSource};

/// An introduction of this agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryIntroduction {
    /// The agent's credential.
    pub credential: Credential,
    /// Address of the blob server.
    pub transfer: SocketAddr,
    /// Address of gossip.
    pub gossip: SocketAddr,
    /// The node's zone.
    pub zone: Option<Zone>,
}

/// Records the calls of the agent, and sends the events that follow from the calls.
pub struct MemoryMesh {
    events: mpsc::Sender<MembershipEvent>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Admitted peers, and the life of each admission.
    members: BTreeMap<PeerId, Duration>,
    unreachable: Vec<PeerId>,
    rejected: Vec<PeerId>,
    introductions: Vec<MemoryIntroduction>,
    changes: Vec<InventoryChange>,
}

impl MemoryMesh {
    /// A mesh without members that sends its events here.
    pub fn new(events: mpsc::Sender<MembershipEvent>) -> Self {
        Self { events, state: Mutex::default() }
    }

    /// Admitted peers, and the life of each admission.
    pub fn members(&self) -> BTreeMap<PeerId, Duration> {
        self.lock().members.clone()
    }

    /// Peers that the agent reported as unreachable, in order.
    pub fn unreachable(&self) -> Vec<PeerId> {
        self.lock().unreachable.clone()
    }

    /// Peers that the agent reported as not admitted, in order.
    pub fn rejected(&self) -> Vec<PeerId> {
        self.lock().rejected.clone()
    }

    /// Introductions of this agent, in order.
    pub fn introductions(&self) -> Vec<MemoryIntroduction> {
        self.lock().introductions.clone()
    }

    /// Announced changes, in order.
    pub fn changes(&self) -> Vec<InventoryChange> {
        self.lock().changes.clone()
    }

    /// Sends an event that no call of the agent caused.
    pub async fn send(&self, event: MembershipEvent) {
        // A test may end the receiver first.
        let _ = self.events.send(event).await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

#[async_trait]
impl MeshCommands for MemoryMesh {
    async fn admit(&self, peer: Peer, life: Duration) {
        self.lock().members.insert(peer.id, life);
        self.send(MembershipEvent::Up(peer)).await;
    }

    async fn revoke_admission(&self, peer: PeerId) {
        self.lock().members.remove(&peer);
        self.send(MembershipEvent::Down(peer)).await;
    }

    async fn report_unreachable(&self, peer: PeerId) {
        self.lock().unreachable.push(peer);
    }

    async fn report_rejection(&self, peer: PeerId) {
        self.lock().rejected.push(peer);
    }

    async fn announce(&self, changes: Vec<InventoryChange>) {
        self.lock().changes.extend(changes);
    }

    async fn introduce(&self, credential: Credential, transfer: SocketAddr, gossip: SocketAddr, zone: Option<Zone>) {
        self.lock().introductions.push(MemoryIntroduction { credential, transfer, gossip, zone });
    }
}

#[async_trait]
impl MeshSource for MemoryMesh {
    async fn mesh(&self) -> Option<MeshStatus> {
        Some(MeshStatus { alive: self.lock().members.len(), ..MeshStatus::default() })
    }
}
