//! Asking a registry: whether it is there, and what a tag means now. Never for content; that comes from peers.

use async_trait::async_trait;

use super::PullSecret;
use crate::model::OutageKind;
use crate::oci::{Digest, Repository};

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
    Nonsense {
        /// Which one.
        registry: String,
        /// What is wrong with it.
        reason: String,
    },
}
