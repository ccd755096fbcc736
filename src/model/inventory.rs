//! What nodes hold, as they tell each other.

use serde::{Deserialize, Serialize};

use super::{Outage, OutageKind, Peer, PeerId};
use crate::oci::{Digest, Hasher, Repository};

/// Most items of one node's inventory that it announces or that others keep of it. A node of 110 pods with a dozen layers each has
/// 1500; this is room for forty times as many, and bounds what one peer can make us keep.
pub const MAX_ITEMS: usize = 65_536;

/// Most changes in one entry of a log: at 35 to 330 bytes each they stay under gossipsub's 64 KiB (a repository's
/// name is at most 255 bytes and a tag 128).
pub const MAX_CHANGES: usize = 128;

/// One thing that a node tells of itself. Announcements are hints: whoever fetches verifies.
///
/// The order of items is part of the protocol, because [`state_digest`] takes them in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum InventoryItem {
    /// A blob is wholly there.
    Blob(Digest),
    /// An image is known under this repository, by this tag when there is one.
    Image(Repository, Option<String>, Digest),
    /// The node itself saw that this registry cannot be reached.
    Outage(Outage),
    /// A blob is being fetched; what has come of it is served.
    Fetching(Digest),
}

impl InventoryItem {
    /// Feeds the canonical form, which publishers sign and relays check. Part of the protocol: it never changes.
    ///
    /// A byte for the kind (0 blob, 1 image, 2 outage, 3 fetching), then its fields in order. A digest is its 32 bytes, a tag a byte 0 when there is
    /// none, else 1 and the text. The kind of an outage is one byte, since when 8 bytes, big endian. No two items feed the same
    /// bytes, and none feeds the beginning of another's.
    pub fn write_canonical(&self, into: &mut impl FnMut(&[u8])) {
        match self {
            Self::Blob(digest) => {
                into(&[0]);
                into(digest.as_bytes());
            }
            Self::Image(repository, tag, digest) => {
                into(&[1]);
                write_text(&repository.registry, into);
                write_text(&repository.path, into);
                into(&[u8::from(tag.is_some())]);
                if let Some(tag) = tag {
                    write_text(tag, into);
                }
                into(digest.as_bytes());
            }
            Self::Outage(Outage { registry, kind, since }) => {
                into(&[2]);
                write_text(registry, into);
                into(&[outage_kind_byte(*kind)]);
                into(&since.to_be_bytes());
            }
            Self::Fetching(digest) => {
                into(&[3]);
                into(digest.as_bytes());
            }
        }
    }
}

/// The length in two bytes, big endian, and the text.
fn write_text(text: &str, into: &mut impl FnMut(&[u8])) {
    match u16::try_from(text.len()) {
        Ok(length) if length < u16::MAX => into(&length.to_be_bytes()),
        // No proper name is so long. Whoever sends one shall not have it taken for several others.
        _ => {
            into(&u16::MAX.to_be_bytes());
            into(&(text.len() as u64).to_be_bytes());
        }
    }
    into(text.as_bytes());
}

/// The byte that stands for a kind of outage.
fn outage_kind_byte(kind: OutageKind) -> u8 {
    match kind {
        OutageKind::NoSuchHost => 0,
        OutageKind::Refused => 1,
        OutageKind::TimedOut => 2,
        OutageKind::Tls => 3,
        OutageKind::ServerError => 4,
    }
}

/// The digest of what a node holds: of the items in their order, each once, however they are given.
///
/// It does not say whose or since when, nor that it is of a state: whoever signs it has to sign that as well.
pub fn state_digest<'a>(items: impl IntoIterator<Item = &'a InventoryItem>) -> Digest {
    let mut items: Vec<_> = items.into_iter().collect();
    // Linear where they are in order already.
    items.sort();
    items.dedup();
    let mut hasher = Hasher::default();
    items.into_iter().for_each(|item| item.write_canonical(&mut |bytes| hasher.update(bytes)));
    hasher.digest()
}

/// The digest of the changes of one announcement, in the order given: for each a byte 1 when it was added or 0 when it was removed, and
/// the item.
///
/// It does not say whose or which, nor that it is of changes: whoever signs it has to sign that as well.
pub fn changes_digest(changes: &[InventoryChange]) -> Digest {
    let mut hasher = Hasher::default();
    for change in changes {
        hasher.update(&[u8::from(matches!(change, InventoryChange::Added(_)))]);
        change.item().write_canonical(&mut |bytes| hasher.update(bytes));
    }
    hasher.digest()
}

/// One change of what a node tells.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum InventoryChange {
    /// It is so from now on.
    Added(InventoryItem),
    /// It is so no longer.
    Removed(InventoryItem),
}

impl InventoryChange {
    /// What came or went.
    pub fn item(&self) -> &InventoryItem {
        let (Self::Added(item) | Self::Removed(item)) = self;
        item
    }
}

/// What the mesh tells the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeshEvent {
    /// A peer is alive; its inventory follows, or counts again as it was.
    Up(Peer),
    /// A peer is gone: nothing it announced can be fetched now.
    Down(PeerId),
    /// Everything a peer holds; replaces what was known of it.
    Snapshot(PeerId, Vec<InventoryItem>),
    /// What changed at a peer since then.
    Changed(PeerId, Vec<InventoryChange>),
}

#[cfg(test)]
mod tests;
