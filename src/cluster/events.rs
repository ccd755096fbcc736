//! What happened, as Events on pods.
//!
//! Written in the older form of core/v1 (`firstTimestamp`, `lastTimestamp`, `count`), as kubelets do: every `kubectl describe pod`
//! shows all of it, and one right suffices. kube's own recorder writes events.k8s.io/v1, has no limit of rate, and its cache none
//! of size.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::Instant;

use super::call::{Failure, PATIENCE, call, cut};
use crate::model::{NodeName, PodRef};
use crate::oci::Digest;
use crate::ports::{ClusterError, PodReport, ReportKind};

/// The same words about the same pod within this time are counted on the first Event, not said again. (Kubernetes' own recorders
/// take ten minutes too; the API server forgets Events after an hour.)
const SAME: Duration = Duration::from_secs(10 * 60);

/// The limit that the newer API sets for notes (`NoteLengthLimit`); the older one has none.
pub(super) const MAX_NOTE: usize = 1024;

/// The longest name of an object (RFC 1123 subdomain).
pub(super) const MAX_NAME: usize = 253;

/// A node's Events that are remembered, to count repetitions: four reasons for each of 110 pods, rounded up. When there are more, the
/// one unused for longest is forgotten, and would be said again.
const MOST: usize = 512;

/// Events written at once, and then one in every [`REFILL`]. That is a hundredth of what each kubelet may write
/// (`eventRecordQPS` 50): in an outage that hits a node with 110 pods all of them are told within 200 s, and a thousand such
/// nodes together write 500 a second.
const BURST: u32 = 10;
const REFILL: Duration = Duration::from_secs(2);

pub(super) const COMPONENT: &str = "lighterman";

pub(super) struct Events {
    client: Client,
    node: NodeName,
    ledger: Mutex<Ledger>,
}

impl Events {
    pub(super) fn new(client: Client, node: NodeName) -> Self {
        Self { client, node, ledger: Mutex::new(Ledger::new(Instant::now())) }
    }

    /// `uid` is the one that the kubelet knows the pod by.
    pub(super) async fn report(&self, pod: &PodRef, uid: &str, report: &PodReport) -> Result<(), ClusterError> {
        let note = cut(&report.note, MAX_NOTE);
        let key = Key { pod_uid: pod.uid.clone(), kind: report.kind, note: Digest::of(note.as_bytes()) };
        let wall = Timestamp::now();
        let name = event_name(&pod.name, wall);
        let step = self.ledger().enter(key.clone(), name, Instant::now());
        let written = match step {
            Step::Counted => return Ok(()),
            Step::HeldBack => {
                let pace = format!("one in {} s", REFILL.as_secs());
                return Err(ClusterError::Unavailable(format!(
                    "too many Events at once; they are held back to {pace}"
                )));
            }
            Step::First { name } => self.create(pod, uid, report.kind, note, name, wall).await,
            Step::Again { name, count } => match self.count(pod, &name, count, wall).await {
                // Events are forgotten after an hour, sooner on some clusters.
                Err(Failure::NotFound(_)) => self.create(pod, uid, report.kind, note, name, wall).await,
                counted => counted,
            },
        };
        written.map_err(|failure| {
            self.ledger().forget(&key);
            failure.about(&format!("namespace {}", pod.k8s_namespace))
        })
    }

    async fn create(
        &self,
        pod: &PodRef,
        uid: &str,
        kind: ReportKind,
        note: &str,
        name: String,
        now: Timestamp,
    ) -> Result<(), Failure> {
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
        call(PATIENCE, self.api(pod).create(&PostParams::default(), &event)).await.map(drop)
    }

    async fn count(&self, pod: &PodRef, name: &str, count: i32, now: Timestamp) -> Result<(), Failure> {
        let patch = Patch::Merge(json!({ "count": count, "lastTimestamp": Time(now) }));
        call(PATIENCE, self.api(pod).patch(name, &PatchParams::default(), &patch)).await.map(drop)
    }

    fn api(&self, pod: &PodRef) -> Api<Event> {
        Api::namespaced(self.client.clone(), &pod.k8s_namespace)
    }

    fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("nothing panics while holding it")
    }
}

/// As kubelets name theirs: the pod's name and the time. A long name is cut to leave room; what is left must not end with a dot or dash.
pub(super) fn event_name(pod: &str, now: Timestamp) -> String {
    let suffix = format!(".{:x}", now.as_nanosecond());
    let pod = cut(pod, MAX_NAME - suffix.len()).trim_end_matches(['.', '-']);
    format!("{pod}{suffix}")
}

/// What was said lately and how much more may be said now. Pure: `now` is an argument.
struct Ledger {
    said: HashMap<Key, Said>,
    tokens: u32,
    filled: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    pod_uid: String,
    kind: ReportKind,
    note: Digest,
}

struct Said {
    name: String,
    count: i32,
    last: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Make an Event of this name.
    First { name: String },
    /// It is there: set its count.
    Again { name: String, count: i32 },
    /// It is there, and its count can wait for the next repetition.
    Counted,
    /// Nothing may be written now.
    HeldBack,
}

