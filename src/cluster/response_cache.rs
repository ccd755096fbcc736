//! Cache of single objects of the API server, in place of watches.
//!
//! A watch of every namespace from each of a thousand nodes would be a thousand watches of objects
//! that change once a month. Not here: the requests.

use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use hashlink::LruCache;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::api_server::error::ApiError;

/// Lifetime of a cached error, so that callers do not wait for the same failed request one after
/// the other.
const ERROR_TTL: Duration = Duration::from_secs(5);

/// Lifetime of a response while the API server is unavailable. Outages of a control plane and of a
/// registry often come together, and an upgrade of a control plane takes minutes.
const STALE_IF_ERROR: Duration = Duration::from_secs(15 * 60);

/// Responses by key. Concurrent lookups of one key share one request.
pub(super) struct ResponseCache<K, V> {
    ttl: Duration,
    slots: Mutex<LruCache<K, CacheSlot<V>>>,
}

/// Locked during the request, so that all other lookups of the key wait for its result.
type CacheSlot<V> = Arc<tokio::sync::Mutex<CachedResult<V>>>;

struct CachedResult<V> {
    response: Option<(Instant, V)>,
    error: Option<(Instant, ApiError)>,
}

impl<V> Default for CachedResult<V> {
    fn default() -> Self {
        Self { response: None, error: None }
    }
}

impl<V: Clone> CachedResult<V> {
    fn response_within(&self, limit: Duration) -> Option<V> {
        self.response.as_ref().filter(|(at, _)| at.elapsed() < limit).map(|(_, response)| response.clone())
    }

    fn recent_error(&self) -> Option<ApiError> {
        self.error.as_ref().filter(|(at, _)| at.elapsed() < ERROR_TTL).map(|(_, failure)| failure.clone())
    }
}

impl<K: Eq + Hash, V: Clone> ResponseCache<K, V> {
    /// A response is valid for `fresh`. Above `most` keys the least recently used key is evicted.
    pub(super) fn new(ttl: Duration, max_entries: usize) -> Self {
        Self { ttl, slots: Mutex::new(LruCache::new(max_entries)) }
    }

    /// The cached response, or the result of `fetch`, which is polled only without a valid
    /// response.
    ///
    /// [`ApiError::NotFound`] removes the cached response. [`ApiError::Forbidden`] is returned and
    /// leaves the response in the cache: rights come and go while an API server starts.
    pub(super) async fn get(&self, key: K, fetch: impl Future<Output = Result<V, ApiError>>) -> Result<V, ApiError> {
        let slot = self.slot(key);
        let mut state = slot.lock().await;
        if let Some(response) = state.response_within(self.ttl) {
            return Ok(response);
        }
        let failure = match state.recent_error() {
            Some(failure) => failure,
            None => match fetch.await {
                Ok(value) => {
                    *state = CachedResult { response: Some((Instant::now(), value.clone())), error: None };
                    return Ok(value);
                }
                Err(failure) => {
                    if matches!(failure, ApiError::NotFound(_)) {
                        state.response = None;
                    }
                    state.error = Some((Instant::now(), failure.clone()));
                    failure
                }
            },
        };
        match state.response_within(STALE_IF_ERROR) {
            Some(response) if matches!(failure, ApiError::Unavailable(_)) => Ok(response),
            _ => Err(failure),
        }
    }

    fn slot(&self, key: K) -> CacheSlot<V> {
        let mut slots = self.slots.lock();
        let slot = slots.get(&key).cloned().unwrap_or_default();
        slots.insert(key, Arc::clone(&slot));
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const TTL: Duration = Duration::from_secs(30);
    const MAX_ENTRIES: usize = 8;

    type Answer = Result<&'static str, ApiError>;

    fn test_cache() -> ResponseCache<&'static str, &'static str> {
        ResponseCache::new(TTL, MAX_ENTRIES)
    }

    fn down() -> Answer {
        Err(ApiError::Unavailable("down".into()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_is_cached_until_it_expires() {
        let cache = test_cache();
        let lookup = async |value| cache.get("shop", async move { Ok(value) }).await.unwrap();
        assert_eq!(lookup("old").await, "old");
        assert_eq!(lookup("new").await, "old");
        tokio::time::advance(TTL).await;
        assert_eq!(lookup("new").await, "new");
    }

    #[tokio::test(start_paused = true)]
    async fn concurrent_lookups_share_one_request() {
        for answer in
            [Ok("yes"), down(), Err(ApiError::NotFound(String::new())), Err(ApiError::Forbidden(String::new()))]
        {
            let cache = test_cache();
            let requests = AtomicUsize::new(0);
            let lookup = async || {
                let request = async {
                    requests.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    answer.clone()
                };
                cache.get("shop", request).await
            };
            let answers = futures::future::join_all((0..100).map(|_| lookup())).await;
            assert!(answers.iter().all(|each| each.is_ok() == answer.is_ok()), "{answer:?}");
            assert_eq!(requests.load(Ordering::Relaxed), 1, "{answer:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stale_response_is_served_while_the_api_server_is_unavailable() {
        let cache = test_cache();
        let lookup = async |answer: Answer| cache.get("shop", async { answer }).await;
        lookup(Ok("yes")).await.unwrap();
        tokio::time::advance(STALE_IF_ERROR - ERROR_TTL).await;
        assert_eq!(lookup(down()).await.unwrap(), "yes");
        tokio::time::advance(ERROR_TTL).await;
        assert!(matches!(lookup(down()).await, Err(ApiError::Unavailable(text)) if text == "down"));
        tokio::time::advance(ERROR_TTL).await;
        assert_eq!(lookup(Ok("back")).await.unwrap(), "back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stale_response_is_not_served_for_a_missing_or_forbidden_object() {
        let cache = test_cache();
        let lookup = async |answer: Answer| cache.get("shop", async { answer }).await;
        lookup(Ok("yes")).await.unwrap();
        tokio::time::advance(TTL).await;
        assert!(matches!(lookup(Err(ApiError::Forbidden(String::new()))).await, Err(ApiError::Forbidden(_))));
        tokio::time::advance(ERROR_TTL).await;
        assert_eq!(lookup(down()).await.unwrap(), "yes", "rights come and go while an API server starts");
        tokio::time::advance(ERROR_TTL).await;
        assert!(matches!(lookup(Err(ApiError::NotFound(String::new()))).await, Err(ApiError::NotFound(_))));
        tokio::time::advance(ERROR_TTL).await;
        assert!(matches!(lookup(down()).await, Err(ApiError::Unavailable(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_lookup_leaves_the_request_to_the_next_lookup() {
        let cache = test_cache();
        let silent = cache.get("shop", std::future::pending());
        assert!(tokio::time::timeout(ERROR_TTL, silent).await.is_err());
        assert_eq!(cache.get("shop", async { Ok("yes") }).await.unwrap(), "yes");
    }

    #[tokio::test(start_paused = true)]
    async fn the_cache_is_bounded() {
        let cache = ResponseCache::new(TTL, MAX_ENTRIES);
        for key in 0..MAX_ENTRIES + 2 {
            tokio::time::advance(Duration::from_millis(1)).await;
            cache.get(key, async { Ok("yes") }).await.unwrap();
        }
        let slots = cache.slots.lock();
        assert_eq!(slots.len(), MAX_ENTRIES);
        assert!(!slots.contains_key(&1) && slots.contains_key(&2));
    }
}
