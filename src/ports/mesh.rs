//! The mesh as other parts of the agent see it.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;

use crate::model::{Credential, InventoryChange, MeshStatus, NodeName, Peer, PeerId, Zone};

/// Most members in a status: as many nodes as Kubernetes supports. At some 300 bytes each that is
/// 1.5 MiB, and 3 MiB with names of the longest kind.
pub const MAX_STATUS_MEMBERS: usize = 5000;

/// Returns the status of the mesh.
#[async_trait]
pub trait MeshSource: Send + Sync + 'static {
    /// Current status with at most [`MAX_STATUS_MEMBERS`] members, by node; `None` when the mesh
    /// does not answer within a second.
    async fn mesh(&self) -> Option<MeshStatus>;
}

/// Calls of the agent to the mesh. The results arrive as [`MembershipEvent`]s.
#[async_trait]
pub trait MeshCommands: Send + Sync + 'static {
    /// The peer was admitted for `life`. A repeated call may bring a new address.
    async fn admit(&self, peer: Peer, life: Duration);

    /// Closes this peer's connections, and accepts no connection until the peer is admitted again.
    async fn revoke_admission(&self, peer: PeerId);

    /// The peer's transfer port did not answer.
    async fn report_unreachable(&self, peer: PeerId);

    /// The peer is not silent, but was not admitted: another agent answered at the address, the
    /// handshake failed, or the dial was not queued.
    async fn report_rejection(&self, peer: PeerId);

    /// Announces changes of this node's content. A change without effect is not announced, so a
    /// repeated call does no harm.
    async fn announce(&self, changes: Vec<InventoryChange>);

    /// Sets the agent's introduction: credential, transfer and gossip addresses, and the zone if
    /// the cluster has zones. Before the first call the agent cannot join; each change of these
    /// values needs another call.
    async fn introduce(&self, credential: Credential, transfer: SocketAddr, gossip: SocketAddr, zone: Option<Zone>);
}

/// An event of the mesh for the agent. Inventories are no events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipEvent {
    /// The agent can fetch from this peer, from now on or at another address.
    Up(Peer),
    /// The agent cannot fetch from this peer any more.
    Down(PeerId),
    /// The agent should dial this peer, to admit the peer or to report the peer as unreachable.
    Handshake(Peer),
    /// The agent of this node uses the same key as this agent.
    SharedKey(NodeName),
}
