//! The cryptography of the protocol: signatures, and the verification of credentials.

use std::time::Duration;

use crate::model::{Credential, NodeName, PeerId, Signature};

/// The cryptography that the protocol uses.
pub trait CredentialVerifier {
    /// Signs with this agent's key.
    fn sign(&self, message: &[u8]) -> Signature;
    /// Whether the key's owner signed the message.
    fn is_signed(&self, signer: PeerId, message: &[u8], signature: &Signature) -> bool;
    /// Verifies that the credential admits the key.
    ///
    /// # Errors
    /// [`CredentialRejection`] if the credential does not admit the key, or no decision is
    /// possible.
    fn verify_credential(
        &self,
        peer: PeerId,
        credential: &Credential,
    ) -> Result<VerifiedCredential, CredentialRejection>;
}

/// The contents of a credential that admits its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedCredential {
    /// The node that the credential names, if any. This node overrides the agent's statement.
    pub node: Option<NodeName>,
    /// UID of the pod that the credential is bound to, if any.
    pub pod: Option<String>,
    /// Remaining validity.
    pub lifetime: Duration,
}

/// Why a credential does not admit a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CredentialRejection {
    /// The credential is not good for this key.
    Rejected,
    /// No decision is possible now.
    Undecided,
}
