//! This agent's own token: the request for the token, and its expiry.

use std::time::Duration;

use hyper::Request;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Resource;
use kube::api::PostParams;
use kube::core::request::Error;
use tokio::time::Instant;

use super::admission_file::StoredToken;
use crate::api_server::AgentPod;
use crate::api_server::error::ApiError;
use crate::credential::token::MAX_LIFE;
use crate::model::{Credential, PeerId};

/// The shortest lifetime that an API server grants (`expirationSeconds`). A shorter lifetime in an
/// answer is raised to this value, so that a wrong answer causes no flood of requests.
const MIN_LIFE: Duration = Duration::from_secs(600);

/// A token with its expiry, by this machine's monotonic clock.
pub(super) struct AgentToken {
    pub(super) credential: Credential,
    obtained_at: Instant,
    /// The remaining lifetime at `obtained_at`, or the time since the expiry.
    remaining: Duration,
    overdue: Duration,
    /// The expiry by the wall clock, since 1970.
    expires: Duration,
}

impl AgentToken {
    /// A token whose request was sent at `sent`, by the wall clock `sent_at`, with the lifetime
    /// `life`.
    pub(super) fn new(token: String, sent: Instant, sent_at: Duration, life: Duration) -> Self {
        let credential = Credential::new(token);
        Self { credential, obtained_at: sent, remaining: life, overdue: Duration::ZERO, expires: sent_at + life }
    }

    /// The stored token, if the token is for this key and this pod.
    pub(super) fn from_stored(stored: StoredToken, peer: PeerId, agent_pod: &AgentPod, now: Duration) -> Option<Self> {
        let until = Duration::from_secs(stored.until);
        let (remaining, overdue) = (until.saturating_sub(now), now.saturating_sub(until));
        let is_own = stored.peer == peer.to_string() && stored.pod == pod_key(agent_pod) && remaining <= MAX_LIFE;
        is_own.then(|| Self {
            credential: Credential::new(stored.token),
            obtained_at: Instant::now(),
            remaining,
            overdue,
            expires: until,
        })
    }

    pub(super) fn to_stored(&self, peer: PeerId, agent_pod: &AgentPod) -> StoredToken {
        let token = self.credential.expose().to_owned();
        StoredToken { peer: peer.to_string(), pod: pod_key(agent_pod), token, until: self.expires.as_secs() }
    }

    /// The time since the token's expiry; `None` before the expiry.
    pub(super) fn expired_for(&self) -> Option<Duration> {
        (self.obtained_at.elapsed() + self.overdue).checked_sub(self.remaining)
    }
}

/// The pod's UID, or its name where the environment sets no UID.
fn pod_key(agent_pod: &AgentPod) -> String {
    agent_pod.pod_uid.clone().unwrap_or_else(|| agent_pod.pod_name.clone())
}

/// The request for a token for this key, bound to this pod.
pub(super) fn token_request(agent_pod: &AgentPod, peer: PeerId) -> Result<Request<Vec<u8>>, Error> {
    let payload = TokenRequest {
        spec: TokenRequestSpec {
            audiences: vec![peer.to_string()],
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(agent_pod.pod_name.clone()),
                uid: agent_pod.pod_uid.clone(),
            }),
            expiration_seconds: Some(MAX_LIFE.as_secs().cast_signed()),
        },
        ..TokenRequest::default()
    };
    let accounts = ServiceAccount::url_path(&(), Some(&agent_pod.k8s_namespace));
    let body = serde_json::to_vec(&payload).map_err(Error::SerializeBody)?;
    kube::core::Request::new(accounts).create_subresource(
        "token",
        &agent_pod.service_account,
        &PostParams::default(),
        body,
    )
}

/// The granted token and its lifetime, from the API server's answer.
pub(super) fn parse_granted(answer: &str) -> Result<(String, Duration), ApiError> {
    let granted = serde_json::from_str::<TokenRequest>(answer).ok();
    let granted = granted.and_then(|granted| Some((granted.status?.token, granted.spec.expiration_seconds)));
    // The answer contains a token, so no error quotes the answer.
    let (token, seconds) =
        granted.ok_or_else(|| ApiError::Other("the API server's answer contains no token".to_owned()))?;
    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(MAX_LIFE.as_secs());
    Ok((token, Duration::from_secs(seconds).clamp(MIN_LIFE, MAX_LIFE)))
}
