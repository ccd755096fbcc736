//! Admission by ServiceAccount token: the API server issues tokens to the agents of this cluster.
//!
//! Each agent requests a token whose audience is its own PeerId, bound to its own pod, and sends
//! the token to its peers. A peer verifies the token with the keys that the cluster publishes, so
//! only the issue needs the API server. A handshake also asks the API server for a review, while
//! the API server answers and the budget lasts ([`super::token_review`]). Keys, token and verdicts
//! are stored on the node for API-server outages ([`super::admission_file`]). No log contains a
//! token.

mod admission_file;
mod own_token;
mod published_keys;
mod token_review;
mod verdict_cache;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use rand::Rng;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::admission_file::{AdmissionFile, AdmissionWriter};
use self::own_token::{AgentToken, parse_granted, token_request};
use self::published_keys::KeySource;
use self::token_review::{SharedReviewBudget, review_token};
use self::verdict_cache::{ReviewStatus, VerdictCache};
use crate::api_server::client::{ApiServerClient, Reachability};
use crate::api_server::error::{ApiError, REQUEST_TIMEOUT};
use crate::api_server::{AgentPod, ApiServer};
use crate::credential::token::{Claims, ClusterKeys, Expectations, MAX_LIFE, TokenRejection, verify_ignoring_expiry};
use crate::metrics::Metrics;
use crate::model::{Credential, PeerId};
use crate::ports::{Admission, AdmittedPeer, Rejection};
use crate::util::backoff::Backoff;
use crate::util::clock::unix_time;

/// Lifetime of the cached keys. The agent fetches the keys as often as a token, so that a withdrawn
/// key is dropped.
const KEYS_LIFETIME: Duration = MAX_LIFE;

/// The first and the longest back-off; each failure doubles the back-off. At the longest, with the
/// random part 45 s on average, a thousand agents send 22 token requests per second.
const BACKOFF: Backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(60) };

/// Lifetime of a verdict in grace. The API server may return, which the agent's requests find out
/// within a minute.
const GRACE_VERDICT_TTL: Duration = Duration::from_secs(300);

/// Interval of writes of new verdicts, and of retries after a failed write (the disk was full). A
/// token and keys are written at once: a restarted agent without them is not admitted.
const SAVE_INTERVAL: Duration = Duration::from_secs(30);

/// The stored state of admission, and the grace period.
#[derive(Debug, Clone, Default)]
pub struct TokenAdmissionOptions {
    /// The file, created with mode 0600; `None` to store nothing.
    pub file: Option<PathBuf>,
    /// Time after its expiry for which a token is still sent, and for which a verified peer's token
    /// is still accepted, while the API server cannot be reached.
    pub grace: Duration,
}

/// Admits agents of this cluster, and obtains the token by which peers admit this agent.
pub struct TokenAdmission {
    api_server: Arc<ApiServerClient>,
    agent_pod: AgentPod,
    peer: PeerId,
    expectations: Expectations,
    options: TokenAdmissionOptions,
    keys: KeySource,
    verdicts: VerdictCache,
    budget: SharedReviewBudget,
    token: Mutex<Option<AgentToken>>,
    renewals: watch::Sender<u64>,
    /// Wakes the writer of the file after a new token or new keys.
    unsaved: Notify,
    writer: AdmissionWriter,
    review_forbidden_logged: AtomicBool,
    metrics: Metrics,
}

impl TokenAdmission {
    /// Admission for the agent with the key `peer`. Without a stored token,
    /// [`Admission::credential`] fails until [`TokenAdmission::run`] has a token.
    pub fn new(api_server: &ApiServer, peer: PeerId, options: TokenAdmissionOptions, metrics: Metrics) -> Self {
        let agent_pod = api_server.agent_pod.clone();
        let expectations = Expectations {
            k8s_namespace: agent_pod.k8s_namespace.clone(),
            service_account: agent_pod.service_account.clone(),
        };
        let mut stored = options.file.as_deref().map_or_else(AdmissionFile::empty, AdmissionFile::load);
        let api_server = Arc::new(ApiServerClient::new(api_server.client.clone()));
        Self {
            keys: KeySource::new(api_server.clone(), stored.keys.take(), options.grace),
            verdicts: VerdictCache::new(stored.peers(), options.grace),
            token: Mutex::new(
                stored.token.and_then(|stored| AgentToken::from_stored(stored, peer, &agent_pod, unix_time())),
            ),
            api_server,
            agent_pod,
            peer,
            expectations,
            options,
            budget: SharedReviewBudget::default(),
            renewals: watch::Sender::default(),
            unsaved: Notify::new(),
            writer: AdmissionWriter::default(),
            review_forbidden_logged: AtomicBool::new(false),
            metrics,
        }
    }

