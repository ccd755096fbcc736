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

use super::call::{Failure, PATIENCE};
use super::jwks::KeySource;
use super::kept::Kept;
use super::own_token::{Token, granted, request};
use super::review::{Budget, review};
use super::server::{Reach, Server};
use super::verdicts::{Ask, Verdicts};
use super::{KubeCluster, Own};
use crate::credential::token::{Claims, Expectations, Flaw, Keys, MAX_LIFE, verify_but_for_its_end};
use crate::metrics::Metrics;
use crate::model::{Credential, PeerId};
use crate::ports::{Admission, Admitted, Refusal};

/// Keys are asked for as often as tokens are renewed, so that one that was withdrawn is forgotten.
const KEYS_LIFE: Duration = MAX_LIFE;

/// Pauses after a failure double from the first to the second. At the longest, a thousand agents that wait for the API
/// server send it thirty requests a second.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// A verdict on grace has to be renewed so often, because the API server may be back: its loops notice that within a minute.
const GRACE_STEP: Duration = Duration::from_secs(300);

/// How often it is looked whether there are new peers to keep, and tried again what failed (the disk was full). A token and keys are kept at once:
/// without them a restarted agent is nobody.
const SAVE: Duration = Duration::from_secs(30);

/// What outlives the process, and how long it is believed.
#[derive(Debug, Clone, Default)]
pub struct Keep {
    /// The file, made with mode 0600; `None` to keep nothing.
    pub file: Option<PathBuf>,
    /// How long after its end a token is still shown, and still accepted of a peer that was found good before, while the API server
    /// cannot be reached.
    pub grace: Duration,
}

/// Admits agents of this cluster, and gets the token that others admit this one by.
pub struct TokenAdmission {
    server: Arc<Server>,
    own: Own,
    peer: PeerId,
    expectations: Expectations,
    keep: Keep,
    keys: KeySource,
    verdicts: Verdicts,
    budget: Budget,
    token: Mutex<Option<Token>>,
    renewals: watch::Sender<u64>,
    /// There is a token, or there are keys, that the file does not have.
    unsaved: Notify,
    /// It was said that reviews are forbidden.
    told: AtomicBool,
    metrics: Metrics,
}

impl TokenAdmission {
    /// For the agent whose key is `peer`. Until [`TokenAdmission::run`] has got a token there is none to show, unless one was kept.
    pub fn new(cluster: &KubeCluster, peer: PeerId, keep: Keep, metrics: Metrics) -> Self {
        let own = cluster.own.clone();
        let expectations =
            Expectations { k8s_namespace: own.k8s_namespace.clone(), service_account: own.service_account.clone() };
        let mut kept = keep.file.as_deref().map_or_else(Kept::empty, Kept::load);
        let server = Arc::new(Server::new(cluster.client.clone()));
        Self {
            keys: KeySource::new(server.clone(), kept.keys.take(), keep.grace),
            verdicts: Verdicts::new(kept.peers(), keep.grace),
            token: Mutex::new(kept.token.and_then(|kept| Token::found_again(kept, peer, &own, now()))),
            server,
            own,
            peer,
            expectations,
            keep,
            budget: Budget::full(),
            renewals: watch::Sender::default(),
            unsaved: Notify::new(),
            told: AtomicBool::new(false),
            metrics,
        }
    }

