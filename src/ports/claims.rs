//! Claims: Kubernetes Leases, one per digest, for what should happen once.
//!
//! The port only reads and writes; what to do with what was read is decided in [`crate::decide::claim`].

use std::time::SystemTime;

use async_trait::async_trait;

use crate::model::{LeaseSnapshot, LeaseVersion};
use crate::oci::Digest;

/// Reads and writes the Lease of a digest.
#[async_trait]
pub trait Claims: Send + Sync + 'static {
    /// The Lease as it is; `None` when there is none.
    ///
    /// # Errors
    /// [`ClaimError::Unavailable`]; a claim never blocks a recovery, so callers go on without.
    async fn read(&self, digest: Digest) -> Result<Option<LeaseSnapshot>, ClaimError>;

    /// Makes the Lease, held by this agent, if there is none.
    ///
    /// # Errors
    /// [`ClaimError::Lost`] when somebody was faster.
    async fn create(&self, digest: Digest, now: SystemTime) -> Result<(), ClaimError>;

    /// Takes over, or renews, the Lease that was read.
    ///
    /// # Errors
    /// [`ClaimError::Lost`] when it changed since: the resource version is the fence.
    async fn update(&self, digest: Digest, read: &LeaseVersion, now: SystemTime) -> Result<(), ClaimError>;

    /// Deletes the Lease if this agent still holds it.
    ///
    /// # Errors
    /// [`ClaimError::Unavailable`]; the Lease then expires by itself and is swept.
    async fn release(&self, digest: Digest) -> Result<(), ClaimError>;
}

/// Why a claim could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Somebody else has it, or changed it first.
    #[error("somebody else was faster")]
    Lost,
    /// The API server does not answer, or does not let us.
    #[error("claims are out of reach: {0}")]
    Unavailable(String),
}
