//! Who holds what, as recoveries ask for it. The mesh keeps the table; this only reads it.

use std::collections::BTreeMap;

use tokio::sync::watch;

use super::udp_watch::UdpState;
use crate::mesh::Table;
use crate::model::{MeshEvent, NodeName, Outage, Peer, PeerId, Zone};
use crate::oci::{Digest, Repository};

/// A peer that has all of a blob, or some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Who.
    pub peer: PeerId,
    /// Where it is.
    pub zone: Option<Zone>,
    /// It has all of it.
    pub whole: bool,
}

/// A handle to the table.
#[derive(Clone, Default)]
pub struct Holders {
    table: Table,
    udp: UdpState,
}

impl Holders {
    /// Reads this table.
    pub fn new(table: Table) -> Self {
        Self { table, udp: UdpState::default() }
    }

    /// Whether any of them can be fetched from: a firewall may block UDP.
    pub fn udp(&self) -> &UdpState {
        &self.udp
    }

    /// Takes in one event, in the mesh's place: where there is no mesh.
    pub fn apply(&self, event: MeshEvent) {
        self.table.apply(event);
    }

    /// Moves whenever the table changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.table.changes()
    }

    /// Peers that hold the blob.
    pub fn of_blob(&self, digest: Digest) -> Vec<PeerId> {
        self.table.read(|table| table.holders(digest))
    }

    /// How many peers hold the blob.
    pub fn count_of_blob(&self, digest: Digest) -> usize {
        self.table.read(|table| table.count_holders(digest))
    }

    /// Everybody who holds the blob or is fetching it.
    pub fn sources(&self, digest: Digest) -> Vec<Source> {
        self.table.read(|table| {
            let source = |whole| move |peer| Source { peer, zone: table.zone_of(peer).cloned(), whole };
            let holders = table.holders(digest);
            let fetching = table.fetching(digest).into_iter().filter(|peer| !holders.contains(peer));
            let fetching: Vec<_> = fetching.map(source(false)).collect();
            holders.into_iter().map(source(true)).chain(fetching).collect()
        })
    }

    /// Where a peer is.
    pub fn zone_of(&self, peer: PeerId) -> Option<Zone> {
        self.table.read(|table| table.zone_of(peer).cloned())
    }

    /// Who runs on a node.
    pub fn peer_on(&self, node: &NodeName) -> Option<PeerId> {
        self.table.read(|table| table.peers().into_iter().find(|peer| peer.node == *node).map(|peer| peer.id))
    }

    /// Whether the peer is fetching the blob, and does not hold it.
    pub fn is_fetching(&self, peer: PeerId, digest: Digest) -> bool {
        self.table.read(|table| table.fetching(digest).contains(&peer) && !table.holders(digest).contains(&peer))
    }

    /// Peers that hold the image's root and know it under this repository. A digest alone is not a permission.
    pub fn of_image(&self, repository: &Repository, root: Digest) -> Vec<PeerId> {
        self.table.read(|table| table.providers(repository, root))
    }

    /// What a tag means, according to each peer that knows it.
    pub fn of_tag(&self, repository: &Repository, tag: &str) -> BTreeMap<Digest, Vec<PeerId>> {
        self.table.read(|table| table.tag(repository, tag))
    }

    /// What peers say about a registry that they cannot reach.
    pub fn outages_of(&self, registry: &str) -> Vec<(Outage, Vec<PeerId>)> {
        self.table
            .read(|table| table.outages(registry).into_iter().map(|(outage, peers)| (outage.clone(), peers)).collect())
    }

    /// What peers say about registries that they cannot reach, and who says it; the first so many, by registry.
    pub fn outages(&self, most: usize) -> Vec<(Outage, Vec<PeerId>)> {
        self.table.read(|table| table.all_outages().take(most).map(|(outage, peers)| (outage.clone(), peers)).collect())
    }

    /// The peers that are up.
    pub fn peers(&self) -> Vec<Peer> {
        self.table.read(|table| table.peers().into_iter().cloned().collect())
    }

    /// How many peers are up.
    pub fn count(&self) -> usize {
        self.table.read(|table| table.peers().len())
    }

    /// The node's name, for people; the PeerId where it is not known any more.
    pub fn node_of(&self, peer: PeerId) -> String {
        self.table.read(|table| table.node_of(peer).map_or_else(|| peer.to_string(), NodeName::to_string))
    }
}
