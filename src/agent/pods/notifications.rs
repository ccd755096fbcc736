//! Messages to the webhook: one for each image and outcome in the cluster, however many nodes
//! recover the image.
//!
//! A claim decides which node sends a message. Claims are advice: without an API server every node
//! sends, and a receiver recognizes copies by the id.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::metrics::Metrics;
use crate::model::{NodeName, PeerId, PodRef, PodReportKind, RecoveredImage};
use crate::oci::{Digest, Reference};
use crate::ports::{ClaimError, Claims, MAX_PODS, Notification, Notifier};
use crate::util::clock::sleep_until;

/// Messages that wait to be sent. Further messages are dropped and counted. A node recovers a few
/// images at a time.
const QUEUE_LENGTH: usize = 64;

/// No node repeats a message about an image and outcome within this time: the nodes of one outage
/// recover the same image for hours.
const DEDUPLICATION_WINDOW: Duration = Duration::from_secs(3600);

/// Claims on sent messages that this agent releases itself. The sweep of expired claims removes the
/// others. A node waits for the receiver, and so sends some messages a minute at most.
const MAX_SENT_CLAIMS: usize = 256;

/// Attempts for one message, with pauses of 1, 2, 4, 8 and 16 seconds: half a minute, besides the
/// receiver's own time.
const MAX_ATTEMPTS: u32 = 6;

/// A message before its claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::agent) struct PendingNotification {
    kind: PodReportKind,
    image: String,
    digest: Option<Digest>,
    pods: Vec<String>,
    from: BTreeMap<PeerId, u64>,
    bytes: u64,
    took: Duration,
    note: String,
}

impl PendingNotification {
    pub(in crate::agent) fn recovered(
        reference: &Reference,
        recovered: &RecoveredImage,
        pods: &[PodRef],
        note: &str,
    ) -> Self {
        let RecoveredImage { digest, bytes, fetched: _, present: _, providers, took, tag_note: _ } = recovered;
        let (image, pods, note) = (reference.to_string(), pod_names(pods), note.to_owned());
        let from = providers.clone();
        Self {
            kind: PodReportKind::Recovered,
            image,
            digest: Some(*digest),
            pods,
            from,
            bytes: *bytes,
            took: *took,
            note,
        }
    }

    pub(in crate::agent) fn not_recovered(image: &str, kind: PodReportKind, pods: &[PodRef], note: &str) -> Self {
        let (image, pods, note) = (image.to_owned(), pod_names(pods), note.to_owned());
        Self { kind, image, digest: None, pods, from: BTreeMap::new(), bytes: 0, took: Duration::ZERO, note }
    }
}

fn pod_names(pods: &[PodRef]) -> Vec<String> {
    pods.iter().take(MAX_PODS).map(ToString::to_string).collect()
}

/// Queues messages. Without a webhook, messages are dropped.
#[derive(Clone)]
pub struct NotificationQueue {
    queue: Option<mpsc::Sender<PendingNotification>>,
    metrics: Metrics,
}

impl NotificationQueue {
    /// For agents without a webhook.
    pub fn disabled(metrics: Metrics) -> Self {
        Self { queue: None, metrics }
    }

    pub(in crate::agent) fn send(&self, pending: PendingNotification) {
        if let Some(queue) = &self.queue
            && queue.try_send(pending).is_err()
        {
            self.metrics.notified("dropped");
        }
    }
}

/// Sends the messages of a [`NotificationQueue`], one after the other.
pub struct NotificationSender {
    notifier: Arc<dyn Notifier>,
    claims: Arc<dyn Claims>,
    inventory: PeerInventory,
    node: NodeName,
    metrics: Metrics,
    pending: mpsc::Receiver<PendingNotification>,
    /// The claim on the message being sent, also while the write of the claim is not answered.
    claimed: Option<Digest>,
    /// The claims on sent messages, the oldest first, with the instant of their release.
    sent_claims: VecDeque<(Instant, Digest)>,
}

impl NotificationSender {
    /// A sender, and the queue of its messages.
    pub fn new(
        notifier: Arc<dyn Notifier>,
        claims: Arc<dyn Claims>,
        inventory: PeerInventory,
        node: NodeName,
        metrics: Metrics,
    ) -> (Self, NotificationQueue) {
        let (queue, pending) = mpsc::channel(QUEUE_LENGTH);
        let notification_queue = NotificationQueue { queue: Some(queue), metrics: metrics.clone() };
        let (claimed, sent_claims) = (None, VecDeque::new());
        (Self { notifier, claims, inventory, node, metrics, pending, claimed, sent_claims }, notification_queue)
    }

