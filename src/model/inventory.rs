//! The inventories of nodes, as members announce them.

use serde::{Deserialize, Serialize};

use super::{Outage, OutageKind, Peer, PeerId};
use crate::oci::{Digest, Hasher, Repository};

/// Most items that a node announces, and that another agent keeps of one node. A node of 110 pods
/// with a dozen layers each has 1500 items. The limit has room for forty times as many, and bounds
/// the memory that one peer can take.
pub const MAX_ITEMS: usize = 65_536;

/// Most changes in one entry of a log. At 35 to 330 bytes each, an entry stays under gossipsub's 64
/// KiB: a repository's name has at most 255 bytes and a tag 128.
pub const MAX_CHANGES: usize = 128;

/// One fact that a node announces. Announcements are hints: the fetching agent verifies content.
///
/// The order of items is part of the protocol, because [`state_digest`] hashes items in this order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum InventoryItem {
    /// The node has the whole blob.
    Blob(Digest),
    /// The node has an image in this repository, with this tag if there is one.
    Image(Repository, Option<String>, Digest),
    /// The node itself could not reach this registry.
    Outage(Outage),
    /// The node downloads the blob and serves the pieces that arrived.
    Fetching(Digest),
}

impl InventoryItem {
    /// Writes the canonical form, which publishers sign and relays check. The form is part of the
    /// protocol and never changes.
    ///
    /// First comes a byte for the kind (0 blob, 1 image, 2 outage, 3 fetching), then the fields in
    /// order. A digest is 32 bytes. A tag is a byte 0 when there is none, else a byte 1 and the
    /// text. An outage's kind is one byte, and its start 8 bytes, big endian. No item's form equals
    /// or begins another item's form.
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

/// Writes the length in two bytes, big endian, and then the text.
fn write_text(text: &str, into: &mut impl FnMut(&[u8])) {
    match u16::try_from(text.len()) {
        Ok(length) if length < u16::MAX => into(&length.to_be_bytes()),
        // No valid name is so long. The longer length keeps an invalid name apart from several
        // short names.
        _ => {
            into(&u16::MAX.to_be_bytes());
            into(&(text.len() as u64).to_be_bytes());
        }
    }
    into(text.as_bytes());
}

/// Part of the canonical form, so the numbers never change.
fn outage_kind_byte(kind: OutageKind) -> u8 {
    match kind {
        OutageKind::NoSuchHost => 0,
        OutageKind::Refused => 1,
        OutageKind::TimedOut => 2,
        OutageKind::Tls => 3,
        OutageKind::ServerError => 4,
    }
}

/// The digest of a node's items: sorted, each once, whatever their given order.
///
/// The digest covers neither the node, nor the time, nor its own purpose. A signature over the
/// digest has to cover these as well.
pub fn state_digest<'a>(items: impl IntoIterator<Item = &'a InventoryItem>) -> Digest {
    let mut items: Vec<_> = items.into_iter().collect();
    // Linear when the items are sorted already.
    items.sort();
    items.dedup();
    let mut hasher = Hasher::default();
    items.into_iter().for_each(|item| item.write_canonical(&mut |bytes| hasher.update(bytes)));
    hasher.digest()
}

/// The digest of one entry's changes in the given order: for each change a byte (1 added, 0
/// removed), then the item.
///
/// The digest covers neither the publisher, nor the entry's number, nor its own purpose. A
/// signature over the digest has to cover these as well.
pub fn changes_digest(changes: &[InventoryChange]) -> Digest {
    let mut hasher = Hasher::default();
    for change in changes {
        hasher.update(&[u8::from(matches!(change, InventoryChange::Added(_)))]);
        change.item().write_canonical(&mut |bytes| hasher.update(bytes));
    }
    hasher.digest()
}

/// One change of a node's inventory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum InventoryChange {
    /// The node announces the item.
    Added(InventoryItem),
    /// The node withdraws the item.
    Removed(InventoryItem),
}

impl InventoryChange {
    /// The announced or withdrawn item.
    pub fn item(&self) -> &InventoryItem {
        let (Self::Added(item) | Self::Removed(item)) = self;
        item
    }
}

/// A change of a peer, as the mesh reports it to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeshEvent {
    /// The peer is alive. An inventory follows, or the earlier one counts again.
    Up(Peer),
    /// The peer is gone. None of its items can be fetched now.
    Down(PeerId),
    /// All items of a peer, which replace the earlier ones.
    Snapshot(PeerId, Vec<InventoryItem>),
    /// Changes of a peer's items.
    Changed(PeerId, Vec<InventoryChange>),
}

#[cfg(test)]
mod tests;
