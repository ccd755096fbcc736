//! Disk space of this node: reserved before a download and before each layer is unpacked, and
//! measured again after a refusal.

use std::sync::Arc;

use tokio::sync::watch;

use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::disk_floor::Disks;
use crate::decide::disk_floor::OverLimit;
use crate::decide::disk_reservations::{MeasurementStart, Reservation, Reservations};
use crate::decide::layer_stack::{TRAILER, unpacked_bytes};
use crate::decide::policy::Policy;
use crate::oci::Descriptor;
use crate::ports::{ContentStore, StoreDisks, StoreError};

/// The part of a recovery's reservation that its layers are unpacked into.
#[derive(Clone, Copy)]
pub(in crate::agent) struct LayerReservation<'a> {
    pub(in crate::agent::recovery) store: &'a dyn ContentStore,
    pub(in crate::agent::recovery) reservations: &'a Reservations,
    pub(in crate::agent::recovery) policy: &'a watch::Receiver<Arc<Policy>>,
    pub(in crate::agent::recovery) reservation: &'a Reservation,
}

/// Why a layer has no disk space.
#[derive(Debug, thiserror::Error)]
pub(in crate::agent) enum NoDiskSpace {
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    #[error("looking for room: {0}")]
    Store(#[from] StoreError),
}

impl LayerReservation<'_> {
    /// Reserves the unpacked size of these layers in place of the estimate. Returns that size in
    /// bytes, or 0 where no file system is visible.
    ///
    /// # Errors
    /// [`NoDiskSpace`]. The estimate stays reserved then.
    pub(in crate::agent) async fn reserve(&self, layers: &[Descriptor]) -> Result<u64, NoDiskSpace> {
        let (measurement, disks) = measure(self.store, self.reservations).await?;
        if disks.are_unknown() {
            return Ok(0);
        }
        let (mut compressed, mut unpacked) = (0_u64, 0_u64);
        for layer in layers {
            compressed = compressed.saturating_add(layer.size);
            unpacked = unpacked.saturating_add(unpacked_bytes(layer, self.trailer(layer).await?));
        }
        let floors = self.policy.borrow().budgets.disk_floors();
        self.reservation.replace_estimate(compressed, unpacked, measurement, disks, floors)?;
        Ok(unpacked)
    }

    /// Checks that the runtime has room to unpack these layers. Unpacked layers count too, so the
    /// check may require more room than the runtime needs.
    ///
    /// # Errors
    /// [`RecoverError::NoRoomToUnpack`] and [`RecoverError::Store`].
    pub(in crate::agent) async fn check_unpack(&self, layers: &[Descriptor]) -> Result<(), RecoverError> {
        match self.reserve(layers).await {
            Ok(_) => Ok(()),
            Err(NoDiskSpace::OverLimit(source)) => Err(RecoverError::NoRoomToUnpack(source)),
            Err(NoDiskSpace::Store(source)) => Err(RecoverError::Store { doing: "looking for room", source }),
        }
    }

    /// Records bytes of unpacked layers, which the file system counts from now on.
    pub(in crate::agent) fn record_unpacked(&self, bytes: u64) {
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

pub(in crate::agent::recovery) async fn measure(
    store: &dyn StoreDisks,
    reservations: &Reservations,
) -> Result<(MeasurementStart, Disks), StoreError> {
    let measurement = reservations.begin_measurement();
    Ok((measurement, store.disks().await?))
}
