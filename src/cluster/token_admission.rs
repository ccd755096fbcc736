//! Admission by ServiceAccount token: the API server says who is an agent of this cluster.
//!
//! Every agent asks for a token whose audience is its own PeerId, bound to its own pod, and shows it to peers; they verify it with
//! the keys that the cluster publishes. Only the issuing needs the API server. At the door the API server is asked about a token as
//! well, while it answers and the budget lasts (`review`). What an agent needs to go on while the API server is away is kept on its
//! node (`kept`). No token goes to the log.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rand::Rng;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::admission_file::AdmissionFile;
use super::api_error::{ApiError, REQUEST_TIMEOUT};
use super::api_server::{ApiServerClient, Reachability};
use super::jwks::KeySource;
use super::own_token::{AgentToken, parse_granted, token_request};
use super::token_review::{SharedReviewBudget, review_token};
use super::verdict_cache::{ReviewStatus, VerdictCache};
use super::{AgentPod, KubeCluster};
use crate::credential::token::{Claims, ClusterKeys, Expectations, MAX_LIFE, TokenRejection, verify_ignoring_expiry};
use crate::metrics::Metrics;
use crate::model::{Credential, PeerId};
use crate::ports::{Admission, AdmittedPeer, Rejection};

/// Keys are asked for as often as tokens are renewed, so that one that was withdrawn is forgotten.
const KEYS_LIFETIME: Duration = MAX_LIFE;

/// Pauses after a failure double from the first to the second. At the longest, a thousand agents that wait for the API
/// server send it thirty requests a second.
const MIN_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// A verdict on grace has to be renewed so often, because the API server may be back: its loops notice that within a minute.
const GRACE_VERDICT_TTL: Duration = Duration::from_secs(300);

/// How often it is looked whether there are new peers to keep, and tried again what failed (the disk was full). A token and keys are kept at once:
/// without them a restarted agent is nobody.
const SAVE_INTERVAL: Duration = Duration::from_secs(30);

/// What outlives the process, and how long it is believed.
#[derive(Debug, Clone, Default)]
pub struct TokenAdmissionOptions {
    /// The file, made with mode 0600; `None` to keep nothing.
    pub file: Option<PathBuf>,
    /// How long after its end a token is still shown, and still accepted of a peer that was found good before, while the API server
    /// cannot be reached.
    pub grace: Duration,
}

/// Admits agents of this cluster, and gets the token that others admit this one by.
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
    /// There is a token, or there are keys, that the file does not have.
    unsaved: Notify,
    /// It was said that reviews are forbidden.
    review_forbidden_logged: AtomicBool,
    metrics: Metrics,
}

impl TokenAdmission {
    /// For the agent whose key is `peer`. Until [`TokenAdmission::run`] has got a token there is none to show, unless one was kept.
    pub fn new(cluster: &KubeCluster, peer: PeerId, keep: TokenAdmissionOptions, metrics: Metrics) -> Self {
        let own = cluster.agent_pod.clone();
        let expectations =
            Expectations { k8s_namespace: own.k8s_namespace.clone(), service_account: own.service_account.clone() };
        let mut kept = keep.file.as_deref().map_or_else(AdmissionFile::empty, AdmissionFile::load);
        let server = Arc::new(ApiServerClient::new(cluster.client.clone()));
        Self {
            keys: KeySource::new(server.clone(), kept.keys.take(), keep.grace),
            verdicts: VerdictCache::new(kept.peers(), keep.grace),
            token: Mutex::new(kept.token.and_then(|kept| AgentToken::from_stored(kept, peer, &own, now()))),
            api_server: server,
            agent_pod: own,
            peer,
            expectations,
            options: keep,
            budget: SharedReviewBudget::full(),
            renewals: watch::Sender::default(),
            unsaved: Notify::new(),
            review_forbidden_logged: AtomicBool::new(false),
            metrics,
        }
    }

