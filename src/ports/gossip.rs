//! What the mesh tells the agent about its peers.

use crate::model::{ContentChange, Peer, PeerId};

/// What the mesh tells the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeshEvent {
    /// A peer is connected; its inventory follows.
    Up(Peer),
    /// A peer is gone: nothing it announced can be fetched now.
    Down(PeerId),
    /// Everything a peer holds; replaces what was known of it.
    Snapshot(PeerId, Vec<ContentChange>),
    /// What changed at a peer since then.
    Changed(PeerId, Vec<ContentChange>),
}
