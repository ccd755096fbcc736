//! The decisions about the pods of this node: pods, policy, answers and the time in, actions out.
//!
//! [`Pods::handle`] applies one [`Input`] to the state and returns the [`Action`]s that follow.
//! Each read, probe and recovery is an action, and its result is a later input, in any order.
//! `reconcile` decides which images a pod needs, `probes` decides on probes of registries and reads
//! of the kubelet's Events, and `completion` acts on the end of a recovery. `stalled_pulls` ends
//! containerd's silent connections, and `waiting_pod` holds the state of one pod. `opt_in_sources`
//! evaluates opt-ins, and `image_records` compares the needs of pods with this node.
//!
//! Not here: the execution of actions (`crate::agent::pods::pod_controller`).

mod action;
mod completion;
mod image_records;
mod input;
mod notes;
mod opt_in_sources;
mod probes;
mod reconcile;
mod stalled_pulls;
mod waiting_pod;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::stalled_pulls::StallWatch;
use self::waiting_pod::WaitingPod;
use super::container_records::ContainerRecords;
use super::opt_in::InvalidAnnotation;
use super::outage::RegistryOutages;
use super::policy::RecoveryOptions;
use super::recovery_queue::RecoveryQueue;
use crate::model::{PodEvent, PodRef, PodReport, PodReportKind};
use crate::oci::{Digest, Reference};

pub use self::action::{Action, Observation, RecoveryOrder};
pub use self::input::{Context, Facts, FailedRecovery, ImageRecords, Input, RecoveryResult, RegistryProbe};
pub use self::opt_in_sources::OptInSources;

/// Interval of probes to registries of this node's images that have never answered. A registry that
/// only mirrors serve never answers: with three such registries a node sends 18 requests in an
/// hour.
const UNANSWERED_PROBE_INTERVAL: Duration = Duration::from_secs(600);

/// Options fixed for the life of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodsOptions {
    /// How recoveries act on this node.
    pub recovery: RecoveryOptions,
    /// Whether registries are probed at all.
    pub is_probing: bool,
    /// Whether containerd's connections can be listed.
    pub has_connections: bool,
}

/// The pods of this node that wait, and the recoveries for these pods.
#[derive(Debug)]
pub struct Pods {
    options: PodsOptions,
    registries: RegistryOutages,
    queue: RecoveryQueue,
    container_records: ContainerRecords,
    /// Pods with a waiting container, as last seen.
    waiting: BTreeMap<PodRef, WaitingPod>,
    /// Pods whose namespace or owners could not be read.
    undecided: BTreeSet<PodRef>,
    /// When these pods are reconciled again. An instant and not a duration, because other inputs
    /// come more often.
    retry_undecided_at: Option<Instant>,
    running: BTreeMap<Reference, RunningRecovery>,
    /// Wanted images without an attempt, and when the pod that wants the image was seen.
    requested_since: HashMap<Reference, Instant>,
    /// Blobs without a provider at the image's last attempt. A retry is useless before all of them
    /// have one.
    unprovided_blobs: HashMap<Reference, Vec<Digest>>,
    /// Invalid annotations that were observed already.
    invalid_annotations: HashSet<InvalidAnnotation>,
    /// The image records at the previous change; `None` before the first list.
    previous_image_records: Option<Arc<ImageRecords>>,
    /// When registries that have never answered are probed next.
    probe_unanswered_at: Instant,
    stall_watch: StallWatch,
    is_measuring_disks: bool,
}

/// A recovery between [`Action::Recover`] and [`Input::RecoveryEnded`].
#[derive(Debug, Default)]
struct RunningRecovery {
    /// Pods that waited for the image and started before the recovery's end became an input. Each
    /// still gets an Event.
    started_pods: BTreeSet<PodRef>,
    is_canceled: bool,
}

/// The handling of one input.
struct Step<'a> {
    pods: &'a mut Pods,
    context: &'a Context<'a>,
    actions: Vec<Action>,
}

impl Pods {
    /// Starts without pods, and runs `concurrency` recoveries at a time.
    pub fn new(options: PodsOptions, concurrency: usize, now: Instant) -> Self {
        Self {
            options,
            registries: RegistryOutages::default(),
            queue: RecoveryQueue::new(concurrency),
            container_records: ContainerRecords::default(),
            waiting: BTreeMap::new(),
            undecided: BTreeSet::new(),
            retry_undecided_at: None,
            running: BTreeMap::new(),
            requested_since: HashMap::new(),
            unprovided_blobs: HashMap::new(),
            invalid_annotations: HashSet::new(),
            previous_image_records: None,
            probe_unanswered_at: now + UNANSWERED_PROBE_INTERVAL,
            stall_watch: StallWatch::default(),
            is_measuring_disks: false,
        }
    }