    /// Sends until stopped. A message that was not sent by then loses its claim, so that another
    /// node sends the message. Claims on sent messages stay until the hour is over.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let due = self.sent_claims.front().map(|(due, _)| *due);
            let is_running = stop.run_until_cancelled(async {
                tokio::select! {
                    pending = self.pending.recv() => match pending {
                        Some(pending) => self.deliver(pending).await,
                        // The queue's senders live as long as the agent.
                        None => std::future::pending().await,
                    },
                    () = sleep_until(due) => self.release_oldest().await,
                }
            });
            if is_running.await.is_none() {
                break;
            }
        }
        if let Some(claimed) = self.claimed.take() {
            self.release(claimed).await;
        }
    }

    async fn release_oldest(&mut self) {
        if let Some((_, subject)) = self.sent_claims.pop_front() {
            self.release(subject).await;
        }
    }

    async fn release(&self, subject: Digest) {
        if let Err(error) = self.claims.release(subject).await {
            tracing::debug!(%error, "the claim on a message could not be released and expires");
        }
    }

    /// Keeps the claim for an hour, as the mark of a sent message.
    fn record_sent(&mut self, subject: Digest) {
        self.claimed = None;
        self.sent_claims.retain(|(_, sent)| *sent != subject);
        if self.sent_claims.len() == MAX_SENT_CLAIMS {
            self.sent_claims.pop_front();
        }
        self.sent_claims.push_back((Instant::now() + DEDUPLICATION_WINDOW, subject));
    }

    async fn deliver(&mut self, pending: PendingNotification) {
        let now = SystemTime::now();
        let subject = subject(&pending);
        if !self.try_claim(subject, now).await {
            return self.metrics.notified("left_to_another");
        }
        let notification = self.notification(pending, subject, now);
        for attempt in 0..MAX_ATTEMPTS {
            match self.notifier.notify(&notification).await {
                Ok(()) => {
                    self.record_sent(subject);
                    return self.metrics.notified("sent");
                }
                Err(error) if error.is_retryable() && attempt + 1 < MAX_ATTEMPTS => {
                    tokio::time::sleep(Duration::from_secs(1 << attempt).mul_f64(0.5 + rand::random::<f64>())).await;
                }
                Err(error) => {
                    tracing::warn!(
                        image = notification.image, reason = notification.reason, %error,
                        "a message is lost"
                    );
                    // The next message about this image may get through, from here or from another
                    // node.
                    self.release(subject).await;
                    self.claimed = None;
                    return self.metrics.notified("failed");
                }
            }
        }
    }

    /// Whether this node sends the message: no other node sent the same message recently.
    async fn try_claim(&mut self, subject: Digest, now: SystemTime) -> bool {
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
        let existing = self.claims.read(subject).await?;
        if existing.as_ref().is_some_and(|lease| is_recent(lease.renewed, now)) {
            return Err(ClaimError::Lost);
        }
        self.claimed = Some(subject);
        match existing {
            None => self.claims.create(subject, now).await,
            Some(lease) => self.claims.update(subject, &lease.version, now).await,
        }
    }

    fn notification(&self, pending: PendingNotification, subject: Digest, now: SystemTime) -> Notification {
        let PendingNotification { kind, image, digest, pods, from, bytes, took, note } = pending;
        let at = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // Equal on all nodes that send the same message within the same hour.
        let id = format!("{}-{}", subject.short(), at / DEDUPLICATION_WINDOW.as_secs());
        Notification {
            id,
            reason: kind.reason(),
            node: self.node.to_string(),
            image,
            digest: digest.map(|digest| digest.to_string()),
            pods,
            from: from.keys().map(|peer| self.inventory.node_of(*peer)).collect(),
            bytes,
            milliseconds: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            note,
            at,
        }
    }
}

fn is_recent(renewed: Option<SystemTime>, now: SystemTime) -> bool {
    renewed.is_some_and(|at| now.duration_since(at).is_ok_and(|age| age < DEDUPLICATION_WINDOW))
}

/// The digest for a claim on the message: of outcome, image and image digest.
fn subject(pending: &PendingNotification) -> Digest {
    let digest = pending.digest.map(|digest| digest.to_string()).unwrap_or_default();
    Digest::of(format!("message\n{}\n{}\n{digest}", pending.kind.reason(), pending.image).as_bytes())
}
