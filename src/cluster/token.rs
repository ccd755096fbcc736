//! Whether a ServiceAccount token admits the owner of a key. Pure: keys and `now` are arguments.
//!
//! The token's audience is the key's own name, the PeerId that the TLS handshake has proved; so a token that was stolen from one
//! agent is of no use to another key.

use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::jwk::{EllipticCurve, Jwk};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;

use crate::model::{NodeName, PeerId};

/// What agents ask for ([`super::admission`]), and the longest life that a token may have: what was stolen is useless after it.
pub(super) const MAX_LIFE: Duration = Duration::from_secs(3600);

/// Two nodes' clocks, and the API server's, may differ by so much.
const LEEWAY: Duration = Duration::from_secs(60);

/// What [`crate::wire::Hello`] has room for. A ServiceAccount token has 1 to 2 KiB.
const MAX_BYTES: usize = 16 << 10;

/// The keys that a cluster signs its tokens with, and the name that it signs in.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    pub(super) issuer: String,
    pub(super) keys: Vec<Key>,
}

/// One of them, tied to the one algorithm that it is for.
#[derive(Debug, Clone)]
pub(super) struct Key {
    id: String,
    algorithm: Algorithm,
    key: DecodingKey,
}

/// Whose tokens admit.
#[derive(Debug, Clone)]
pub(super) struct Expectations {
    pub(super) k8s_namespace: String,
    pub(super) service_account: String,
}

/// What a good token says about the one who shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claims {
    /// The pod that the token dies with.
    pub(super) pod_name: String,
    /// Its node, which API servers tell from Kubernetes 1.30 on.
    pub(super) node: Option<NodeName>,
}

/// Why a token does not admit. Nothing of the token is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Flaw {
    #[error("no token was shown")]
    Absent,
    #[error("the token is longer than {MAX_BYTES} bytes")]
    TooLong,
    #[error("not a signed ServiceAccount token")]
    Malformed,
    #[error("the token is signed with another algorithm than its key is for")]
    Algorithm,
    #[error("the token is signed with a key that this cluster does not publish")]
    UnknownKey,
    #[error("the token's signature is wrong")]
    Signature,
    #[error("the token is another cluster's")]
    Issuer,
    #[error("the token is for another peer")]
    Audience,
    #[error("the token is of another ServiceAccount")]
    Subject,
    #[error("the token has expired, or the clocks differ")]
    Expired,
    #[error("the token is not valid yet, or the clocks differ")]
    TooEarly,
    #[error("the token lives longer than {} s", MAX_LIFE.as_secs())]
    LivesTooLong,
    #[error("the token is not bound to a pod")]
    Unbound,
}

impl Key {
    /// Takes a published key, unless it is of a kind that nothing here verifies, or is not for signatures.
    ///
    /// A symmetric key is never taken: whoever could read it could sign.
    pub(super) fn from_jwk(jwk: &Jwk) -> Option<Self> {
        let common = &jwk.common;
        if common.public_key_use.as_ref().is_some_and(|use_| *use_ != PublicKeyUse::Signature) {
            return None;
        }
        let algorithm = match (&jwk.algorithm, common.key_algorithm) {
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::RS256)) => Algorithm::RS256,
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::RS384)) => Algorithm::RS384,
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::RS512)) => Algorithm::RS512,
            (AlgorithmParameters::EllipticCurve(ec), Some(KeyAlgorithm::ES256)) if ec.curve == EllipticCurve::P256 => {
                Algorithm::ES256
            }
            (AlgorithmParameters::EllipticCurve(ec), Some(KeyAlgorithm::ES384)) if ec.curve == EllipticCurve::P384 => {
                Algorithm::ES384
            }
            _ => return None,
        };
        let key = DecodingKey::from_jwk(jwk).ok()?;
        Some(Self { id: common.key_id.clone()?, algorithm, key })
    }
}

/// Whether `token` admits `peer`.
pub(super) fn verify(
    token: &str,
    peer: PeerId,
    keys: &Keys,
    expectations: &Expectations,
    now: Duration,
) -> Result<Claims, Flaw> {
    let payload = open(token, &keys.keys)?;
    let Payload { iss, sub, aud, exp, iat, nbf, kubernetes } = payload;
    if iss != keys.issuer {
        return Err(Flaw::Issuer);
    }
    if !aud.contains(&peer.to_string()) {
        return Err(Flaw::Audience);
    }
    let Expectations { k8s_namespace, service_account } = expectations;
    if sub != format!("system:serviceaccount:{k8s_namespace}:{service_account}") {
        return Err(Flaw::Subject);
    }
    let (now, leeway) = (now.as_secs(), LEEWAY.as_secs());
    if exp.saturating_add(leeway) < now {
        return Err(Flaw::Expired);
    }
    if nbf.unwrap_or(iat).max(iat) > now + leeway {
        return Err(Flaw::TooEarly);
    }
    if exp.saturating_sub(iat) > MAX_LIFE.as_secs() + leeway {
        return Err(Flaw::LivesTooLong);
    }
    let Kubernetes { namespace, serviceaccount, pod, node } = kubernetes.ok_or(Flaw::Unbound)?;
    if namespace != *k8s_namespace || serviceaccount.name != *service_account {
        return Err(Flaw::Subject);
    }
    let pod = pod.filter(|pod| !pod.name.is_empty() && !pod.uid.is_empty()).ok_or(Flaw::Unbound)?;
    let node = node.map(|node| NodeName::try_from(node.name)).transpose().map_err(|_| Flaw::Malformed)?;
    Ok(Claims { pod_name: pod.name, node })
}

/// Checks the signature; what the token says is looked at afterwards only.
fn open(token: &str, keys: &[Key]) -> Result<Payload, Flaw> {
    match token.len() {
        0 => return Err(Flaw::Absent),
        1..=MAX_BYTES => {}
        _ => return Err(Flaw::TooLong),
    }
    // An algorithm that is unknown here, `none` among them, makes the header malformed.
    let header = decode_header(token).map_err(|_| Flaw::Malformed)?;
    // No extension that must be understood is (RFC 7515, section 4.1.11).
    if header.crit.is_some() {
        return Err(Flaw::Malformed);
    }
    let id = header.kid.ok_or(Flaw::UnknownKey)?;
    let key = keys.iter().find(|key| key.id == id).ok_or(Flaw::UnknownKey)?;
    // The key decides which algorithm is right, never the token.
    if header.alg != key.algorithm {
        return Err(Flaw::Algorithm);
    }
    let mut signature_only = Validation::new(key.algorithm);
    signature_only.required_spec_claims.clear();
    signature_only.validate_exp = false;
    signature_only.validate_aud = false;
    let opened = decode::<Payload>(token, &key.key, &signature_only).map_err(|error| match error.kind() {
        ErrorKind::InvalidSignature => Flaw::Signature,
        _ => Flaw::Malformed,
    })?;
    Ok(opened.claims)
}

/// The claims of a ServiceAccount token, as API servers issue it for a TokenRequest.
#[derive(Deserialize)]
struct Payload {
    iss: String,
    sub: String,
    aud: Audience,
    exp: u64,
    iat: u64,
    nbf: Option<u64>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<Kubernetes>,
}

#[derive(Deserialize)]
struct Kubernetes {
    namespace: String,
    serviceaccount: Named,
    pod: Option<Bound>,
    node: Option<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Bound {
    name: String,
    uid: String,
}

/// One or many (RFC 7519, section 4.1.3).
#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Audience {
    fn contains(&self, name: &str) -> bool {
        match self {
            Self::One(one) => one == name,
            Self::Many(many) => many.iter().any(|one| one == name),
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
