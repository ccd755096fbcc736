//! Messages to people's own systems: one for each image and outcome in the cluster, however many nodes recover it.
//!
//! Who sends is settled by a claim, as everything that must happen once. It is advice here as well: without an API server every node sends,
//! and a receiver tells the copies by their id.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::holders::Holders;
use super::recover::Recovered;
use crate::metrics::Metrics;
use crate::model::{NodeName, PeerId, PodRef};
use crate::oci::{Digest, Reference};
use crate::ports::{ClaimError, Claims, MAX_PODS, Notification, Notifier, ReportKind};

/// Messages that wait to be sent; further ones are dropped, and counted. A node recovers a few images at a time.
const QUEUED: usize = 64;

/// What was said about an image once is not said again by any node within this time: nodes of one outage recover the same image for hours.
const ONCE_IN: Duration = Duration::from_secs(3600);

/// Leases of sent messages that this agent releases itself; those beyond are swept. A message waits
/// for the receiver, so a node sends some a minute at most.
const MAX_SENT: usize = 256;

/// Tries of one message, at 1, 2, 4, ... seconds: half a minute besides what the receiver takes.
const TRIES: u32 = 6;

/// Something to tell the outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Notice {
    kind: ReportKind,
    image: String,
    digest: Option<Digest>,
    pods: Vec<String>,
    from: BTreeMap<PeerId, u64>,
    bytes: u64,
    took: Duration,
    note: String,
}

impl Notice {
    pub(super) fn recovered(reference: &Reference, recovered: &Recovered, pods: &[PodRef], note: &str) -> Self {
        let Recovered { root, bytes, fetched: _, there: _, providers, took, settled: _ } = recovered;
        let (image, pods, note) = (reference.to_string(), names(pods), note.to_owned());
        let from = providers.clone();
        Self { kind: ReportKind::Salvaged, image, digest: Some(*root), pods, from, bytes: *bytes, took: *took, note }
    }

    pub(super) fn not_recovered(image: &str, kind: ReportKind, pods: &[PodRef], note: &str) -> Self {
        let (image, pods, note) = (image.to_owned(), names(pods), note.to_owned());
        Self { kind, image, digest: None, pods, from: BTreeMap::new(), bytes: 0, took: Duration::ZERO, note }
    }
}

fn names(pods: &[PodRef]) -> Vec<String> {
    pods.iter().take(MAX_PODS).map(ToString::to_string).collect()
}

/// Takes messages; without a receiver they go nowhere.
#[derive(Clone)]
pub struct Notices {
    queue: Option<mpsc::Sender<Notice>>,
    metrics: Metrics,
}

impl Notices {
    /// For agents without a webhook.
    pub fn nowhere(metrics: Metrics) -> Self {
        Self { queue: None, metrics }
    }

    pub(super) fn send(&self, notice: Notice) {
        if let Some(queue) = &self.queue
            && queue.try_send(notice).is_err()
        {
            self.metrics.notified("dropped");
        }
    }
}

/// Sends what [`Notices`] takes, one after the other.
pub struct Messenger {
    notifier: Arc<dyn Notifier>,
    claims: Arc<dyn Claims>,
    holders: Holders,
    node: NodeName,
    metrics: Metrics,
    notices: mpsc::Receiver<Notice>,
    /// The claim on the message under way, also while its write is not answered.
    claimed: Option<Digest>,
    /// The claims on messages that were sent, the oldest first, and when each is released.
    sent: VecDeque<(Instant, Digest)>,
}

impl Messenger {
    /// A messenger, and where to put messages.
    pub fn new(
        notifier: Arc<dyn Notifier>,
        claims: Arc<dyn Claims>,
        holders: Holders,
        node: NodeName,
        metrics: Metrics,
    ) -> (Self, Notices) {
        let (queue, notices) = mpsc::channel(QUEUED);
        let sender = Notices { queue: Some(queue), metrics: metrics.clone() };
        let (claimed, sent) = (None, VecDeque::new());
        (Self { notifier, claims, holders, node, metrics, notices, claimed, sent }, sender)
    }

