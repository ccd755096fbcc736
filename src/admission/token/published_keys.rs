//! The cluster's published signing keys, cached so that peers are admitted while the API server is
//! down.

use std::sync::Arc;
use std::time::Duration;

use jsonwebtoken::jwk::Jwk;
use kube::api::GetParams;
use kube::core::Request;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::admission_file::{PublishedKeys, StoredKeys};
use crate::api_server::client::ApiServerClient;
use crate::api_server::error::{ApiError, REQUEST_TIMEOUT};
use crate::credential::token::{ClusterKey, ClusterKeys, MAX_LIFE};
use crate::util::clock::unix_time;

/// Shortest time between two requests for the keys. A token with an unknown key starts a request,
/// and any unauthenticated connection can send such a token.
const MIN_REFETCH_INTERVAL: Duration = Duration::from_secs(10);

/// Most keys that are read. A cluster signs with one key and publishes a few earlier keys.
const MAX_KEYS: usize = 64;

/// Most bytes of the published keys: a key has about 500 bytes, so [`MAX_KEYS`] of them have 32
/// KiB.
const MAX_BYTES: usize = 256 << 10;

pub(super) struct KeySource {
    api_server: Arc<ApiServerClient>,
    /// Separate from `last_fetch`, so that cached keys can be read during a fetch.
    cached: Mutex<Option<CachedKeys>>,
    last_fetch: tokio::sync::Mutex<Option<(Instant, Result<(), String>)>>,
    refetch_requests: Notify,
}

struct CachedKeys {
    keys: Arc<ClusterKeys>,
    published: PublishedKeys,
    /// Since 1970.
    fetched_at: Duration,
}

impl KeySource {
    /// Starts with the stored keys, unless every token that they could verify has expired, `grace`
    /// included. Fetched keys replace the stored keys.
    pub(super) fn new(server: Arc<ApiServerClient>, stored: Option<StoredKeys>, grace: Duration) -> Self {
        // A time in the future comes from a clock that was wrong. Such keys count as fetched now,
        // and expire like other keys.
        let is_usable =
            |stored: &StoredKeys| Duration::from_secs(stored.at).saturating_add(MAX_LIFE + grace) > unix_time();
        let cached_keys = stored.filter(is_usable).and_then(|StoredKeys { published, at }| {
            let keys = Arc::new(parse(&published.discovery, &published.jwks).ok()?);
            Some(CachedKeys { keys, published, fetched_at: Duration::from_secs(at).min(unix_time()) })
        });
        Self {
            api_server: server,
            cached: Mutex::new(cached_keys),
            last_fetch: tokio::sync::Mutex::default(),
            refetch_requests: Notify::new(),
        }
    }

    pub(super) fn cached(&self) -> Option<Arc<ClusterKeys>> {
        self.lock().as_ref().map(|cached| cached.keys.clone())
    }

    pub(super) fn to_stored(&self) -> Option<StoredKeys> {
        let cached = self.lock();
        cached
            .as_ref()
            .map(|cached| StoredKeys { published: cached.published.clone(), at: cached.fetched_at.as_secs() })
    }

    /// Wakes the task in [`KeySource::refetch_requested`], which then fetches the keys. The fetch
    /// also finds out whether the API server can be reached.
    pub(super) fn request_refetch(&self) {
        self.refetch_requests.notify_one();
    }

    /// Returns when a fetch was requested and [`MIN_REFETCH_INTERVAL`] has passed since the last
    /// fetch.
    pub(super) async fn refetch_requested(&self) {
        self.refetch_requests.notified().await;
        let last_fetch = self.last_fetch.lock().await.as_ref().map(|(at, _)| *at);
        if let Some(at) = last_fetch {
            tokio::time::sleep_until(at + MIN_REFETCH_INTERVAL).await;
        }
    }

    /// Fetches the keys, at most once in [`MIN_REFETCH_INTERVAL`]; a call within the interval gets
    /// the result of the last fetch. After an error the cached keys stay.
    pub(super) async fn refetch(&self) -> Result<Arc<ClusterKeys>, String> {
        let mut last_fetch = self.last_fetch.lock().await;
        if last_fetch.as_ref().is_none_or(|(at, _)| at.elapsed() >= MIN_REFETCH_INTERVAL) {
            let outcome = self.fetch().await.map(|fetched| *self.lock() = Some(fetched));
            *last_fetch = Some((Instant::now(), outcome));
        }
        match last_fetch.as_ref() {
            Some((_, Err(text))) => Err(text.clone()),
            _ => self.cached().ok_or_else(|| "the cluster's signing keys were not fetched yet".to_owned()),
        }
    }

    async fn fetch(&self) -> Result<CachedKeys, String> {
        let get = async |folder: &str, file: &str| {
            let answer =
                self.api_server.send(REQUEST_TIMEOUT / 2, Request::new(folder).get(file, &GetParams::default())).await;
            answer.map_err(|failure| match failure {
                ApiError::NotFound(_) => "the API server publishes no keys for ServiceAccount tokens: --service-account-issuer must be an https URL".to_owned(),
                ApiError::Forbidden(text) => format!("{text} (the ClusterRole system:service-account-issuer-discovery allows it)"),
                other => format!("the keys for ServiceAccount tokens: {other}"),
            })
        };
        let discovery = get("/.well-known", "openid-configuration").await?;
        let jwks = get("/openid/v1", "jwks").await?;
        let keys = Arc::new(parse(&discovery, &jwks)?);
        Ok(CachedKeys { keys, published: PublishedKeys { discovery, jwks }, fetched_at: unix_time() })
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, Option<CachedKeys>> {
        self.cached.lock()
    }
}

fn parse(discovery: &str, jwks: &str) -> Result<ClusterKeys, String> {
    #[derive(Deserialize)]
    struct Discovery {
        issuer: String,
    }
    #[derive(Deserialize)]
    struct JwkSet {
        keys: Vec<serde_json::Value>,
    }
    if discovery.len().max(jwks.len()) > MAX_BYTES {
        return Err(format!("the API server's keys have more than {MAX_BYTES} bytes"));
    }
    let unreadable = |error: serde_json::Error| format!("the API server's keys cannot be parsed: {error}");
    let Discovery { issuer } = serde_json::from_str(discovery).map_err(unreadable)?;
    let published: JwkSet = serde_json::from_str(jwks).map_err(unreadable)?;
    // Each key is parsed by itself: a key of an unknown type must not hide the other keys.
    let usable = published.keys.into_iter().take(MAX_KEYS).filter_map(|key| serde_json::from_value::<Jwk>(key).ok());
    let keys: Vec<_> = usable.filter_map(|jwk| ClusterKey::from_jwk(&jwk)).collect();
    if keys.is_empty() {
        return Err("the API server publishes no key of a supported type (RSA, P-256, P-384)".to_owned());
    }
    Ok(ClusterKeys { issuer, keys })
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
    fn only_public_keys_of_supported_algorithms_are_accepted() {
        let with = |key: serde_json::Value, field: &str, value: &str| {
            let mut key = key;
            key[field] = value.into();
            key
        };
        let curve = |crv: &str, alg: &str| json!({ "kty": "EC", "kid": "ec", "alg": alg, "crv": crv, "x": "AQAB", "y": "AQAB" });
        for (key, is_accepted) in [
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
            assert_eq!(parse(DISCOVERY, &set).is_ok(), is_accepted, "{key}");
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
        assert_eq!(parse(DISCOVERY, &json!({ "keys": many }).to_string()).unwrap().keys.len(), MAX_KEYS);
        assert!(parse(DISCOVERY, &" ".repeat(MAX_BYTES + 1)).is_err());
    }
}
