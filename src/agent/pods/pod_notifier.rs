//! Nudges, deletions and Events of pods. A nudge makes the kubelet sync a pod at once, and Events
//! inform people.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::failure_text::failure_text;
use crate::agent::recovery::progress::human_bytes;
use crate::agent::recovery::recover_error::RecoverError;
use crate::metrics::Metrics;
use crate::model::{PeerId, PodRef, PodReport, PodReportKind, RecoveredImage};
use crate::oci::{Digest, Reference};
use crate::ports::{ClusterError, PodWriter};

/// Attempts for one nudge. A pod without a nudge starts later: the kubelet syncs by itself within a
/// minute and a half.
const NUDGE_ATTEMPTS: u32 = 3;

/// The chart gives both rights only where its policies narrow them. Other policies may deny too.
const NUDGE_DENIED: &str = "the API server denies the nudge (logged once): images are recovered as before, and a pod \
    starts at its kubelet's own sync, within 90 s. Where the right to patch pods/status is missing: the chart grants \
    the right on Kubernetes 1.30 and later (podPolicy=always for `helm template`), or without a policy where \
    podRightsWithoutPolicy=true accepts the risk. Where a policy or webhook of the cluster denies the nudge: exempt \
    the annotation lighterman.dev/nudged-at";
const DELETION_DENIED: &str = "the API server denies the deletion of a pod (logged once): the kubelet starts the pod \
    later. The chart grants the right with agent.deletePods and a policy (Kubernetes 1.30 and later; podPolicy=always \
    for `helm template`), or with podRightsWithoutPolicy=true";

/// Attempts for one Event, [`REPORT_PAUSE`] apart: five minutes. The adapter limits the Events of
/// one node, so a node full of pods needs more than three minutes.
const REPORT_ATTEMPTS: u32 = 30;
/// Half of the pause is random, so that delayed Events do not arrive together again.
const REPORT_PAUSE: Duration = Duration::from_secs(10);

/// Nudges and deletes pods, and writes Events about them.
pub struct PodNotifier {
    cluster: Arc<dyn PodWriter>,
    inventory: PeerInventory,
    metrics: Metrics,
    /// Denials that the log has already. A missing right denies every pod alike.
    nudge_denied: AtomicBool,
    deletion_denied: AtomicBool,
}

impl PodNotifier {
    /// Writes to the pods of `cluster`. The Events name the nodes of `inventory`.
    pub fn new(cluster: Arc<dyn PodWriter>, inventory: PeerInventory, metrics: Metrics) -> Self {
        Self {
            cluster,
            inventory,
            metrics,
            nudge_denied: AtomicBool::default(),
            deletion_denied: AtomicBool::default(),
        }
    }

    /// Makes the kubelet sync the pod now.
    pub(in crate::agent) async fn nudge(&self, pod: &PodRef) {
        for attempt in 1..=NUDGE_ATTEMPTS {
            match self.cluster.nudge(pod).await {
                Ok(()) => return self.metrics.nudged("ok"),
                Err(ClusterError::Gone(_)) => return self.metrics.nudged("gone"),
                Err(error) if error.is_retryable() && attempt < NUDGE_ATTEMPTS => {
                    tokio::time::sleep(Duration::from_secs(1) * attempt).await;
                }
                Err(ClusterError::Forbidden(answer)) => {
                    if !self.nudge_denied.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%pod, answer, "{NUDGE_DENIED}");
                    }
                    return self.metrics.nudged("denied");
                }
                Err(error) => {
                    tracing::warn!(
                        %pod, %error,
                        "cannot nudge the pod; the kubelet syncs the pod by itself within 90 s"
                    );
                    return self.metrics.nudged("failed");
                }
            }
        }
    }

    /// Whether the API server has denied a nudge since this agent started.
    pub(in crate::agent) fn is_nudge_denied(&self) -> bool {
        self.nudge_denied.load(Ordering::Relaxed)
    }

    /// Deletes a pod that waits although its image is here.
    pub(in crate::agent) async fn delete(&self, pod: &PodRef) {
        let result = match self.cluster.delete(pod).await {
            Ok(()) => "ok",
            Err(ClusterError::Gone(_)) => "gone",
            Err(ClusterError::Forbidden(answer)) => {
                if !self.deletion_denied.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%pod, answer, "{DELETION_DENIED}");
                }
                "denied"
            }
            Err(error) => {
                tracing::warn!(%pod, %error, "cannot delete the pod; the kubelet starts the pod later");
                "failed"
            }
        };
        self.metrics.pod_deleted(result);
    }

    /// Writes an Event on the pod. The log has the same text, so a failed write is only logged.
    pub(in crate::agent) async fn report(&self, pod: &PodRef, kind: PodReportKind, note: String) {
        let report = PodReport { kind, note };
        for attempt in 1..=REPORT_ATTEMPTS {
            match self.cluster.report(pod, &report).await {
                Ok(()) => return self.metrics.event_written(kind.reason()),
                Err(error) if error.is_retryable() && attempt < REPORT_ATTEMPTS => {
                    tokio::time::sleep(REPORT_PAUSE.mul_f64(0.75 + rand::random::<f64>() / 2.0)).await;
                }
                Err(error) => {
                    return tracing::warn!(%pod, reason = kind.reason(), %error, "cannot write the Event");
                }
            }
        }
    }

    /// Text of an Event: the image's providers and size. `down_since` is the start of the
    /// registry's outage, in seconds since 1970.
    pub(in crate::agent) fn recovered_note(
        &self,
        reference: &Reference,
        recovered: &RecoveredImage,
        down_since: Option<u64>,
    ) -> String {
        let RecoveredImage { digest, bytes, fetched, present, providers, took, tag_note } = recovered;
        let names: Vec<_> = providers.keys().take(5).map(|peer| self.inventory.node_of(*peer)).collect();
        let more = providers.len().saturating_sub(names.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let since = down_since.and_then(|since| jiff::Timestamp::from_second(since.try_into().ok()?).ok());
        format!(
            "{reference} ({digest}) came from {}{more}: {fetched} blobs, {} in {:.1} s ({present} were here).{}{}",
            names.join(", "),
            human_bytes(*bytes),
            took.as_secs_f64(),
            tag_note.as_ref().map(|note| format!(" {note}")).unwrap_or_default(),
            since.map(|since| format!(" Its registry has failed since {since}.")).unwrap_or_default(),
        )
    }

    /// Text of a dry run's Event.
    pub(in crate::agent) fn dry_run_note(&self, reference: &Reference, digest: Digest, providers: &[PeerId]) -> String {
        let names: Vec<_> = providers.iter().take(5).map(|peer| self.inventory.node_of(*peer)).collect();
        format!(
            "{reference} ({digest}) could come from {} nodes ({}); --dry-run is set, so the agent does not fetch the \
             image.",
            providers.len(),
            names.join(", ")
        )
    }

    /// Text of a failure's Event: the cause, the nodes, and the next step.
    pub(in crate::agent) fn failed_note(&self, error: &RecoverError) -> String {
        let next = match error.report_kind() {
            PodReportKind::NoProvider => " The agent fetches the image as soon as a node has the image.",
            PodReportKind::Failed => " The agent retries.",
            _ => "",
        };
        format!("{}.{next}", failure_text(error, &self.inventory))
    }
}
