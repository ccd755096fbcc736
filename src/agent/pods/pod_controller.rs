//! The pod controller: from the pods of this node to recoveries, and back to the pods as nudges and
//! Events.
//!
//! One task owns all of this state. Slow work (recoveries, probes, requests to the API server,
//! nudges, Events) runs in a [`JoinSet`] beside the task and returns a result. `reconcile` decides
//! which images a pod needs, `probes` contacts registries and reads the kubelet's Events, and
//! `completion` acts on the end of a recovery. `stalled_pulls` ends containerd's silent
//! connections, and `waiting_pod` holds the state of one pod. `opt_in_sources` reads opt-ins,
//! `image_records` compares the needs of pods with this node, and `running_recovery` starts
//! recoveries.

mod completion;
mod image_records;
mod opt_in_sources;
mod probes;
mod reconcile;
mod running_recovery;
mod stalled_pulls;
mod waiting_pod;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::opt_in_sources::OptInSources;
use self::running_recovery::RunningRecovery;
use self::stalled_pulls::{EndedConnections, StallWatch};
use self::waiting_pod::WaitingPod;
use crate::agent::membership::announcer::RecordTargets;
use crate::agent::pods::notifications::NotificationQueue;
use crate::agent::pods::pod_notifier::PodNotifier;
use crate::agent::pods::registry_health::{RegistryHealth, RegistryProbe};
use crate::agent::recovery::progress::RecoveryTracker;
use crate::agent::recovery::recover::Recoverer;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::recovered_image::{RecoveredImage, ResolvedImage};
use crate::decide::container_records::ContainerRecords;
use crate::decide::opt_in::InvalidAnnotation;
use crate::decide::policy::{Policy, RecoveryOptions};
use crate::decide::recovery_queue::RecoveryQueue;
use crate::metrics::Metrics;
use crate::model::PodRef;
use crate::oci::{Digest, Reference};
use crate::ports::{Cluster, ClusterError, KubeletEvent, PodEvent, PullConnections};

/// Interval of the work that time alone starts: probes of registries, reads of the kubelet's
/// Events, and deletions.
const TICK: Duration = Duration::from_secs(2);

/// Concurrent reads of opt-ins and Events from the API server. A full node has a hundred pods, and
/// the adapter's cache answers most of these reads.
const MAX_API_REQUESTS: usize = 4;

/// Interval of probes to registries of this node's images that have never answered. A registry that
/// only mirrors serve never answers: with three such registries a node sends 18 requests in an
/// hour.
const UNANSWERED_PROBE_INTERVAL: Duration = Duration::from_secs(600);

/// Dependencies of the controller.
pub struct PodControllerParts {
    /// Fetches and imports images.
    pub recoverer: Arc<Recoverer>,
    /// Publishes the progress of recoveries.
    pub tracker: RecoveryTracker,
    /// Pods, namespaces and Events.
    pub cluster: Arc<dyn Cluster>,
    /// Outages of registries, as this node and its peers found them.
    pub registries: RegistryHealth,
    /// containerd's TCP connections; `None` with another store.
    pub connections: Option<Arc<dyn PullConnections>>,
    /// Queue of the webhook's messages.
    pub notifications: NotificationQueue,
    /// Image records of this node; `None` before the announcer's first list.
    pub image_records: watch::Receiver<RecordTargets>,
    /// The policy in force.
    pub policy: watch::Receiver<Arc<Policy>>,
    /// Options fixed for the life of the agent.
    pub options: RecoveryOptions,
    /// Counters of failures, recoveries and nudges.
    pub metrics: Metrics,
}

