//! Asking a registry: whether it is there, what a tag means now, and for layers that a node discarded. The content of a
//! recovery comes from peers.

use std::time::Duration;

use async_trait::async_trait;

use super::{BlobSink, PullSecret, StoreError};
use crate::model::OutageKind;
use crate::oci::{BlobProof, Digest, Repository};

/// Asks registries. Every answer is bounded in size and time.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Whether anything that speaks HTTP answers there, in whichever words (a 401 is an answer too).
    ///
    /// # Errors
    /// [`RegistryError::Down`].
    async fn ping(&self, registry: &str) -> Result<(), RegistryError>;

    /// The digest that a tag has now, asked for with each of the secrets that has credentials for this registry, or as nobody.
    ///
    /// # Errors
    /// [`RegistryError`].
    async fn resolve(
        &self,
        repository: &Repository,
        tag: &str,
        secrets: &[PullSecret],
    ) -> Result<Digest, RegistryError>;

    /// Streams a blob of `size` bytes into `sink`, in order, and proves the digest. Credentials are
    /// tried as in [`Registry::resolve`]. After an error the bytes in `sink` must be thrown away.
    ///
    /// # Errors
    /// [`BlobError`].
    async fn fetch_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        size: u64,
        secrets: &[PullSecret],
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, RegistryFetchError>;
}

/// Why a blob did not come from a registry.
#[derive(Debug, thiserror::Error)]
pub enum RegistryFetchError {
    /// The registry accepts none of the credentials, and no request without any.
    #[error("{0} denies the blob")]
    Denied(String),
    /// The registry does not have the blob.
    #[error("{0} does not have the blob")]
    Gone(String),
    /// 429.
    #[error("{registry} limits the rate")]
    RateLimited {
        /// The registry.
        registry: String,
        /// The pause that the registry asks for.
        retry_after: Option<Duration>,
    },
    /// The registry, its token server or its storage failed.
    #[error("{registry} failed: {kind}")]
    Down {
        /// The registry.
        registry: String,
        /// How.
        kind: OutageKind,
    },
    /// The registry sent something else than the blob.
    #[error("{registry} sent something else than the blob: {reason}")]
    WrongBytes {
        /// The registry.
        registry: String,
        /// The difference.
        reason: String,
    },
    /// The sink failed.
    #[error("writing the blob: {0}")]
    Sink(#[from] StoreError),
}

/// Why a registry did not say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// It is not there.
    #[error("{registry} cannot be reached: {kind}")]
    Down {
        /// Which one.
        registry: String,
        /// How it fails.
        kind: OutageKind,
    },
    /// 429.
    #[error("{0} limits our rate")]
    RateLimited(String),
    /// 401 or 403.
    #[error("{0} denies it")]
    Denied(String),
    /// 404.
    #[error("{0} does not have it")]
    NotFound(String),
    /// It answers, but not as a registry does (an HTML page, a digest that is none, too much of anything).
    #[error("{registry} answers nonsense: {reason}")]
    InvalidResponse {
        /// Which one.
        registry: String,
        /// What is wrong with it.
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