impl Ledger {
    fn new(now: Instant) -> Self {
        Self { said: HashMap::new(), tokens: BURST, filled: now }
    }

    fn enter(&mut self, key: Key, name: String, now: Instant) -> Step {
        let may_write = self.take_token(now);
        if let Some(said) = self.said.get_mut(&key).filter(|said| now.duration_since(said.last) < SAME) {
            said.count = said.count.saturating_add(1);
            said.last = now;
            return if may_write { Step::Again { name: said.name.clone(), count: said.count } } else { Step::Counted };
        }
        if !may_write {
            return Step::HeldBack;
        }
        if self.said.len() >= MOST {
            let oldest = self.said.iter().min_by_key(|(_, said)| said.last).map(|(key, _)| key.clone());
            oldest.and_then(|key| self.said.remove(&key));
        }
        self.said.insert(key, Said { name: name.clone(), count: 1, last: now });
        Step::First { name }
    }

    /// What was entered was not written after all; the next report begins anew.
    fn forget(&mut self, key: &Key) {
        self.said.remove(key);
    }

    fn take_token(&mut self, now: Instant) -> bool {
        while self.tokens < BURST && now.duration_since(self.filled) >= REFILL {
            self.tokens += 1;
            self.filled += REFILL;
        }
        if self.tokens == BURST {
            self.filled = now;
        }
        let may_write = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        may_write
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(pod: usize, note: &str) -> Key {
        Key { pod_uid: pod.to_string(), kind: ReportKind::NoProvider, note: Digest::of(note.as_bytes()) }
    }

    fn first(name: &str) -> Step {
        Step::First { name: name.into() }
    }

    #[test]
    fn repetitions_are_counted_on_the_first_event() {
        let start = Instant::now();
        let mut ledger = Ledger::new(start);
        let mut say = |note, name: &str, after| ledger.enter(key(1, note), name.into(), start + after);
        assert_eq!(say("none", "a", Duration::ZERO), first("a"));
        assert_eq!(say("none", "b", SAME / 2), Step::Again { name: "a".into(), count: 2 });
        assert_eq!(say("other words", "c", SAME / 2), first("c"));
        // Ten minutes since it was said last, not first.
        assert_eq!(say("none", "d", SAME), Step::Again { name: "a".into(), count: 3 });
        assert_eq!(say("none", "e", SAME * 2), first("e"));
    }

    #[test]
    fn an_outage_with_110_pods_is_told_at_a_bounded_pace() {
        let start = Instant::now();
        let mut ledger = Ledger::new(start);
        let mut say = |pod| ledger.enter(key(pod, "none"), String::new(), start);
        let written = (0..110).filter(|&pod| say(pod) != Step::HeldBack).count();
        assert_eq!(written, BURST as usize);
        assert_eq!(say(0), Step::Counted, "a repetition is not lost");
        let mut told = written;
        let mut waited = Duration::ZERO;
        while told < 110 {
            waited += REFILL;
            told += usize::from(ledger.enter(key(told, "none"), String::new(), start + waited) == first(""));
        }
        assert_eq!(waited, Duration::from_secs(200));
    }

    #[test]
    fn a_count_that_waited_is_in_the_next_one() {
        let start = Instant::now();
        let mut ledger = Ledger::new(start);
        for pod in 0..BURST as usize {
            ledger.enter(key(pod, "none"), "a".into(), start);
        }
        assert_eq!(ledger.enter(key(0, "none"), "b".into(), start), Step::Counted);
        let next = ledger.enter(key(0, "none"), "b".into(), start + REFILL);
        assert_eq!(next, Step::Again { name: "a".into(), count: 3 });
    }

    #[test]
    fn an_idle_hour_saves_up_no_more_than_a_burst() {
        let start = Instant::now();
        let mut ledger = Ledger::new(start);
        let later = start + Duration::from_secs(3600);
        let written =
            (0..100).filter(|&pod| ledger.enter(key(pod, ""), String::new(), later) != Step::HeldBack).count();
        assert_eq!(written, BURST as usize);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let start = Instant::now();
        let mut ledger = Ledger::new(start);
        for pod in 0..MOST + 10 {
            let now = start + REFILL * u32::try_from(pod).unwrap() / 10;
            ledger.tokens = BURST;
            ledger.enter(key(pod, ""), String::new(), now);
        }
        assert_eq!(ledger.said.len(), MOST);
        assert!(!ledger.said.contains_key(&key(9, "")) && ledger.said.contains_key(&key(10, "")));
    }

    #[test]
    fn an_events_name_is_one_that_kubernetes_takes() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        assert_eq!(event_name("web-0", now), "web-0.17979cfe362a0000");
        let long = format!("{}.{}", "a".repeat(235), "b".repeat(17));
        let name = event_name(&long, now);
        assert_eq!(name, format!("{}.17979cfe362a0000", "a".repeat(235)));
        assert!(name.len() <= MAX_NAME);
    }
}
