//! Every metric that an agent exports. Methods are named after what happened; no label is unbounded: never a digest, a pod, a
//! peer or an image.

mod admission;
mod layers;
mod mesh;
mod network;
mod own_image;
mod register;

use std::time::Duration;

use prometheus::{Encoder, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TextEncoder};

use self::admission::AdmissionMetrics;
use self::layers::LayerMetrics;
use self::mesh::MeshMetrics;
use self::network::NetworkMetrics;
use self::own_image::OwnImageMetrics;
use self::register::{counter, counters, gauge, histogram};

/// The metrics of one agent. Cheap to clone; clones share their values.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
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

/// How a recovery ended; the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoveryOutcome {
    /// The image is here.
    Recovered,
    /// It was here already, whole, and only the pod had to be nudged.
    AlreadyHere,
    /// Nobody holds it.
    NoProvider,
    /// Parts of it are on no node.
    BlobsWithoutProvider,
    /// Nothing may be imported here.
    ImportsRefused,
    /// It was only decided, as a dry run asks.
    DryRun,
    /// Providers failed, all of them.
    FetchFailed,
    /// Our store failed.
    StoreFailed,
    /// A manifest that cannot be used, or none for this platform.
    Unusable,
    /// A limit forbids it.
    OverLimit,
    /// Nobody waited for it any more.
    Abandoned,
}

impl RecoveryOutcome {
    /// The label's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Recovered => "recovered",
            Self::AlreadyHere => "already_here",
            Self::NoProvider => "no_provider",
            Self::BlobsWithoutProvider => "not_held",
            Self::ImportsRefused => "closed",
            Self::DryRun => "dry_run",
            Self::FetchFailed => "fetch_failed",
            Self::StoreFailed => "store_failed",
            Self::Unusable => "unusable",
            Self::OverLimit => "over_limit",
            Self::Abandoned => "abandoned",
        }
    }
}