    /// Keeps a token and the cluster's keys at hand until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let keeping = async { tokio::join!(self.keep_token(), self.keep_keys(), self.keep_file()) };
        stop.run_until_cancelled(keeping).await;
        self.save().await;
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
                    self.unsaved.notify_one();
                    renewal(KEYS_LIFE, rand::rng().random())
                }
                Err(text) => {
                    failures += 1;
                    tracing::warn!(error = text, "no keys to verify peers' tokens with; they are asked for again");
                    pause(failures, rand::rng().random())
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.keys.wanted() => {}
            }
        }
    }

    async fn keep_file(&self) {
        let mut failed = false;
        loop {
            let must = timeout(SAVE, self.unsaved.notified()).await.is_ok();
            // Both, or a peer that became known would be seen as new once more.
            if self.verdicts.have_changed() | must | failed {
                failed = !self.save().await;
            }
        }
    }

    /// Whether there is nothing left to keep.
    async fn save(&self) -> bool {
        let Some(file) = self.keep.file.clone() else { return true };
        let token = {
            let token = self.token.lock().expect("nothing panics while holding it");
            token.as_ref().map(|token| token.to_keep(self.peer, &self.own))
        };
        let kept = Kept::new(self.keys.to_keep(), token, self.verdicts.to_keep(now()));
        let stored = spawn_blocking(move || kept.store(&file).map_err(|error| (file, error))).await;
        if let Ok(Err((file, error))) = &stored {
            tracing::warn!(file = %file.display(), %error, "what is known of the mesh cannot be kept for a restart");
        }
        matches!(stored, Ok(Ok(())))
    }

    /// Asks for a token; how long it lives is returned.
    async fn obtain(&self) -> Result<Duration, Failure> {
        let (asked, asked_at) = (Instant::now(), now());
        let answer = self.server.ask(PATIENCE, request(&self.own, self.peer)).await?;
        let (token, life) = granted(&answer)?;
        let token = Token::new(token, asked, asked_at, life);
        *self.token.lock().expect("nothing panics while holding it") = Some(token);
        self.unsaved.notify_one();
        self.renewals.send_modify(|renewals| *renewals += 1);
        Ok(life)
    }

    fn judge(&self, peer: PeerId, credential: &Credential, keys: &Keys) -> Result<Claims, Flaw> {
        verify_but_for_its_end(credential.expose(), peer, keys, &self.expectations, now())
    }

    /// What the API server itself says of a token that is good. Its no counts; its silence does not.
    async fn ask(&self, peer: PeerId, credential: &Credential, claims: &Claims) -> Result<(), Refusal> {
        let asked = self.verdicts.to_ask(peer, claims);
        // A no stands until there is a yes.
        let otherwise = if asked == Ask::Again { Err(refused()) } else { Ok(()) };
        match asked {
            Ask::No => return Ok(()),
            Ask::Refused => return Err(refused()),
            Ask::Yes | Ask::Again if self.server.reach() == Reach::Away => return otherwise,
            Ask::Yes | Ask::Again => {}
        }
        if !self.budget.take(self.verdicts.count() + 1) {
            self.metrics.token_reviewed("over_budget");
            return otherwise;
        }
        match review(&self.server, peer, credential, &self.expectations.user()).await {
            Ok(passed) => {
                self.metrics.token_reviewed(if passed { "passed" } else { "refused" });
                self.verdicts.remember(peer, claims, now());
                self.verdicts.reviewed(peer, claims, passed);
                if passed { Ok(()) } else { Err(refused()) }
            }
            Err(failure) => {
                self.metrics.token_reviewed("unanswered");
                // Asked again until there is an answer: as long as there is none, nothing is reviewed and grace is given.
                self.keys.want();
                if matches!(failure, Failure::Forbidden(_)) && !self.told.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%failure, "tokens are not reviewed (create on tokenreviews is needed)");
                }
                otherwise
            }
        }
    }

    /// About a token that was good and has ended.
    fn on_grace(&self, peer: PeerId, claims: &Claims, now: Duration) -> Result<Admitted, Refusal> {
        let expired = || Refusal::Denied(Flaw::Expired.to_string());
        if !self.is_in_grace(peer, claims, now) {
            return Err(expired());
        }
        match self.server.reach() {
            Reach::Away => {
                let until = (claims.expires + self.keep.grace).min(now + GRACE_STEP);
                Ok(Admitted { node: claims.node.clone(), pod: Some(claims.pod_uid.clone()), until, on_grace: true })
            }
            Reach::Answers => Err(expired()),
            Reach::Unknown => {
                self.keys.want();
                Err(Refusal::CannotTell("the token has expired; whether another can be had is being asked".to_owned()))
            }
        }
    }

    fn is_in_grace(&self, peer: PeerId, claims: &Claims, now: Duration) -> bool {
        now < claims.expires.saturating_add(self.keep.grace) && self.verdicts.was_good(peer, claims)
    }

    fn good(&self, peer: PeerId, claims: Claims, now: Duration) -> Admitted {
        self.verdicts.remember(peer, &claims, now);
        tracing::debug!(%peer, pod = claims.pod_name, node = ?claims.node, "a peer's token is good");
        Admitted { node: claims.node, pod: Some(claims.pod_uid), until: claims.expires, on_grace: false }
    }
}

#[async_trait]
impl Admission for TokenAdmission {
    async fn credential(&self) -> Result<Credential, Refusal> {
        let token = self.token.lock().expect("nothing panics while holding it");
        let Some(token) = token.as_ref() else {
            return Err(Refusal::CannotTell("this agent has no token yet".to_owned()));
        };
        match token.over() {
            None => Ok(token.credential.clone()),
            Some(over) if over < self.keep.grace && self.server.reach() == Reach::Away => Ok(token.credential.clone()),
            Some(_) => Err(Refusal::CannotTell("this agent's token has expired and none is to be had".to_owned())),
        }
    }

    fn renewed(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<Admitted, Refusal> {
        let (keys, just_asked) = match self.keys.known() {
            Some(keys) => (keys, false),
            None => (self.keys.refetch().await.map_err(Refusal::CannotTell)?, true),
        };
        let found = match self.judge(peer, credential, &keys) {
            // Signed by a key, or in a name, that is newer than what is known.
            Err(Flaw::UnknownKey | Flaw::Issuer) if !just_asked => {
                let keys = self.keys.refetch().await.map_err(Refusal::CannotTell)?;
                self.judge(peer, credential, &keys)
            }
            found => found,
        };
        let (claims, now) = (found.map_err(|flaw| Refusal::Denied(flaw.to_string()))?, now());
        if claims.is_over(now) {
            if self.is_in_grace(peer, &claims, now) && self.server.reach() == Reach::Unknown {
                // For what it tells about the API server, whatever the answer is.
                let _ = self.keys.refetch().await;
            }
            return self.on_grace(peer, &claims, now);
        }
        self.ask(peer, credential, &claims).await?;
        Ok(self.good(peer, claims, now))
    }

    fn vouch(&self, peer: PeerId, credential: &Credential) -> Result<Admitted, Refusal> {
        let Some(keys) = self.keys.known() else {
            self.keys.want();
            return Err(Refusal::CannotTell("no keys are known yet".to_owned()));
        };
        let claims = self.judge(peer, credential, &keys).map_err(|flaw| match flaw {
            Flaw::UnknownKey | Flaw::Issuer => {
                self.keys.want();
                Refusal::CannotTell(flaw.to_string())
            }
            flaw => Refusal::Denied(flaw.to_string()),
        })?;
        let now = now();
        if claims.is_over(now) {
            return self.on_grace(peer, &claims, now);
        }
        match self.verdicts.to_ask(peer, &claims) {
            Ask::Refused | Ask::Again => Err(refused()),
            Ask::Yes | Ask::No => Ok(self.good(peer, claims, now)),
        }
    }
}

fn refused() -> Refusal {
    Refusal::Denied("the API server does not accept the token".to_owned())
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
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
