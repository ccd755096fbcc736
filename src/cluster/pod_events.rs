//! Events on pods.
//!
//! The agent writes the older form of core/v1 (`firstTimestamp`, `lastTimestamp`, `count`), as
//! kubelets do: every `kubectl describe pod` shows all fields, and one right suffices. kube's own
//! recorder writes events.k8s.io/v1, has no rate limit, and has a cache without a bound.

use std::time::{Duration, Instant};

use hashlink::LruCache;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use parking_lot::Mutex;
use serde_json::json;

use crate::api_server::error::{ApiError, REQUEST_TIMEOUT, call, truncate};
use crate::model::{NodeName, PodRef, PodReport, PodReportKind};
use crate::oci::Digest;
use crate::ports::ClusterError;
use crate::util::clock;
use crate::util::token_bucket::{Rate, TokenBucket};

/// A repetition of the same note on the same pod within this time raises the count of the first
/// Event. Kubernetes' own recorders use ten minutes too. The API server deletes Events after an
/// hour.
const DEDUP_WINDOW: Duration = Duration::from_secs(10 * 60);

/// Most bytes of a note: the limit of the newer API (`NoteLengthLimit`). The older API has no
/// limit.
pub(super) const MAX_NOTE: usize = 1024;

/// Most bytes of an object name (RFC 1123 subdomain).
pub(super) const MAX_NAME: usize = 253;

/// Most recorded Events of a node, for the count of repetitions: four reasons for each of 110 pods,
/// rounded up. Above the bound the least recently used record is evicted; a repetition then becomes
/// a new Event.
const MAX_RECORDED_EVENTS: usize = 512;

/// Events in a burst, and then one in each period: a hundredth of a kubelet's rate
/// (`eventRecordQPS` 50). In an outage, all 110 pods of a node get their Event within 200 s, and a
/// thousand such nodes write 500 Events per second.
const EVENT_RATE: Rate = Rate { burst: 10, tokens: 1, period: Duration::from_secs(2) };

pub(super) const COMPONENT: &str = "lighterman";

pub(super) struct EventRecorder {
    client: Client,
    node: NodeName,
    correlator: Mutex<EventCorrelator>,
}

impl EventRecorder {
    pub(super) fn new(client: Client, node: NodeName) -> Self {
        Self { client, node, correlator: Mutex::new(EventCorrelator::new()) }
    }

    /// Writes or counts the Event. `uid` is the kubelet's UID of the pod.
    pub(super) async fn report(&self, pod: &PodRef, uid: &str, report: &PodReport) -> Result<(), ClusterError> {
        let note = truncate(&report.note, MAX_NOTE);
        let key = EventKey { pod_uid: pod.uid.clone(), kind: report.kind, note: Digest::of(note.as_bytes()) };
        let timestamp = Timestamp::now();
        let name = event_name(&pod.name, timestamp);
        let decision = self.correlator().record(key.clone(), name, clock::now());
        let written = match decision {
            EventDecision::CountOnly => return Ok(()),
            EventDecision::RateLimited => return Err(ClusterError::RateLimited(EVENT_RATE.period)),
            EventDecision::Create { name } => self.create(pod, uid, report.kind, note, name, timestamp).await,
            EventDecision::UpdateCount { name, count } => match self.update_count(pod, &name, count, timestamp).await {
                // The API server deletes an Event after an hour, on some clusters sooner.
                Err(ApiError::NotFound(_)) => self.create(pod, uid, report.kind, note, name, timestamp).await,
                counted => counted,
            },
        };
        written.map_err(|failure| {
            self.correlator().forget(&key);
            failure.into_cluster_error(&format!("namespace {}", pod.k8s_namespace))
        })
    }