/// Recovers images for the pods of this node.
pub struct PodController {
    recoverer: Arc<Recoverer>,
    tracker: RecoveryTracker,
    cluster: Arc<dyn Cluster>,
    registries: RegistryHealth,
    connections: Option<Arc<dyn PullConnections>>,
    stall_watch: StallWatch,
    notifications: NotificationQueue,
    image_records: watch::Receiver<RecordTargets>,
    /// The image records at the previous change.
    previous_image_records: RecordTargets,
    /// When registries that have never answered are probed next.
    probe_unanswered_at: Instant,
    pod_notifier: Arc<PodNotifier>,
    policy: watch::Receiver<Arc<Policy>>,
    options: RecoveryOptions,
    metrics: Metrics,
    queue: RecoveryQueue,
    container_records: ContainerRecords,
    /// Pods with a waiting container, as last seen.
    waiting: BTreeMap<PodRef, WaitingPod>,
    /// Pods whose namespace or owners could not be read.
    undecided: BTreeSet<PodRef>,
    /// When these pods are reconciled again. An instant and not a duration, because other events
    /// wake the task more often.
    retry_undecided_at: Option<Instant>,
    running: HashMap<Reference, RunningRecovery>,
    /// Wanted images without an attempt, and when the pod that wants the image was seen.
    requested_since: HashMap<Reference, Instant>,
    /// Blobs without a provider at the image's last attempt. A retry is useless before all of them
    /// have one.
    unprovided_blobs: HashMap<Reference, Vec<Digest>>,
    /// Invalid annotations that the log has already.
    invalid_annotations: HashSet<InvalidAnnotation>,
    is_measuring_disks: bool,
    /// Bounds the concurrent requests to the API server.
    api_permits: Arc<Semaphore>,
    /// Canceled when the agent stops, which ends the retries of nudges and Events.
    stopping: CancellationToken,
    /// Work in flight: the recoveries that the queue admits, and a few reads, nudges and Events for
    /// each waiting pod.
    work: JoinSet<WorkResult>,
}

/// Result of work in [`PodController::work`].
enum WorkResult {
    RecoveryEnded {
        reference: Reference,
        result: Result<RecoveredImage, RecoverError>,
    },
    DryRunEnded {
        reference: Reference,
        result: Result<ResolvedImage, RecoverError>,
    },
    /// A broken image record was removed, or was kept.
    RecordRemoved {
        reference: Reference,
        pods: Vec<PodRef>,
        result: Result<bool, RecoverError>,
    },
    /// Whether a refused recovery has room now.
    DisksMeasured(bool),
    RegistryProbed(RegistryProbe),
    OptInRead {
        pod: PodRef,
        result: Result<OptInSources, ClusterError>,
    },
    KubeletEventsRead {
        pod: PodRef,
        result: Result<Vec<KubeletEvent>, ClusterError>,
    },
    ConnectionsEnded(EndedConnections),
    Nothing,
}

impl PodController {
    /// Builds the controller. [`PodController::run`] starts it.
    pub fn new(parts: PodControllerParts) -> Self {
        let PodControllerParts {
            recoverer,
            tracker,
            cluster,
            registries,
            connections,
            notifications,
            image_records,
            policy,
            options,
            metrics,
        } = parts;
        let pod_notifier =
            PodNotifier::new(Arc::clone(&cluster) as _, recoverer.resolver.inventory.clone(), metrics.clone());
        let concurrency = policy.borrow().budgets.concurrent_recoveries;
        Self {
            recoverer,
            tracker,
            cluster,
            registries,
            connections,
            stall_watch: StallWatch::default(),
            notifications,
            image_records,
            previous_image_records: None,
            probe_unanswered_at: now() + UNANSWERED_PROBE_INTERVAL,
            pod_notifier: Arc::new(pod_notifier),
            policy,
            options,
            metrics,
            queue: RecoveryQueue::new(concurrency),
            container_records: ContainerRecords::default(),
            waiting: BTreeMap::new(),
            undecided: BTreeSet::new(),
            retry_undecided_at: None,
            running: HashMap::new(),
            requested_since: HashMap::new(),
            unprovided_blobs: HashMap::new(),
            invalid_annotations: HashSet::new(),
            is_measuring_disks: false,
            api_permits: Arc::new(Semaphore::new(MAX_API_REQUESTS)),
            stopping: CancellationToken::new(),
            work: JoinSet::new(),
        }
    }

    /// Registries that may serve layers in the background.
    pub fn healthy_registries(&self) -> watch::Receiver<Arc<BTreeSet<String>>> {
        self.registries.healthy()
    }