    /// Renews the token and the cluster's keys, and writes the file, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let maintenance = async { tokio::join!(self.maintain_token(), self.maintain_keys(), self.maintain_file()) };
        stop.run_until_cancelled(maintenance).await;
        self.save().await;
    }

    async fn maintain_token(&self) {
        let mut failures = 0;
        loop {
            let wait = match self.request_token().await {
                Ok(life) => {
                    failures = 0;
                    tracing::debug!(life_s = life.as_secs(), "the API server granted a token for peers");
                    renewal_delay(life, rand::rng().random())
                }
                Err(failure) => {
                    failures += 1;
                    tracing::warn!(
                        service_account = %self.agent_pod.service_account, namespace = %self.agent_pod.k8s_namespace, %failure,
                        "the API server grants no token for peers (needs create on serviceaccounts/token); the agent retries"
                    );
                    BACKOFF.jittered_wait(failures - 1, rand::rng().random())
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn maintain_keys(&self) {
        let mut failures = 0;
        loop {
            let wait = match self.keys.refetch().await {
                Ok(_) => {
                    failures = 0;
                    self.unsaved.notify_one();
                    renewal_delay(KEYS_LIFETIME, rand::rng().random())
                }
                Err(text) => {
                    failures += 1;
                    tracing::warn!(
                        error = text,
                        "the cluster's signing keys for peers' tokens cannot be fetched; the agent retries"
                    );
                    BACKOFF.jittered_wait(failures - 1, rand::rng().random())
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.keys.refetch_requested() => {}
            }
        }
    }

    async fn maintain_file(&self) {
        let mut failed = false;
        loop {
            let is_requested = timeout(SAVE_INTERVAL, self.unsaved.notified()).await.is_ok();
            // Each round takes the change flag, or the next round would write the same file again.
            if self.verdicts.take_changed() | is_requested | failed {
                failed = !self.save().await;
            }
        }
    }

    /// Writes the file. Returns `false` when the write failed.
    async fn save(&self) -> bool {
        let Some(file) = self.options.file.clone() else { return true };
        let contents = || {
            let token = self.token.lock().as_ref().map(|token| token.to_stored(self.peer, &self.agent_pod));
            AdmissionFile::new(self.keys.to_stored(), token, self.verdicts.to_stored(unix_time()))
        };
        let written = self.writer.write(file.clone(), contents).await;
        if let Err(error) = &written {
            tracing::warn!(file = %file.display(), %error, "keys, token and verdicts cannot be stored for a restart; the agent retries");
        }
        written.is_ok()
    }

    /// Requests a token and returns its lifetime.
    async fn request_token(&self) -> Result<Duration, ApiError> {
        let (sent, sent_at) = (Instant::now(), unix_time());
        let answer = self.api_server.send(REQUEST_TIMEOUT, token_request(&self.agent_pod, self.peer)).await?;
        let (token, life) = parse_granted(&answer)?;
        let token = AgentToken::new(token, sent, sent_at, life);
        *self.token.lock() = Some(token);
        self.unsaved.notify_one();
        self.renewals.send_modify(|renewals| *renewals += 1);
        Ok(life)
    }

    fn verify_claims(
        &self,
        peer: PeerId,
        credential: &Credential,
        keys: &ClusterKeys,
    ) -> Result<Claims, TokenRejection> {
        verify_ignoring_expiry(credential.expose(), peer, keys, &self.expectations, unix_time())
    }

    /// Asks the API server for its verdict on a token with a valid signature. A rejection counts; a
    /// missing answer does not.
    async fn review_online(&self, peer: PeerId, credential: &Credential, claims: &Claims) -> Result<(), Rejection> {
        let review_status = self.verdicts.review_status(peer, claims);
        // A rejection stays in force until the API server accepts the token.
        let offline_verdict = if review_status == ReviewStatus::RejectionExpired { Err(rejected()) } else { Ok(()) };
        match review_status {
            ReviewStatus::Accepted => return Ok(()),
            ReviewStatus::Rejected => return Err(rejected()),
            ReviewStatus::NotReviewed | ReviewStatus::RejectionExpired
                if self.api_server.reachability() == Reachability::Unreachable =>
            {
                return offline_verdict;
            }
            ReviewStatus::NotReviewed | ReviewStatus::RejectionExpired => {}
        }
        if !self.budget.try_take(self.verdicts.count() + 1) {
            self.metrics.token_reviewed("over_budget");
            return offline_verdict;
        }
        match review_token(&self.api_server, peer, credential, &self.expectations.user()).await {
            Ok(passed) => {
                self.metrics.token_reviewed(if passed { "passed" } else { "refused" });
                self.verdicts.record_verified(peer, claims, unix_time());
                self.verdicts.record_review(peer, claims, passed);
                if passed { Ok(()) } else { Err(rejected()) }
            }
            Err(failure) => {
                self.metrics.token_reviewed("unanswered");
                // The fetch of the keys finds out when the API server answers again. Until then no
                // token is reviewed, and admission grants grace.
                self.keys.request_refetch();
                if matches!(failure, ApiError::Forbidden(_))
                    && !self.review_forbidden_logged.swap(true, Ordering::Relaxed)
                {
                    tracing::warn!(%failure, "peers' tokens are not reviewed (the ServiceAccount needs create on tokenreviews)");
                }
                offline_verdict
            }
        }
    }

    /// The verdict on an expired token with a valid signature.
    fn admit_on_grace(&self, peer: PeerId, claims: &Claims, now: Duration) -> Result<AdmittedPeer, Rejection> {
        let expired = || Rejection::Denied(TokenRejection::Expired.to_string());
        if !self.is_in_grace(peer, claims, now) {
            return Err(expired());
        }
        match self.api_server.reachability() {
            Reachability::Unreachable => {
                let until = (claims.expires + self.options.grace).min(now + GRACE_VERDICT_TTL);
                Ok(AdmittedPeer {
                    node: claims.node.clone(),
                    pod: Some(claims.pod_uid.clone()),
                    valid_until: until,
                    is_in_grace: true,
                })
            }
            Reachability::Reachable => Err(expired()),
            Reachability::Unknown => {
                self.keys.request_refetch();
                let text = "the token has expired, and the agent does not know yet whether the API server answers";
                Err(Rejection::Undecided(text.to_owned()))
            }
        }
    }

    fn is_in_grace(&self, peer: PeerId, claims: &Claims, now: Duration) -> bool {
        now < claims.expires.saturating_add(self.options.grace) && self.verdicts.is_verified(peer, claims)
    }

    fn admit_verified(&self, peer: PeerId, claims: Claims, now: Duration) -> AdmittedPeer {
        self.verdicts.record_verified(peer, &claims, now);
        tracing::debug!(%peer, pod = claims.pod_name, node = ?claims.node, "a peer's token is verified");
        AdmittedPeer { node: claims.node, pod: Some(claims.pod_uid), valid_until: claims.expires, is_in_grace: false }
    }
}

#[async_trait]
impl Admission for TokenAdmission {
    async fn credential(&self) -> Result<Credential, Rejection> {
        let token = self.token.lock();
        let Some(token) = token.as_ref() else {
            return Err(Rejection::Undecided("this agent has no token yet".to_owned()));
        };
        match token.expired_for() {
            None => Ok(token.credential.clone()),
            Some(overdue)
                if overdue < self.options.grace && self.api_server.reachability() == Reachability::Unreachable =>
            {
                Ok(token.credential.clone())
            }
            Some(_) => Err(Rejection::Undecided(
                "this agent's token has expired, and the API server grants no new token".to_owned(),
            )),
        }
    }

    fn credential_changes(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        let (keys, just_fetched) = match self.keys.cached() {
            Some(keys) => (keys, false),
            None => (self.keys.refetch().await.map_err(Rejection::Undecided)?, true),
        };
        let verified = match self.verify_claims(peer, credential, &keys) {
            // The signing key, or the issuer's name, is newer than the cached keys.
            Err(TokenRejection::UnknownKey | TokenRejection::Issuer) if !just_fetched => {
                let keys = self.keys.refetch().await.map_err(Rejection::Undecided)?;
                self.verify_claims(peer, credential, &keys)
            }
            verified => verified,
        };
        let (claims, now) = (verified.map_err(|rejection| Rejection::Denied(rejection.to_string()))?, unix_time());
        if claims.is_expired(now) {
            if self.is_in_grace(peer, &claims, now) && self.api_server.reachability() == Reachability::Unknown {
                // The request finds out whether the API server answers; its result is not used.
                let _ = self.keys.refetch().await;
            }
            return self.admit_on_grace(peer, &claims, now);
        }
        self.review_online(peer, credential, &claims).await?;
        Ok(self.admit_verified(peer, claims, now))
    }

    fn admit_relayed(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        let Some(keys) = self.keys.cached() else {
            self.keys.request_refetch();
            return Err(Rejection::Undecided("the cluster's signing keys were not fetched yet".to_owned()));
        };
        let claims = self.verify_claims(peer, credential, &keys).map_err(|rejection| match rejection {
            TokenRejection::UnknownKey | TokenRejection::Issuer => {
                self.keys.request_refetch();
                Rejection::Undecided(rejection.to_string())
            }
            rejection => Rejection::Denied(rejection.to_string()),
        })?;
        let now = unix_time();
        if claims.is_expired(now) {
            return self.admit_on_grace(peer, &claims, now);
        }
        match self.verdicts.review_status(peer, &claims) {
            ReviewStatus::Rejected | ReviewStatus::RejectionExpired => Err(rejected()),
            ReviewStatus::NotReviewed | ReviewStatus::Accepted => Ok(self.admit_verified(peer, claims, now)),
        }
    }
}

fn rejected() -> Rejection {
    Rejection::Denied("the API server does not accept the token".to_owned())
}

/// Time until the renewal of a token: around 80 % of its lifetime, so that twelve minutes of an
/// hour remain for an API-server outage. `chance` (0 to 1) spreads the renewals of agents that
/// started together by a tenth.
fn renewal_delay(life: Duration, jitter: f64) -> Duration {
    life.mul_f64(0.75 + 0.1 * jitter)
}

#[cfg(test)]
mod tests;
