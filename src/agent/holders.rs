//! The table of who holds what, shared by the tasks of one agent: the mesh writes it, recoveries read it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::decide::inventory::Inventory;
use crate::metrics::Metrics;
use crate::model::{MAX_ITEMS, MeshEvent, NodeName, Outage, Peer, PeerId};
use crate::oci::{Digest, Repository};

/// A handle to the table.
#[derive(Clone)]
pub struct Holders {
    table: Arc<RwLock<Inventory>>,
    changed: watch::Sender<u64>,
}

impl Default for Holders {
    fn default() -> Self {
        Self { table: Arc::default(), changed: watch::Sender::new(0) }
    }
}

impl Holders {
    /// Takes in what the mesh tells, until stopped.
    pub async fn run(self, mut events: mpsc::Receiver<MeshEvent>, metrics: Metrics, stop: CancellationToken) {
        while let Some(Some(event)) = stop.run_until_cancelled(events.recv()).await {
            match &event {
                MeshEvent::Up(peer) => tracing::info!(peer = %peer.id, node = %peer.node, "peer up"),
                MeshEvent::Down(peer) => tracing::info!(%peer, node = %self.node_of(*peer), "peer down"),
                MeshEvent::Snapshot(peer, items) => tracing::debug!(%peer, items = items.len(), "inventory received"),
                MeshEvent::Changed(peer, changes) => {
                    tracing::debug!(%peer, changes = changes.len(), "inventory changed")
                }
            }
            self.apply(event);
            metrics.peers_connected(self.peers().len());
        }
    }

    /// Takes in one event.
    pub fn apply(&self, event: MeshEvent) {
        let dropped = self.table.write().unwrap_or_else(PoisonError::into_inner).apply(event);
        if dropped > 0 {
            tracing::warn!(dropped, limit = MAX_ITEMS, "a peer announces more than is kept of one");
        }
        self.changed.send_modify(|version| *version += 1);
    }

    /// Moves whenever the table changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Peers that hold the blob.
    pub fn of_blob(&self, digest: Digest) -> Vec<PeerId> {
        self.read(|table| table.holders(digest))
    }

    /// Peers that hold the image's root and know it under this repository. A digest alone is not a permission.
    pub fn of_image(&self, repository: &Repository, root: Digest) -> Vec<PeerId> {
        self.read(|table| table.providers(repository, root))
    }

    /// What a tag means, according to each peer that knows it.
    pub fn of_tag(&self, repository: &Repository, tag: &str) -> BTreeMap<Digest, Vec<PeerId>> {
        self.read(|table| table.tag(repository, tag))
    }

    /// What peers say about a registry that they cannot reach.
    pub fn outages_of(&self, registry: &str) -> Vec<(Outage, Vec<PeerId>)> {
        self.read(|table| table.outages(registry).into_iter().map(|(outage, peers)| (outage.clone(), peers)).collect())
    }

    /// What peers say about registries that they cannot reach, and who says it; the first so many, by registry.
    pub fn outages(&self, most: usize) -> Vec<(Outage, Vec<PeerId>)> {
        self.read(|table| table.all_outages().take(most).map(|(outage, peers)| (outage.clone(), peers)).collect())
    }

    /// The peers that are connected now.
    pub fn peers(&self) -> Vec<Peer> {
        self.read(|table| table.peers().into_iter().cloned().collect())
    }

    /// The node's name, for people; the PeerId where it is not known any more.
    pub fn node_of(&self, peer: PeerId) -> String {
        self.read(|table| table.node_of(peer).map_or_else(|| peer.to_string(), NodeName::to_string))
    }

    fn read<T>(&self, question: impl FnOnce(&Inventory) -> T) -> T {
        question(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }
}
