//! Verification of a ServiceAccount token. Pure: keys and `now` are arguments.
//!
//! The token's audience is the PeerId that the TLS handshake proved, so a token stolen from one
//! agent is useless to another key.

use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::jwk::{EllipticCurve, Jwk};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;

use crate::model::{NodeName, PeerId};
use crate::ports::LEEWAY;

/// The life that agents request for a token, and the longest life that is accepted; a stolen token
/// is useless after that. API servers extend lives to a year
/// (`--service-account-extend-token-expiration`) only for tokens of the API server's own audience,
/// requested with exactly 3607 s.
pub const MAX_LIFE: Duration = Duration::from_secs(3600);

/// Bytes of a pod's name or UID at most. Kubernetes' names have at most 253 bytes, UIDs 36.
const MAX_NAME: usize = 253;

/// [`crate::wire::Hello`] has room for this much. A ServiceAccount token has 1 to 2 KiB.
const MAX_BYTES: usize = 16 << 10;

/// The keys with which a cluster signs tokens, and the issuer.
#[derive(Debug, Clone)]
pub struct ClusterKeys {
    /// The `iss` claim of the cluster's tokens.
    pub issuer: String,
    /// A few keys: the current signing key and earlier keys.
    pub keys: Vec<ClusterKey>,
}

/// A published key, bound to one algorithm.
#[derive(Debug, Clone)]
pub struct ClusterKey {
    id: String,
    algorithm: Algorithm,
    key: DecodingKey,
}

/// The ServiceAccount whose tokens are accepted.
#[derive(Debug, Clone)]
pub struct Expectations {
    /// The namespace of the agents.
    pub k8s_namespace: String,
    /// The ServiceAccount of the agents.
    pub service_account: String,
}

impl Expectations {
    /// The user name of the agents, as the API server writes it.
    pub fn user(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.k8s_namespace, self.service_account)
    }
}

/// The claims of a verified token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The pod to which the token is bound.
    pub pod_name: String,
    /// The UID of that pod.
    pub pod_uid: String,
    /// The node of that pod. API servers include the node from Kubernetes 1.30 on.
    pub node: Option<NodeName>,
    /// The end of the token, since 1970.
    pub expires: Duration,
}

impl Claims {
    /// Whether the token has expired by more than [`LEEWAY`].
    pub fn is_expired(&self, now: Duration) -> bool {
        self.expires.saturating_add(LEEWAY) < now
    }
}

/// Why a token is rejected. The texts repeat nothing of the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRejection {
    /// The token is empty.
    #[error("no token was shown")]
    Absent,
    /// The token has more than 16 KiB.
    #[error("the token is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// The token is no JWS in compact form, or lacks the claims of a ServiceAccount.
    #[error("not a signed ServiceAccount token")]
    Malformed,
    /// The header names another algorithm than the key's.
    #[error("the token is signed with another algorithm than the key's")]
    Algorithm,
    /// The cluster may have a new key.
    #[error("the token is signed with a key that this cluster does not publish")]
    UnknownKey,
    /// The token is forged or damaged.
    #[error("the token's signature is wrong")]
    Signature,
    /// The token is from another cluster, or this cluster's issuer was renamed.
    #[error("the token is another cluster's")]
    Issuer,
    /// The audience is not the PeerId of the connected key.
    #[error("the token is for another peer")]
    Audience,
    /// The token is not an agent's.
    #[error("the token is of another ServiceAccount")]
    Subject,
    /// All other checks passed.
    #[error("the token has expired, or the clocks differ")]
    Expired,
    /// `nbf` or `iat` is in the future.
    #[error("the token is not valid yet, or the clocks differ")]
    TooEarly,
    /// The token lives longer than [`MAX_LIFE`].
    #[error("the token lives longer than {} s", MAX_LIFE.as_secs())]
    LivesTooLong,
    /// A token without a pod would stay valid after the pod's end.
    #[error("the token is not bound to a pod")]
    Unbound,
}

impl ClusterKey {
    /// Accepts a published key for signatures, of a supported kind.
    ///
    /// A symmetric key is never accepted, because every reader of the key could sign. ES512
    /// (P-521), which API servers can be set to, is not accepted either: jsonwebtoken does not
    /// support ES512, and a second verifier for the rarest of keys adds more risk than use. Such a
    /// cluster uses certificates.
    pub fn from_jwk(jwk: &Jwk) -> Option<Self> {
        let common = &jwk.common;
        if common.public_key_use.as_ref().is_some_and(|use_| *use_ != PublicKeyUse::Signature) {
            return None;
        }
        let algorithm = match (&jwk.algorithm, common.key_algorithm) {
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::RS256)) => Algorithm::RS256,
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::RS384)) => Algorithm::RS384,
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::RS512)) => Algorithm::RS512,
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::PS256)) => Algorithm::PS256,
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::PS384)) => Algorithm::PS384,
            (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::PS512)) => Algorithm::PS512,
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

