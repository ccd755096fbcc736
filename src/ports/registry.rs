//! Requests to registries: liveness, the digest of a tag, and layers that a node discarded. Other
//! content of a recovery comes from peers.

use std::time::Duration;

use async_trait::async_trait;

use super::{BlobSink, PullSecret, StoreError};
use crate::model::OutageKind;
use crate::oci::{BlobProof, Digest, Repository};

/// Sends requests to registries. Every answer is bounded in size and time.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Whether any HTTP server answers, with whichever status (a 401 is an answer too).
    ///
    /// # Errors
    /// [`RegistryError::Down`].
    async fn ping(&self, registry: &str) -> Result<(), RegistryError>;

    /// Digest of a tag at present. The first request is anonymous. After a challenge every secret
    /// with credentials for this registry is tried, and last an anonymous token.
    ///
    /// # Errors
    /// [`RegistryError`].
    async fn resolve(
        &self,
        repository: &Repository,
        tag: &str,
        secrets: &[PullSecret],
    ) -> Result<Digest, RegistryError>;

    /// Streams a blob of `size` bytes into `sink`, in order, and verifies the digest. Credentials
    /// are tried as in [`Registry::resolve`]. After an error the caller must delete the bytes in
    /// `sink`.
    ///
    /// # Errors
    /// [`RegistryFetchError`].
    async fn fetch_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        size: u64,
        secrets: &[PullSecret],
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, RegistryFetchError>;
}

/// Reason of a failed blob transfer from a registry.
#[derive(Debug, thiserror::Error)]
pub enum RegistryFetchError {
    /// The registry rejects every credential, and anonymous requests.
    #[error("{0} denies the blob")]
    Denied(String),
    /// The registry does not have the blob.
    #[error("{0} does not have the blob")]
    Gone(String),
    /// Status 429.
    #[error("{registry} limits the rate")]
    RateLimited {
        /// Registry.
        registry: String,
        /// Pause from the header `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// The registry, its token server or its storage failed.
    #[error("{registry} failed: {kind}")]
    Down {
        /// Registry.
        registry: String,
        /// Kind of the failure.
        kind: OutageKind,
    },
    /// The registry sent other bytes than the blob.
    #[error("{registry} sent other bytes than the blob: {reason}")]
    WrongBytes {
        /// Registry.
        registry: String,
        /// Difference.
        reason: String,
    },
    /// The sink failed.
    #[error("writing the blob: {0}")]
    Sink(#[from] StoreError),
}

/// Reason of a failed request to a registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The registry cannot be reached.
    #[error("{registry} cannot be reached: {kind}")]
    Down {
        /// Registry.
        registry: String,
        /// Kind of the failure.
        kind: OutageKind,
    },
    /// Status 429.
    #[error("{0} limits the rate of requests")]
    RateLimited(String),
    /// Status 401 or 403.
    #[error("{0} denies access")]
    Denied(String),
    /// Status 404.
    #[error("{0} does not have the tag")]
    NotFound(String),
    /// No registry's answer (an HTML page, an invalid digest, an oversized body).
    #[error("{registry} sent an invalid response: {reason}")]
    InvalidResponse {
        /// Registry.
        registry: String,
        /// Fault of the response.
        reason: String,
    },
}

impl From<RegistryError> for RegistryFetchError {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Down { registry, kind } => Self::Down { registry, kind },
            RegistryError::RateLimited(registry) => Self::RateLimited { registry, retry_after: None },
            RegistryError::Denied(registry) => Self::Denied(registry),
            RegistryError::NotFound(registry) => Self::Gone(registry),
            RegistryError::InvalidResponse { registry, reason } => Self::WrongBytes { registry, reason },
        }
    }
}
