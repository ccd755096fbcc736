//! The table of who holds what, shared by the tasks of one agent: the mesh writes it, recoveries read it.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

use crate::decide::inventory::Inventory;
use crate::model::MeshEvent;

/// A handle to the table. Cheap to clone; clones are the same table.
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
    /// Asks the table something. It cannot change meanwhile, so nothing may take long.
    pub fn read<T>(&self, question: impl FnOnce(&Inventory) -> T) -> T {
        question(&self.inventory.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes in one event, in the mesh's place: where there is no mesh.
    pub fn apply(&self, event: MeshEvent) {
        self.modify(|inventory| inventory.apply(event));
        self.mark_changed();
    }

    /// Moves whenever the table changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Lends the table to somebody who may change it; if so, [`Table::moved`] has to follow.
    pub(super) fn modify<T>(&self, change: impl FnOnce(&mut Inventory) -> T) -> T {
        change(&mut self.inventory.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// It has changed.
    pub(super) fn mark_changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }
}
