//! Renewal of pins. containerd cannot extend a lease: `Leases` has no update, and the end is read
//! from the lease's first labels (`containerd.io/gc.expire`; api/services/leases/v1,
//! core/metadata/gc.go). A renewal creates a new lease with the same resources. The pin keeps the
//! name of its first lease.
//!
//! The former lease stays until it expires, because calls under it are still running: containerd
//! refuses a commit under a missing lease. Pins are renewed at half life, so such a call has half a
//! life, thirty minutes. The longest call unpacks a layer, with a deadline of ten minutes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use containerd_client::services::v1::{AddResourceRequest, ListResourcesRequest, Resource};
use containerd_client::tonic::{Code, Status};
use parking_lot::{Mutex, MutexGuard};

use super::ContainerdStore;
use crate::ports::{Pin, StoreError};
use crate::util::clock;

/// Most leases of one pin: the last, the one before, and leases whose resources could not be copied
/// yet. The caller renews at most sixteen times before the former lease ends.
const MAX_LEASES: usize = 18;

/// Leases of renewed pins: one entry for each running recovery. The next renewal of any pin removes
/// the entries of expired pins.
#[derive(Default)]
pub(super) struct Renewals(Mutex<HashMap<String, PinLeases>>);

struct PinLeases {
    /// The oldest first. New resources go to the last.
    leases: Vec<Lease>,
    /// End of the last lease.
    ends: Instant,
    /// A lease ended before its resources were copied.
    is_lost: bool,
}

struct Lease {
    id: String,
    /// The next lease holds all resources of this one.
    is_copied: bool,
}

impl Renewals {
    /// The lease for new resources of the pin.
    pub(super) fn lease(&self, pin: &Pin) -> Result<String, StoreError> {
        match self.lock().get(&pin.0) {
            Some(pin_leases) if pin_leases.is_lost => Err(pin_ended(pin)),
            Some(pin_leases) => Ok(pin_leases.last().to_owned()),
            None => Ok(pin.0.clone()),
        }
    }

    /// Removes the pin's entry. Returns the last lease and the former leases.
    pub(super) fn end(&self, pin: &Pin) -> (String, Vec<String>) {
        let Some(pin_leases) = self.lock().remove(&pin.0) else { return (pin.0.clone(), Vec::new()) };
        let last = pin_leases.last().to_owned();
        let former = pin_leases.leases.into_iter().map(|lease| lease.id).filter(|id| *id != last).collect();
        (last, former)
    }

    /// Adds a new lease to the pin. Returns the leases that must be copied into the new lease.
    fn push(&self, pin: &Pin, id: String, life: Duration, now: Instant) -> Vec<String> {
        let mut renewals = self.lock();
        renewals.retain(|name, pin_leases| *name == pin.0 || pin_leases.ends > now);
        let first = || Lease { id: pin.0.clone(), is_copied: false };
        let pin_leases = renewals.entry(pin.0.clone());
        let pin_leases = pin_leases.or_insert_with(|| PinLeases { leases: vec![first()], ends: now, is_lost: false });
        let uncopied = pin_leases.leases.iter().filter(|lease| !lease.is_copied).map(|lease| lease.id.clone());
        let uncopied: Vec<_> = uncopied.collect();
        pin_leases.leases.push(Lease { id, is_copied: false });
        pin_leases.ends = now + life;
        uncopied
    }

    fn may_renew(&self, pin: &Pin) -> bool {
        self.lock().get(&pin.0).is_none_or(|pin_leases| !pin_leases.is_lost && pin_leases.leases.len() < MAX_LEASES)
    }

    /// The last lease has the resources of this lease.
    fn mark_copied(&self, pin: &Pin, id: &str) {
        if let Some(pin_leases) = self.lock().get_mut(&pin.0)
            && let Some(lease) = pin_leases.leases.iter_mut().find(|lease| lease.id == id)
        {
            lease.is_copied = true;
        }
    }

    /// The last lease has every resource. Leases before the last two have expired.
    fn drop_older(&self, pin: &Pin) {
        if let Some(pin_leases) = self.lock().get_mut(&pin.0) {
            let older = pin_leases.leases.len().saturating_sub(2);
            pin_leases.leases.drain(..older);
        }
    }

