//! What nodes hold, as they tell each other.

use serde::{Deserialize, Serialize};

use super::{Outage, Peer, PeerId};
use crate::oci::{Digest, Repository};

/// Most items of one node's inventory that it announces or that others keep of it. A node of 110 pods with a dozen layers each has
/// 1500; this is room for forty times as many, and bounds what one peer can make us keep.
pub const MAX_ITEMS: usize = 65_536;

/// One change of what a node holds. Announcements are hints: whoever fetches verifies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ContentChange {
    /// A blob is wholly there.
    BlobAdded(Digest),
    /// A blob is gone.
    BlobRemoved(Digest),
    /// An image is known under this repository, by this tag when there is one.
    Tagged(Repository, Option<String>, Digest),
    /// It is no longer.
    Untagged(Repository, Option<String>, Digest),
    /// The node itself saw that this registry cannot be reached.
    RegistryDown(Outage),
    /// It no longer says so.
    RegistryUp(Outage),
}

impl ContentChange {
    /// Whether it adds something rather than take it back.
    pub fn is_addition(&self) -> bool {
        matches!(self, Self::BlobAdded(_) | Self::Tagged(..) | Self::RegistryDown(_))
    }
}

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
