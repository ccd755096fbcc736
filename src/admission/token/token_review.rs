//! TokenReview: the API server's verdict on a token. The API server also rejects tokens of a
//! deleted pod or ServiceAccount, whose signature is still valid.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::PostParams;
use kube::core::Request;
use parking_lot::Mutex;

use crate::api_server::client::ApiServerClient;
use crate::api_server::error::ApiError;
use crate::decide::review_budget::ReviewBudget;
use crate::model::{Credential, PeerId};
use crate::util::clock;

/// Timeout of a review. Without an answer in this time the verdict of the signature counts. A
/// handshake has 5 s in all.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(super) struct SharedReviewBudget(Mutex<ReviewBudget>);

impl SharedReviewBudget {
    /// Takes one review of the budget, in a cluster of `agents` agents; `false` when none is left.
    pub(super) fn try_take(&self, agents: usize) -> bool {
        self.0.lock().try_take(agents, clock::now())
    }
}

/// Whether the API server accepts the token as a token of `user`, with `peer` as its audience.
pub(super) async fn review_token(
    server: &Arc<ApiServerClient>,
    peer: PeerId,
    credential: &Credential,
    user: &str,
) -> Result<bool, ApiError> {
    let audience = peer.to_string();
    let payload = TokenReview {
        spec: TokenReviewSpec { token: Some(credential.expose().to_owned()), audiences: Some(vec![audience.clone()]) },
        ..TokenReview::default()
    };
    let body = serde_json::to_vec(&payload).map_err(|error| ApiError::Other(error.to_string()))?;
    let request = Request::new("/apis/authentication.k8s.io/v1/tokenreviews").create(&PostParams::default(), body);
    let answer = server.send(REVIEW_TIMEOUT, request).await?;
    // The answer contains the token, so no error quotes the answer.
    let status = serde_json::from_str::<TokenReview>(&answer).ok().and_then(|answer| answer.status);
    let status = status.ok_or_else(|| ApiError::Other("the API server's answer is not a TokenReview".to_owned()))?;
    let is_user = status.user.and_then(|found| found.username).is_some_and(|name| name == user);
    let for_peer = status.audiences.is_some_and(|audiences| audiences.contains(&audience));
    Ok(status.authenticated == Some(true) && is_user && for_peer)
}
