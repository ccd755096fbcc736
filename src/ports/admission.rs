//! Admission of peers by their credentials.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::model::{Credential, NodeName, PeerId};

pub use crate::decide::clock_skew::LEEWAY;

/// Verdict: the key belongs to an agent of this cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmittedPeer {
    /// Node that the credential names, if any.
    pub node: Option<NodeName>,
    /// UID of the pod that the credential is bound to, if any.
    pub pod: Option<String>,
    /// End of the verdict since 1970, unless renewed; [`Duration::MAX`] for a verdict without end.
    pub valid_until: Duration,
    /// The credential has expired and counts only because no new one can be issued at present.
    pub is_in_grace: bool,
}

/// Verifies that the owner of a key is an agent of this cluster.
#[async_trait]
pub trait Admission: Send + Sync + 'static {
    /// Credential that this agent presents to peers.
    ///
    /// # Errors
    /// [`Rejection::Undecided`] while there is no credential.
    async fn credential(&self) -> Result<Credential, Rejection>;

    /// Changes when this agent has to present a new credential. Open as long as the admission
    /// exists.
    fn credential_changes(&self) -> watch::Receiver<u64>;

    /// Verifies the credential that `peer` presented; the TLS handshake proved the peer's key. May
    /// call the API server and then take seconds.
    ///
    /// # Errors
    /// [`Rejection`] of the credential.
    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection>;

    /// Verifies a credential that another member relayed. The caller verifies that `peer` signed
    /// the relayed message. Returns at once, from cached state: event loops call this function.
    ///
    /// # Errors
    /// [`Rejection`]. After [`Rejection::Undecided`] the missing keys are being fetched; a retry is
    /// worthwhile after seconds.
    fn admit_relayed(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection>;
}

/// Reason of a rejection. The rejected peer receives the text, so no text helps an intruder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The key is not listed, or the credential is not valid for this key.
    #[error("not admitted: {0}")]
    Denied(String),
    /// Keys or services for a verdict are missing at present; retry.
    #[error("cannot decide now: {0}")]
    Undecided(String),
}
