//! Room on this node's disks: asked for before a download, before each layer is unpacked, and again
//! after a refusal.

use std::sync::Arc;

use tokio::sync::watch;

use super::recover::{RecoverError, Recoverer};
use crate::decide::disk::{DiskNeed, Disks};
use crate::decide::disk_reservations::{MeasurementStart, Reservation, Reservations};
use crate::decide::layer_stack::{TRAILER, unpacked_bytes};
use crate::decide::plan::{FetchPlan, OverLimit};
use crate::decide::policy::Policy;
use crate::oci::Descriptor;
use crate::ports::{ContentStore, StoreError};

/// The room that layers of one recovery are unpacked into.
#[derive(Clone, Copy)]
pub(super) struct LayerReservation<'a> {
    store: &'a dyn ContentStore,
    reservations: &'a Reservations,
    policy: &'a watch::Receiver<Arc<Policy>>,
    reservation: &'a Reservation,
}

/// Why a layer gets no room.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoDiskSpace {
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    #[error("looking for room: {0}")]
    Store(#[from] StoreError),
}

impl Recoverer {
    /// Keeps the plan within the limits, those of the disks together with every other recovery.
    pub(super) async fn reserve(&self, plan: &FetchPlan) -> Result<Reservation, RecoverError> {
        let budgets = self.policy.borrow().budgets;
        plan.check_size(budgets.max_image_bytes)?;
        let measured = measure(&*self.store, &self.reservations).await;
        let (before, disks) = measured.map_err(RecoverError::store("looking for room"))?;
        Ok(self.reservations.reserve(
            DiskNeed::of_missing(plan.missing_bytes()),
            before,
            disks,
            budgets.disk_floors(),
        )?)
    }

    /// Room for the layers of a recovery that has a reservation.
    pub(super) fn layer_reservation<'a>(&'a self, reservation: &'a Reservation) -> LayerReservation<'a> {
        LayerReservation { store: &*self.store, reservations: &self.reservations, policy: &self.policy, reservation }
    }

    /// Whether a recovery that was refused for want of room has room now.
    pub(super) async fn take_freed_space(&self) -> bool {
        let Ok((before, disks)) = measure(&*self.store, &self.reservations).await else { return false };
        let lines = self.policy.borrow().budgets.disk_floors();
        self.reservations.clear_refusals_if_freed(before, disks, lines)
    }
}

impl LayerReservation<'_> {
    /// Sets aside what these layers unpack to. Returns their size in bytes.
    ///
    /// # Errors
    /// [`NoRoom`]. Nothing more is set aside then.
    pub(super) async fn reserve(&self, layers: &[Descriptor]) -> Result<u64, NoDiskSpace> {
        let (before, disks) = measure(self.store, self.reservations).await?;
        if disks.are_unknown() {
            return Ok(0);
        }
        let (mut compressed, mut real) = (0_u64, 0_u64);
        for layer in layers {
            compressed = compressed.saturating_add(layer.size);
            real = real.saturating_add(unpacked_bytes(layer, self.trailer(layer).await?));
        }
        let lines = self.policy.borrow().budgets.disk_floors();
        self.reservation.replace_estimate(compressed, real, before, disks, lines)?;
        Ok(real)
    }

    /// Whether the runtime has room to unpack these layers. Layers that are unpacked already count
    /// too, so the check may ask for more room than the runtime needs.
    ///
    /// # Errors
    /// [`RecoverError::NoRoomToUnpack`], and what the store says.
    pub(super) async fn check_unpack(&self, layers: &[Descriptor]) -> Result<(), RecoverError> {
        match self.reserve(layers).await {
            Ok(_) => Ok(()),
            Err(NoDiskSpace::OverLimit(source)) => Err(RecoverError::NoRoomToUnpack(source)),
            Err(NoDiskSpace::Store(source)) => Err(RecoverError::Store { doing: "looking for room", source }),
        }
    }

    /// So many bytes are unpacked now.
    pub(super) fn record_unpacked(&self, bytes: u64) {
        self.reservation.record_unpacked(bytes);
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

async fn measure(
    store: &dyn ContentStore,
    reservations: &Reservations,
) -> Result<(MeasurementStart, Disks), StoreError> {
    let before = reservations.begin_measurement();
    Ok((before, store.disks().await?))
}
