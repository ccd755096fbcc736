//! Claims: Kubernetes Leases, one per digest, for work that one agent should do.
//!
//! The port only reads and writes; [`crate::decide::claim`] decides.

use std::time::SystemTime;

use async_trait::async_trait;

use crate::model::{LeaseSnapshot, LeaseVersion};
use crate::oci::Digest;

/// Reads and writes the Lease of a digest.
#[async_trait]
pub trait Claims: Send + Sync + 'static {
    /// Current Lease; `None` where no Lease exists.
    ///
    /// # Errors
    /// [`ClaimError::Unavailable`]; callers go on without a claim, which never blocks a recovery.
    async fn read(&self, digest: Digest) -> Result<Option<LeaseSnapshot>, ClaimError>;

    /// Creates the Lease, held by this agent.
    ///
    /// # Errors
    /// [`ClaimError::Lost`] when the Lease exists already.
    async fn create(&self, digest: Digest, now: SystemTime) -> Result<(), ClaimError>;

    /// Takes over or renews the Lease that was read.
    ///
    /// # Errors
    /// [`ClaimError::Lost`] when the Lease changed since: the resource version is the fence.
    async fn update(&self, digest: Digest, version: &LeaseVersion, now: SystemTime) -> Result<(), ClaimError>;

    /// Deletes the Lease if this agent still holds it.
    ///
    /// # Errors
    /// [`ClaimError::Unavailable`]; the Lease then expires and is swept.
    async fn release(&self, digest: Digest) -> Result<(), ClaimError>;
}

/// Reason for a missing claim.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another agent holds the Lease, or changed it first.
    #[error("another agent wrote the Lease first")]
    Lost,
    /// The API server does not answer, or refuses.
    #[error("the Lease cannot be read or written: {0}")]
    Unavailable(String),
}
