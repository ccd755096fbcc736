//! The cluster's published signing keys, kept so that peers can be admitted while the API server is down.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use jsonwebtoken::jwk::Jwk;
use kube::Client;
use kube::api::GetParams;
use kube::core::Request;
use serde::Deserialize;
use tokio::time::Instant;

use super::call::{Failure, PATIENCE, call};
use super::token::{Key, Keys};

/// A token with an unknown key asks for the keys again, which anybody can provoke; so not more often than this.
const PAUSE: Duration = Duration::from_secs(10);

/// A cluster signs with one key and publishes the ones before it as well; a handful.
const MOST: usize = 64;

/// A published key has about 500 bytes, so this is ample for [`MOST`].
const MAX_BYTES: usize = 256 << 10;

pub(super) struct KeySource {
    client: Client,
    /// Apart from `asked`, so that known keys can be had while others are asked for.
    keys: Mutex<Option<Arc<Keys>>>,
    asked: tokio::sync::Mutex<Option<(Instant, Result<(), String>)>>,
}

impl KeySource {
    pub(super) fn new(client: Client) -> Self {
        Self { client, keys: Mutex::default(), asked: tokio::sync::Mutex::default() }
    }

    /// The keys as they were published last.
    pub(super) fn known(&self) -> Option<Arc<Keys>> {
        self.keys.lock().expect("nothing panics while holding it").clone()
    }

    /// The keys as they are published now, or were a moment ago.
    ///
    /// The error says why they cannot be had; those known before remain.
    pub(super) async fn refetch(&self) -> Result<Arc<Keys>, String> {
        let mut asked = self.asked.lock().await;
        if asked.as_ref().is_none_or(|(at, _)| at.elapsed() >= PAUSE) {
            let outcome = self.fetch().await.map(|keys| {
                *self.keys.lock().expect("nothing panics while holding it") = Some(Arc::new(keys));
            });
            *asked = Some((Instant::now(), outcome));
        }
        match asked.as_ref() {
            Some((_, Err(text))) => Err(text.clone()),
            _ => self.known().ok_or_else(|| "no keys are known yet".to_owned()),
        }
    }

    async fn fetch(&self) -> Result<Keys, String> {
        let get = async |folder: &str, file: &str| {
            let request = Request::new(folder).get(file, &GetParams::default()).map_err(kube::Error::BuildRequest)?;
            self.client.request_text(request).await
        };
        let both = async { Ok((get("/.well-known", "openid-configuration").await?, get("/openid/v1", "jwks").await?)) };
        let (discovery, jwks) = call(PATIENCE, both).await.map_err(|failure| match failure {
            Failure::NotFound(_) => "the API server publishes no keys for ServiceAccount tokens: its --service-account-issuer has to be an https URL".to_owned(),
            Failure::Forbidden(text) => format!("{text} (the ClusterRole system:service-account-issuer-discovery allows it)"),
            other => format!("the keys for ServiceAccount tokens: {other}"),
        })?;
        parse(&discovery, &jwks)
    }
}

fn parse(discovery: &str, jwks: &str) -> Result<Keys, String> {
    #[derive(Deserialize)]
    struct Discovery {
        issuer: String,
    }
    #[derive(Deserialize)]
    struct Published {
        keys: Vec<serde_json::Value>,
    }
    if discovery.len().max(jwks.len()) > MAX_BYTES {
        return Err(format!("the API server's keys take more than {MAX_BYTES} bytes"));
    }
    let unreadable = |error: serde_json::Error| format!("the API server's keys cannot be read: {error}");
    let Discovery { issuer } = serde_json::from_str(discovery).map_err(unreadable)?;
    let published: Published = serde_json::from_str(jwks).map_err(unreadable)?;
    // One at a time: a key of a kind that nobody here knows must not hide the others.
    let usable = published.keys.into_iter().take(MOST).filter_map(|key| serde_json::from_value::<Jwk>(key).ok());
    let keys: Vec<_> = usable.filter_map(|jwk| Key::from_jwk(&jwk)).collect();
    if keys.is_empty() {
        return Err("the API server publishes no key of a kind that is known here (RSA, P-256, P-384)".to_owned());
    }
    Ok(Keys { issuer, keys })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DISCOVERY: &str = r#"{"issuer":"https://kubernetes.default.svc"}"#;

    fn rsa(kid: &str) -> serde_json::Value {
        json!({ "use": "sig", "kty": "RSA", "kid": kid, "alg": "RS256", "n": "AQAB", "e": "AQAB" })
    }

    #[test]
    fn only_public_keys_for_known_signatures_are_taken() {
        let with = |key: serde_json::Value, field: &str, value: &str| {
            let mut key = key;
            key[field] = value.into();
            key
        };
        let curve = |crv: &str, alg: &str| json!({ "kty": "EC", "kid": "ec", "alg": alg, "crv": crv, "x": "AQAB", "y": "AQAB" });
        for (key, taken) in [
            (rsa("a"), true),
            (with(rsa("a"), "use", "enc"), false),
            (with(rsa("a"), "alg", "HS256"), false),
            (with(rsa("a"), "alg", "none"), false),
            (json!({ "kty": "oct", "kid": "a", "alg": "HS256", "k": "c2VjcmV0" }), false),
            (json!({ "kty": "new", "kid": "a" }), false),
            (json!({ "kty": "RSA", "alg": "RS256", "n": "AQAB", "e": "AQAB" }), false),
            (curve("P-256", "ES256"), true),
            (curve("P-384", "ES384"), true),
            (curve("P-384", "ES256"), false),
            (curve("P-521", "ES512"), false),
        ] {
            let set = json!({ "keys": [key.clone()] }).to_string();
            assert_eq!(parse(DISCOVERY, &set).is_ok(), taken, "{key}");
        }
    }

    #[test]
    fn a_key_of_an_unknown_kind_does_not_hide_the_others() {
        let set = json!({ "keys": [{ "kty": "new" }, rsa("a"), 7] }).to_string();
        let keys = parse(DISCOVERY, &set).unwrap();
        assert_eq!((keys.issuer.as_str(), keys.keys.len()), ("https://kubernetes.default.svc", 1));
    }

    #[test]
    fn the_number_of_keys_is_bounded() {
        let many: Vec<_> = (0..1000).map(|i| rsa(&i.to_string())).collect();
        assert_eq!(parse(DISCOVERY, &json!({ "keys": many }).to_string()).unwrap().keys.len(), MOST);
        assert!(parse(DISCOVERY, &" ".repeat(MAX_BYTES + 1)).is_err());
    }
}
