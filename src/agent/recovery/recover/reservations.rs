//! The disk space that a recovery reserves before its download.

use super::Recoverer;
use crate::agent::recovery::disk_space::{LayerReservation, measure};
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::disk_floor::DiskNeed;
use crate::decide::disk_reservations::Reservation;
use crate::decide::plan::FetchPlan;

impl Recoverer {
    /// Checks the plan against the size limit, and reserves disk space for its blobs. The disk
    /// floors hold for all recoveries of this node together.
    pub(in crate::agent) async fn reserve(&self, plan: &FetchPlan) -> Result<Reservation, RecoverError> {
        let budgets = self.policy.borrow().budgets;
        plan.check_size(budgets.max_image_bytes)?;
        let measured = measure(&*self.store, &self.reservations).await;
        let (measurement, disks) = measured.map_err(RecoverError::store("looking for room"))?;
        Ok(self.reservations.reserve(
            DiskNeed::of_missing(plan.missing_bytes()),
            measurement,
            disks,
            budgets.disk_floors(),
        )?)
    }

    /// Reserves space for unpacked layers within the reservation of a recovery.
    pub(in crate::agent) fn layer_reservation<'a>(&'a self, reservation: &'a Reservation) -> LayerReservation<'a> {
        LayerReservation { store: &*self.store, reservations: &self.reservations, policy: &self.policy, reservation }
    }

    /// Whether one of the recoveries that were refused for lack of space fits now.
    pub(in crate::agent) async fn take_freed_space(&self) -> bool {
        let Ok((measurement, disks)) = measure(&*self.store, &self.reservations).await else { return false };
        let floors = self.policy.borrow().budgets.disk_floors();
        self.reservations.clear_rejected_if_freed(measurement, disks, floors)
    }
}
