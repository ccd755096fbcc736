use super::*;
use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Value, json};

/// Made for these tests: the cluster's key and a stranger's.
const CLUSTER: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQguFkVRw5go2jMZuGO
ZqdwHKdLtBT8bwaDnbrgZ5SE8pShRANCAASfxlFTq16+ccY8M4alpmsX+uoHZyqp
qRRuVjMIiX3+ZHOChHC+s3o+bTAeqgAJd2jROCb4Jkqm9Pvg0W5m2wFR
-----END PRIVATE KEY-----";
const STRANGER: &str = "-----BEGIN PRIVATE KEY-----
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

fn keys() -> Keys {
    Keys { issuer: ISSUER.to_owned(), keys: vec![Key::from_jwk(&published()).unwrap()] }
}

/// As API servers of today issue it.
pub(crate) fn good() -> Value {
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

fn judge(token: &str) -> Result<Claims, Flaw> {
    let expectations = Expectations { k8s_namespace: "lighterman".into(), service_account: "agent".into() };
    verify(token, peer(), &keys(), &expectations, Duration::from_secs(NOW))
}

/// A good token but for one claim, given as a JSON pointer; `null` takes the claim away.
fn judge_with(pointer: &str, value: Value) -> Result<Claims, Flaw> {
    let mut claims = good();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let parent = claims.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    if value.is_null() {
        parent.remove(name)
    } else {
        parent.insert(name.to_owned(), value)
    };
    judge(&sign(&claims))
}

#[test]
fn a_token_made_for_this_peer_admits_it() {
    let node = Some("node-1".parse().unwrap());
    assert_eq!(
        judge(&sign(&good())),
        Ok(Claims {
            pod_name: "agent-x".into(),
            pod_uid: "p-1".into(),
            node,
            expires: Duration::from_secs(NOW + 3500)
        })
    );
    // Older API servers do not tell the node.
    assert_eq!(judge_with("/kubernetes.io/node", Value::Null).unwrap().node, None);
    // A single audience may stand alone.
    assert!(judge_with("/aud", peer().to_string().into()).is_ok());
}

#[test]
fn a_claim_that_is_not_as_expected_refuses() {
    let other_peer = PeerId::from_public_key([8; 32]).to_string();
    for (claim, value, flaw) in [
        ("/iss", json!("https://other.test"), Flaw::Issuer),
        ("/iss", Value::Null, Flaw::Malformed),
        ("/aud", json!([other_peer]), Flaw::Audience),
        ("/aud", json!("https://kubernetes.default.svc"), Flaw::Audience),
        ("/aud", json!([]), Flaw::Audience),
        ("/aud", Value::Null, Flaw::Malformed),
        ("/sub", json!("system:serviceaccount:lighterman:other"), Flaw::Subject),
        ("/sub", json!("system:serviceaccount:other:agent"), Flaw::Subject),
        ("/kubernetes.io/namespace", json!("other"), Flaw::Subject),
        ("/kubernetes.io/serviceaccount/name", json!("other"), Flaw::Subject),
        ("/exp", json!(NOW - 61), Flaw::Expired),
        ("/exp", Value::Null, Flaw::Malformed),
        ("/nbf", json!(NOW + 61), Flaw::TooEarly),
        ("/iat", json!(NOW + 61), Flaw::TooEarly),
        ("/iat", json!(NOW - 161), Flaw::LivesTooLong),
        ("/exp", json!(u64::MAX), Flaw::LivesTooLong),
        ("/kubernetes.io", Value::Null, Flaw::Unbound),
        ("/kubernetes.io/pod", Value::Null, Flaw::Unbound),
        ("/kubernetes.io/pod/uid", json!(""), Flaw::Unbound),
        ("/kubernetes.io/node/name", json!("No Node"), Flaw::Malformed),
    ] {
        assert_eq!(judge_with(claim, value.clone()), Err(flaw), "{claim} {value}");
    }
}

#[test]
fn clocks_may_differ_by_a_minute() {
    for (claim, value) in [("/exp", NOW - 60), ("/nbf", NOW + 60), ("/iat", NOW - 160)] {
        assert!(judge_with(claim, value.into()).is_ok(), "{claim}");
    }
}

#[test]
fn only_the_clusters_signature_counts() {
    let stranger = encode(&header(Algorithm::ES256), &good(), &signer(STRANGER)).unwrap();
    assert_eq!(judge(&stranger), Err(Flaw::Signature));

    let mut changed = sign(&good());
    changed.replace_range(changed.len() - 8..changed.len() - 4, "AAAA");
    assert_eq!(judge(&changed), Err(Flaw::Signature));

    let mut unknown = header(Algorithm::ES256);
    unknown.kid = Some("k2".to_owned());
    assert_eq!(judge(&encode(&unknown, &good(), &signer(CLUSTER)).unwrap()), Err(Flaw::UnknownKey));
    unknown.kid = None;
    assert_eq!(judge(&encode(&unknown, &good(), &signer(CLUSTER)).unwrap()), Err(Flaw::UnknownKey));
}

#[test]
fn an_unsigned_token_is_refused() {
    let good = sign(&good());
    let (_, rest) = good.split_once('.').unwrap();
    let (claims, signature) = rest.split_once('.').unwrap();
    // {"alg":"none","kid":"k1"}
    let none = "eyJhbGciOiJub25lIiwia2lkIjoiazEifQ";
    assert_eq!(judge(&format!("{none}.{claims}.")), Err(Flaw::Malformed));
    assert_eq!(judge(&format!("{none}.{claims}.{signature}")), Err(Flaw::Malformed));
    let (header, _) = good.split_once('.').unwrap();
    assert_eq!(judge(&format!("{header}.{claims}.")), Err(Flaw::Signature));
}

#[test]
fn a_public_key_is_no_shared_secret() {
    // Everybody knows the public key; a verifier that lets the token choose HMAC would take a signature made with it.
    let public = keys().keys[0].key.as_bytes().to_vec();
    for secret in [public.as_slice(), CLUSTER.as_bytes()] {
        let forged = encode(&header(Algorithm::HS256), &good(), &EncodingKey::from_secret(secret)).unwrap();
        assert_eq!(judge(&forged), Err(Flaw::Algorithm));
    }
}

#[test]
fn what_is_no_token_is_refused() {
    assert_eq!(judge(""), Err(Flaw::Absent));
    let good = sign(&good());
    for garbage in ["x", "..", "a.b.c", &good[..good.len() / 2], &format!("{good}.{good}"), "é.é.é", " "] {
        assert_eq!(judge(garbage), Err(Flaw::Malformed), "{garbage:?}");
    }
    assert_eq!(judge(&"a".repeat(MAX_BYTES + 1)), Err(Flaw::TooLong));
    assert_eq!(judge(&"a".repeat(MAX_BYTES)), Err(Flaw::Malformed));
    let mut critical = header(Algorithm::ES256);
    critical.crit = Some(vec!["b64".to_owned()]);
    assert_eq!(judge(&encode(&critical, &self::good(), &signer(CLUSTER)).unwrap()), Err(Flaw::Malformed));
}

proptest::proptest! {
    #[test]
    fn no_text_makes_it_panic(text in ".{0,64}|([A-Za-z0-9_-]{0,40}\\.){2}[A-Za-z0-9_-]{0,40}") {
        proptest::prop_assert!(judge(&text).is_err());
    }
}
