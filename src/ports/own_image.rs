//! The agent's own DaemonSet, and the protection of its images.

use async_trait::async_trait;

use super::{ClusterError, StoreError};
use crate::decide::own_image::{OwnImages, Protection};
use crate::oci::Reference;

/// Reads the DaemonSet that this agent belongs to.
#[async_trait]
pub trait OwnDaemonSet: Send + Sync + 'static {
    /// Images of the agent's pod and of its DaemonSet. Costs one small read of one object, and no
    /// read before the agent's pod was seen.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn own_images(&self) -> Result<OwnImages, ClusterError>;
}

/// Protects images of a store from the kubelet's image collection. Only image records with this
/// program's mark count; another program's protection never changes.
#[async_trait]
pub trait ProtectedImages: Send + Sync + 'static {
    /// Names of the protected image records, whichever program protects them.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] and [`StoreError::Other`].
    async fn protected_images(&self) -> Result<Protection, StoreError>;

    /// Protects the image record of this name. The protection outlives the agent.
    ///
    /// # Errors
    /// [`StoreError::Other`] without such a record, and as [`ProtectedImages::protected_images`].
    async fn protect_image(&self, image: &Reference) -> Result<(), StoreError>;

    /// Ends the protection of the image record of this name, if the record carries the mark.
    ///
    /// # Errors
    /// As [`ProtectedImages::protected_images`]. A missing record is no error.
    async fn release_image(&self, image: &Reference) -> Result<(), StoreError>;
}
