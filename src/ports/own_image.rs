//! The agent's own DaemonSet, and the protection of its images.

use async_trait::async_trait;

use super::{ClusterError, StoreError};
use crate::decide::own_image::{OwnImages, Protection};
use crate::oci::Reference;

/// Reads the DaemonSet that this agent belongs to.
#[async_trait]
pub trait OwnDaemonSet: Send + Sync + 'static {
    /// The images of the agent's pod and of its DaemonSet. One small read of one object; no read
    /// before the agent's pod was seen.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn own_images(&self) -> Result<OwnImages, ClusterError>;
}

/// Keeps images of a store from the kubelet's image collection. Only image records count that carry
/// this program's mark; a protection by another program is never changed.
#[async_trait]
pub trait ProtectedImages: Send + Sync + 'static {
    /// The names of the image records that are protected, by this program or by another one.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] and [`StoreError::Other`].
    async fn protected_images(&self) -> Result<Protection, StoreError>;

    /// Protects the image record of this name. The protection outlives the agent.
    ///
    /// # Errors
    /// [`StoreError::Other`] when there is no such record, and as
    /// [`ProtectedImages::protected_images`].
    async fn protect_image(&self, image: &Reference) -> Result<(), StoreError>;

    /// Ends the protection of the image record of this name, where the record carries the mark.
    ///
    /// # Errors
    /// As [`ProtectedImages::protected_images`]. A record that is gone is no error.
    async fn release_image(&self, image: &Reference) -> Result<(), StoreError>;
}
