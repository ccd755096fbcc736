//! Cheap signatures and credentials: a hash over the signer's PeerId and the message. No simulated
//! node computes the hash of another node, so forgeries are detected as with real signatures.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use lighterman::decide::gossip::{CredentialRejection, CredentialVerifier, VerifiedCredential};
use lighterman::model::{Credential, PeerId, Signature};

/// The key of an agent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SimulatedKey(pub(crate) PeerId);

/// Lifetime of a ServiceAccount token.
pub(crate) const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);

/// The credential of this PeerId, issued at this time.
pub(crate) fn credential(peer: PeerId, at: u64) -> Credential {
    Credential::new(format!("{at} {:016x}", hash(peer, &at.to_be_bytes())))
}

fn hash(signer: PeerId, message: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    signer.hash(&mut hasher);
    message.hash(&mut hasher);
    hasher.finish()
}

fn signature(signer: PeerId, message: &[u8]) -> Signature {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&hash(signer, message).to_le_bytes());
    Signature::from(bytes)
}

impl CredentialVerifier for SimulatedKey {
    fn sign(&self, message: &[u8]) -> Signature {
        signature(self.0, message)
    }

    fn is_signed(&self, signer: PeerId, message: &[u8], given: &Signature) -> bool {
        *given == signature(signer, message)
    }

    fn verify_credential(
        &self,
        peer: PeerId,
        presented: &Credential,
    ) -> Result<VerifiedCredential, CredentialRejection> {
        let (at, _) = presented.expose().split_once(' ').ok_or(CredentialRejection::Rejected)?;
        let at = at.parse().map_err(|_| CredentialRejection::Rejected)?;
        if *presented == credential(peer, at) {
            Ok(VerifiedCredential { node: None, pod: None, lifetime: TOKEN_LIFETIME })
        } else {
            Err(CredentialRejection::Rejected)
        }
    }
}
