//! Room on this node's disks: asked for before a download, before each layer is unpacked, and again
//! after a refusal.

use std::sync::Arc;

use tokio::sync::watch;

use super::recover::{RecoverError, Recoverer};
use crate::decide::disk::{Disks, Need};
use crate::decide::plan::{OverLimit, Plan};
use crate::decide::reserve::{Before, Reservation, Reservations};
use crate::decide::rules::Rules;
use crate::decide::unpacking::{TRAILER, unpacked_bytes};
use crate::oci::Descriptor;
use crate::ports::{ContentStore, StoreError};

/// The room that layers of one recovery are unpacked into.
#[derive(Clone, Copy)]
pub(super) struct LayerRoom<'a> {
    store: &'a dyn ContentStore,
    all: &'a Reservations,
    rules: &'a watch::Receiver<Arc<Rules>>,
    reservation: &'a Reservation,
}

/// Why a layer gets no room.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoRoom {
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    #[error("looking for room: {0}")]
    Store(#[from] StoreError),
}

impl Recoverer {
    /// Keeps the plan within the limits, those of the disks together with every other recovery.
    pub(super) async fn reserve(&self, plan: &Plan) -> Result<Reservation, RecoverError> {
        let budgets = self.rules.borrow().budgets;
        plan.check_size(budgets.max_image_bytes)?;
        let looked = measure(&*self.store, &self.room).await;
        let (before, disks) = looked.map_err(RecoverError::store("looking for room"))?;
        Ok(self.room.reserve(Need::of_missing(plan.missing_bytes()), before, disks, budgets.lines())?)
    }

    /// Room for the layers of a recovery that has a reservation.
    pub(super) fn layer_room<'a>(&'a self, reservation: &'a Reservation) -> LayerRoom<'a> {
        LayerRoom { store: &*self.store, all: &self.room, rules: &self.rules, reservation }
    }

    /// Whether a recovery that was refused for want of room has room now.
    pub(super) async fn has_room_again(&self) -> bool {
        let Ok((before, disks)) = measure(&*self.store, &self.room).await else { return false };
        let lines = self.rules.borrow().budgets.lines();
        self.room.take_freed(before, disks, lines)
    }
}

impl LayerRoom<'_> {
    /// Sets aside what these layers unpack to. Returns their size in bytes.
    ///
    /// # Errors
    /// [`NoRoom`]. Nothing more is set aside then.
    pub(super) async fn reserve(&self, layers: &[Descriptor]) -> Result<u64, NoRoom> {
        let (before, disks) = measure(self.store, self.all).await?;
        if disks.are_unseen() {
            return Ok(0);
        }
        let (mut compressed, mut real) = (0_u64, 0_u64);
        for layer in layers {
            compressed = compressed.saturating_add(layer.size);
            real = real.saturating_add(unpacked_bytes(layer, self.trailer(layer).await?));
        }
        let lines = self.rules.borrow().budgets.lines();
        self.reservation.unpack(compressed, real, before, disks, lines)?;
        Ok(real)
    }

    /// Whether the runtime has room to unpack these layers. Layers that are unpacked already count
    /// too, so the check may ask for more room than the runtime needs.
    ///
    /// # Errors
    /// [`RecoverError::NoRoomToUnpack`], and what the store says.
    pub(super) async fn check(&self, layers: &[Descriptor]) -> Result<(), RecoverError> {
        match self.reserve(layers).await {
            Ok(_) => Ok(()),
            Err(NoRoom::OverLimit(source)) => Err(RecoverError::NoRoomToUnpack(source)),
            Err(NoRoom::Store(source)) => Err(RecoverError::Store { doing: "looking for room", source }),
        }
    }

    /// So many bytes are unpacked now.
    pub(super) fn unpacked(&self, bytes: u64) {
        self.reservation.unpacked(bytes);
    }

    async fn trailer(&self, layer: &Descriptor) -> Result<[u8; TRAILER], StoreError> {
        let mut trailer = [0; TRAILER];
        let bytes = match layer.size.checked_sub(TRAILER as u64) {
            Some(offset) => self.store.open(layer.digest).await?.read_at(offset, TRAILER).await?,
            None => return Ok(trailer),
        };
        if let Some(bytes) = bytes.first_chunk() {
            trailer = *bytes;
        }
        Ok(trailer)
    }
}

async fn measure(store: &dyn ContentStore, all: &Reservations) -> Result<(Before, Disks), StoreError> {
    let before = all.before_measuring();
    Ok((before, store.disks().await?))
}
