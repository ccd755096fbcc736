//! Leases on layers, and the events of containerd.

use std::collections::HashMap;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_client::events::ContentCreate;
use containerd_client::services::v1::{CreateRequest, ListRequest, ListResourcesRequest};
use containerd_client::tonic::Code;
use containerd_client::types::Envelope;
use prost::Message;
use tokio::sync::broadcast;

use super::ContainerdStore;
use super::labels::{has_layers, origins};
use super::leases::EXPIRES;
use crate::oci::Digest;
use crate::ports::{ContentEvent, LayerLease, LayerLeases, Origin, Pin, StoreError};

/// Queued events of a receiver: a pull of the largest manifest (1024 children) and its records. A
/// receiver further behind lists everything.
pub(super) const EVENTS_QUEUED: usize = 2048;

/// Manifest whose layers the lease names. The label also marks leases of this kind.
const RETAINS: &str = "lighterman.dev/retains";
/// Last use of the image before the lease was created.
const LAST_USE: &str = "lighterman.dev/last-use";
/// With this label containerd holds the resources of the lease, but not the resources that their
/// labels name (core/metadata/gc.go).
const FLAT: &str = "containerd.io/gc.flat";

/// Translates containerd's event; `None` for other events.
pub(super) fn content_event(event: &Envelope) -> Option<ContentEvent> {
    if event.topic.starts_with("/images/") {
        return Some(ContentEvent::Records);
    }
    if event.topic != "/content/create" {
        return None;
    }
    let created = ContentCreate::decode(&*event.event.as_ref()?.value).ok()?;
    Some(ContentEvent::Committed { digest: created.digest.parse().ok()?, size: created.size.try_into().ok()? })
}

impl ContainerdStore {
    /// Without a receiver the event is lost.
    pub(super) fn publish(&self, event: ContentEvent) {
        let _ = self.state.events.send(event);
    }

    async fn layers_of(&self, pin: &Pin) -> Result<Vec<Digest>, StoreError> {
        let request = self.client.request(ListResourcesRequest { id: pin.0.clone() });
        match self.client.call(self.client.leases().list_resources(request)).await {
            Ok(answer) => Ok(answer.resources.iter().filter_map(|resource| resource.id.parse().ok()).collect()),
            // The lease expired between the two calls.
            Err(status) if status.code() == Code::NotFound => Ok(Vec::new()),
            Err(status) => Err(self.client.store_error(&status)),
        }
    }
}

#[async_trait]
impl LayerLeases for ContainerdStore {
    async fn layer_leases(&self) -> Result<Vec<LayerLease>, StoreError> {
        let request = self.client.request(ListRequest { filters: vec![format!("labels.\"{RETAINS}\"")] });
        let listed = self
            .client
            .call(self.client.leases().list(request))
            .await
            .map_err(|status| self.client.store_error(&status))?;
        let mut leases = Vec::new();
        for lease in listed.leases {
            let time = |label| lease.labels.get(label).and_then(|time| time.parse::<jiff::Timestamp>().ok());
            let (manifest, expires) = (lease.labels.get(RETAINS).and_then(|digest| digest.parse().ok()), time(EXPIRES));
            let last_use = time(LAST_USE).map(SystemTime::from);
            let (Some(manifest), Some(expires)) = (manifest, expires.map(SystemTime::from)) else { continue };
            let pin = Pin(lease.id);
            let layers = self.layers_of(&pin).await?.into_iter().collect();
            leases.push(LayerLease { pin, manifest, last_use, expires, layers });
        }
        Ok(leases)
    }

    async fn lease_layers(
        &self,
        manifest: Digest,
        last_use: Option<SystemTime>,
        expires: SystemTime,
    ) -> Result<Pin, StoreError> {
        let text = |time: SystemTime| {
            let time = jiff::Timestamp::try_from(time);
            time.map(|time| time.to_string()).map_err(|error| StoreError::Other(format!("a lease's time: {error}")))
        };
        let mut labels = HashMap::from([
            (EXPIRES.to_owned(), text(expires)?),
            (RETAINS.to_owned(), manifest.to_string()),
            // containerd reads only the key; some clients drop an empty value.
            (FLAT.to_owned(), "true".to_owned()),
        ]);
        if let Some(last_use) = last_use {
            labels.insert(LAST_USE.to_owned(), text(last_use)?);
        }
        let id = format!("lighterman-layers-{:032x}", rand::random::<u128>());
        let request = self.client.request(CreateRequest { id: id.clone(), labels });
        self.client
            .call(self.client.leases().create(request))
            .await
            .map_err(|status| self.client.store_error(&status))?;
        Ok(Pin(id))
    }

    async fn add_layer(&self, pin: &Pin, layer: Digest) -> Result<(), StoreError> {
        self.add_to_pin(pin, "content".to_owned(), layer.to_string()).await
    }

    async fn end_lease(&self, pin: Pin, collect: bool) -> Result<(), StoreError> {
        self.delete_lease(&pin, collect).await
    }

    async fn has_layer_references(&self, manifest: Digest) -> Result<bool, StoreError> {
        Ok(self.info(manifest).await?.is_some_and(|info| has_layers(&info.labels)))
    }

    async fn origins(&self, manifest: Digest) -> Result<Vec<Origin>, StoreError> {
        Ok(self.info(manifest).await?.map(|info| origins(&info.labels)).unwrap_or_default())
    }

    fn content_events(&self) -> broadcast::Receiver<ContentEvent> {
        self.state.events.subscribe()
    }
}
