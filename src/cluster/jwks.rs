//! The cluster's published signing keys, kept so that peers can be admitted while the API server is down.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use jsonwebtoken::jwk::Jwk;
use kube::api::GetParams;
use kube::core::Request;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::call::{Failure, PATIENCE};
use super::kept::KeptKeys;
use super::server::Server;
use crate::credential::token::{Key, Keys, MAX_LIFE};

/// A token with an unknown key asks for the keys again, which anybody can provoke; so not more often than this.
const PAUSE: Duration = Duration::from_secs(10);

/// A cluster signs with one key and publishes the ones before it as well; a handful.
const MOST: usize = 64;

/// A published key has about 500 bytes, so this is ample for [`MOST`].
const MAX_BYTES: usize = 256 << 10;

pub(super) struct KeySource {
    server: Arc<Server>,
    /// Apart from `asked`, so that known keys can be had while others are asked for.
    known: Mutex<Option<Known>>,
    asked: tokio::sync::Mutex<Option<(Instant, Result<(), String>)>>,
    wanted: Notify,
}

/// What the API server published, as it did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Published {
    pub(super) discovery: String,
    pub(super) jwks: String,
}

struct Known {
    keys: Arc<Keys>,
    published: Published,
    /// Since 1970.
    at: Duration,
}

impl KeySource {
    /// Begins with the keys that were kept, unless all that they could verify has ended, `grace` included. Later ones replace them.
    pub(super) fn new(server: Arc<Server>, kept: Option<KeptKeys>, grace: Duration) -> Self {
        // A time to come is a clock that was wrong; then they count as of now, and end like any others.
        let is_of_use = |kept: &KeptKeys| Duration::from_secs(kept.at).saturating_add(MAX_LIFE + grace) > now();
        let known = kept.filter(is_of_use).and_then(|KeptKeys { published, at }| {
            let keys = Arc::new(parse(&published.discovery, &published.jwks).ok()?);
            Some(Known { keys, published, at: Duration::from_secs(at).min(now()) })
        });
        Self { server, known: Mutex::new(known), asked: tokio::sync::Mutex::default(), wanted: Notify::new() }
    }

    /// The keys as they were published last.
    pub(super) fn known(&self) -> Option<Arc<Keys>> {
        self.lock().as_ref().map(|known| known.keys.clone())
    }

    /// The same, to be kept.
    pub(super) fn to_keep(&self) -> Option<KeptKeys> {
        let known = self.lock();
        known.as_ref().map(|known| KeptKeys { published: known.published.clone(), at: known.at.as_secs() })
    }

    /// Has the keys asked for soon, by whoever waits in [`KeySource::wanted`]. That also tells whether the API server can be reached.
    pub(super) fn want(&self) {
        self.wanted.notify_one();
    }

    /// Returns when the keys are wanted and may be asked for again.
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
        let asked = self.asked.lock().await.as_ref().map(|(at, _)| *at);
        if let Some(at) = asked {
            tokio::time::sleep_until(at + PAUSE).await;
        }
    }

    /// The keys as they are published now, or were a moment ago.
    ///
    /// The error says why they cannot be had; those known before remain.
    pub(super) async fn refetch(&self) -> Result<Arc<Keys>, String> {
        let mut asked = self.asked.lock().await;
        if asked.as_ref().is_none_or(|(at, _)| at.elapsed() >= PAUSE) {
            let outcome = self.fetch().await.map(|known| *self.lock() = Some(known));
            *asked = Some((Instant::now(), outcome));
        }
        match asked.as_ref() {
            Some((_, Err(text))) => Err(text.clone()),
            _ => self.known().ok_or_else(|| "no keys are known yet".to_owned()),
        }
    }

    async fn fetch(&self) -> Result<Known, String> {
        let get = async |folder: &str, file: &str| {
            let answer = self.server.ask(PATIENCE / 2, Request::new(folder).get(file, &GetParams::default())).await;
            answer.map_err(|failure| match failure {
                Failure::NotFound(_) => "the API server publishes no keys for ServiceAccount tokens: its --service-account-issuer has to be an https URL".to_owned(),
                Failure::Forbidden(text) => format!("{text} (the ClusterRole system:service-account-issuer-discovery allows it)"),
                other => format!("the keys for ServiceAccount tokens: {other}"),
            })
        };
        let discovery = get("/.well-known", "openid-configuration").await?;
        let jwks = get("/openid/v1", "jwks").await?;
        let keys = Arc::new(parse(&discovery, &jwks)?);
        Ok(Known { keys, published: Published { discovery, jwks }, at: now() })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Known>> {
        self.known.lock().expect("nothing panics while holding it")
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
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
            (with(rsa("a"), "alg", "PS256"), true),
            (with(rsa("a"), "alg", "PS512"), true),
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
