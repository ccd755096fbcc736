use super::*;
use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Value, json};

/// Keys made for these tests: the cluster's, and another cluster's.
const CLUSTER: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQguFkVRw5go2jMZuGO
ZqdwHKdLtBT8bwaDnbrgZ5SE8pShRANCAASfxlFTq16+ccY8M4alpmsX+uoHZyqp
qRRuVjMIiX3+ZHOChHC+s3o+bTAeqgAJd2jROCb4Jkqm9Pvg0W5m2wFR
-----END PRIVATE KEY-----";
const OTHER_CLUSTER: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgz1JdwfVfqx65uglu
dMVDnTyc7wl+9FDIz8M4RzrnbPShRANCAASQgYVYJuigkVAM4i3gOamfF6U9KnZc
YSoSx2BVShOPncRWqO5WCHI+jMFbxhanK/9WuykwMuttxzWCA28K5Y9i
-----END PRIVATE KEY-----";

pub(crate) const ISSUER: &str = "https://issuer.test";
const NOW: u64 = 1_800_000_000;

pub(crate) fn peer() -> PeerId {
    PeerId::from_public_key([7; 32])
}

fn signer(pem: &str) -> EncodingKey {
    EncodingKey::from_ec_pem(pem.as_bytes()).unwrap()
}

/// The cluster's key, published as `k1`.
pub(crate) fn published() -> Jwk {
    let mut jwk = Jwk::from_encoding_key(&signer(CLUSTER), Algorithm::ES256).unwrap();
    jwk.common.key_id = Some("k1".to_owned());
    jwk
}

fn keys() -> ClusterKeys {
    ClusterKeys { issuer: ISSUER.to_owned(), keys: vec![ClusterKey::from_jwk(&published()).unwrap()] }
}

/// The claims of a token, as current API servers issue them.
pub(crate) fn good_claims() -> Value {
    json!({
        "iss": ISSUER,
        "sub": "system:serviceaccount:lighterman:agent",
        "aud": [peer().to_string()],
        "iat": NOW - 100, "nbf": NOW - 100, "exp": NOW + 3500, "jti": "1",
        "kubernetes.io": {
            "namespace": "lighterman",
            "serviceaccount": { "name": "agent", "uid": "s-1" },
            "pod": { "name": "agent-x", "uid": "p-1" },
            "node": { "name": "node-1", "uid": "n-1" },
        },
    })
}

fn header(algorithm: Algorithm) -> Header {
    Header { kid: Some("k1".to_owned()), typ: None, ..Header::new(algorithm) }
}

pub(crate) fn sign(claims: &Value) -> String {
    encode(&header(Algorithm::ES256), claims, &signer(CLUSTER)).unwrap()
}

fn check(token: &str) -> Result<Claims, TokenRejection> {
    let expectations = Expectations { k8s_namespace: "lighterman".into(), service_account: "agent".into() };
    verify(token, peer(), &keys(), &expectations, Duration::from_secs(NOW))
}

/// A good token with one claim changed. `pointer` is a JSON pointer; `null` removes the claim.
fn check_with(pointer: &str, value: Value) -> Result<Claims, TokenRejection> {
    let mut claims = good_claims();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let parent = claims.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    if value.is_null() {
        parent.remove(name)
    } else {
        parent.insert(name.to_owned(), value)
    };
    check(&sign(&claims))
}

#[test]
fn a_token_made_for_this_peer_admits_the_peer() {
    let node = Some("node-1".parse().unwrap());
    assert_eq!(
        check(&sign(&good_claims())),
        Ok(Claims {
            pod_name: "agent-x".into(),
            pod_uid: "p-1".into(),
            node,
            expires: Duration::from_secs(NOW + 3500)
        })
    );
    // Older API servers do not include the node.
    assert_eq!(check_with("/kubernetes.io/node", Value::Null).unwrap().node, None);
    // A single audience may be a plain string.
    assert!(check_with("/aud", peer().to_string().into()).is_ok());
}

