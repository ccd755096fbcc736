//! From the pods of this node to recoveries, and back to the pods: who needs which image, who runs now, who is told what.
//!
//! One task owns all of this state. What takes time (recovering, asking, nudging, writing Events) runs beside it and reports back. What a
//! pod needs is found out in `pods`, what is asked about it in `questions`, and what follows a recovery in `aftermath`.

mod completion;
mod probes;
mod reconcile;
mod stalled_pulls;
mod waiting_pod;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::reconcile::OptInSources;
use self::stalled_pulls::{EndedConnections, StallWatch};
use self::waiting_pod::WaitingPod;
use crate::agent::membership::announcer::RecordTargets;
use crate::agent::pods::notifications::NotificationQueue;
use crate::agent::pods::pod_notifier::PodNotifier;
use crate::agent::pods::registry_health::{RegistryHealth, RegistryProbe};
use crate::agent::recovery::progress::{Progress, RecoveryTracker};
use crate::agent::recovery::recover::Recoverer;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::recovered_image::{RecoveredImage, ResolvedImage};
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::decide::container_records::ContainerRecords;
use crate::decide::opt_in::InvalidAnnotation;
use crate::decide::policy::{Policy, RecoveryOptions};
use crate::decide::recovery_queue::RecoveryQueue;
use crate::metrics::Metrics;
use crate::model::PodRef;
use crate::oci::{Digest, Reference};
use crate::ports::{Cluster, ClusterError, KubeletEvent, PodEvent, PullConnections};

/// How often what only time changes is looked at: registries that were down, what the kubelet may have said meanwhile.
const TICK: Duration = Duration::from_secs(2);

/// Questions to the API server at a time: a node full of pods is a hundred questions, most of which one answer serves.
const MAX_API_REQUESTS: usize = 4;

/// Registries asked at a time because images of this node name them. A cluster uses a handful.
const MAX_PROBED_REGISTRIES: usize = 16;

/// Interval of asking registries of this node's images that have never answered. A registry that
/// only mirrors serve never answers: with three of these a node makes 18 requests in an hour.
const UNANSWERED_PROBE_INTERVAL: Duration = Duration::from_secs(600);

/// Parts of the agent that the controller uses.
pub struct PodControllerParts {
    /// Brings images.
    pub recoverer: Arc<Recoverer>,
    /// Where recoveries can be watched.
    pub tracker: RecoveryTracker,
    /// Pods, namespaces, Events.
    pub cluster: Arc<dyn Cluster>,
    /// Registries as this node knows them.
    pub registries: RegistryHealth,
    /// containerd's TCP connections; `None` with another store.
    pub connections: Option<Arc<dyn PullConnections>>,
    /// Messages to the outside.
    pub notifications: NotificationQueue,
    /// The image records that are here, once that is known.
    pub image_records: watch::Receiver<RecordTargets>,
    /// What is in force now.
    pub policy: watch::Receiver<Arc<Policy>>,
    /// What is fixed for the life of the agent.
    pub options: RecoveryOptions,
    /// Counts.
    pub metrics: Metrics,
}

/// Watches over the pods of this node.
pub struct PodController {
    recoverer: Arc<Recoverer>,
    tracker: RecoveryTracker,
    cluster: Arc<dyn Cluster>,
    registries: RegistryHealth,
    connections: Option<Arc<dyn PullConnections>>,
    stall_watch: StallWatch,
    notifications: NotificationQueue,
    image_records: watch::Receiver<RecordTargets>,
    /// The records that were here when they were looked at last.
    previous_image_records: RecordTargets,
    /// When the registries that have never answered are asked again.
    probe_unanswered_at: Instant,
    pod_notifier: Arc<PodNotifier>,
    policy: watch::Receiver<Arc<Policy>>,
    options: RecoveryOptions,
    metrics: Metrics,
    queue: RecoveryQueue,
    ledger: ContainerRecords,
    /// Pods as last seen, while one of their containers waits.
    waiting: BTreeMap<PodRef, WaitingPod>,
    /// Pods whose namespace or owners could not be read.
    undecided: BTreeSet<PodRef>,
    /// When they are looked at again. A moment, not a wait: other events come more often than that.
    retry_undecided_at: Option<Instant>,
    running: HashMap<Reference, RunningRecovery>,
    /// Images that are wanted and were not tried yet, since the event that said so.
    requested_since: HashMap<Reference, Instant>,
    /// What nobody held when an image was tried last: it is no use trying again before somebody does.
    unprovided_blobs: HashMap<Reference, Vec<Digest>>,
    /// Annotations that were complained about already.
    odd_annotations: HashSet<InvalidAnnotation>,
    /// The disks are being looked at.
    is_measuring_disks: bool,
    /// Bounds the questions to the API server that are under way.
    api_permits: Arc<Semaphore>,
    /// Cancelled when the agent stops: messages are then not tried again.
    stopping: CancellationToken,
    /// Recoveries, questions and messages under way: as many recoveries as the queue lets run, and a few of the others for each waiting pod.
    work: JoinSet<WorkResult>,
}

