//! Every metric that an agent exports. Methods are named after events; no label is unbounded: never
//! a digest, a pod, a peer or an image.

mod admission;
mod layers;
mod mesh;
mod network;
mod own_image;
mod register;

use std::sync::Arc;
use std::time::Duration;

use prometheus::{Encoder, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TextEncoder};

use self::admission::AdmissionMetrics;
use self::layers::LayerMetrics;
use self::mesh::MeshMetrics;
use self::network::NetworkMetrics;
use self::own_image::OwnImageMetrics;
pub use self::register::MetricDescription;
use self::register::{Register, counter, counters, gauge, histogram};
use crate::model::RecoveryOutcome;

/// The metrics of one agent. Cheap to clone; all clones share their values.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    descriptions: Arc<[MetricDescription]>,
    recoveries: IntCounterVec,
    recovery_seconds: Histogram,
    recoveries_running: IntGauge,
    pod_failures: IntCounterVec,
    fetched_bytes: IntCounter,
    served_bytes: IntCounter,
    fetch_failures: IntCounterVec,
    peer_faults: IntCounterVec,
    peers: IntGauge,
    mesh: MeshMetrics,
    admission: AdmissionMetrics,
    network: NetworkMetrics,
    nudges: IntCounterVec,
    events: IntCounterVec,
    claims: IntCounterVec,
    layers_unpacked: IntCounterVec,
    store_list_failures: IntCounter,
    layers: LayerMetrics,
    own_image: OwnImageMetrics,
    registries_down: IntGauge,
    invalid_annotations: IntCounter,
    records_removed: IntCounter,
    event_to_first_byte_seconds: Histogram,
    import_to_running_seconds: Histogram,
    deletions: IntCounterVec,
    notifications: IntCounterVec,
    policy_file_valid: IntGauge,
}

impl Metrics {
    /// Registers all metrics, with the value zero.
    ///
    /// # Panics
    /// Never: the names are constants, and each is registered once.
    pub fn new() -> Self {
        let register = Register::default();
        let r = &register;
        let policy_file_valid = gauge(
            r,
            "policy_file_valid",
            "1 while the policy file is in force, 0 while the file is unreadable or invalid and the previous policy stays.",
        );
        policy_file_valid.set(1);
        let metrics = Self {
            registry: Registry::new(),
            descriptions: Arc::default(),
            recoveries: counters(r, "recoveries_total", "Recoveries that ended, by outcome.", "outcome"),
            recovery_seconds: histogram(
                r,
                "recovery_seconds",
                "Seconds from the decision to recover until the image is usable.",
            ),
            recoveries_running: gauge(r, "recoveries_running", "Recoveries that are running."),
            pod_failures: counters(
                r,
                "image_pull_failures_total",
                "Image pull failures on this node by verdict, once per container and verdict.",
                "verdict",
            ),
            fetched_bytes: counter(r, "fetched_bytes_total", "Blob bytes received from peers."),
            served_bytes: counter(r, "served_bytes_total", "Blob bytes sent to peers."),
            fetch_failures: counters(r, "fetch_failures_total", "Failed blob fetches, by reason.", "reason"),
            peer_faults: counters(
                r,
                "peer_faults_total",
                "Faults of peers that lower their score for a while, by kind; the log names the peer.",
                "fault",
            ),
            peers: gauge(r, "peers", "Peers from which this agent can fetch."),
            mesh: MeshMetrics::new(r),
            admission: AdmissionMetrics::new(r),
            network: NetworkMetrics::new(r),
            nudges: counters(r, "nudges_total", "Pods nudged after a recovery, by result.", "result"),
            events: counters(r, "events_total", "Kubernetes Events written, by reason.", "reason"),
            claims: counters(r, "claims_total", "Claims on a digest, by result.", "result"),
            layers_unpacked: counters(
                r,
                "layers_unpacked_total",
                "Layers of recovered images, by the result of unpacking: unpacked, or there (unpacked before). Once for each \
                 image whose other layers the runtime unpacks: failed, given_up. Once for each try without disk space: no_room.",
                "result",
            ),
            store_list_failures: counter(
                r,
                "content_list_failures_total",
                "Times that listing the content store failed.",
            ),
            layers: LayerMetrics::new(r),
            own_image: OwnImageMetrics::new(r),
            registries_down: gauge(r, "registries_down", "Registries that this node itself found unreachable."),
            invalid_annotations: counter(
                r,
                "invalid_annotations_total",
                "Annotations of lighterman with an invalid value.",
            ),
            records_removed: counter(
                r,
                "image_records_removed_total",
                "Records of broken images that were removed because no node has the missing blobs.",
            ),
            event_to_first_byte_seconds: histogram(
                r,
                "event_to_first_byte_seconds",
                "Seconds from the pod's event until the first byte of a missing blob arrived.",
            ),
            import_to_running_seconds: histogram(
                r,
                "import_to_running_seconds",
                "Seconds from the image being usable until the pod's container no longer waited for the image.",
            ),
            deletions: counters(
                r,
                "pod_deletions_total",
                "Pods deleted after a recovery, where the policy permits a deletion, by result.",
                "result",
            ),
            notifications: counters(r, "webhook_messages_total", "Messages to the webhook, by result.", "result"),
            policy_file_valid,
        };
        let (registry, descriptions) = register.into_parts();
        Self { registry, descriptions: descriptions.into(), ..metrics }
    }

