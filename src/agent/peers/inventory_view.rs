//! Providers, tags and outages that peers announce, as recoveries read them. The mesh writes the
//! inventory.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::watch;

use crate::agent::peers::udp_state::UdpState;
use crate::mesh::SharedInventory;
use crate::model::{MeshEvent, NodeName, Outage, Peer, PeerId, Zone};
use crate::oci::{Digest, Repository};

/// A provider or partial provider of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobProvider {
    /// The peer to request from.
    pub peer: PeerId,
    /// The peer's zone, if known.
    pub zone: Option<Zone>,
    /// Whether the peer has the whole blob.
    pub whole: bool,
}

/// The inventory and the state of UDP. Clones share both.
#[derive(Clone, Default)]
pub struct PeerInventory {
    inventory: SharedInventory,
    udp: UdpState,
}

impl PeerInventory {
    /// Reads this inventory.
    pub fn new(inventory: SharedInventory) -> Self {
        Self { inventory, udp: UdpState::default() }
    }

    /// Whether UDP reaches the peers. A firewall may block UDP.
    pub fn udp(&self) -> &UdpState {
        &self.udp
    }

    /// Applies one event. Only for an agent without a mesh.
    pub fn apply(&self, event: MeshEvent) {
        self.inventory.apply(event);
    }

    /// Changes whenever the inventory changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inventory.changes()
    }

    /// The providers of the blob, without partial providers.
    pub fn blob_providers(&self, digest: Digest) -> Vec<PeerId> {
        self.inventory.read(|inventory| inventory.blob_providers(digest))
    }

    /// The number of the blob's providers, without partial providers.
    pub fn count_blob_providers(&self, digest: Digest) -> usize {
        self.inventory.read(|inventory| inventory.count_blob_providers(digest))
    }

    /// The providers and partial providers of the blob.
    pub fn all_providers(&self, digest: Digest) -> Vec<BlobProvider> {
        self.inventory.read(|inventory| {
            let provider = |whole| move |peer| BlobProvider { peer, zone: inventory.zone_of(peer).cloned(), whole };
            let whole_providers = inventory.blob_providers(digest);
            let partial_providers =
                inventory.partial_providers(digest).into_iter().filter(|peer| !whole_providers.contains(peer));
            let partial_providers: Vec<_> = partial_providers.map(provider(false)).collect();
            whole_providers.into_iter().map(provider(true)).chain(partial_providers).collect()
        })
    }

    /// The zone that the peer announces.
    pub fn zone_of(&self, peer: PeerId) -> Option<Zone> {
        self.inventory.read(|inventory| inventory.zone_of(peer).cloned())
    }

    /// The peer that runs on the node.
    pub fn peer_on_node(&self, node: &NodeName) -> Option<PeerId> {
        self.inventory
            .read(|inventory| inventory.peers().into_iter().find(|peer| peer.node == *node).map(|peer| peer.id))
    }

    /// Whether the peer downloads the blob and does not have the whole blob.
    pub fn is_partial_provider(&self, peer: PeerId, digest: Digest) -> bool {
        self.inventory.read(|inventory| {
            inventory.partial_providers(digest).contains(&peer) && !inventory.blob_providers(digest).contains(&peer)
        })
    }

    /// Peers that have the image's root and a record of the image in this repository. A digest
    /// alone gives no permission.
    pub fn image_providers(&self, repository: &Repository, image_digest: Digest) -> Vec<PeerId> {
        self.inventory.read(|inventory| inventory.image_providers(repository, image_digest))
    }

    /// The digests that peers announce for the tag.
    pub fn tag_digests(&self, repository: &Repository, tag: &str) -> BTreeMap<Digest, Vec<PeerId>> {
        self.inventory.read(|inventory| inventory.tag(repository, tag))
    }

    /// The outages of this registry, with the peers that announce them.
    pub fn registry_outages(&self, registry: &str) -> Vec<(Outage, Vec<PeerId>)> {
        self.inventory.read(|inventory| {
            inventory.outages(registry).into_iter().map(|(outage, peers)| (outage.clone(), peers)).collect()
        })
    }

    /// The number of peers that announce an outage of this registry.
    pub fn count_outage_reports(&self, registry: &str) -> usize {
        let peers = self.registry_outages(registry).into_iter().flat_map(|(_, peers)| peers);
        peers.collect::<BTreeSet<_>>().len()
    }

    /// The first `most` outages in the order of registries, with the peers that announce them.
    pub fn outages(&self, limit: usize) -> Vec<(Outage, Vec<PeerId>)> {
        self.inventory.read(|inventory| {
            inventory.all_outages().take(limit).map(|(outage, peers)| (outage.clone(), peers)).collect()
        })
    }

    /// The peers that are up.
    pub fn peers(&self) -> Vec<Peer> {
        self.inventory.read(|inventory| inventory.peers().into_iter().cloned().collect())
    }

    /// The number of peers that are up.
    pub fn peer_count(&self) -> usize {
        self.inventory.read(|inventory| inventory.peers().len())
    }

    /// The name of the peer's node. The peer's ID when the node is unknown.
    pub fn node_of(&self, peer: PeerId) -> String {
        self.inventory.read(|inventory| inventory.node_of(peer).map_or_else(|| peer.to_string(), NodeName::to_string))
    }
}