    /// Applies the input, and returns the actions in their order.
    pub fn handle(&mut self, input: Input, context: &Context<'_>) -> Vec<Action> {
        let mut step = Step { pods: self, context, actions: Vec::new() };
        step.apply(input);
        step.start_due_recoveries();
        step.actions
    }

    /// When [`Input::Due`] is due, unless another input comes before.
    pub fn next_due(&self) -> Option<Instant> {
        self.queue.next_due().into_iter().chain(self.retry_undecided_at).min()
    }

    /// This node's evidence about registries.
    pub fn registries(&self) -> &RegistryOutages {
        &self.registries
    }
}

impl Step<'_> {
    fn apply(&mut self, input: Input) {
        match input {
            Input::Pod(event) => self.on_pod_event(event),
            Input::OptInRead { pod, result } => self.on_opt_in(&pod, result),
            Input::KubeletEventsRead { pod, events } => self.on_kubelet_events(&pod, &events),
            Input::RegistryProbed(probe) => self.on_registry_probed(&probe),
            Input::RecoveryEnded { reference, result } => self.on_recovery_ended(&reference, result),
            Input::RecordRemoved { reference, pods } => self.on_record_removed(&reference, pods),
            Input::DisksMeasured { has_room } => self.on_disks_measured(has_room),
            Input::ConnectionsEnded(ended) => self.on_connections_ended(&ended),
            Input::ProvidersChanged => {
                self.on_providers_changed();
                self.reconcile_pods_in_outages();
            }
            Input::PolicyChanged => self.on_policy_changed(),
            Input::ImageRecordsChanged => self.on_image_records(),
            Input::ImportsChanged => self.pods.queue.retry_now(),
            Input::Tick => self.on_tick(),
            Input::Due => self.reconcile_undecided(),
        }
    }

    fn on_pod_event(&mut self, event: PodEvent) {
        match event {
            PodEvent::Applied(pod) => self.reconcile(*pod),
            PodEvent::Deleted(pod) => self.on_pod_gone(&pod),
            PodEvent::Synced(pods) => {
                let existing: BTreeSet<_> = pods.into_iter().collect();
                let deleted: Vec<_> =
                    self.pods.waiting.keys().filter(|pod| !existing.contains(*pod)).cloned().collect();
                deleted.iter().for_each(|pod| self.on_pod_gone(pod));
                let uids: BTreeSet<_> = existing.iter().map(|pod| pod.uid.as_str()).collect();
                self.pods.container_records.retain_pods(|uid| uids.contains(uid));
            }
        }
    }

    fn on_disks_measured(&mut self, has_room: bool) {
        self.pods.is_measuring_disks = false;
        if has_room {
            self.pods.queue.retry_now();
        }
    }

    fn on_policy_changed(&mut self) {
        self.pods.queue.set_concurrency(self.context.policy.budgets.concurrent_recoveries);
        // The new policy may permit an image that a limit refused.
        self.pods.queue.retry_now();
        self.reconcile_all();
    }

    fn on_tick(&mut self) {
        for registry in self.pods.registries.down_registries(self.context.now) {
            self.probe_registry(&registry);
        }
        if self.context.now >= self.pods.probe_unanswered_at {
            self.pods.probe_unanswered_at = self.context.now + UNANSWERED_PROBE_INTERVAL;
            let records = self.pods.previous_image_records.clone();
            self.probe_registries_of(records.as_deref());
        }
        self.actions.push(Action::PublishOutages);
        self.suspect_sandboxes();
        self.suspect_stalls();
        self.end_stalled_pulls();
        self.read_due_kubelet_events();
        self.delete_due_pods();
        self.measure_disks();
    }

    /// Freed space sends no event, so the disks are measured while a refused recovery waits for
    /// room. One measurement at a time: a disk may hang.
    fn measure_disks(&mut self) {
        let is_useful = !self.pods.waiting.is_empty() && self.context.facts.has_rejected_reservation();
        if is_useful && !self.pods.is_measuring_disks {
            self.pods.is_measuring_disks = true;
            self.actions.push(Action::MeasureDisks);
        }
    }

    fn observe(&mut self, observation: Observation) {
        self.actions.push(Action::Observe(observation));
    }

    /// A dry run reports, and nudges no pod.
    fn nudge(&mut self, pod: PodRef) {
        if !self.pods.options.recovery.dry_run {
            self.actions.push(Action::Nudge(pod));
        }
    }

    fn report(&mut self, pod: PodRef, kind: PodReportKind, note: String) {
        self.actions.push(Action::Report(pod, PodReport { kind, note }));
    }
}

#[cfg(test)]
mod tests;