    /// Sends until stopped. The claim on a message that was not sent is released then, so that
    /// another node sends it. Claims on messages that were sent stay until the hour is over.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let due = self.sent.front().map(|(due, _)| *due);
            let went_on = stop.run_until_cancelled(async {
                tokio::select! {
                    notice = self.notices.recv() => match notice {
                        Some(notice) => self.deliver(notice).await,
                        // The senders end when the agent does.
                        None => std::future::pending().await,
                    },
                    () = sleep_until(due) => self.release_oldest().await,
                }
            });
            if went_on.await.is_none() {
                break;
            }
        }
        if let Some(claimed) = self.claimed.take() {
            self.release(claimed).await;
        }
    }

    async fn release_oldest(&mut self) {
        if let Some((_, subject)) = self.sent.pop_front() {
            self.release(subject).await;
        }
    }

    async fn release(&self, subject: Digest) {
        if let Err(error) = self.claims.release(subject).await {
            tracing::debug!(%error, "the claim on a message is left to expire");
        }
    }

    /// The claim says for an hour that the message was sent.
    fn was_sent(&mut self, subject: Digest) {
        self.claimed = None;
        self.sent.retain(|(_, sent)| *sent != subject);
        if self.sent.len() == MAX_SENT {
            self.sent.pop_front();
        }
        self.sent.push_back((Instant::now() + ONCE_IN, subject));
    }

    async fn deliver(&mut self, notice: Notice) {
        let now = SystemTime::now();
        let subject = subject(&notice);
        if !self.is_first(subject, now).await {
            return self.metrics.notified("left_to_another");
        }
        let notification = self.notification(notice, subject, now);
        for attempt in 0..TRIES {
            match self.notifier.notify(&notification).await {
                Ok(()) => {
                    self.was_sent(subject);
                    return self.metrics.notified("sent");
                }
                Err(error) if error.is_retryable() && attempt + 1 < TRIES => {
                    tokio::time::sleep(Duration::from_secs(1 << attempt).mul_f64(0.5 + rand::random::<f64>())).await;
                }
                Err(error) => {
                    tracing::warn!(image = notification.image, reason = notification.reason, %error, "a message is lost");
                    // The next one about it may get through, from here or from another node.
                    self.release(subject).await;
                    self.claimed = None;
                    return self.metrics.notified("failed");
                }
            }
        }
    }

    /// Whether no other node has said the same of late.
    async fn is_first(&mut self, subject: Digest, now: SystemTime) -> bool {
        match self.claim(subject, now).await {
            Ok(()) => true,
            Err(ClaimError::Lost) => {
                self.claimed = None;
                false
            }
            Err(ClaimError::Unavailable(reason)) => {
                tracing::debug!(reason, "a message is sent without a claim on it");
                true
            }
        }
    }

    async fn claim(&mut self, subject: Digest, now: SystemTime) -> Result<(), ClaimError> {
        let read = self.claims.read(subject).await?;
        if read.as_ref().is_some_and(|lease| is_recent(lease.renewed, now)) {
            return Err(ClaimError::Lost);
        }
        self.claimed = Some(subject);
        match read {
            None => self.claims.create(subject, now).await,
            Some(lease) => self.claims.update(subject, &lease.version, now).await,
        }
    }

    fn notification(&self, notice: Notice, subject: Digest, now: SystemTime) -> Notification {
        let Notice { kind, image, digest, pods, from, bytes, took, note } = notice;
        let at = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // The same on every node that says the same in the same hour.
        let id = format!("{}-{}", subject.short(), at / ONCE_IN.as_secs());
        Notification {
            id,
            reason: kind.reason(),
            node: self.node.to_string(),
            image,
            digest: digest.map(|digest| digest.to_string()),
            pods,
            from: from.keys().map(|peer| self.holders.node_of(*peer)).collect(),
            bytes,
            milliseconds: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            note,
            at,
        }
    }
}

fn is_recent(renewed: Option<SystemTime>, now: SystemTime) -> bool {
    renewed.is_some_and(|at| now.duration_since(at).is_ok_and(|age| age < ONCE_IN))
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// What a message is about, as something that a claim can be on.
fn subject(notice: &Notice) -> Digest {
    let digest = notice.digest.map(|digest| digest.to_string()).unwrap_or_default();
    Digest::of(format!("message\n{}\n{}\n{digest}", notice.kind.reason(), notice.image).as_bytes())
}
