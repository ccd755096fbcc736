//! The cryptography that the protocol needs: this agent's key, others' keys, and the agent's admission.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use libp2p::identity::{Keypair, ed25519};

use crate::decide::gossip::{Doubt, Notary, Vouched};
use crate::model::{Credential, PeerId, Signature};
use crate::ports::{Admission, Refusal};

/// Signs and checks with ed25519 keys; whose keys are agents', the admission says.
pub(super) struct Keys {
    own: Keypair,
    admission: Arc<dyn Admission>,
}

impl Keys {
    pub(super) fn new(own: Keypair, admission: Arc<dyn Admission>) -> Self {
        Self { own, admission }
    }
}

impl Notary for Keys {
    fn sign(&self, message: &[u8]) -> Signature {
        let signature = self.own.sign(message).expect("an ed25519 key signs anything");
        <[u8; 64]>::try_from(signature).expect("an ed25519 signature has 64 bytes").into()
    }

    fn is_signed(&self, by: PeerId, message: &[u8], signature: &Signature) -> bool {
        let key = ed25519::PublicKey::try_from_bytes(by.public_key());
        key.is_ok_and(|key| key.verify(message, &signature.to_bytes()))
    }

    fn vouch(&self, peer: PeerId, credential: &Credential) -> Result<Vouched, Doubt> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        vouched(self.admission.as_ref(), peer, credential, now)
    }
}

/// What the admission says, as the protocol takes it. `now` is since 1970.
fn vouched(admission: &dyn Admission, peer: PeerId, credential: &Credential, now: Duration) -> Result<Vouched, Doubt> {
    match admission.vouch(peer, credential) {
        Ok(admitted) => {
            Ok(Vouched { node: admitted.node, pod: admitted.pod, life: admitted.until.saturating_sub(now) })
        }
        Err(Refusal::Denied(_)) => Err(Doubt::Denied),
        Err(Refusal::CannotTell(_)) => Err(Doubt::CannotTell),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::AllBut;
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn what_a_key_signed_is_its_and_nobody_elses() {
        let identity = Identity::generate();
        let keys = Keys::new(identity.keypair(), Arc::new(AllBut::default()));
        let signature = keys.sign(b"text");
        assert!(keys.is_signed(identity.peer_id(), b"text", &signature));
        assert!(!keys.is_signed(identity.peer_id(), b"texts", &signature));
        assert!(!keys.is_signed(Identity::generate().peer_id(), b"text", &signature));
        let Signature(r, mut s) = signature;
        s[0] ^= 1;
        assert!(!keys.is_signed(identity.peer_id(), b"text", &Signature(r, s)));
    }

    #[test]
    fn a_verdict_that_has_ended_leaves_no_life() {
        let peer = Identity::generate().peer_id();
        let life = |now| vouched(&AllBut::default(), peer, &Credential::default(), now).unwrap().life;
        assert_eq!(life(AllBut::UNTIL - Duration::from_secs(5)), Duration::from_secs(5));
        assert_eq!(life(AllBut::UNTIL + Duration::from_secs(5)), Duration::ZERO);
    }
}
