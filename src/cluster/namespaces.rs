//! Namespaces' annotations, asked for one at a time and kept for a moment.
//!
//! Not watched: a thousand nodes that watch every namespace are a thousand watches for what changes once a month.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::api::GetParams;
use kube::{Api, Client};
use tokio::time::Instant;

use super::call::{Failure, PATIENCE, call};
use crate::ports::ClusterError;

/// A changed annotation counts after this; the pods of one failing Deployment meanwhile share one request.
const FRESH: Duration = Duration::from_secs(5);

/// While the API server does not answer, what it said last counts for so long. Outages of a control plane and of a registry come
/// together, and an upgrade of the former takes minutes.
const STALE: Duration = Duration::from_secs(15 * 60);

/// Namespaces of the pods of one node: a few dozen. When more are asked for, the one unused for longest is forgotten.
const MOST: usize = 1024;

type Annotations = Arc<BTreeMap<String, String>>;

pub(super) struct Namespaces {
    client: Client,
    slots: Mutex<HashMap<String, Slot>>,
}

struct Slot {
    used: Instant,
    /// Held while the API server is asked, so that everybody else waits for the same answer.
    state: Arc<tokio::sync::Mutex<State>>,
}

#[derive(Default)]
struct State {
    known: Option<(Instant, Annotations)>,
    /// When the API server did not answer, so that not everybody waits for that again.
    failed: Option<(Instant, String)>,
}

impl Namespaces {
    pub(super) fn new(client: Client) -> Self {
        Self { client, slots: Mutex::default() }
    }

    pub(super) async fn annotations(&self, k8s_namespace: &str) -> Result<Annotations, ClusterError> {
        self.through_cache(k8s_namespace, async {
            let namespaces = Api::<Namespace>::all(self.client.clone());
            // From the watch cache, and the metadata alone.
            let found = call(PATIENCE, namespaces.get_metadata_with(k8s_namespace, &GetParams::any())).await?;
            Ok(Arc::new(found.metadata.annotations.unwrap_or_default()))
        })
        .await
    }

    /// `ask` is only polled when nothing fresh is known.
    async fn through_cache(
        &self,
        k8s_namespace: &str,
        ask: impl Future<Output = Result<Annotations, Failure>>,
    ) -> Result<Annotations, ClusterError> {
        let state = self.slot(k8s_namespace);
        let mut state = state.lock().await;
        if let Some((_, known)) = state.known.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return Ok(known.clone());
        }
        if state.failed.as_ref().is_none_or(|(at, _)| at.elapsed() >= FRESH) {
            match ask.await {
                Ok(annotations) => {
                    *state = State { known: Some((Instant::now(), annotations.clone())), failed: None };
                    return Ok(annotations);
                }
                Err(Failure::Unavailable(text)) => state.failed = Some((Instant::now(), text)),
                Err(failure) => {
                    if matches!(failure, Failure::NotFound(_)) {
                        *state = State::default();
                    }
                    return Err(failure.about(&format!("namespace {k8s_namespace}")));
                }
            }
        }
        if let Some((_, known)) = state.known.as_ref().filter(|(at, _)| at.elapsed() < STALE) {
            return Ok(known.clone());
        }
        let text = state.failed.as_ref().map(|(_, text)| text.clone()).unwrap_or_default();
        Err(ClusterError::Unavailable(text))
    }

    fn slot(&self, k8s_namespace: &str) -> Arc<tokio::sync::Mutex<State>> {
        let mut slots = self.slots.lock().expect("nothing panics while holding it");
        if !slots.contains_key(k8s_namespace) && slots.len() >= MOST {
            let oldest = slots.iter().min_by_key(|(_, slot)| slot.used).map(|(name, _)| name.clone());
            oldest.and_then(|name| slots.remove(&name));
        }
        let slot = slots
            .entry(k8s_namespace.to_owned())
            .or_insert_with(|| Slot { used: Instant::now(), state: Arc::default() });
        slot.used = Instant::now();
        slot.state.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::test_client;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn annotations(value: &str) -> Annotations {
        Arc::new(BTreeMap::from([("key".to_owned(), value.to_owned())]))
    }

    fn down() -> Result<Annotations, Failure> {
        Err(Failure::Unavailable("down".into()))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_kept_for_a_moment() {
        let namespaces = Namespaces::new(test_client());
        let ask = async |value| namespaces.through_cache("shop", async { Ok(annotations(value)) }).await.unwrap();
        assert_eq!(ask("old").await, annotations("old"));
        assert_eq!(ask("new").await, annotations("old"));
        tokio::time::advance(FRESH).await;
        assert_eq!(ask("new").await, annotations("new"));
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_ask_at_once_share_one_request() {
        let namespaces = Namespaces::new(test_client());
        let requests = AtomicUsize::new(0);
        let ask = async || {
            let request = async {
                requests.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(1)).await;
                down()
            };
            namespaces.through_cache("shop", request).await
        };
        let answers = futures::future::join_all((0..100).map(|_| ask())).await;
        assert!(answers.iter().all(|answer| matches!(answer, Err(ClusterError::Unavailable(_)))));
        assert_eq!(requests.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_the_api_server_is_bridged_for_some_minutes() {
        let namespaces = Namespaces::new(test_client());
        let ask = async |answer| namespaces.through_cache("shop", async { answer }).await;
        ask(Ok(annotations("yes"))).await.unwrap();
        tokio::time::advance(STALE - FRESH).await;
        assert_eq!(ask(down()).await.unwrap(), annotations("yes"));
        tokio::time::advance(FRESH).await;
        assert!(matches!(ask(down()).await, Err(ClusterError::Unavailable(text)) if text == "down"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_that_is_gone_or_forbidden_is_not_bridged() {
        let namespaces = Namespaces::new(test_client());
        let ask = async |answer| namespaces.through_cache("shop", async { answer }).await;
        ask(Ok(annotations("yes"))).await.unwrap();
        tokio::time::advance(FRESH).await;
        assert!(matches!(ask(Err(Failure::Forbidden(String::new()))).await, Err(ClusterError::Forbidden(_))));
        assert_eq!(ask(down()).await.unwrap(), annotations("yes"), "rights come and go while an API server starts");
        tokio::time::advance(FRESH).await;
        assert!(matches!(ask(Err(Failure::NotFound(String::new()))).await, Err(ClusterError::Gone(_))));
        assert!(matches!(ask(down()).await, Err(ClusterError::Unavailable(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_cache_is_bounded() {
        let namespaces = Namespaces::new(test_client());
        for i in 0..MOST + 10 {
            tokio::time::advance(Duration::from_millis(1)).await;
            let _ = namespaces.through_cache(&format!("ns-{i}"), async { Ok(annotations("yes")) }).await;
        }
        let slots = namespaces.slots.lock().unwrap();
        assert_eq!(slots.len(), MOST);
        assert!(!slots.contains_key("ns-9") && slots.contains_key("ns-10"));
    }
}
