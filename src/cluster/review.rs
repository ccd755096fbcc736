//! TokenReview: the API server's own word on a token, which knows what no signature tells: that the pod is gone, or the ServiceAccount.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::PostParams;
use kube::core::Request;
use tokio::time::Instant;

use super::call::Failure;
use super::server::Server;
use crate::model::{Credential, PeerId};

/// An API server that needs longer is not held up further; the offline verdict stands. The door waits for 5 s in all.
const PATIENCE: Duration = Duration::from_secs(2);

/// Reviews that may be asked for at once, and the time after which there is one more.
///
/// Of a thousand agents that start together each meets the others: a million reviews, if every first meeting had one. With these,
/// 8000 in the first seconds, eight for each agent by others that chance chose, and then 50 a second from the whole cluster. An API server answers a
/// review in a few milliseconds and has room for 200 writes at a time. A newcomer in a cluster at rest is reviewed at every door.
const BURST: u32 = 8;
const EACH: Duration = Duration::from_secs(20);

/// What may be asked now.
pub(super) struct Budget(Mutex<(u32, Instant)>);

impl Budget {
    pub(super) fn full() -> Self {
        Self(Mutex::new((BURST, Instant::now())))
    }

    /// Takes one, if there is one.
    pub(super) fn take(&self) -> bool {
        let mut budget = self.0.lock().expect("nothing panics while holding it");
        let (left, since) = &mut *budget;
        let gathered = u32::try_from(since.elapsed().as_secs() / EACH.as_secs()).unwrap_or(u32::MAX);
        *since += EACH.saturating_mul(gathered);
        *left = left.saturating_add(gathered).min(BURST);
        let taken = *left > 0;
        *left -= u32::from(taken);
        taken
    }
}

/// Whether the API server takes this token for one of `user`, made for `peer`.
pub(super) async fn review(
    server: &Arc<Server>,
    peer: PeerId,
    credential: &Credential,
    user: &str,
) -> Result<bool, Failure> {
    let audience = peer.to_string();
    let question = TokenReview {
        spec: TokenReviewSpec { token: Some(credential.expose().to_owned()), audiences: Some(vec![audience.clone()]) },
        ..TokenReview::default()
    };
    let body = serde_json::to_vec(&question).map_err(|error| Failure::Other(error.to_string()))?;
    let request = Request::new("/apis/authentication.k8s.io/v1/tokenreviews").create(&PostParams::default(), body);
    let answer = server.ask(PATIENCE, request).await?;
    // The answer repeats the token, so its text goes nowhere.
    let status = serde_json::from_str::<TokenReview>(&answer).ok().and_then(|answer| answer.status);
    let status = status.ok_or_else(|| Failure::Other("the API server's answer is no TokenReview".to_owned()))?;
    let is_user = status.user.and_then(|found| found.username).is_some_and(|name| name == user);
    let for_peer = status.audiences.is_some_and(|audiences| audiences.contains(&audience));
    Ok(status.authenticated == Some(true) && is_user && for_peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_budget_is_a_burst_and_then_a_rate() {
        let budget = Budget::full();
        assert_eq!((0..100).filter(|_| budget.take()).count(), BURST as usize);
        tokio::time::advance(EACH - Duration::from_millis(1)).await;
        assert!(!budget.take());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(budget.take() && !budget.take());
        tokio::time::advance(EACH * 1000).await;
        assert_eq!((0..100).filter(|_| budget.take()).count(), BURST as usize, "no more gathers");
    }
}
