//! The cryptography of gossip: this agent's key, other agents' keys, and the admission of
//! credentials.

use std::sync::Arc;
use std::time::Duration;

use libp2p::identity::{Keypair, ed25519};

use crate::decide::gossip::{CredentialRejection, CredentialVerifier, VerifiedCredential};
use crate::model::{Credential, PeerId, Signature};
use crate::ports::{Admission, Rejection};
use crate::util::clock;

/// Signs and verifies with ed25519 keys. The admission decides which keys belong to agents.
pub(super) struct GossipCrypto {
    keypair: Keypair,
    admission: Arc<dyn Admission>,
}

impl GossipCrypto {
    pub(super) fn new(keypair: Keypair, admission: Arc<dyn Admission>) -> Self {
        Self { keypair, admission }
    }
}

impl CredentialVerifier for GossipCrypto {
    fn sign(&self, message: &[u8]) -> Signature {
        let signature = self.keypair.sign(message).expect("an ed25519 key signs anything");
        <[u8; 64]>::try_from(signature).expect("an ed25519 signature has 64 bytes").into()
    }

    fn is_signed(&self, by: PeerId, message: &[u8], signature: &Signature) -> bool {
        let key = ed25519::PublicKey::try_from_bytes(by.public_key());
        key.is_ok_and(|key| key.verify(message, &signature.to_bytes()))
    }

    fn verify_credential(
        &self,
        peer: PeerId,
        credential: &Credential,
    ) -> Result<VerifiedCredential, CredentialRejection> {
        let now = clock::unix_time();
        verify_credential(self.admission.as_ref(), peer, credential, now)
    }
}

/// Converts the admission's verdict for the protocol. `now` is the time since 1970.
fn verify_credential(
    admission: &dyn Admission,
    peer: PeerId,
    credential: &Credential,
    now: Duration,
) -> Result<VerifiedCredential, CredentialRejection> {
    match admission.admit_relayed(peer, credential) {
        Ok(admitted) => Ok(VerifiedCredential {
            node: admitted.node,
            pod: admitted.pod,
            lifetime: admitted.valid_until.saturating_sub(now),
        }),
        Err(Rejection::Denied(_)) => Err(CredentialRejection::Rejected),
        Err(Rejection::Undecided(_)) => Err(CredentialRejection::Undecided),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::DenyListAdmission;
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn a_signature_verifies_with_its_own_key_alone() {
        let identity = Identity::generate();
        let crypto = GossipCrypto::new(identity.keypair(), Arc::new(DenyListAdmission::default()));
        let signature = crypto.sign(b"text");
        assert!(crypto.is_signed(identity.peer_id(), b"text", &signature));
        assert!(!crypto.is_signed(identity.peer_id(), b"texts", &signature));
        assert!(!crypto.is_signed(Identity::generate().peer_id(), b"text", &signature));
        let Signature(r, mut s) = signature;
        s[0] ^= 1;
        assert!(!crypto.is_signed(identity.peer_id(), b"text", &Signature(r, s)));
    }

    #[test]
    fn an_expired_verdict_has_no_life_left() {
        let peer = Identity::generate().peer_id();
        let life =
            |now| verify_credential(&DenyListAdmission::default(), peer, &Credential::default(), now).unwrap().lifetime;
        assert_eq!(life(DenyListAdmission::UNTIL - Duration::from_secs(5)), Duration::from_secs(5));
        assert_eq!(life(DenyListAdmission::UNTIL + Duration::from_secs(5)), Duration::ZERO);
    }
}