    async fn create(
        &self,
        pod: &PodRef,
        uid: &str,
        kind: PodReportKind,
        note: &str,
        name: String,
        now: Timestamp,
    ) -> Result<(), ApiError> {
        let text = |text: &str| Some(text.to_owned());
        let event = Event {
            metadata: ObjectMeta { name: Some(name), namespace: text(&pod.k8s_namespace), ..ObjectMeta::default() },
            involved_object: ObjectReference {
                api_version: text("v1"),
                kind: text("Pod"),
                name: text(&pod.name),
                namespace: text(&pod.k8s_namespace),
                uid: text(uid),
                ..ObjectReference::default()
            },
            type_: text(if kind.is_warning() { "Warning" } else { "Normal" }),
            reason: text(kind.reason()),
            message: text(note),
            source: Some(EventSource { component: text(COMPONENT), host: text(self.node.as_str()) }),
            reporting_component: text(COMPONENT),
            reporting_instance: text(self.node.as_str()),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            ..Event::default()
        };
        call(REQUEST_TIMEOUT, self.api(pod).create(&PostParams::default(), &event)).await.map(drop)
    }

    async fn update_count(&self, pod: &PodRef, name: &str, count: i32, now: Timestamp) -> Result<(), ApiError> {
        let patch = Patch::Merge(json!({ "count": count, "lastTimestamp": Time(now) }));
        call(REQUEST_TIMEOUT, self.api(pod).patch(name, &PatchParams::default(), &patch)).await.map(drop)
    }

    fn api(&self, pod: &PodRef) -> Api<Event> {
        Api::namespaced(self.client.clone(), &pod.k8s_namespace)
    }

    fn correlator(&self) -> parking_lot::MutexGuard<'_, EventCorrelator> {
        self.correlator.lock()
    }
}

/// The name of an Event, as kubelets form it: the pod's name and the time. A long pod name is
/// truncated, and must not end with a dot or dash then.
pub(super) fn event_name(pod: &str, now: Timestamp) -> String {
    let suffix = format!(".{:x}", now.as_nanosecond());
    let pod = truncate(pod, MAX_NAME - suffix.len()).trim_end_matches(['.', '-']);
    format!("{pod}{suffix}")
}

/// The recent Events and the rate limiter for new Events. Pure: `now` is an argument.
struct EventCorrelator {
    recorded: LruCache<EventKey, RecordedEvent>,
    bucket: TokenBucket,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct EventKey {
    pod_uid: String,
    kind: PodReportKind,
    note: Digest,
}

struct RecordedEvent {
    name: String,
    count: i32,
    last: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum EventDecision {
    /// Create an Event of this name.
    Create { name: String },
    /// Set the count of the existing Event.
    UpdateCount { name: String, count: i32 },
    /// The rate limiter has no token: the next update of the existing Event includes this
    /// repetition.
    CountOnly,
    /// The rate limiter has no token for a new Event.
    RateLimited,
}

impl EventCorrelator {
    fn new() -> Self {
        Self { recorded: LruCache::new(MAX_RECORDED_EVENTS), bucket: TokenBucket::default() }
    }

    fn record(&mut self, key: EventKey, name: String, now: Instant) -> EventDecision {
        let may_write = self.bucket.try_take(1, EVENT_RATE, now);
        if let Some(event) = self.recorded.get_mut(&key).filter(|event| now.duration_since(event.last) < DEDUP_WINDOW) {
            event.count = event.count.saturating_add(1);
            event.last = now;
            return if may_write {
                EventDecision::UpdateCount { name: event.name.clone(), count: event.count }
            } else {
                EventDecision::CountOnly
            };
        }
        if !may_write {
            return EventDecision::RateLimited;
        }
        self.recorded.insert(key, RecordedEvent { name: name.clone(), count: 1, last: now });
        EventDecision::Create { name }
    }