    fn mark_lost(&self, pin: &Pin) {
        if let Some(pin_leases) = self.lock().get_mut(&pin.0) {
            pin_leases.is_lost = true;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, PinLeases>> {
        self.0.lock()
    }
}

impl PinLeases {
    fn last(&self) -> &str {
        &self.leases.last().expect("a pin always has a last lease").id
    }
}

fn pin_ended(pin: &Pin) -> StoreError {
    StoreError::Other(format!("the pin {} has ended", pin.0))
}

impl ContainerdStore {
    /// Adds a present or absent resource to the pin. A concurrent renewal may have copied the
    /// former lease before the resource was in it, so the last lease is compared afterwards.
    pub(super) async fn add_to_pin(&self, pin: &Pin, kind: String, id: String) -> Result<(), StoreError> {
        let resource = Resource { id, r#type: kind };
        let mut lease = self.state.renewals.lease(pin)?;
        loop {
            let added = self.add_resource(lease.clone(), resource.clone()).await;
            added.map_err(|status| self.client.store_error(&status))?;
            let last = self.state.renewals.lease(pin)?;
            if last == lease {
                return Ok(());
            }
            lease = last;
        }
    }

    async fn add_resource(&self, lease: String, resource: Resource) -> Result<(), Status> {
        let request = self.client.request(AddResourceRequest { id: lease, resource: Some(resource) });
        self.client.call(self.client.leases().add_resource(request)).await.map(drop)
    }

    /// Replaces the lease of the pin. New content goes to the new lease before the former lease is
    /// copied, so no content is missed in between.
    pub(super) async fn replace_lease(&self, pin: &Pin, life: Duration) -> Result<(), StoreError> {
        let renewals = &self.state.renewals;
        if !renewals.may_renew(pin) {
            return Err(pin_ended(pin));
        }
        let now = clock::now();
        let Pin(next) = self.create_lease(life).await?;
        for former in renewals.push(pin, next.clone(), life, now) {
            match self.copy_lease(&former, &next).await {
                Ok(()) => renewals.mark_copied(pin, &former),
                Err(status) if status.code() == Code::NotFound => {
                    renewals.mark_lost(pin);
                    // Without the deletion this lease would last for a whole life.
                    self.delete_lease_by_id(next, false).await?;
                    return Err(pin_ended(pin));
                }
                Err(status) => return Err(self.client.store_error(&status)),
            }
        }
        renewals.drop_older(pin);
        Ok(())
    }

    async fn copy_lease(&self, from: &str, to: &str) -> Result<(), Status> {
        let request = self.client.request(ListResourcesRequest { id: from.to_owned() });
        let listed = self.client.call(self.client.leases().list_resources(request)).await?;
        for resource in listed.resources {
            self.add_resource(to.to_owned(), resource).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Duration = Duration::from_secs(100);

    #[test]
    fn a_pin_keeps_its_name_and_its_last_two_leases() {
        let (renewals, pin, now) = (Renewals::default(), Pin("a".into()), Instant::now());
        assert_eq!(renewals.lease(&pin).unwrap(), "a");
        for (next, former) in [("b", "a"), ("c", "b"), ("d", "c")] {
            assert_eq!(renewals.push(&pin, next.into(), LIFE, now), [former]);
            assert_eq!(renewals.lease(&pin).unwrap(), next, "new content goes to the new lease at once");
            renewals.mark_copied(&pin, former);
            renewals.drop_older(&pin);
        }
        assert_eq!(renewals.end(&pin), ("d".to_owned(), vec!["c".to_owned()]));
        assert_eq!(renewals.end(&pin), ("a".to_owned(), Vec::new()), "the entry is gone");
    }

    #[test]
    fn a_lease_that_could_not_be_copied_is_copied_by_the_next_renewal() {
        let (renewals, pin, now) = (Renewals::default(), Pin("a".into()), Instant::now());
        renewals.push(&pin, "b".into(), LIFE, now);
        assert_eq!(renewals.push(&pin, "c".into(), LIFE, now), ["a", "b"]);
        renewals.mark_copied(&pin, "a");
        assert_eq!(renewals.push(&pin, "d".into(), LIFE, now), ["b", "c"]);
    }

    #[test]
    fn a_pin_that_lost_a_lease_accepts_no_writes() {
        let (renewals, pin) = (Renewals::default(), Pin("a".into()));
        renewals.push(&pin, "b".into(), LIFE, Instant::now());
        renewals.mark_lost(&pin);
        assert!(renewals.lease(&pin).is_err() && !renewals.may_renew(&pin));
    }

    #[test]
    fn expired_pins_are_dropped_and_renewals_are_bounded() {
        let (renewals, now) = (Renewals::default(), Instant::now());
        renewals.push(&Pin("a".into()), "b".into(), LIFE, now);
        let pin = Pin("x".into());
        let mut tries = 0;
        while renewals.may_renew(&pin) {
            renewals.push(&pin, tries.to_string(), LIFE, now + LIFE);
            tries += 1;
        }
        assert_eq!((tries, renewals.lock().len()), (MAX_LEASES - 1, 1));
    }
}
