//! Who may join.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::model::{Credential, NodeName, PeerId};

pub use crate::decide::clock_skew::LEEWAY;

/// A verdict: this key is an agent of this cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmittedPeer {
    /// Its node, where the credential vouches for it.
    pub node: Option<NodeName>,
    /// The UID of the pod that the credential is bound to, where it is.
    pub pod: Option<String>,
    /// The moment, since 1970, from which the verdict is void unless it is renewed; [`Duration::MAX`] where it never ends.
    pub valid_until: Duration,
    /// The credential has expired and is accepted because nobody can be had who issues another.
    pub is_in_grace: bool,
}

/// Decides whether the owner of a key is an agent of this cluster.
#[async_trait]
pub trait Admission: Send + Sync + 'static {
    /// What this agent shows to others.
    ///
    /// # Errors
    /// [`Refusal::CannotTell`] while no credential can be had.
    async fn credential(&self) -> Result<Credential, Rejection>;

    /// Moves whenever another credential should be shown. Never closed before the admission itself is gone.
    fn credential_changes(&self) -> watch::Receiver<u64>;

    /// Whether `peer`, showing `credential` itself, is admitted: its key has been proved by the TLS handshake. May ask the API server,
    /// so it may take seconds.
    ///
    /// # Errors
    /// [`Refusal`] when it is not.
    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection>;

    /// The same for an introduction that another member relayed; whoever uses it checks that `peer` signed what came with it. At once
    /// and from what is known: called from an event loop.
    ///
    /// # Errors
    /// [`Refusal`]; what was missing to decide is being asked for, so that it is worth trying again in seconds.
    fn admit_relayed(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection>;
}

/// Why a peer is not admitted. The text goes to the refused peer as well, so it says nothing that helps an intruder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// Not on the list, or the credential is not good for this key.
    #[error("not admitted: {0}")]
    Denied(String),
    /// The means to decide are missing just now; try again.
    #[error("cannot decide now: {0}")]
    Undecided(String),
}
