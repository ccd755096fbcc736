//! The inventory, shared by the tasks of one agent: the mesh writes, recoveries read.

use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::watch;

use crate::decide::inventory::Inventory;
use crate::model::MeshEvent;

/// A handle to the inventory. Cheap to clone; all clones share one inventory.
#[derive(Clone)]
pub struct SharedInventory {
    inventory: Arc<RwLock<Inventory>>,
    version: watch::Sender<u64>,
}

impl Default for SharedInventory {
    fn default() -> Self {
        Self { inventory: Arc::default(), version: watch::Sender::new(0) }
    }
}

impl SharedInventory {
    /// Reads the inventory under a lock, so `question` must be short.
    pub fn read<T>(&self, query: impl FnOnce(&Inventory) -> T) -> T {
        query(&self.inventory.read())
    }

    /// Applies one event, in processes without a mesh.
    pub fn apply(&self, event: MeshEvent) {
        self.modify(|inventory| inventory.apply(event));
        self.mark_changed();
    }

    /// Changes whenever the inventory changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Gives `change` write access; after a change, the caller calls
    /// [`SharedInventory::mark_changed`].
    pub(super) fn modify<T>(&self, change: impl FnOnce(&mut Inventory) -> T) -> T {
        change(&mut self.inventory.write())
    }

    /// Notifies the receivers of [`SharedInventory::changes`].
    pub(super) fn mark_changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }
}
