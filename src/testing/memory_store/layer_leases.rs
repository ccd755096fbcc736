//! Leases on layers in memory.

use std::collections::HashSet;
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::{MemoryStore, PinState};
use crate::oci::Digest;
use crate::ports::{ChildKind, ContentEvent, LayerLease, LayerLeases, Origin, Pin, Pins, StoreError};

/// More than a test commits before the receiver reads.
pub(super) const EVENTS_QUEUED: usize = 256;

/// Labels of a lease on layers.
#[derive(Clone)]
pub(super) struct LayerLeaseLabels {
    manifest: Digest,
    last_use: Option<SystemTime>,
    expires: SystemTime,
}

impl MemoryStore {
    /// Without a receiver the event is lost.
    pub(super) fn publish(&self, event: ContentEvent) {
        let _ = self.events.send(event);
    }
}

#[async_trait]
impl LayerLeases for MemoryStore {
    async fn layer_leases(&self) -> Result<Vec<LayerLease>, StoreError> {
        let state = self.state();
        let lease = |(name, pin_state): (&String, &PinState)| {
            let LayerLeaseLabels { manifest, last_use, expires } = pin_state.labels.clone()?;
            let layers = pin_state.blobs.iter().copied().collect();
            Some(LayerLease { pin: Pin(name.clone()), manifest, last_use, expires, layers })
        };
        Ok(state.pins.iter().filter_map(lease).collect())
    }

    async fn lease_layers(
        &self,
        manifest: Digest,
        last_use: Option<SystemTime>,
        expires: SystemTime,
    ) -> Result<Pin, StoreError> {
        let mut state = self.state();
        state.pins_made += 1;
        let pin = Pin(format!("layers-{}", state.pins_made));
        let life = expires.duration_since(SystemTime::now()).unwrap_or_default();
        let labels = Some(LayerLeaseLabels { manifest, last_use, expires });
        let pin_state =
            PinState { until: Instant::now().checked_add(life), blobs: HashSet::new(), labels, ..PinState::default() };
        state.pins.insert(pin.0.clone(), pin_state);
        Ok(pin)
    }

    async fn add_layer(&self, pin: &Pin, layer: Digest) -> Result<(), StoreError> {
        let unknown_lease = || StoreError::Other(format!("the lease {} is gone", pin.0));
        self.state().pins.get_mut(&pin.0).ok_or_else(unknown_lease)?.blobs.insert(layer);
        Ok(())
    }

    async fn end_lease(&self, pin: Pin, collect: bool) -> Result<(), StoreError> {
        self.release(pin).await?;
        if collect {
            self.collect();
        }
        Ok(())
    }

    async fn has_layer_references(&self, manifest: Digest) -> Result<bool, StoreError> {
        let state = self.state();
        let children = state.blobs.get(&manifest).map(|blob| &blob.children);
        Ok(children.is_some_and(|children| children.iter().any(|child| child.kind == ChildKind::Layer)))
    }

    async fn origins(&self, manifest: Digest) -> Result<Vec<Origin>, StoreError> {
        let state = self.state();
        let sources = state.blobs.get(&manifest).into_iter().flat_map(|blob| &blob.sources);
        Ok(sources.map(Origin::of).collect())
    }

    fn content_events(&self) -> broadcast::Receiver<ContentEvent> {
        self.events.subscribe()
    }
}
