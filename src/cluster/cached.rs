//! Answers of the API server, asked for one at a time and kept for a moment.
//!
//! What is looked at in this way is not watched: a thousand nodes that watch every namespace are a thousand watches for what changes
//! once a month. Not here: what is asked.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::call::Failure;

/// A refusal, or an API server that did not answer, stands for so long, so that not everybody waits for the same again.
const RETRY: Duration = Duration::from_secs(5);

/// While the API server does not answer, what it said last counts for so long. Outages of a control plane and of a registry come
/// together, and an upgrade of the former takes minutes.
const STALE: Duration = Duration::from_secs(15 * 60);

/// What is known under each key. Of those who ask for one key at once, one asks the API server and all get its answer.
pub(super) struct Cached<K, V> {
    fresh: Duration,
    most: usize,
    slots: Mutex<HashMap<K, Slot<V>>>,
}

struct Slot<V> {
    used: Instant,
    /// Held while the API server is asked, so that everybody else waits for the same answer.
    state: Arc<tokio::sync::Mutex<State<V>>>,
}

struct State<V> {
    known: Option<(Instant, V)>,
    failed: Option<(Instant, Failure)>,
}

impl<V> Default for State<V> {
    fn default() -> Self {
        Self { known: None, failed: None }
    }
}

impl<V: Clone> State<V> {
    fn known_for(&self, limit: Duration) -> Option<V> {
        self.known.as_ref().filter(|(at, _)| at.elapsed() < limit).map(|(_, known)| known.clone())
    }

    fn failed_lately(&self) -> Option<Failure> {
        self.failed.as_ref().filter(|(at, _)| at.elapsed() < RETRY).map(|(_, failure)| failure.clone())
    }
}

impl<K: Clone + Eq + Hash, V: Clone> Cached<K, V> {
    /// An answer counts for `fresh`. When more than `most` keys are asked for, the one unused for longest is forgotten.
    pub(super) fn new(fresh: Duration, most: usize) -> Self {
        Self { fresh, most, slots: Mutex::default() }
    }

    /// `ask` is only polled when nothing fresh is known.
    ///
    /// What does not exist is forgotten at once. What may not be asked any more is refused, but not forgotten: rights come and go while
    /// an API server starts.
    pub(super) async fn get(&self, key: K, ask: impl Future<Output = Result<V, Failure>>) -> Result<V, Failure> {
        let state = self.slot(key);
        let mut state = state.lock().await;
        if let Some(known) = state.known_for(self.fresh) {
            return Ok(known);
        }
        let failure = match state.failed_lately() {
            Some(failure) => failure,
            None => match ask.await {
                Ok(value) => {
                    *state = State { known: Some((Instant::now(), value.clone())), failed: None };
                    return Ok(value);
                }
                Err(failure) => {
                    if matches!(failure, Failure::NotFound(_)) {
                        state.known = None;
                    }
                    state.failed = Some((Instant::now(), failure.clone()));
                    failure
                }
            },
        };
        match state.known_for(STALE) {
            Some(known) if matches!(failure, Failure::Unavailable(_)) => Ok(known),
            _ => Err(failure),
        }
    }

    fn slot(&self, key: K) -> Arc<tokio::sync::Mutex<State<V>>> {
        let mut slots = self.slots.lock().expect("nothing panics while holding it");
        if !slots.contains_key(&key) && slots.len() >= self.most {
            let oldest = slots.iter().min_by_key(|(_, slot)| slot.used).map(|(key, _)| key.clone());
            oldest.and_then(|key| slots.remove(&key));
        }
        let slot = slots.entry(key).or_insert_with(|| Slot { used: Instant::now(), state: Arc::default() });
        slot.used = Instant::now();
        slot.state.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const FRESH: Duration = Duration::from_secs(30);
    const MOST: usize = 8;

    type Answer = Result<&'static str, Failure>;

    fn cached() -> Cached<&'static str, &'static str> {
        Cached::new(FRESH, MOST)
    }

    fn down() -> Answer {
        Err(Failure::Unavailable("down".into()))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_kept_for_a_moment() {
        let cached = cached();
        let ask = async |value| cached.get("shop", async move { Ok(value) }).await.unwrap();
        assert_eq!(ask("old").await, "old");
        assert_eq!(ask("new").await, "old");
        tokio::time::advance(FRESH).await;
        assert_eq!(ask("new").await, "new");
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_ask_at_once_share_one_request() {
        for answer in [Ok("yes"), down(), Err(Failure::NotFound(String::new())), Err(Failure::Forbidden(String::new()))]
        {
            let cached = cached();
            let requests = AtomicUsize::new(0);
            let ask = async || {
                let request = async {
                    requests.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    answer.clone()
                };
                cached.get("shop", request).await
            };
            let answers = futures::future::join_all((0..100).map(|_| ask())).await;
            assert!(answers.iter().all(|each| each.is_ok() == answer.is_ok()), "{answer:?}");
            assert_eq!(requests.load(Ordering::Relaxed), 1, "{answer:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_the_api_server_is_bridged_for_some_minutes() {
        let cached = cached();
        let ask = async |answer: Answer| cached.get("shop", async { answer }).await;
        ask(Ok("yes")).await.unwrap();
        tokio::time::advance(STALE - RETRY).await;
        assert_eq!(ask(down()).await.unwrap(), "yes");
        tokio::time::advance(RETRY).await;
        assert!(matches!(ask(down()).await, Err(Failure::Unavailable(text)) if text == "down"));
        tokio::time::advance(RETRY).await;
        assert_eq!(ask(Ok("back")).await.unwrap(), "back");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_gone_or_forbidden_is_not_bridged() {
        let cached = cached();
        let ask = async |answer: Answer| cached.get("shop", async { answer }).await;
        ask(Ok("yes")).await.unwrap();
        tokio::time::advance(FRESH).await;
        assert!(matches!(ask(Err(Failure::Forbidden(String::new()))).await, Err(Failure::Forbidden(_))));
        tokio::time::advance(RETRY).await;
        assert_eq!(ask(down()).await.unwrap(), "yes", "rights come and go while an API server starts");
        tokio::time::advance(RETRY).await;
        assert!(matches!(ask(Err(Failure::NotFound(String::new()))).await, Err(Failure::NotFound(_))));
        tokio::time::advance(RETRY).await;
        assert!(matches!(ask(down()).await, Err(Failure::Unavailable(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_stops_waiting_leaves_the_question_to_the_next() {
        let cached = cached();
        let silent = cached.get("shop", std::future::pending());
        assert!(tokio::time::timeout(RETRY, silent).await.is_err());
        assert_eq!(cached.get("shop", async { Ok("yes") }).await.unwrap(), "yes");
    }

    #[tokio::test(start_paused = true)]
    async fn the_cache_is_bounded() {
        let cached = Cached::new(FRESH, MOST);
        for key in 0..MOST + 2 {
            tokio::time::advance(Duration::from_millis(1)).await;
            cached.get(key, async { Ok("yes") }).await.unwrap();
        }
        let slots = cached.slots.lock().unwrap();
        assert_eq!(slots.len(), MOST);
        assert!(!slots.contains_key(&1) && slots.contains_key(&2));
    }
}