struct RunningRecovery {
    stop: CancellationToken,
    began: Instant,
    /// The event that made it wanted, where this is the first try.
    requested: Option<Instant>,
    progress: Arc<Progress>,
    /// Pods that waited for the image and went on before this task heard that it is here. They are told all the same.
    started_pods: BTreeSet<PodRef>,
}

/// Something that ran beside the task and has ended.
enum WorkResult {
    RecoveryEnded {
        reference: Reference,
        result: Result<RecoveredImage, RecoverError>,
    },
    /// A dry run.
    DryRunEnded {
        reference: Reference,
        result: Result<ResolvedImage, RecoverError>,
    },
    /// The last resort was taken, or there was nothing to take.
    RecordRemoved {
        reference: Reference,
        pods: Vec<PodRef>,
        result: Result<bool, RecoverError>,
    },
    /// The disks were looked at, because a recovery was refused for want of room. Says whether one
    /// has room now.
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
    /// Silent connections of containerd were looked for.
    ConnectionsEnded(EndedConnections),
    Nothing,
}

impl PodController {
    /// Puts the parts together; nothing runs yet.
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
            PodNotifier::new(Arc::clone(&cluster), recoverer.resolver.inventory.clone(), metrics.clone());
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
            ledger: ContainerRecords::default(),
            waiting: BTreeMap::new(),
            undecided: BTreeSet::new(),
            retry_undecided_at: None,
            running: HashMap::new(),
            requested_since: HashMap::new(),
            unprovided_blobs: HashMap::new(),
            odd_annotations: HashSet::new(),
            is_measuring_disks: false,
            api_permits: Arc::new(Semaphore::new(MAX_API_REQUESTS)),
            stopping: CancellationToken::new(),
            work: JoinSet::new(),
        }
    }

    /// What brings the images, for whoever else asks for one.
    pub fn recoverer(&self) -> Arc<Recoverer> {
        Arc::clone(&self.recoverer)
    }

    /// The registries that may be asked for layers in the background.
    pub fn healthy_registries(&self) -> watch::Receiver<Arc<BTreeSet<String>>> {
        self.registries.healthy()
    }

    /// Runs until stopped. What is being recovered then is abandoned cleanly.
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
        // Recoveries end at once now. Each may hold a Lease, and its release ends within seconds.
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
                let exist: BTreeSet<_> = pods.into_iter().collect();
                let gone: Vec<_> = self.waiting.keys().filter(|pod| !exist.contains(*pod)).cloned().collect();
                gone.iter().for_each(|pod| self.on_pod_gone(pod));
                let uids: BTreeSet<_> = exist.iter().map(|pod| pod.uid.as_str()).collect();
                self.ledger.retain_pods(|uid| uids.contains(uid));
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
            Ok(WorkResult::RegistryProbed(answer)) => match self.registries.record_probe(answer, now()) {
                true => self.reconcile_all(),
                // An outage that goes on is fresh evidence for tags.
                false => self.reconcile_pods_in_outages(),
            },
            Ok(WorkResult::OptInRead { pod, result }) => self.on_opt_in(&pod, result),
            Ok(WorkResult::KubeletEventsRead { pod, result }) => self.on_kubelet_events(&pod, result),
            Ok(WorkResult::ConnectionsEnded(outcome)) => self.on_connections_ended(outcome),
            Ok(WorkResult::Nothing) => {}
            // A bug of ours: let the supervisor see it rather than lose an image silently.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn on_policy_changed(&mut self) {
        let concurrency = self.policy.borrow_and_update().budgets.concurrent_recoveries;
        self.queue.set_concurrency(concurrency);
        // What a limit forbade may be allowed now.
        self.queue.retry_now();
        self.reconcile_all();
    }

    /// A record that is new, or that has another target than before, without a recovery: containerd pulled the image, so
    /// containerd reaches its registry.
    fn on_image_records(&mut self) {
        let records = self.image_records.borrow_and_update().clone();
        if let (Some(before), Some(here)) = (&self.previous_image_records, &records) {
            for (name, target) in here.iter().filter(|(name, target)| before.get(*name) != Some(*target)) {
                let Ok(name) = name.parse::<Reference>() else { continue };
                if !self.tracker.has_recorded(&name, *target) {
                    self.registries.record_pull_success(&name.repository().registry, now());
                }
            }
        }
        self.probe_registries_of(records.as_deref());
        self.previous_image_records = records;
    }

    /// Asks each registry of this node's images until it has answered once: only then does a later silence say that it is down.
    fn probe_registries_of(&mut self, records: Option<&BTreeMap<String, Digest>>) {
        let references = records.into_iter().flat_map(BTreeMap::keys).filter_map(|name| name.parse::<Reference>().ok());
        let registries: BTreeSet<_> = references.map(|reference| reference.repository().registry.clone()).collect();
        let unanswered = registries.into_iter().filter(|registry| !self.registries.has_answered(registry));
        for registry in unanswered.take(MAX_PROBED_REGISTRIES).collect::<Vec<_>>() {
            self.probe_registry(&registry);
        }
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

    /// Free space sends no event, so it is asked for while a recovery waits for it. One question at
    /// a time: a disk may hang.
    fn measure_disks(&mut self) {
        if self.is_measuring_disks || self.waiting.is_empty() || !self.recoverer.reservations.has_refused() {
            return;
        }
        self.is_measuring_disks = true;
        let recoverer = Arc::clone(&self.recoverer);
        self.work.spawn(async move { WorkResult::DisksMeasured(recoverer.take_freed_space().await) });
    }

    /// Only what has a provider now is started: in a large cluster somebody announces something all the time.
    fn on_providers_changed(&mut self) {
        let (resolver, unprovided) = (&self.recoverer.resolver, &self.unprovided_blobs);
        let has_provider = |digest: &Digest| !resolver.inventory.blob_providers(*digest).is_empty();
        self.queue.providers_changed(|reference| {
            resolver.has_provider(reference)
                && unprovided.get(reference).is_none_or(|blobs| blobs.iter().all(has_provider))
        });
    }

    fn start_due_recoveries(&mut self) {
        while let Some(reference) = self.queue.start_next(now()) {
            let stop = CancellationToken::new();
            let progress = self.tracker.begin(&reference);
            let running = RunningRecovery {
                stop: stop.clone(),
                began: Instant::now(),
                requested: self.requested_since.remove(&reference),
                progress: Arc::clone(&progress),
                started_pods: BTreeSet::new(),
            };
            self.running.insert(reference.clone(), running);
            self.metrics.recovery_started();
            let recoverer = Arc::clone(&self.recoverer);
            let request = self.request_for(reference);
            let dry_run = self.options.dry_run;
            self.work.spawn(async move {
                if dry_run {
                    let result = recoverer.find(&request).await;
                    return WorkResult::DryRunEnded { reference: request.reference, result };
                }
                let result = recoverer.recover(&request, &progress, &stop).await;
                WorkResult::RecoveryEnded { reference: request.reference, result }
            });
        }
    }

    /// The image with the secrets of all pods that wait for it.
    fn request_for(&self, reference: Reference) -> RecoveryRequest {
        let pods = self.waiting.iter().filter(|(_, pod)| pod.needed.contains(&reference));
        let secrets: BTreeSet<_> = pods
            .flat_map(|(pod, waiting)| {
                waiting.view.pull_secrets.iter().map(|name| (pod.k8s_namespace.clone(), name.clone()))
            })
            .collect();
        let verify_layers = self.waiting.values().any(|waiting| waiting.is_content_missing(&reference));
        RecoveryRequest { reference, pull_secrets: secrets.into_iter().collect(), verify_layers, resolved_digest: None }
    }
}

/// The clock that [`sleep_until`] waits on, which tests pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
