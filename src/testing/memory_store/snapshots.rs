//! Snapshots in memory: only names and parents, because no test reads a snapshot's content.

use std::collections::{BTreeSet, HashMap, HashSet};

use async_trait::async_trait;

use super::{MemoryStore, State};
use crate::decide::disk_floor::Disks;
use crate::oci::{Digest, StackedLayer};
use crate::ports::{Pin, Snapshots, StoreError, UnpackError, UnpackOutcome, Unpacker};
use crate::testing::decompress::decompress;

/// Chain IDs of unpacked layers, with the chain ID of the parent.
pub(super) type SnapshotParents = HashMap<Digest, Option<Digest>>;

/// Properties of the simulated runtime.
#[derive(Clone)]
pub(super) struct Runtime {
    snapshotter: String,
    discards_layers: Option<bool>,
}

impl Default for Runtime {
    fn default() -> Self {
        Self { snapshotter: "overlayfs".into(), discards_layers: None }
    }
}

impl MemoryStore {
    /// Sets the snapshotter that layers are unpacked into, and the runtime's setting for discarding
    /// layers.
    pub fn set_runtime(&self, snapshotter: &str, discards_layers: Option<bool>) {
        self.state().runtime = Runtime { snapshotter: snapshotter.into(), discards_layers };
    }

    pub(super) fn snapshots_of(&self, chain_id: Digest) -> Snapshots {
        let state = self.state();
        let Runtime { snapshotter, discards_layers } = state.runtime.clone();
        let snapshotters = if state.snapshots.contains_key(&chain_id) { vec![snapshotter] } else { Vec::new() };
        Snapshots { snapshotters, discards_layers }
    }

    /// Chain IDs of the unpacked layers.
    pub fn unpacked(&self) -> BTreeSet<Digest> {
        self.state().snapshots.keys().copied().collect()
    }
}

impl MemoryStore {
    /// Sets the figures of the file systems, whatever is written.
    pub fn set_disks(&self, disks: Disks) {
        self.state().disks = disks;
    }
}

impl State {
    /// Removes snapshots without a pin and without a blob that keeps them.
    pub(super) fn collect_snapshots(&mut self) {
        let mut reachable = HashSet::new();
        let pinned = self.pins.values().flat_map(|pin_state| &pin_state.snapshots);
        let mut unvisited: Vec<Digest> =
            pinned.chain(self.blobs.values().filter_map(|blob| blob.top.as_ref())).copied().collect();
        while let Some(chain_id) = unvisited.pop() {
            if let Some(parent) = self.snapshots.get(&chain_id)
                && reachable.insert(chain_id)
            {
                unvisited.extend(parent);
            }
        }
        self.snapshots.retain(|chain_id, _| reachable.contains(chain_id));
    }
}

#[async_trait]
impl Unpacker for MemoryStore {
    async fn ensure_supported(&self) -> Result<(), UnpackError> {
        Ok(())
    }

    async fn is_unpacked(&self, layer: &StackedLayer) -> Result<bool, UnpackError> {
        Ok(self.state().snapshots.contains_key(&layer.chain_id))
    }

    async fn unpack(&self, layer: &StackedLayer, pin: &Pin) -> Result<UnpackOutcome, UnpackError> {
        let mut state = self.state();
        let unknown_pin = || StoreError::Other(format!("the pin {} is gone", pin.0));
        state.pins.get_mut(&pin.0).ok_or_else(unknown_pin)?.snapshots.insert(layer.chain_id);
        if state.snapshots.contains_key(&layer.chain_id) {
            return Ok(UnpackOutcome::AlreadyUnpacked);
        }
        if let Some(parent) = layer.parent.filter(|parent| !state.snapshots.contains_key(parent)) {
            return Err(StoreError::Other(format!("the parent layer {parent} is not unpacked")).into());
        }
        let blob = state.blobs.get(&layer.blob.digest).ok_or(StoreError::Absent(layer.blob.digest))?;
        let archive = decompress(&blob.bytes);
        let archive = archive.ok_or_else(|| StoreError::Other(format!("{} is no layer", layer.blob.digest)))?;
        let actual = Digest::of(&archive);
        if actual != layer.diff_id {
            return Err(UnpackError::DiffIdMismatch { expected: layer.diff_id, actual: actual.to_string() });
        }
        state.snapshots.insert(layer.chain_id, layer.parent);
        Ok(UnpackOutcome::Unpacked)
    }

    async fn keep_snapshot(&self, config: Digest, top: Digest) -> Result<(), UnpackError> {
        self.state().blobs.get_mut(&config).ok_or(StoreError::Absent(config))?.top = Some(top);
        Ok(())
    }
}