/// Verifies that `token` admits `peer`.
///
/// # Errors
/// The first [`TokenRejection`] found; [`TokenRejection::Expired`] is checked last.
pub fn verify(
    token: &str,
    peer: PeerId,
    keys: &ClusterKeys,
    expectations: &Expectations,
    now: Duration,
) -> Result<Claims, TokenRejection> {
    let claims = verify_ignoring_expiry(token, peer, keys, expectations, now)?;
    if claims.is_expired(now) { Err(TokenRejection::Expired) } else { Ok(claims) }
}

/// As [`verify`], but accepts an expired token: the caller checks [`Claims::is_expired`].
///
/// # Errors
/// Any [`TokenRejection`] except [`TokenRejection::Expired`].
pub fn verify_ignoring_expiry(
    token: &str,
    peer: PeerId,
    keys: &ClusterKeys,
    expectations: &Expectations,
    now: Duration,
) -> Result<Claims, TokenRejection> {
    let Payload { iss, sub, aud, exp, iat, nbf, kubernetes } = verify_signature(token, &keys.keys)?;
    if iss != keys.issuer {
        return Err(TokenRejection::Issuer);
    }
    if !aud.contains(&peer.to_string()) {
        return Err(TokenRejection::Audience);
    }
    if sub != expectations.user() {
        return Err(TokenRejection::Subject);
    }
    let (now, leeway) = (now.as_secs(), LEEWAY.as_secs());
    if nbf.unwrap_or(iat).max(iat) > now.saturating_add(leeway) {
        return Err(TokenRejection::TooEarly);
    }
    if exp.saturating_sub(iat) > MAX_LIFE.as_secs() + leeway {
        return Err(TokenRejection::LivesTooLong);
    }
    let Kubernetes { namespace, serviceaccount, pod, node } = kubernetes.ok_or(TokenRejection::Unbound)?;
    if namespace != expectations.k8s_namespace || serviceaccount.name != expectations.service_account {
        return Err(TokenRejection::Subject);
    }
    let is_valid_name = |name: &str| (1..=MAX_NAME).contains(&name.len());
    let pod = pod.filter(|pod| is_valid_name(&pod.name) && is_valid_name(&pod.uid)).ok_or(TokenRejection::Unbound)?;
    let node = node.map(|node| NodeName::try_from(node.name)).transpose().map_err(|_| TokenRejection::Malformed)?;
    Ok(Claims { pod_name: pod.name, pod_uid: pod.uid, node, expires: Duration::from_secs(exp) })
}

/// Verifies the signature before any claim is used.
fn verify_signature(token: &str, keys: &[ClusterKey]) -> Result<Payload, TokenRejection> {
    match token.len() {
        0 => return Err(TokenRejection::Absent),
        1..=MAX_BYTES => {}
        _ => return Err(TokenRejection::TooLong),
    }
    // An algorithm unknown to jsonwebtoken, such as `none`, makes the header malformed.
    let header = decode_header(token).map_err(|_| TokenRejection::Malformed)?;
    // RFC 7515, section 4.1.11: a verifier rejects critical extensions that are not supported. None
    // is.
    if header.crit.is_some() {
        return Err(TokenRejection::Malformed);
    }
    let id = header.kid.ok_or(TokenRejection::UnknownKey)?;
    let key = keys.iter().find(|key| key.id == id).ok_or(TokenRejection::UnknownKey)?;
    // The key determines the algorithm, never the token.
    if header.alg != key.algorithm {
        return Err(TokenRejection::Algorithm);
    }
    let mut signature_only = Validation::new(key.algorithm);
    signature_only.required_spec_claims.clear();
    signature_only.validate_exp = false;
    signature_only.validate_aud = false;
    let decoded = decode::<Payload>(token, &key.key, &signature_only).map_err(|error| match error.kind() {
        ErrorKind::InvalidSignature => TokenRejection::Signature,
        _ => TokenRejection::Malformed,
    })?;
    Ok(decoded.claims)
}

/// The claims of a ServiceAccount token, as API servers issue tokens for a TokenRequest.
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
    serviceaccount: NamedObject,
    pod: Option<BoundPod>,
    node: Option<NamedObject>,
}

#[derive(Deserialize)]
struct NamedObject {
    name: String,
}

#[derive(Deserialize)]
struct BoundPod {
    name: String,
    uid: String,
}

/// A single string or a list (RFC 7519, section 4.1.3).
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
pub(crate) mod tests;
