//! Who may join.

use async_trait::async_trait;

use crate::model::{Credential, NodeName, PeerId};

/// Decides whether the owner of a key is an agent of this cluster. The key itself has been proved by the TLS handshake.
#[async_trait]
pub trait Admission: Send + Sync + 'static {
    /// What this agent shows to others.
    ///
    /// # Errors
    /// [`Refusal::CannotTell`] while no credential can be had.
    async fn credential(&self) -> Result<Credential, Refusal>;

    /// Whether `peer`, showing `credential`, is admitted; the node's name where the credential vouches for it.
    ///
    /// # Errors
    /// [`Refusal`] when it is not.
    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<Option<NodeName>, Refusal>;
}

/// Why a peer is not admitted. The text goes to the refused peer as well, so it says nothing that helps an intruder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not on the list, or the credential is not good for this key.
    #[error("not admitted: {0}")]
    Denied(String),
    /// The means to decide are missing just now; try again.
    #[error("cannot decide now: {0}")]
    CannotTell(String),
}
