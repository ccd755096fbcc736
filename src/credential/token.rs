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
use crate::ports::LEEWAY;

/// What agents ask for, and the longest life that a token may have: what was stolen is useless after it. API servers that extend lives
/// to a year (`--service-account-extend-token-expiration`) do so for tokens that are for themselves, asked for with exactly 3607 s.
pub const MAX_LIFE: Duration = Duration::from_secs(3600);

/// The longest name or UID of a pod that is taken: Kubernetes' names have 253 bytes at most, UIDs 36.
const MAX_NAME: usize = 253;

/// What [`crate::wire::Hello`] has room for. A ServiceAccount token has 1 to 2 KiB.
const MAX_BYTES: usize = 16 << 10;

/// The keys that a cluster signs its tokens with, and the name that it signs in.
#[derive(Debug, Clone)]
pub struct ClusterKeys {
    /// The `iss` of its tokens.
    pub issuer: String,
    /// A handful: the one that it signs with, and those before it.
    pub keys: Vec<ClusterKey>,
}

/// One of them, tied to the one algorithm that it is for.
#[derive(Debug, Clone)]
pub struct ClusterKey {
    id: String,
    algorithm: Algorithm,
    key: DecodingKey,
}

/// Whose tokens admit.
#[derive(Debug, Clone)]
pub struct Expectations {
    /// Where the agents run.
    pub k8s_namespace: String,
    /// What they run as.
    pub service_account: String,
}

impl Expectations {
    /// How the API server calls the agents.
    pub fn user(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.k8s_namespace, self.service_account)
    }
}

/// What a good token says about the one who shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The pod that the token dies with.
    pub pod_name: String,
    /// Its UID.
    pub pod_uid: String,
    /// Its node, which API servers tell from Kubernetes 1.30 on.
    pub node: Option<NodeName>,
    /// When the token ends, since 1970.
    pub expires: Duration,
}

impl Claims {
    /// Whether the token has ended, as far as clocks can be trusted.
    pub fn is_expired(&self, now: Duration) -> bool {
        self.expires.saturating_add(LEEWAY) < now
    }
}

/// Why a token does not admit. Nothing of the token is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRejection {
    /// Nothing.
    #[error("no token was shown")]
    Absent,
    /// More than a token has.
    #[error("the token is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// No JWS in compact form, or not with the claims of a ServiceAccount.
    #[error("not a signed ServiceAccount token")]
    Malformed,
    /// The key decides which one is right.
    #[error("the token is signed with another algorithm than its key is for")]
    Algorithm,
    /// It may be a new one.
    #[error("the token is signed with a key that this cluster does not publish")]
    UnknownKey,
    /// Forged, or damaged.
    #[error("the token's signature is wrong")]
    Signature,
    /// Or the issuer has been renamed.
    #[error("the token is another cluster's")]
    Issuer,
    /// Whoever shows it is not the one it was made for.
    #[error("the token is for another peer")]
    Audience,
    /// Not an agent.
    #[error("the token is of another ServiceAccount")]
    Subject,
    /// All else is as it should be.
    #[error("the token has expired, or the clocks differ")]
    Expired,
    /// From the future.
    #[error("the token is not valid yet, or the clocks differ")]
    TooEarly,
    /// More than agents ask for.
    #[error("the token lives longer than {} s", MAX_LIFE.as_secs())]
    LivesTooLong,
    /// It would outlive every pod.
    #[error("the token is not bound to a pod")]
    Unbound,
}

impl ClusterKey {
    /// Takes a published key, unless it is of a kind that nothing here verifies, or is not for signatures.
    ///
    /// A symmetric key is never taken: whoever could read it could sign. ES512 (P-521), which API servers can be set to, is not taken
    /// either: jsonwebtoken does not know it, and a second verifier beside it for the rarest of keys would be more to get wrong than it
    /// is worth. Such a cluster uses certificates.
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

/// Whether `token` admits `peer`.
///
/// # Errors
/// The first [`Flaw`] found; [`Flaw::Expired`] is looked for last.
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

/// As [`verify`], but a token that has ended is no less good: the caller looks at [`Claims::is_over`].
///
/// # Errors
/// Any [`Flaw`] but [`Flaw::Expired`].
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
    let is_one = |name: &str| (1..=MAX_NAME).contains(&name.len());
    let pod = pod.filter(|pod| is_one(&pod.name) && is_one(&pod.uid)).ok_or(TokenRejection::Unbound)?;
    let node = node.map(|node| NodeName::try_from(node.name)).transpose().map_err(|_| TokenRejection::Malformed)?;
    Ok(Claims { pod_name: pod.name, pod_uid: pod.uid, node, expires: Duration::from_secs(exp) })
}

/// Checks the signature; what the token says is looked at afterwards only.
fn verify_signature(token: &str, keys: &[ClusterKey]) -> Result<Payload, TokenRejection> {
    match token.len() {
        0 => return Err(TokenRejection::Absent),
        1..=MAX_BYTES => {}
        _ => return Err(TokenRejection::TooLong),
    }
    // An algorithm that is unknown here, `none` among them, makes the header malformed.
    let header = decode_header(token).map_err(|_| TokenRejection::Malformed)?;
    // No extension that must be understood is (RFC 7515, section 4.1.11).
    if header.crit.is_some() {
        return Err(TokenRejection::Malformed);
    }
    let id = header.kid.ok_or(TokenRejection::UnknownKey)?;
    let key = keys.iter().find(|key| key.id == id).ok_or(TokenRejection::UnknownKey)?;
    // The key decides which algorithm is right, never the token.
    if header.alg != key.algorithm {
        return Err(TokenRejection::Algorithm);
    }
    let mut signature_only = Validation::new(key.algorithm);
    signature_only.required_spec_claims.clear();
    signature_only.validate_exp = false;
    signature_only.validate_aud = false;
    let opened = decode::<Payload>(token, &key.key, &signature_only).map_err(|error| match error.kind() {
        ErrorKind::InvalidSignature => TokenRejection::Signature,
        _ => TokenRejection::Malformed,
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
pub(crate) mod tests;
