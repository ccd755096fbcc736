//! Leases by which layers outlive their unpacking, and the events that trigger a lease.

use std::collections::BTreeSet;
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::sync::broadcast;

use super::{Pin, StoreError};
use crate::oci::{Digest, Repository};

/// The lease that retains layers of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLease {
    /// The lease.
    pub pin: Pin,
    /// Manifest of the layers.
    pub manifest: Digest,
    /// Last use of the image before the lease was created; `None` for an image that no pod used.
    pub last_use: Option<SystemTime>,
    /// Time at which the store drops the lease.
    pub expires: SystemTime,
    /// Layers that the lease names, present or absent.
    pub layers: BTreeSet<Digest>,
}

/// Change of a store's content, sent at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentEvent {
    /// A blob was committed. The writer's own lease still holds the blob. containerd sends this
    /// event from 2.1 on.
    Committed {
        /// Digest of the blob.
        digest: Digest,
        /// Size in bytes.
        size: u64,
    },
    /// An image record was written or removed.
    Records,
    /// Events may have been missed: list everything.
    Missed,
}

/// Repository that the runtime recorded at a pull. containerd drops the registry's port, so an
/// origin is a hint about a manifest and never a permission.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The registry without the port, and without the brackets of an IPv6 address.
    host: String,
    /// The path of the repository.
    path: String,
}

impl Origin {
    /// The origin that a pull from this repository leaves.
    pub fn of(repository: &Repository) -> Self {
        Self::new(&repository.registry, &repository.path)
    }

    /// The origin of a registry, with or without the port, and a path.
    pub fn new(registry: &str, path: &str) -> Self {
        Self { host: without_port(registry).to_owned(), path: path.to_owned() }
    }
}

/// containerd records `[fd00::1]:5000` as `fd00::1` (Go's `URL.Hostname`). More than one colon
/// outside of brackets is an address without a port.
fn without_port(registry: &str) -> &str {
    match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => registry.split_once(':').filter(|(_, port)| !port.contains(':')).map_or(registry, |(host, _)| host),
    }
}

/// Leases on layers, in a store whose collector removes content without a lease and an image
/// record.
#[async_trait]
pub trait LayerLeases: Send + Sync + 'static {
    /// Every lease of this kind, also those of an earlier agent.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] and [`StoreError::Other`].
    async fn layer_leases(&self) -> Result<Vec<LayerLease>, StoreError>;

    /// Creates a lease without layers. The list of leases shows this manifest, last use and end, to
    /// the second.
    ///
    /// # Errors
    /// As [`LayerLeases::layer_leases`].
    async fn lease_layers(
        &self,
        manifest: Digest,
        last_use: Option<SystemTime>,
        expires: SystemTime,
    ) -> Result<Pin, StoreError>;

    /// Adds a layer to the lease. The layer may be absent: a layer that is committed later is held
    /// from the first moment. The lease does not hold content that the layer's own labels name.
    ///
    /// # Errors
    /// [`StoreError::Other`] when the lease is gone, and as [`LayerLeases::layer_leases`].
    async fn add_layer(&self, pin: &Pin, layer: Digest) -> Result<(), StoreError>;

    /// Deletes the lease. With `collect` the call returns after the collector removed content
    /// without another reference.
    ///
    /// # Errors
    /// As [`LayerLeases::layer_leases`]. A missing lease is no error.
    async fn end_lease(&self, pin: Pin, collect: bool) -> Result<(), StoreError>;

    /// Whether the manifest's labels hold the layers for as long as the image record exists.
    /// `false` for an absent manifest.
    ///
    /// # Errors
    /// As [`LayerLeases::layer_leases`].
    async fn has_layer_references(&self, manifest: Digest) -> Result<bool, StoreError>;

    /// Repositories that the manifest was pulled from, as far as the runtime recorded them.
    ///
    /// # Errors
    /// As [`LayerLeases::layer_leases`].
    async fn origins(&self, manifest: Digest) -> Result<Vec<Origin>, StoreError>;

    /// The events from now on. A slow receiver gets `Lagged`.
    fn content_events(&self) -> broadcast::Receiver<ContentEvent>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_has_neither_the_port_nor_the_brackets_of_its_registry() {
        let origin = |registry| Origin::new(registry, "team/app");
        for (registry, host) in [
            ("registry.test:5000", "registry.test"),
            ("registry.test", "registry.test"),
            ("10.0.0.1:5000", "10.0.0.1"),
            // As containerd 2.3.7 and 2.4.2 record them.
            ("[fd77::1]:5000", "fd77::1"),
            ("[fd77::1]", "fd77::1"),
            ("fd77::1", "fd77::1"),
        ] {
            assert_eq!(origin(registry), Origin { host: host.into(), path: "team/app".into() }, "{registry}");
        }
    }
}