    /// Keeps a token and the cluster's keys at hand until `stop`.
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
                    tracing::debug!(life_s = life.as_secs(), "got a token for the mesh");
                    renewal_delay(life, rand::rng().random())
                }
                Err(failure) => {
                    failures += 1;
                    tracing::warn!(
                        service_account = %self.agent_pod.service_account, namespace = %self.agent_pod.k8s_namespace, %failure,
                        "no token for the mesh (create on serviceaccounts/token is needed); it is asked for again"
                    );
                    backoff_delay(failures, rand::rng().random())
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
                    tracing::warn!(error = text, "no keys to verify peers' tokens with; they are asked for again");
                    backoff_delay(failures, rand::rng().random())
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
            // Both, or a peer that became known would be seen as new once more.
            if self.verdicts.take_changed() | is_requested | failed {
                failed = !self.save().await;
            }
        }
    }

    /// Whether there is nothing left to keep.
    async fn save(&self) -> bool {
        let Some(file) = self.options.file.clone() else { return true };
        let token = {
            let token = self.token.lock().expect("nothing panics while holding it");
            token.as_ref().map(|token| token.to_stored(self.peer, &self.agent_pod))
        };
        let kept = AdmissionFile::new(self.keys.to_stored(), token, self.verdicts.to_stored(now()));
        let stored = spawn_blocking(move || kept.store(&file).map_err(|error| (file, error))).await;
        if let Ok(Err((file, error))) = &stored {
            tracing::warn!(file = %file.display(), %error, "what is known of the mesh cannot be kept for a restart");
        }
        matches!(stored, Ok(Ok(())))
    }

    /// Asks for a token; how long it lives is returned.
    async fn request_token(&self) -> Result<Duration, ApiError> {
        let (sent, sent_at) = (Instant::now(), now());
        let answer = self.api_server.send(REQUEST_TIMEOUT, token_request(&self.agent_pod, self.peer)).await?;
        let (token, life) = parse_granted(&answer)?;
        let token = AgentToken::new(token, sent, sent_at, life);
        *self.token.lock().expect("nothing panics while holding it") = Some(token);
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
        verify_ignoring_expiry(credential.expose(), peer, keys, &self.expectations, now())
    }

    /// What the API server itself says of a token that is good. Its no counts; its silence does not.
    async fn review_online(&self, peer: PeerId, credential: &Credential, claims: &Claims) -> Result<(), Rejection> {
        let review_status = self.verdicts.review_status(peer, claims);
        // A no stands until there is a yes.
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
                self.verdicts.record_verified(peer, claims, now());
                self.verdicts.record_review(peer, claims, passed);
                if passed { Ok(()) } else { Err(rejected()) }
            }
            Err(failure) => {
                self.metrics.token_reviewed("unanswered");
                // Asked again until there is an answer: as long as there is none, nothing is reviewed and grace is given.
                self.keys.request_refetch();
                if matches!(failure, ApiError::Forbidden(_))
                    && !self.review_forbidden_logged.swap(true, Ordering::Relaxed)
                {
                    tracing::warn!(%failure, "tokens are not reviewed (create on tokenreviews is needed)");
                }
                offline_verdict
            }
        }
    }

    /// About a token that was good and has ended.
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
                Err(Rejection::Undecided("the token has expired; whether another can be had is being asked".to_owned()))
            }
        }
    }

    fn is_in_grace(&self, peer: PeerId, claims: &Claims, now: Duration) -> bool {
        now < claims.expires.saturating_add(self.options.grace) && self.verdicts.is_verified(peer, claims)
    }

    fn admit_verified(&self, peer: PeerId, claims: Claims, now: Duration) -> AdmittedPeer {
        self.verdicts.record_verified(peer, &claims, now);
        tracing::debug!(%peer, pod = claims.pod_name, node = ?claims.node, "a peer's token is good");
        AdmittedPeer { node: claims.node, pod: Some(claims.pod_uid), valid_until: claims.expires, is_in_grace: false }
    }
}

#[async_trait]
impl Admission for TokenAdmission {
    async fn credential(&self) -> Result<Credential, Rejection> {
        let token = self.token.lock().expect("nothing panics while holding it");
        let Some(token) = token.as_ref() else {
            return Err(Rejection::Undecided("this agent has no token yet".to_owned()));
        };
        match token.expired_for() {
            None => Ok(token.credential.clone()),
            Some(over) if over < self.options.grace && self.api_server.reachability() == Reachability::Unreachable => {
                Ok(token.credential.clone())
            }
            Some(_) => Err(Rejection::Undecided("this agent's token has expired and none is to be had".to_owned())),
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
        let found = match self.verify_claims(peer, credential, &keys) {
            // Signed by a key, or in a name, that is newer than what is known.
            Err(TokenRejection::UnknownKey | TokenRejection::Issuer) if !just_fetched => {
                let keys = self.keys.refetch().await.map_err(Rejection::Undecided)?;
                self.verify_claims(peer, credential, &keys)
            }
            found => found,
        };
        let (claims, now) = (found.map_err(|flaw| Rejection::Denied(flaw.to_string()))?, now());
        if claims.is_expired(now) {
            if self.is_in_grace(peer, &claims, now) && self.api_server.reachability() == Reachability::Unknown {
                // For what it tells about the API server, whatever the answer is.
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
            return Err(Rejection::Undecided("no keys are known yet".to_owned()));
        };
        let claims = self.verify_claims(peer, credential, &keys).map_err(|flaw| match flaw {
            TokenRejection::UnknownKey | TokenRejection::Issuer => {
                self.keys.request_refetch();
                Rejection::Undecided(flaw.to_string())
            }
            flaw => Rejection::Denied(flaw.to_string()),
        })?;
        let now = now();
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

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// When a token of this life is renewed: around 80 % of it, so that twelve minutes are left for an API server that is away;
/// spread by a tenth (`chance` from 0 to 1), so that agents started at once do not renew at once.
fn renewal_delay(life: Duration, chance: f64) -> Duration {
    life.mul_f64(0.75 + 0.1 * chance)
}

/// The pause after so many failures in a row, half of it at random.
fn backoff_delay(failures: u32, chance: f64) -> Duration {
    let longest = MIN_BACKOFF.saturating_mul(1 << failures.saturating_sub(1).min(6)).min(MAX_BACKOFF);
    longest.mul_f64(0.5 + 0.5 * chance)
}

#[cfg(test)]
mod tests;
