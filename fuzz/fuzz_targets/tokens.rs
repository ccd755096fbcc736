//! ServiceAccount tokens from unauthenticated connections: any text, and any claims under a valid
//! signature.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use libfuzzer_sys::fuzz_target;
use lighterman::credential::token::{ClusterKey, ClusterKeys, Expectations, MAX_LIFE, verify, verify_ignoring_expiry};
use lighterman::model::PeerId;
use lighterman::ports::LEEWAY;
use serde_json::Value;

/// Private key of this target alone.
const PEM: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQguFkVRw5go2jMZuGO
ZqdwHKdLtBT8bwaDnbrgZ5SE8pShRANCAASfxlFTq16+ccY8M4alpmsX+uoHZyqp
qRRuVjMIiX3+ZHOChHC+s3o+bTAeqgAJd2jROCb4Jkqm9Pvg0W5m2wFR
-----END PRIVATE KEY-----";

/// The tokens of the corpus were issued in this second.
const NOW: Duration = Duration::from_secs(1_800_000_000);

static SIGNER: LazyLock<EncodingKey> = LazyLock::new(|| EncodingKey::from_ec_pem(PEM.as_bytes()).expect("a key"));

static KEYS: LazyLock<ClusterKeys> = LazyLock::new(|| {
    let mut published = Jwk::from_encoding_key(&SIGNER, Algorithm::ES256).expect("a key");
    published.common.key_id = Some("k1".to_owned());
    let key = ClusterKey::from_jwk(&published).expect("the key is accepted");
    ClusterKeys { issuer: "https://issuer.test".to_owned(), keys: vec![key] }
});

// The first byte selects a whole token, or the claims of a token.
fuzz_target!(|input: &[u8]| {
    let Some((kind, text)) = input.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    if kind % 2 == 0 {
        return check(text);
    }
    let Ok(claims) = serde_json::from_str::<Value>(text) else { return };
    let header = Header { kid: Some("k1".to_owned()), ..Header::new(Algorithm::ES256) };
    check(&jsonwebtoken::encode(&header, &claims, &SIGNER).expect("claims in JSON can be signed"));
});

fn check(token: &str) {
    let expectations = Expectations { k8s_namespace: "lighterman".into(), service_account: "agent".into() };
    let peer = PeerId::from_public_key([7; 32]);
    let ignoring_expiry = verify_ignoring_expiry(token, peer, &KEYS, &expectations, NOW);
    let verdict = verify(token, peer, &KEYS, &expectations, NOW);
    if let Ok(claims) = &ignoring_expiry {
        assert!(
            !claims.pod_uid.is_empty() && claims.pod_uid.len() <= 253,
            "the pod's UID is bounded, because the agent writes the UID to disk"
        );
        assert!(claims.expires <= NOW + LEEWAY + MAX_LIFE + LEEWAY, "the token does not live too long");
        assert_eq!(verdict.is_ok(), claims.expires + LEEWAY >= NOW);
        let other = PeerId::from_public_key([8; 32]);
        let elsewhere = verify(token, other, &KEYS, &expectations, NOW);
        assert!(elsewhere.is_err() || has_audience(token, other), "the token admits no other key");
    } else {
        assert!(verdict.is_err());
    }
    let _ =
        verdict.map_err(|flaw| assert!(flaw.to_string().len() < 128, "the error is short, for the peer and the log"));
}

/// A token may have several audiences.
fn has_audience(token: &str, peer: PeerId) -> bool {
    let claims = jsonwebtoken::dangerous::insecure_decode::<Value>(token).expect("the token was verified before");
    claims.claims["aud"].to_string().contains(&peer.to_string())
}
