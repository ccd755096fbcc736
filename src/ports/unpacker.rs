//! Unpacks layers ahead of the runtime.

use async_trait::async_trait;

use super::{Pin, StoreError};
use crate::oci::{Digest, StackedLayer};

/// Unpacks layers of a [`super::ContentStore`] into the runtime's snapshotter. An optimization: the
/// runtime unpacks every other layer itself.
#[async_trait]
pub trait Unpacker: Send + Sync + 'static {
    /// Verifies that layers can be unpacked on this node.
    ///
    /// # Errors
    /// [`UnpackError::Unsupported`], with the reason, and [`UnpackError::Store`].
    async fn ensure_supported(&self) -> Result<(), UnpackError>;

    /// Whether the layer is unpacked already. The answer pins nothing.
    ///
    /// # Errors
    /// [`UnpackError::Unsupported`] and [`UnpackError::Store`].
    async fn is_unpacked(&self, layer: &StackedLayer) -> Result<bool, UnpackError>;

    /// Unpacks a layer on top of an unpacked parent. The pin holds the snapshot, also an older one.
    /// A large layer takes minutes. Dropping the future aborts the work, and the partial snapshot
    /// is removed soon after.
    ///
    /// # Errors
    /// [`UnpackError`]. No error leaves a partial snapshot.
    async fn unpack(&self, layer: &StackedLayer, pin: &Pin) -> Result<UnpackOutcome, UnpackError>;

    /// Keeps the snapshots up to the layer with this chain ID (see [`StackedLayer::chain_id`]) as
    /// long as the image's configuration exists.
    ///
    /// # Errors
    /// [`UnpackError::Unsupported`], and [`UnpackError::Store`] with [`StoreError::Absent`] for an
    /// absent configuration.
    async fn keep_snapshot(&self, config: Digest, top: Digest) -> Result<(), UnpackError>;
}

/// Result of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnpackOutcome {
    /// This call unpacked the layer.
    Unpacked,
    /// The layer was unpacked before, for another image or by the runtime.
    AlreadyUnpacked,
}

/// Reason of a layer that is not unpacked. The runtime may still unpack it.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// No layer can be unpacked on this node; the text has the reason.
    #[error("layers are not unpacked here: {0}")]
    Unsupported(String),
    /// The layer differs from the image's configuration. No runtime accepts the layer either.
    #[error("the layer unpacks to {actual}, but the image's configuration has {expected}")]
    DiffIdMismatch {
        /// Digest in the configuration.
        expected: Digest,
        /// Digest of the unpacked layer.
        actual: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
