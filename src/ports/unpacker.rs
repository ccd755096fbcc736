//! Unpacking layers before the runtime would do it.

use async_trait::async_trait;

use super::{Pin, StoreError};
use crate::oci::{Digest, StackedLayer};

/// Unpacks layers of a [`super::ContentStore`] to where its runtime looks for them. An optimisation: what is not unpacked here, the runtime
/// unpacks itself.
#[async_trait]
pub trait Unpacker: Send + Sync + 'static {
    /// Whether layers are unpacked here at all.
    ///
    /// # Errors
    /// [`UnpackError::Unsuited`], which says why not, and [`UnpackError::Store`].
    async fn ensure_supported(&self) -> Result<(), UnpackError>;

    /// Whether the layer is unpacked already. Nothing holds it.
    ///
    /// # Errors
    /// [`UnpackError::Unsuited`] and [`UnpackError::Store`].
    async fn is_unpacked(&self, layer: &StackedLayer) -> Result<bool, UnpackError>;

    /// Unpacks a layer on top of the one beneath it, which is unpacked already. The pin holds the result, also when it was there before.
    /// It takes as long as it takes, minutes perhaps: dropping the future ends it, and what was half unpacked is removed soon after.
    ///
    /// # Errors
    /// [`UnpackError`]. Nothing half unpacked is left by any of them.
    async fn unpack(&self, layer: &StackedLayer, pin: &Pin) -> Result<UnpackOutcome, UnpackError>;

    /// From now on what was unpacked up to the layer of this name (see [`StackedLayer::chain_id`]) lives as long as the image's configuration.
    ///
    /// # Errors
    /// [`UnpackError::Unsuited`], and [`UnpackError::Store`] with [`StoreError::Absent`] when the configuration is not there.
    async fn keep_snapshot(&self, config: Digest, top: Digest) -> Result<(), UnpackError>;
}

/// How a layer came to be unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnpackOutcome {
    /// By this call.
    Unpacked,
    /// It was before, for another image or by the runtime itself.
    AlreadyUnpacked,
}

/// Why a layer was not unpacked. The runtime may still do it.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// No layer is unpacked here; says why.
    #[error("layers are not unpacked here: {0}")]
    Unsupported(String),
    /// The layer is not the one that the image's configuration names. No runtime takes it either.
    #[error("the layer unpacks to {actual}, and the image's configuration says {expected}")]
    DiffIdMismatch {
        /// What the configuration says.
        expected: Digest,
        /// What it hashes to.
        actual: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
