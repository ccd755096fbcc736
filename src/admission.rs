//! Admission by a list of PeerIds: for the demo, for tests, and for clusters without ServiceAccount tokens.
//!
//! The TLS handshake has proved the key; the list says which keys are ours.

use std::collections::BTreeSet;

use async_trait::async_trait;

use crate::model::{Credential, NodeName, PeerId};
use crate::ports::{Admission, Refusal};

/// Admits the peers of a list, and nobody else.
#[derive(Debug, Clone)]
pub struct StaticAdmission(BTreeSet<PeerId>);

impl StaticAdmission {
    /// Admits exactly these.
    pub fn new(peers: impl IntoIterator<Item = PeerId>) -> Self {
        Self(peers.into_iter().collect())
    }
}

#[async_trait]
impl Admission for StaticAdmission {
    async fn credential(&self) -> Result<Credential, Refusal> {
        Ok(Credential::default())
    }

    async fn admit(&self, peer: PeerId, _: &Credential) -> Result<Option<NodeName>, Refusal> {
        if self.0.contains(&peer) { Ok(None) } else { Err(Refusal::Denied(format!("{peer} is not on the list"))) }
    }
}
