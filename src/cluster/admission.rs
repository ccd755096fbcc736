//! Admission by ServiceAccount token: the API server says who is an agent of this cluster.
//!
//! Every agent asks for a token whose audience is its own PeerId, bound to its own pod, and shows it to peers; they verify it with
//! the keys that the cluster publishes. Only the issuing needs the API server. Nothing is written to disk, and no token to the log.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::core::Request;
use kube::{Api, Client};
use rand::Rng;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::call::{Failure, PATIENCE, call};
use super::jwks::KeySource;
use super::token::{Expectations, Flaw, Keys, MAX_LIFE, verify};
use super::{KubeCluster, Own};
use crate::model::{Credential, NodeName, PeerId};
use crate::ports::{Admission, Refusal};

/// The shortest life that an API server grants (`expirationSeconds`); one that claims less is not believed, so that a wrong answer
/// does not become a flood of requests.
const MIN_LIFE: Duration = Duration::from_secs(600);

/// Keys are asked for as often as tokens are renewed, so that one that was withdrawn is forgotten.
const KEYS_LIFE: Duration = MAX_LIFE;

/// Pauses after a failure double from the first to the second. At the longest, a thousand agents that wait for the API
/// server send it thirty requests a second.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// Admits agents of this cluster, and gets the token that others admit this one by.
pub struct TokenAdmission {
    client: Client,
    own: Own,
    peer: PeerId,
    expectations: Expectations,
    keys: KeySource,
    token: Mutex<Option<Token>>,
}

/// A token, and until when it is worth showing, by this machine's own monotonic clock.
struct Token {
    credential: Credential,
    expires: Instant,
}

impl TokenAdmission {
    /// For the agent whose key is `peer`. Until [`TokenAdmission::run`] has got a token there is none to show.
    pub fn new(cluster: &KubeCluster, peer: PeerId) -> Self {
        let own = cluster.own.clone();
        let expectations =
            Expectations { k8s_namespace: own.k8s_namespace.clone(), service_account: own.service_account.clone() };
        Self {
            client: cluster.client.clone(),
            keys: KeySource::new(cluster.client.clone()),
            own,
            peer,
            expectations,
            token: Mutex::default(),
        }
    }

    /// Keeps a token and the cluster's keys at hand until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        stop.run_until_cancelled(async { tokio::join!(self.keep_token(), self.keep_keys()) }).await;
    }

    async fn keep_token(&self) {
        let mut failures = 0;
        loop {
            let wait = match self.obtain().await {
                Ok(life) => {
                    failures = 0;
                    tracing::debug!(life_s = life.as_secs(), "got a token for the mesh");
                    renewal(life, rand::rng().random())
                }
                Err(failure) => {
                    failures += 1;
                    tracing::warn!(
                        service_account = %self.own.service_account, namespace = %self.own.k8s_namespace, %failure,
                        "no token for the mesh (create on serviceaccounts/token is needed); it is asked for again"
                    );
                    pause(failures, rand::rng().random())
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn keep_keys(&self) {
        let mut failures = 0;
        loop {
            let wait = match self.keys.refetch().await {
                Ok(_) => {
                    failures = 0;
                    renewal(KEYS_LIFE, rand::rng().random())
                }
                Err(text) => {
                    failures += 1;
                    tracing::warn!(error = text, "no keys to verify peers' tokens with; they are asked for again");
                    pause(failures, rand::rng().random())
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// Asks for a token; how long it lives is returned.
    async fn obtain(&self) -> Result<Duration, Failure> {
        let asked = Instant::now();
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![self.peer.to_string()],
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(self.own.pod_name.clone()),
                    uid: self.own.pod_uid.clone(),
                }),
                expiration_seconds: Some(MAX_LIFE.as_secs().cast_signed()),
            },
            ..TokenRequest::default()
        };
        // Not kube's own call for this: it logs an answer that it cannot read.
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), &self.own.k8s_namespace);
        let body = serde_json::to_vec(&request).map_err(|error| Failure::Other(error.to_string()))?;
        let request = Request::new(accounts.resource_url())
            .create_subresource("token", &self.own.service_account, &PostParams::default(), body)
            .map_err(kube::Error::BuildRequest)?;
        let answer = call(PATIENCE, self.client.request_text(request)).await?;
        let granted = serde_json::from_str::<TokenRequest>(&answer).ok();
        let granted = granted.and_then(|granted| Some((granted.status?.token, granted.spec.expiration_seconds)));
        let (token, seconds) =
            granted.ok_or_else(|| Failure::Other("the API server's answer holds no token".to_owned()))?;
        let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(MAX_LIFE.as_secs());
        let life = Duration::from_secs(seconds).clamp(MIN_LIFE, MAX_LIFE);
        let token = Token { credential: Credential::new(token), expires: asked + life };
        *self.token.lock().expect("nothing panics while holding it") = Some(token);
        Ok(life)
    }

    fn judge(&self, peer: PeerId, credential: &Credential, keys: &Keys) -> Result<Option<NodeName>, Flaw> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let claims = verify(credential.expose(), peer, keys, &self.expectations, now)?;
        tracing::debug!(%peer, pod = claims.pod_name, node = ?claims.node, "a peer's token is good");
        Ok(claims.node)
    }
}

#[async_trait]
impl Admission for TokenAdmission {
    async fn credential(&self) -> Result<Credential, Refusal> {
        let token = self.token.lock().expect("nothing panics while holding it");
        match token.as_ref() {
            Some(token) if token.expires > Instant::now() => Ok(token.credential.clone()),
            Some(_) => Err(Refusal::CannotTell("this agent's token has expired and none is to be had".to_owned())),
            None => Err(Refusal::CannotTell("this agent has no token yet".to_owned())),
        }
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<Option<NodeName>, Refusal> {
        let (keys, just_asked) = match self.keys.known() {
            Some(keys) => (keys, false),
            None => (self.keys.refetch().await.map_err(Refusal::CannotTell)?, true),
        };
        let verdict = match self.judge(peer, credential, &keys) {
            // Signed by a key, or in a name, that is newer than what is known.
            Err(Flaw::UnknownKey | Flaw::Issuer) if !just_asked => {
                let keys = self.keys.refetch().await.map_err(Refusal::CannotTell)?;
                self.judge(peer, credential, &keys)
            }
            verdict => verdict,
        };
        verdict.map_err(|flaw| Refusal::Denied(flaw.to_string()))
    }
}

/// When a token of this life is renewed: around 80 % of it, so that twelve minutes are left for an API server that is away;
/// spread by a tenth (`chance` from 0 to 1), so that agents started at once do not renew at once.
fn renewal(life: Duration, chance: f64) -> Duration {
    life.mul_f64(0.75 + 0.1 * chance)
}

/// The pause after so many failures in a row, half of it at random.
fn pause(failures: u32, chance: f64) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(6)).min(LAST_PAUSE);
    longest.mul_f64(0.5 + 0.5 * chance)
}

#[cfg(test)]
mod tests;
