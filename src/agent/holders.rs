//! Who holds what, as recoveries ask for it. The mesh keeps the table; this only reads it.

use std::collections::BTreeMap;

use tokio::sync::watch;

use crate::mesh::Table;
use crate::model::{MeshEvent, NodeName, Outage, Peer, PeerId};
use crate::oci::{Digest, Repository};

/// A handle to the table.
#[derive(Clone, Default)]
pub struct Holders(Table);

impl Holders {
    /// Reads this table.
    pub fn new(table: Table) -> Self {
        Self(table)
    }

    /// Takes in one event, in the mesh's place: where there is no mesh.
    pub fn apply(&self, event: MeshEvent) {
        self.0.apply(event);
    }

    /// Moves whenever the table changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes()
    }

    /// Peers that hold the blob.
    pub fn of_blob(&self, digest: Digest) -> Vec<PeerId> {
        self.0.read(|table| table.holders(digest))
    }

    /// Peers that hold the image's root and know it under this repository. A digest alone is not a permission.
    pub fn of_image(&self, repository: &Repository, root: Digest) -> Vec<PeerId> {
        self.0.read(|table| table.providers(repository, root))
    }

    /// What a tag means, according to each peer that knows it.
    pub fn of_tag(&self, repository: &Repository, tag: &str) -> BTreeMap<Digest, Vec<PeerId>> {
        self.0.read(|table| table.tag(repository, tag))
    }

    /// What peers say about a registry that they cannot reach.
    pub fn outages_of(&self, registry: &str) -> Vec<(Outage, Vec<PeerId>)> {
        self.0
            .read(|table| table.outages(registry).into_iter().map(|(outage, peers)| (outage.clone(), peers)).collect())
    }

    /// What peers say about registries that they cannot reach, and who says it; the first so many, by registry.
    pub fn outages(&self, most: usize) -> Vec<(Outage, Vec<PeerId>)> {
        self.0.read(|table| table.all_outages().take(most).map(|(outage, peers)| (outage.clone(), peers)).collect())
    }

    /// The peers that are up.
    pub fn peers(&self) -> Vec<Peer> {
        self.0.read(|table| table.peers().into_iter().cloned().collect())
    }

    /// How many peers are up.
    pub fn count(&self) -> usize {
        self.0.read(|table| table.peers().len())
    }

    /// The node's name, for people; the PeerId where it is not known any more.
    pub fn node_of(&self, peer: PeerId) -> String {
        self.0.read(|table| table.node_of(peer).map_or_else(|| peer.to_string(), NodeName::to_string))
    }
}