#[test]
fn a_token_with_an_unexpected_claim_is_rejected() {
    let other_peer = PeerId::from_public_key([8; 32]).to_string();
    for (claim, value, rejection) in [
        ("/iss", json!("https://other.test"), TokenRejection::Issuer),
        ("/iss", Value::Null, TokenRejection::Malformed),
        ("/aud", json!([other_peer]), TokenRejection::Audience),
        ("/aud", json!("https://kubernetes.default.svc"), TokenRejection::Audience),
        ("/aud", json!([]), TokenRejection::Audience),
        ("/aud", Value::Null, TokenRejection::Malformed),
        ("/sub", json!("system:serviceaccount:lighterman:other"), TokenRejection::Subject),
        ("/sub", json!("system:serviceaccount:other:agent"), TokenRejection::Subject),
        ("/kubernetes.io/namespace", json!("other"), TokenRejection::Subject),
        ("/kubernetes.io/serviceaccount/name", json!("other"), TokenRejection::Subject),
        ("/exp", json!(NOW - 61), TokenRejection::Expired),
        ("/exp", Value::Null, TokenRejection::Malformed),
        ("/nbf", json!(NOW + 61), TokenRejection::TooEarly),
        ("/iat", json!(NOW + 61), TokenRejection::TooEarly),
        ("/iat", json!(NOW - 161), TokenRejection::LivesTooLong),
        ("/exp", json!(u64::MAX), TokenRejection::LivesTooLong),
        ("/kubernetes.io", Value::Null, TokenRejection::Unbound),
        ("/kubernetes.io/pod", Value::Null, TokenRejection::Unbound),
        ("/kubernetes.io/pod/uid", json!(""), TokenRejection::Unbound),
        ("/kubernetes.io/node/name", json!("No Node"), TokenRejection::Malformed),
    ] {
        assert_eq!(check_with(claim, value.clone()), Err(rejection), "{claim} {value}");
    }
}

#[test]
fn clocks_may_differ_by_a_minute() {
    for (claim, value) in [("/exp", NOW - 60), ("/nbf", NOW + 60), ("/iat", NOW - 160)] {
        assert!(check_with(claim, value.into()).is_ok(), "{claim}");
    }
}

#[test]
fn a_token_without_the_clusters_signature_is_rejected() {
    let foreign = encode(&header(Algorithm::ES256), &good_claims(), &signer(OTHER_CLUSTER)).unwrap();
    assert_eq!(check(&foreign), Err(TokenRejection::Signature));

    let mut changed = sign(&good_claims());
    changed.replace_range(changed.len() - 8..changed.len() - 4, "AAAA");
    assert_eq!(check(&changed), Err(TokenRejection::Signature));

    let mut unknown = header(Algorithm::ES256);
    unknown.kid = Some("k2".to_owned());
    assert_eq!(check(&encode(&unknown, &good_claims(), &signer(CLUSTER)).unwrap()), Err(TokenRejection::UnknownKey));
    unknown.kid = None;
    assert_eq!(check(&encode(&unknown, &good_claims(), &signer(CLUSTER)).unwrap()), Err(TokenRejection::UnknownKey));
}

#[test]
fn an_unsigned_token_is_rejected() {
    let good = sign(&good_claims());
    let (_, rest) = good.split_once('.').unwrap();
    let (claims, signature) = rest.split_once('.').unwrap();
    // {"alg":"none","kid":"k1"}
    let none = "eyJhbGciOiJub25lIiwia2lkIjoiazEifQ";
    assert_eq!(check(&format!("{none}.{claims}.")), Err(TokenRejection::Malformed));
    assert_eq!(check(&format!("{none}.{claims}.{signature}")), Err(TokenRejection::Malformed));
    let (header, _) = good.split_once('.').unwrap();
    assert_eq!(check(&format!("{header}.{claims}.")), Err(TokenRejection::Signature));
}

#[test]
fn a_public_key_is_not_accepted_as_a_shared_secret() {
    // The public key is public; a verifier that lets the token choose HMAC accepts a signature made
    // with it.
    let public = keys().keys[0].key.as_bytes().to_vec();
    for secret in [public.as_slice(), CLUSTER.as_bytes()] {
        let forged = encode(&header(Algorithm::HS256), &good_claims(), &EncodingKey::from_secret(secret)).unwrap();
        assert_eq!(check(&forged), Err(TokenRejection::Algorithm));
    }
}

#[test]
fn a_malformed_token_is_rejected() {
    assert_eq!(check(""), Err(TokenRejection::Absent));
    let good = sign(&good_claims());
    for garbage in ["x", "..", "a.b.c", &good[..good.len() / 2], &format!("{good}.{good}"), "é.é.é", " "] {
        assert_eq!(check(garbage), Err(TokenRejection::Malformed), "{garbage:?}");
    }
    assert_eq!(check(&"a".repeat(MAX_BYTES + 1)), Err(TokenRejection::TooLong));
    assert_eq!(check(&"a".repeat(MAX_BYTES)), Err(TokenRejection::Malformed));
    let mut critical = header(Algorithm::ES256);
    critical.crit = Some(vec!["b64".to_owned()]);
    assert_eq!(
        check(&encode(&critical, &self::good_claims(), &signer(CLUSTER)).unwrap()),
        Err(TokenRejection::Malformed)
    );
}

proptest::proptest! {
    #[test]
    fn token_verification_never_panics(text in ".{0,64}|([A-Za-z0-9_-]{0,40}\\.){2}[A-Za-z0-9_-]{0,40}") {
        proptest::prop_assert!(check(&text).is_err());
    }
}
