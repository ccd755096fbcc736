//! Who holds what, as recoveries ask for it. The mesh keeps the table; this only reads it.

use std::collections::BTreeMap;

use tokio::sync::watch;

use crate::agent::peers::udp_state::UdpState;
use crate::mesh::SharedInventory;
use crate::model::{MeshEvent, NodeName, Outage, Peer, PeerId, Zone};
use crate::oci::{Digest, Repository};

/// A peer that has all of a blob, or some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobProvider {
    /// Who.
    pub peer: PeerId,
    /// Where it is.
    pub zone: Option<Zone>,
    /// It has all of it.
    pub whole: bool,
}

/// A handle to the table.
#[derive(Clone, Default)]
pub struct PeerInventory {
    inventory: SharedInventory,
    udp: UdpState,
}

impl PeerInventory {
    /// Reads this table.
    pub fn new(table: SharedInventory) -> Self {
        Self { inventory: table, udp: UdpState::default() }
    }

    /// Whether any of them can be fetched from: a firewall may block UDP.
    pub fn udp(&self) -> &UdpState {
        &self.udp
    }

    /// Takes in one event, in the mesh's place: where there is no mesh.
    pub fn apply(&self, event: MeshEvent) {
        self.inventory.apply(event);
    }

    /// Moves whenever the table changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inventory.changes()
    }

    /// Peers that hold the blob.
    pub fn blob_providers(&self, digest: Digest) -> Vec<PeerId> {
        self.inventory.read(|table| table.blob_providers(digest))
    }

    /// How many peers hold the blob.
    pub fn count_blob_providers(&self, digest: Digest) -> usize {
        self.inventory.read(|table| table.count_blob_providers(digest))
    }

    /// Everybody who holds the blob or is fetching it.
    pub fn all_providers(&self, digest: Digest) -> Vec<BlobProvider> {
        self.inventory.read(|table| {
            let source = |whole| move |peer| BlobProvider { peer, zone: table.zone_of(peer).cloned(), whole };
            let holders = table.blob_providers(digest);
            let fetching = table.partial_providers(digest).into_iter().filter(|peer| !holders.contains(peer));
            let fetching: Vec<_> = fetching.map(source(false)).collect();
            holders.into_iter().map(source(true)).chain(fetching).collect()
        })
    }

    /// Where a peer is.
    pub fn zone_of(&self, peer: PeerId) -> Option<Zone> {
        self.inventory.read(|table| table.zone_of(peer).cloned())
    }

    /// Who runs on a node.
    pub fn peer_on_node(&self, node: &NodeName) -> Option<PeerId> {
        self.inventory.read(|table| table.peers().into_iter().find(|peer| peer.node == *node).map(|peer| peer.id))
    }

    /// Whether the peer is fetching the blob, and does not hold it.
    pub fn is_partial_provider(&self, peer: PeerId, digest: Digest) -> bool {
        self.inventory.read(|table| {
            table.partial_providers(digest).contains(&peer) && !table.blob_providers(digest).contains(&peer)
        })
    }

    /// Peers that hold the image's root and know it under this repository. A digest alone is not a permission.
    pub fn image_providers(&self, repository: &Repository, root: Digest) -> Vec<PeerId> {
        self.inventory.read(|table| table.image_providers(repository, root))
    }

    /// What a tag means, according to each peer that knows it.
    pub fn tag_digests(&self, repository: &Repository, tag: &str) -> BTreeMap<Digest, Vec<PeerId>> {
        self.inventory.read(|table| table.tag(repository, tag))
    }

    /// What peers say about a registry that they cannot reach.
    pub fn registry_outages(&self, registry: &str) -> Vec<(Outage, Vec<PeerId>)> {
        self.inventory
            .read(|table| table.outages(registry).into_iter().map(|(outage, peers)| (outage.clone(), peers)).collect())
    }

    /// What peers say about registries that they cannot reach, and who says it; the first so many, by registry.
    pub fn outages(&self, most: usize) -> Vec<(Outage, Vec<PeerId>)> {
        self.inventory
            .read(|table| table.all_outages().take(most).map(|(outage, peers)| (outage.clone(), peers)).collect())
    }

    /// The peers that are up.
    pub fn peers(&self) -> Vec<Peer> {
        self.inventory.read(|table| table.peers().into_iter().cloned().collect())
    }

    /// How many peers are up.
    pub fn peer_count(&self) -> usize {
        self.inventory.read(|table| table.peers().len())
    }

    /// The node's name, for people; the PeerId where it is not known any more.
    pub fn node_of(&self, peer: PeerId) -> String {
        self.inventory.read(|table| table.node_of(peer).map_or_else(|| peer.to_string(), NodeName::to_string))
    }
}
