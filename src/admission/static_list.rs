//! Admission by a list of PeerIds: for the demo, for tests, and for clusters without ServiceAccount
//! tokens.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::model::{Credential, PeerId};
use crate::ports::{Admission, AdmittedPeer, Rejection};

/// Admits exactly the peers of a list.
#[derive(Debug, Clone)]
pub struct StaticAdmission {
    peers: BTreeSet<PeerId>,
    /// Keeps the receivers open; the credential never changes.
    renewals: watch::Sender<u64>,
}

impl StaticAdmission {
    /// An admission of `peers`.
    pub fn new(peers: impl IntoIterator<Item = PeerId>) -> Self {
        Self { peers: peers.into_iter().collect(), renewals: watch::Sender::default() }
    }
}

#[async_trait]
impl Admission for StaticAdmission {
    async fn credential(&self) -> Result<Credential, Rejection> {
        Ok(Credential::default())
    }

    fn credential_changes(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        self.admit_relayed(peer, credential)
    }

    fn admit_relayed(&self, peer: PeerId, _: &Credential) -> Result<AdmittedPeer, Rejection> {
        match self.peers.contains(&peer) {
            true => Ok(AdmittedPeer { node: None, pod: None, valid_until: Duration::MAX, is_in_grace: false }),
            false => Err(Rejection::Denied(format!("{peer} is not on the list of admitted peers"))),
        }
    }
}