    /// Sets the number of registries that this node itself found down.
    pub fn registries_down(&self, registries: usize) {
        self.registries_down.set(i64::try_from(registries).unwrap_or(i64::MAX));
    }

    /// An annotation has an invalid value; called once for each key and value.
    pub fn invalid_annotation_seen(&self) {
        self.invalid_annotations.inc();
    }

    /// Counts a removed record of a broken image.
    pub fn record_removed(&self) {
        self.records_removed.inc();
    }

    /// Records the time from the pod's event to the first byte of a missing blob.
    pub fn first_byte_received(&self, after: Duration) {
        self.event_to_first_byte_seconds.observe(after.as_secs_f64());
    }

    /// Records the time from the usable image to the end of the container's wait.
    pub fn pod_started(&self, after: Duration) {
        self.import_to_running_seconds.observe(after.as_secs_f64());
    }

    /// A pod was deleted, so that its controller creates the pod again, or the deletion failed.
    pub fn pod_deleted(&self, result: &'static str) {
        self.deletions.with_label_values(&[result]).inc();
    }

    /// A message to the webhook was `sent`, `left_to_another`, `dropped` or `failed`.
    pub fn notified(&self, result: &'static str) {
        self.notifications.with_label_values(&[result]).inc();
    }

    /// Counts a running recovery.
    pub fn recovery_started(&self) {
        self.recoveries_running.inc();
    }

    /// Counts a recovery by its outcome.
    pub fn recovery_ended(&self, outcome: RecoveryOutcome, took: Duration) {
        self.recoveries_running.dec();
        self.recoveries.with_label_values(&[outcome.label()]).inc();
        // Only recoveries that fetched blobs: others end at once, or when no pod waits any more.
        if outcome == RecoveryOutcome::Recovered {
            self.recovery_seconds.observe(took.as_secs_f64());
        }
    }

    /// A container of this node has no image; `verdict` is one of a few constants.
    pub fn pod_failure_seen(&self, verdict: &'static str) {
        self.pod_failures.with_label_values(&[verdict]).inc();
    }

    /// Counts bytes of blobs from peers.
    pub fn fetched(&self, bytes: u64) {
        self.fetched_bytes.inc_by(bytes);
    }

    /// Counts bytes of blobs to peers.
    pub fn served(&self, bytes: u64) {
        self.served_bytes.inc_by(bytes);
    }

    /// A fetch from a peer failed; `reason` names the kind of error.
    pub fn fetch_failed(&self, reason: &'static str) {
        self.fetch_failures.with_label_values(&[reason]).inc();
    }

    /// Counts a peer's fault: `lied`, `busy`, `unreachable`, `stalled`, `store_failed`; or on the
    /// mesh `malformed`, `too_many`, `forged` and others.
    pub fn peer_at_fault(&self, fault: &'static str) {
        self.peer_faults.with_label_values(&[fault]).inc();
    }

    /// Sets the number of peers that are up.
    pub fn peers_connected(&self, peers: usize) {
        self.peers.set(i64::try_from(peers).unwrap_or(i64::MAX));
    }

    /// A pod was nudged, or the nudge failed.
    pub fn nudged(&self, result: &'static str) {
        self.nudges.with_label_values(&[result]).inc();
    }

    /// An Event was written.
    pub fn event_written(&self, reason: &'static str) {
        self.events.with_label_values(&[reason]).inc();
    }

    /// A claim was tried: `held`, `taken_by_other`, `out_of_reach`.
    pub fn claim_tried(&self, result: &'static str) {
        self.claims.with_label_values(&[result]).inc();
    }

    /// A layer was `unpacked` or `there` already, or the rest of an image was left to the runtime
    /// (`failed`, `given_up`) or waits for disk space (`no_room`).
    pub fn layer_unpacked(&self, result: &'static str) {
        self.layers_unpacked.with_label_values(&[result]).inc();
    }

    /// Counts a failed listing of the content store.
    pub fn store_list_failed(&self) {
        self.store_list_failures.inc();
    }

    /// The policy file was read; `in_force` is false for a file that is invalid.
    pub fn policy_file_read(&self, in_force: bool) {
        self.policy_file_valid.set(in_force.into());
    }

    /// The descriptions of all metrics, in the order of their creation.
    pub fn descriptions(&self) -> &[MetricDescription] {
        &self.descriptions
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Panics
    /// Never: a write to memory does not fail.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("a write to memory does not fail");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_values_appear_in_the_text_format() {
        let metrics = Metrics::new();
        metrics.recovery_started();
        metrics.recovery_ended(RecoveryOutcome::Recovered, Duration::from_secs(2));
        metrics.fetched(5);
        let text = String::from_utf8(metrics.render()).unwrap();
        for line in [
            r#"lighterman_recoveries_total{outcome="recovered"} 1"#,
            "lighterman_recoveries_running 0",
            "lighterman_fetched_bytes_total 5",
            "lighterman_recovery_seconds_count 1",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
    }
}
