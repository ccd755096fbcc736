//! Admission by a list of PeerIds: for the demo, for tests, and for clusters without ServiceAccount tokens.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::model::{Credential, PeerId};
use crate::ports::{Admission, Admitted, Refusal};

/// Admits the peers of a list, and nobody else.
#[derive(Debug, Clone)]
pub struct StaticAdmission {
    peers: BTreeSet<PeerId>,
    /// Kept so that receivers do not see it closed; there is never another credential.
    renewals: watch::Sender<u64>,
}

impl StaticAdmission {
    /// Admits exactly these.
    pub fn new(peers: impl IntoIterator<Item = PeerId>) -> Self {
        Self { peers: peers.into_iter().collect(), renewals: watch::Sender::default() }
    }
}

#[async_trait]
impl Admission for StaticAdmission {
    async fn credential(&self) -> Result<Credential, Refusal> {
        Ok(Credential::default())
    }

    fn renewed(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<Admitted, Refusal> {
        self.vouch(peer, credential)
    }

    fn vouch(&self, peer: PeerId, _: &Credential) -> Result<Admitted, Refusal> {
        match self.peers.contains(&peer) {
            true => Ok(Admitted { node: None, pod: None, until: Duration::MAX, on_grace: false }),
            false => Err(Refusal::Denied(format!("{peer} is not on the list"))),
        }
    }
}