impl Metrics {
    /// Registers everything, at zero.
    ///
    /// # Panics
    /// Never: the names are constants and each is registered once.
    pub fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        let policy_file_valid = gauge(
            r,
            "policy_file_valid",
            "1, or 0 while the rules file cannot be read or is wrong and what it said before stays.",
        );
        policy_file_valid.set(1);
        Self {
            recoveries: counters(r, "recoveries_total", "Recoveries that ended, by outcome.", "outcome"),
            recovery_seconds: histogram(
                r,
                "recovery_seconds",
                "From the decision to recover until the image is usable.",
            ),
            recoveries_running: gauge(r, "recoveries_running", "Recoveries under way."),
            pod_failures: counters(
                r,
                "image_pull_failures_total",
                "Containers of this node that could not get their image, once each, by what was decided.",
                "verdict",
            ),
            fetched_bytes: counter(r, "fetched_bytes_total", "Blob bytes received from peers."),
            served_bytes: counter(r, "served_bytes_total", "Blob bytes sent to peers."),
            fetch_failures: counters(r, "fetch_failures_total", "Blob fetches that failed, by reason.", "reason"),
            peer_faults: counters(
                r,
                "peer_faults_total",
                "What went wrong with peers and is held against them for a while, by kind; the log names the peer.",
                "fault",
            ),
            peers: gauge(r, "peers", "Peers that can be fetched from."),
            mesh: MeshMetrics::new(r),
            admission: AdmissionMetrics::new(r),
            network: NetworkMetrics::new(r),
            nudges: counters(r, "nudges_total", "Pods nudged after a recovery, by result.", "result"),
            events: counters(r, "events_total", "Kubernetes Events written, by reason.", "reason"),
            claims: counters(r, "claims_total", "Claims on a digest, by result.", "result"),
            layers_unpacked: counters(
                r,
                "layers_unpacked_total",
                "Layers of recovered images by what came of unpacking them here: unpacked, or there already; failed and given_up, once for each \
                 image whose other layers were then left to the runtime; no_room, once for each try that ended there.",
                "result",
            ),
            store_list_failures: counter(
                r,
                "content_list_failures_total",
                "Times that the content store could not be listed.",
            ),
            layers: LayerMetrics::new(r),
            own_image: OwnImageMetrics::new(r),
            registries_down: gauge(r, "registries_down", "Registries that this node itself found unreachable."),
            invalid_annotations: counter(
                r,
                "invalid_annotations_total",
                "Annotations of ours with a value that means nothing.",
            ),
            records_removed: counter(
                r,
                "image_records_removed_total",
                "Records of broken images removed because no node has what they lack.",
            ),
            event_to_first_byte_seconds: histogram(
                r,
                "event_to_first_byte_seconds",
                "From the pod's event until the first byte of a blob that it lacks has come.",
            ),
            import_to_running_seconds: histogram(
                r,
                "import_to_running_seconds",
                "From the image being usable until the pod's container was seen past waiting for it.",
            ),
            deletions: counters(
                r,
                "pod_deletions_total",
                "Pods deleted after a recovery, where that is allowed, by result.",
                "result",
            ),
            notifications: counters(r, "webhook_messages_total", "Messages for the webhook, by result.", "result"),
            policy_file_valid: policy_file_valid,
            registry,
        }
    }

    /// So many registries are known first hand to be down.
    pub fn registries_down(&self, registries: usize) {
        self.registries_down.set(i64::try_from(registries).unwrap_or(i64::MAX));
    }

    /// An annotation of ours has a value that means nothing; once for each key and value.
    pub fn invalid_annotation_seen(&self) {
        self.invalid_annotations.inc();
    }

    /// The record of a broken image was removed.
    pub fn record_removed(&self) {
        self.records_removed.inc();
    }

    /// The first byte of a missing blob came so long after the event that made it wanted.
    pub fn first_byte_received(&self, after: Duration) {
        self.event_to_first_byte_seconds.observe(after.as_secs_f64());
    }

    /// A pod that waited for an image went on so long after it was usable.
    pub fn pod_started(&self, after: Duration) {
        self.import_to_running_seconds.observe(after.as_secs_f64());
    }

    /// A pod was deleted so that it is made again, or could not be.
    pub fn pod_deleted(&self, result: &'static str) {
        self.deletions.with_label_values(&[result]).inc();
    }

    /// A message for the webhook was `sent`, `left_to_another`, `dropped` or `failed`.
    pub fn notified(&self, result: &'static str) {
        self.notifications.with_label_values(&[result]).inc();
    }

    /// A recovery began.
    pub fn recovery_started(&self) {
        self.recoveries_running.inc();
    }

    /// A recovery ended.
    pub fn recovery_ended(&self, outcome: RecoveryOutcome, took: Duration) {
        self.recoveries_running.dec();
        self.recoveries.with_label_values(&[outcome.label()]).inc();
        // Of those that brought something: the others end at once, or when somebody gives up.
        if outcome == RecoveryOutcome::Recovered {
            self.recovery_seconds.observe(took.as_secs_f64());
        }
    }

    /// A container of this node could not get its image; `verdict` is one of a handful of constants.
    pub fn pod_failure_seen(&self, verdict: &'static str) {
        self.pod_failures.with_label_values(&[verdict]).inc();
    }

    /// Bytes of blobs arrived.
    pub fn fetched(&self, bytes: u64) {
        self.fetched_bytes.inc_by(bytes);
    }

    /// Bytes of blobs were sent.
    pub fn served(&self, bytes: u64) {
        self.served_bytes.inc_by(bytes);
    }

    /// A fetch from a peer failed; `reason` names the kind of error.
    pub fn fetch_failed(&self, reason: &'static str) {
        self.fetch_failures.with_label_values(&[reason]).inc();
    }

    /// A peer did wrong: `lied`, `busy`, `unreachable`, `stalled`, `store_failed`; or on the mesh `malformed`, `too_many`, `forged` and
    /// others.
    pub fn peer_at_fault(&self, fault: &'static str) {
        self.peer_faults.with_label_values(&[fault]).inc();
    }

    /// So many peers are up now.
    pub fn peers_connected(&self, peers: usize) {
        self.peers.set(i64::try_from(peers).unwrap_or(i64::MAX));
    }

    /// A pod was nudged, or could not be.
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

    /// A layer was `unpacked` or `there` already, or the rest of an image was left to the runtime:
    /// `failed`, `given_up`, or waits for room: `no_room`.
    pub fn layer_unpacked(&self, result: &'static str) {
        self.layers_unpacked.with_label_values(&[result]).inc();
    }

    /// The content store could not be listed.
    pub fn store_list_failed(&self) {
        self.store_list_failures.inc();
    }

    /// The rules file was read: what it says now is in force, or is not.
    pub fn policy_file_read(&self, in_force: bool) {
        self.policy_file_valid.set(in_force.into());
    }

    /// Everything in Prometheus' text format.
    ///
    /// # Panics
    /// Never: writing to memory does not fail.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("memory can be written");
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