    /// Runs until stopped, and then cancels every running recovery.
    pub async fn run(mut self, mut pods: mpsc::Receiver<PodEvent>, stop: CancellationToken) {
        let mut providers = self.recoverer.resolver.inventory.changes();
        let mut imports = self.recoverer.imports.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due = self.queue.next_due().into_iter().chain(self.retry_undecided_at).min();
            tokio::select! {
                () = stop.cancelled() => break,
                event = pods.recv() => match event {
                    Some(event) => self.on_event(event),
                    // The watch ends only when the agent does.
                    None => { stop.cancelled().await; break }
                },
                Some(done) = self.work.join_next() => self.on_work_ended(done),
                Ok(()) = providers.changed() => {
                    self.on_providers_changed();
                    self.reconcile_pods_in_outages();
                },
                Ok(()) = self.policy.changed() => self.on_policy_changed(),
                Ok(()) = self.image_records.changed() => self.on_image_records(),
                Ok(()) = imports.changed() => self.queue.retry_now(),
                _ = tick.tick() => self.on_tick(),
                () = sleep_until(due) => self.reconcile_undecided(),
            }
            self.start_due_recoveries();
        }
        self.stopping.cancel();
        self.running.values().for_each(|running| running.stop.cancel());
        // Canceled recoveries end at once. Each may have a claim, and the release ends within
        // seconds.
        while let Some(done) = self.work.join_next().await {
            if let Ok(WorkResult::RecoveryEnded { reference, .. }) = done {
                self.spawn_claim_release(reference);
            }
        }
    }

    fn on_event(&mut self, event: PodEvent) {
        match event {
            PodEvent::Applied(pod) => self.reconcile(*pod),
            PodEvent::Deleted(pod) => self.on_pod_gone(&pod),
            PodEvent::Synced(pods) => {
                let existing: BTreeSet<_> = pods.into_iter().collect();
                let deleted: Vec<_> = self.waiting.keys().filter(|pod| !existing.contains(*pod)).cloned().collect();
                deleted.iter().for_each(|pod| self.on_pod_gone(pod));
                let uids: BTreeSet<_> = existing.iter().map(|pod| pod.uid.as_str()).collect();
                self.container_records.retain_pods(|uid| uids.contains(uid));
            }
        }
    }

    fn on_work_ended(&mut self, done: Result<WorkResult, tokio::task::JoinError>) {
        match done {
            Ok(WorkResult::RecoveryEnded { reference, result }) => self.on_recovery_ended(&reference, result),
            Ok(WorkResult::DryRunEnded { reference, result }) => self.on_dry_run_ended(&reference, result),
            Ok(WorkResult::RecordRemoved { reference, pods, result }) => {
                self.on_record_removed(&reference, pods, result)
            }
            Ok(WorkResult::DisksMeasured(has_room)) => {
                self.is_measuring_disks = false;
                if has_room {
                    self.queue.retry_now();
                }
            }
            Ok(WorkResult::RegistryProbed(probe)) => match self.registries.record_probe(probe, now()) {
                true => self.reconcile_all(),
                // Another failed probe is fresh evidence for tags.
                false => self.reconcile_pods_in_outages(),
            },
            Ok(WorkResult::OptInRead { pod, result }) => self.on_opt_in(&pod, result),
            Ok(WorkResult::KubeletEventsRead { pod, result }) => self.on_kubelet_events(&pod, result),
            Ok(WorkResult::ConnectionsEnded(outcome)) => self.on_connections_ended(outcome),
            Ok(WorkResult::Nothing) => {}
            // A panic of a task is a bug: the supervisor ends the agent, and no image is lost
            // silently.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn on_policy_changed(&mut self) {
        let concurrency = self.policy.borrow_and_update().budgets.concurrent_recoveries;
        self.queue.set_concurrency(concurrency);
        // The new policy may permit an image that a limit refused.
        self.queue.retry_now();
        self.reconcile_all();
    }

    fn on_tick(&mut self) {
        let now = now();
        for registry in self.registries.down_registries(now) {
            self.probe_registry(&registry);
        }
        if now >= self.probe_unanswered_at {
            self.probe_unanswered_at = now + UNANSWERED_PROBE_INTERVAL;
            let records = self.previous_image_records.clone();
            self.probe_registries_of(records.as_deref());
        }
        self.registries.publish(now);
        self.suspect_sandboxes(now);
        self.suspect_stalls(now);
        self.end_stalled_pulls(now);
        self.read_due_kubelet_events(now);
        self.delete_due_pods(now);
        self.measure_disks();
    }

    /// Freed space sends no event, so the disks are measured while a refused recovery waits for
    /// room. One measurement at a time: a disk may hang.
    fn measure_disks(&mut self) {
        if self.is_measuring_disks || self.waiting.is_empty() || !self.recoverer.reservations.has_rejected() {
            return;
        }
        self.is_measuring_disks = true;
        let recoverer = Arc::clone(&self.recoverer);
        self.work.spawn(async move { WorkResult::DisksMeasured(recoverer.take_freed_space().await) });
    }
}

/// The clock of [`sleep_until`], which tests pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