    /// Removes the record of an Event that was not written; the next report creates the Event.
    fn forget(&mut self, key: &EventKey) {
        self.recorded.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(pod: usize, note: &str) -> EventKey {
        EventKey { pod_uid: pod.to_string(), kind: PodReportKind::NoProvider, note: Digest::of(note.as_bytes()) }
    }

    fn created(name: &str) -> EventDecision {
        EventDecision::Create { name: name.into() }
    }

    #[test]
    fn repetitions_are_counted_on_the_first_event() {
        let start = Instant::now();
        let mut correlator = EventCorrelator::new();
        let mut record = |note, name: &str, after| correlator.record(key(1, note), name.into(), start + after);
        assert_eq!(record("none", "a", Duration::ZERO), created("a"));
        assert_eq!(record("none", "b", DEDUP_WINDOW / 2), EventDecision::UpdateCount { name: "a".into(), count: 2 });
        assert_eq!(record("other words", "c", DEDUP_WINDOW / 2), created("c"));
        // The window counts from the last repetition, not from the first.
        assert_eq!(record("none", "d", DEDUP_WINDOW), EventDecision::UpdateCount { name: "a".into(), count: 3 });
        assert_eq!(record("none", "e", DEDUP_WINDOW * 2), created("e"));
    }

    #[test]
    fn an_outage_with_110_pods_is_reported_at_a_bounded_rate() {
        let start = Instant::now();
        let mut correlator = EventCorrelator::new();
        let mut record = |pod| correlator.record(key(pod, "none"), String::new(), start);
        let written = (0..110).filter(|&pod| record(pod) != EventDecision::RateLimited).count();
        assert_eq!(written, EVENT_RATE.burst as usize);
        assert_eq!(record(0), EventDecision::CountOnly, "the repetition is counted");
        let mut reported = written;
        let mut waited = Duration::ZERO;
        while reported < 110 {
            waited += EVENT_RATE.period;
            reported +=
                usize::from(correlator.record(key(reported, "none"), String::new(), start + waited) == created(""));
        }
        assert_eq!(waited, Duration::from_secs(200));
    }

    #[test]
    fn a_deferred_count_is_part_of_the_next_update() {
        let start = Instant::now();
        let mut correlator = EventCorrelator::new();
        for pod in 0..EVENT_RATE.burst as usize {
            correlator.record(key(pod, "none"), "a".into(), start);
        }
        assert_eq!(correlator.record(key(0, "none"), "b".into(), start), EventDecision::CountOnly);
        let next = correlator.record(key(0, "none"), "b".into(), start + EVENT_RATE.period);
        assert_eq!(next, EventDecision::UpdateCount { name: "a".into(), count: 3 });
    }

    #[test]
    fn an_idle_hour_saves_up_no_more_than_a_burst() {
        let start = Instant::now();
        let mut correlator = EventCorrelator::new();
        correlator.bucket.refill(EVENT_RATE, start);
        let later = start + Duration::from_secs(3600);
        let written = (0..100)
            .filter(|&pod| correlator.record(key(pod, ""), String::new(), later) != EventDecision::RateLimited)
            .count();
        assert_eq!(written, EVENT_RATE.burst as usize);
    }

    #[test]
    fn the_number_of_recorded_events_is_bounded() {
        let start = Instant::now();
        let mut correlator = EventCorrelator::new();
        for pod in 0..MAX_RECORDED_EVENTS + 10 {
            let now = start + EVENT_RATE.period * u32::try_from(pod).unwrap() / 10;
            correlator.bucket = TokenBucket::default();
            correlator.record(key(pod, ""), String::new(), now);
        }
        assert_eq!(correlator.recorded.len(), MAX_RECORDED_EVENTS);
        assert!(!correlator.recorded.contains_key(&key(9, "")) && correlator.recorded.contains_key(&key(10, "")));
    }

    #[test]
    fn an_event_name_is_valid_in_kubernetes() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        assert_eq!(event_name("web-0", now), "web-0.17979cfe362a0000");
        let long = format!("{}.{}", "a".repeat(235), "b".repeat(17));
        let name = event_name(&long, now);
        assert_eq!(name, format!("{}.17979cfe362a0000", "a".repeat(235)));
        assert!(name.len() <= MAX_NAME);
    }
}
