//! The pod controller: from the pods of this node to recoveries, and back to the pods as nudges and
//! Events.
//!
//! One task owns the state, [`Pods`], which decides. The task turns changes, results and time into
//! inputs, and executes the actions that follow. Slow work (recoveries, probes, requests to the API
//! server, nudges, Events) runs in a [`JoinSet`] beside the task and returns a result. `actions`
//! executes actions, and `recoveries` starts and ends recoveries. `node_facts` answers the
//! decisions' questions, `observations` logs and counts, and `connections` ends containerd's
//! silent connections.

mod actions;
mod connections;
mod node_facts;
mod observations;
mod recoveries;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use self::connections::EndedConnections;
use self::node_facts::NodeFacts;
use self::recoveries::RunningRecovery;
use crate::agent::membership::announcer::RecordTargets;
use crate::agent::pods::notifications::NotificationQueue;
use crate::agent::pods::pod_notifier::PodNotifier;
use crate::agent::pods::registry_health::RegistryHealth;
use crate::agent::recovery::progress::RecoveryTracker;
use crate::agent::recovery::recover::Recoverer;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::pods::{Context, Input, Pods, PodsOptions};
use crate::decide::policy::{Policy, RecoveryOptions};
use crate::metrics::Metrics;
use crate::model::{PodEvent, RecoveredImage, ResolvedImage};
use crate::oci::Reference;
use crate::ports::{Cluster, PodReader, PullConnections};
use crate::util::clock::{now, sleep_until};

/// Interval of [`Input::Tick`]: of the work that time alone starts, such as probes of registries,
/// reads of the kubelet's Events, and deletions.
const TICK: Duration = Duration::from_secs(2);

/// Concurrent reads of opt-ins and Events from the API server. A full node has a hundred pods, and
/// the adapter's cache answers most of these reads.
const MAX_API_REQUESTS: usize = 4;

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
    pods: Pods,
    recoverer: Arc<Recoverer>,
    tracker: RecoveryTracker,
    cluster: Arc<dyn PodReader>,
    registries: RegistryHealth,
    connections: Option<Arc<dyn PullConnections>>,
    /// The error of the latest search for silent connections that the log has already.
    logged_connections_error: Option<String>,
    notifications: NotificationQueue,
    image_records: watch::Receiver<RecordTargets>,
    pod_notifier: Arc<PodNotifier>,
    policy: watch::Receiver<Arc<Policy>>,
    dry_run: bool,
    metrics: Metrics,
    running: HashMap<Reference, RunningRecovery>,
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
    Input(Input),
    RecoveryEnded { reference: Reference, result: Result<RecoveredImage, RecoverError> },
    DryRunEnded { reference: Reference, result: Result<ResolvedImage, RecoverError> },
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
        let has_connections = connections.is_some();
        let pods_options = PodsOptions { recovery: options, is_probing: registries.is_probing(), has_connections };
        Self {
            pods: Pods::new(pods_options, concurrency, now()),
            recoverer,
            tracker,
            cluster,
            registries,
            connections,
            logged_connections_error: None,
            notifications,
            image_records,
            pod_notifier: Arc::new(pod_notifier),
            policy,
            dry_run: options.dry_run,
            metrics,
            running: HashMap::new(),
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
            let due = self.pods.next_due();
            let input = tokio::select! {
                () = stop.cancelled() => break,
                event = pods.recv() => match event {
                    Some(event) => Some(Input::Pod(event)),
                    // The watch ends only when the agent does.
                    None => { stop.cancelled().await; break }
                },
                Some(done) = self.work.join_next() => self.input_of(done),
                Ok(()) = providers.changed() => Some(Input::ProvidersChanged),
                Ok(()) = self.policy.changed() => Some(Input::PolicyChanged),
                Ok(()) = self.image_records.changed() => Some(Input::ImageRecordsChanged),
                Ok(()) = imports.changed() => Some(Input::ImportsChanged),
                _ = tick.tick() => Some(Input::Tick),
                () = sleep_until(due) => Some(Input::Due),
            };
            input.into_iter().for_each(|input| self.handle(input));
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

    fn handle(&mut self, input: Input) {
        let policy = Arc::clone(&self.policy.borrow());
        let image_records = self.image_records.borrow().clone();
        let facts = NodeFacts {
            recoverer: &self.recoverer,
            tracker: &self.tracker,
            running: &self.running,
            pod_notifier: &self.pod_notifier,
        };
        let context = Context {
            now: now(),
            clock: SystemTime::now(),
            jitter: rand::random(),
            policy: &policy,
            image_records,
            facts: &facts,
        };
        let actions = self.pods.handle(input, &context);
        actions.into_iter().for_each(|action| self.execute(action));
    }

    fn input_of(&mut self, done: Result<WorkResult, JoinError>) -> Option<Input> {
        match done {
            Ok(WorkResult::Input(input)) => Some(input),
            Ok(WorkResult::RecoveryEnded { reference, result }) => Some(self.end_recovery(reference, result)),
            Ok(WorkResult::DryRunEnded { reference, result }) => Some(self.end_dry_run(reference, result)),
            Ok(WorkResult::ConnectionsEnded(ended)) => Some(self.record_ended_connections(ended)),
            Ok(WorkResult::Nothing) => None,
            // A panic of a task is a bug: the supervisor ends the agent, and no image is lost
            // silently.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}
