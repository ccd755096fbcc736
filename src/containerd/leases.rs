//! Pins: containerd's leases.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::{CreateRequest, DeleteRequest};
use containerd_client::tonic::Code;

use super::ContainerdStore;
use crate::ports::{Pin, StoreError};

/// Time after which the collector deletes the lease.
pub(super) const EXPIRES: &str = "containerd.io/gc.expire";
/// Marks the agent's leases for a person who lists leases.
const PIN_LABEL: &str = "lighterman.dev/pin";

/// Deadline of a deletion with collection: the collector walks all metadata and removes files.
const COLLECT_DEADLINE: Duration = Duration::from_secs(60);

impl ContainerdStore {
    pub(super) async fn create_lease(&self, life: Duration) -> Result<Pin, StoreError> {
        let out_of_range =
            |_| StoreError::Other(format!("a pin for {} s ends beyond the range of timestamps", life.as_secs()));
        let until = SystemTime::now().checked_add(life).ok_or(()).map_err(out_of_range)?;
        let until = jiff::Timestamp::try_from(until).map_err(|_| ()).map_err(out_of_range)?;
        let id = format!("lighterman-{:032x}", rand::random::<u128>());
        let labels =
            HashMap::from([(EXPIRES.to_owned(), until.to_string()), (PIN_LABEL.to_owned(), "agent".to_owned())]);
        let request = self.client.request(CreateRequest { id: id.clone(), labels });
        self.client
            .call(self.client.leases().create(request))
            .await
            .map_err(|status| self.client.store_error(&status))?;
        Ok(Pin(id))
    }

    /// Releases the pin, and returns after the collector removed unreferenced content. containerd
    /// is slow during a collection, so this call is for tests and for people.
    ///
    /// # Errors
    /// As [`crate::ports::Pins::release`].
    pub async fn release_and_collect(&self, pin: Pin) -> Result<(), StoreError> {
        self.delete_lease(&pin, true).await
    }

    /// Runs containerd's collector and waits for its end.
    pub(super) async fn collect(&self) -> Result<(), StoreError> {
        let empty_pin = self.create_lease(COLLECT_DEADLINE).await?;
        self.delete_lease(&empty_pin, true).await
    }

    pub(super) async fn delete_lease(&self, pin: &Pin, sync: bool) -> Result<(), StoreError> {
        let (last, former) = self.state.renewals.end(pin);
        for lease in former {
            self.delete_lease_by_id(lease, false).await?;
        }
        self.delete_lease_by_id(last, sync).await?;
        self.record_change();
        Ok(())
    }

    pub(super) async fn delete_lease_by_id(&self, id: String, sync: bool) -> Result<(), StoreError> {
        let request = self.client.request(DeleteRequest { id, sync });
        let mut leases = self.client.leases();
        let deleted = match sync {
            true => self.client.call_within(COLLECT_DEADLINE, leases.delete(request)).await,
            false => self.client.call(leases.delete(request)).await,
        };
        match deleted {
            Err(status) if status.code() != Code::NotFound => Err(self.client.store_error(&status)),
            _ => Ok(()),
        }
    }
}
