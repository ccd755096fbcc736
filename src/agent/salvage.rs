//! From the pods of this node to recoveries, and back to the pods: who needs which image, who runs now, who is told what.
//!
//! One task owns all of this state. What takes time (recovering, asking, nudging, writing Events) runs beside it and reports back. What a
//! pod needs is found out in `pods`, what is asked about it in `questions`, and what follows a recovery in `aftermath`.

mod aftermath;
mod pods;
mod questions;
mod stalls;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::pods::Permission;
use self::stalls::{EndedConnections, StallWatch};
use self::waiting::WaitingPod;
use super::advertise::NamesHere;
use super::notices::Notices;
use super::progress::{Board, Progress};
use super::recover::{Found, RecoverError, Recovered, Recoverer};
use super::registries::{Answer, Registries};
use super::resolve::Wanted;
use super::tell::Tell;
use crate::decide::ledger::Ledger;
use crate::decide::opt_in::OddAnnotation;
use crate::decide::queue::Queue;
use crate::decide::rules::{Manner, Rules};
use crate::metrics::Metrics;
use crate::model::PodRef;
use crate::oci::{Digest, Reference};
use crate::ports::{Cluster, ClusterError, KubeletEvent, PodEvent, PullConnections};

/// How often what only time changes is looked at: registries that were down, what the kubelet may have said meanwhile.
const TICK: Duration = Duration::from_secs(2);

/// Questions to the API server at a time: a node full of pods is a hundred questions, most of which one answer serves.
const ASKING: usize = 4;

/// Registries asked at a time because images of this node name them. A cluster uses a handful.
const MAX_REGISTRIES: usize = 16;

/// Interval of asking registries of this node's images that have never answered. A registry that
/// only mirrors serve never answers: with three of these a node makes 18 requests in an hour.
const ASK_UNKNOWN: Duration = Duration::from_secs(600);

/// What salvaging needs of the rest of the agent.
pub struct Parts {
    /// Brings images.
    pub recoverer: Recoverer,
    /// Where recoveries can be watched.
    pub board: Board,
    /// Pods, namespaces, Events.
    pub cluster: Arc<dyn Cluster>,
    /// Registries as this node knows them.
    pub registries: Registries,
    /// containerd's TCP connections; `None` with another store.
    pub connections: Option<Arc<dyn PullConnections>>,
    /// Messages to the outside.
    pub notices: Notices,
    /// The image records that are here, once that is known.
    pub names_here: watch::Receiver<NamesHere>,
    /// What is in force now.
    pub rules: watch::Receiver<Arc<Rules>>,
    /// What is fixed for the life of the agent.
    pub manner: Manner,
    /// Counts.
    pub metrics: Metrics,
}

/// Watches over the pods of this node.
pub struct Salvager {
    recoverer: Arc<Recoverer>,
    board: Board,
    cluster: Arc<dyn Cluster>,
    registries: Registries,
    connections: Option<Arc<dyn PullConnections>>,
    stall_watch: StallWatch,
    notices: Notices,
    names_here: watch::Receiver<NamesHere>,
    /// The records that were here when they were looked at last.
    names_before: NamesHere,
    /// When the registries that have never answered are asked again.
    ask_unknown_at: Instant,
    tell: Arc<Tell>,
    rules: watch::Receiver<Arc<Rules>>,
    manner: Manner,
    metrics: Metrics,
    queue: Queue,
    ledger: Ledger,
    /// Pods as last seen, while one of their containers waits.
    waiting: BTreeMap<PodRef, WaitingPod>,
    /// Pods whose namespace or owners could not be read.
    undecided: BTreeSet<PodRef>,
    /// When they are looked at again. A moment, not a wait: other events come more often than that.
    decide_again_at: Option<Instant>,
    running: HashMap<Reference, Running>,
    /// Images that are wanted and were not tried yet, since the event that said so.
    wanted_since: HashMap<Reference, Instant>,
    /// What nobody held when an image was tried last: it is no use trying again before somebody does.
    lacking: HashMap<Reference, Vec<Digest>>,
    /// Annotations that were complained about already.
    odd: HashSet<OddAnnotation>,
    /// The disks are being looked at.
    measuring: bool,
    /// Bounds the questions to the API server that are under way.
    asking: Arc<Semaphore>,
    /// Cancelled when the agent stops: messages are then not tried again.
    stopping: CancellationToken,
    /// Recoveries, questions and messages under way: as many recoveries as the queue lets run, and a few of the others for each waiting pod.
    work: JoinSet<Done>,
}

struct Running {
    stop: CancellationToken,
    began: Instant,
    /// The event that made it wanted, where this is the first try.
    since: Option<Instant>,
    progress: Arc<Progress>,
    /// Pods that waited for the image and went on before this task heard that it is here. They are told all the same.
    went_on: BTreeSet<PodRef>,
}

/// Something that ran beside the task and has ended.
enum Done {
    Recovered {
        reference: Reference,
        result: Result<Recovered, RecoverError>,
    },
    /// A dry run.
    Found {
        reference: Reference,
        result: Result<Found, RecoverError>,
    },
    /// The last resort was taken, or there was nothing to take.
    GaveUp {
        reference: Reference,
        pods: Vec<PodRef>,
        result: Result<bool, RecoverError>,
    },
    /// The disks were looked at, because a recovery was refused for want of room. Says whether one
    /// has room now.
    Measured(bool),
    Answered(Answer),
    Permitted {
        pod: PodRef,
        said: Result<Permission, ClusterError>,
    },
    KubeletSaid {
        pod: PodRef,
        said: Result<Vec<KubeletEvent>, ClusterError>,
    },
    /// Silent connections of containerd were looked for.
    ConnectionsEnded(EndedConnections),
    Told,
}

impl Salvager {
    /// Puts the parts together; nothing runs yet.
    pub fn new(parts: Parts) -> Self {
        let Parts { recoverer, board, cluster, registries, connections, notices, names_here, rules, manner, metrics } =
            parts;
        let tell = Tell::new(Arc::clone(&cluster), recoverer.resolver.holders.clone(), metrics.clone());
        let concurrency = rules.borrow().budgets.concurrent_recoveries;
        Self {
            recoverer: Arc::new(recoverer),
            board,
            cluster,
            registries,
            connections,
            stall_watch: StallWatch::default(),
            notices,
            names_here,
            names_before: None,
            ask_unknown_at: now() + ASK_UNKNOWN,
            tell: Arc::new(tell),
            rules,
            manner,
            metrics,
            queue: Queue::new(concurrency),
            ledger: Ledger::default(),
            waiting: BTreeMap::new(),
            undecided: BTreeSet::new(),
            decide_again_at: None,
            running: HashMap::new(),
            wanted_since: HashMap::new(),
            lacking: HashMap::new(),
            odd: HashSet::new(),
            measuring: false,
            asking: Arc::new(Semaphore::new(ASKING)),
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
        let mut providers = self.recoverer.resolver.holders.changes();
        let mut imports = self.recoverer.imports.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due = self.queue.next_due().into_iter().chain(self.decide_again_at).min();
            tokio::select! {
                () = stop.cancelled() => break,
                event = pods.recv() => match event {
                    Some(event) => self.on_event(event),
                    // The watch ends only when the agent does.
                    None => { stop.cancelled().await; break }
                },
                Some(done) = self.work.join_next() => self.on_done(done),
                Ok(()) = providers.changed() => {
                    self.look_for_providers();
                    self.look_at_outages();
                },
                Ok(()) = self.rules.changed() => self.on_new_rules(),
                Ok(()) = self.names_here.changed() => self.on_names(),
                Ok(()) = imports.changed() => self.queue.hurry(),
                _ = tick.tick() => self.on_tick(),
                () = sleep_until(due) => self.decide_again(),
            }
            self.start_what_is_due();
        }
        self.stopping.cancel();
        self.running.values().for_each(|running| running.stop.cancel());
        // Recoveries end at once now. Each may hold a Lease, and its release ends within seconds.
        while let Some(done) = self.work.join_next().await {
            if let Ok(Done::Recovered { reference, .. }) = done {
                self.spawn_retire(reference);
            }
        }
    }

    fn on_event(&mut self, event: PodEvent) {
        match event {
            PodEvent::Seen(pod) => self.on_pod(*pod),
            PodEvent::Gone(pod) => self.on_gone(&pod),
            PodEvent::Synced(pods) => {
                let exist: BTreeSet<_> = pods.into_iter().collect();
                let gone: Vec<_> = self.waiting.keys().filter(|pod| !exist.contains(*pod)).cloned().collect();
                gone.iter().for_each(|pod| self.on_gone(pod));
                let uids: BTreeSet<_> = exist.iter().map(|pod| pod.uid.as_str()).collect();
                self.ledger.retain(|uid| uids.contains(uid));
            }
        }
    }

    fn on_done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(Done::Recovered { reference, result }) => self.on_recovery_ended(&reference, result),
            Ok(Done::Found { reference, result }) => self.on_found(&reference, result),
            Ok(Done::GaveUp { reference, pods, result }) => self.on_given_up(&reference, pods, result),
            Ok(Done::Measured(has_room)) => {
                self.measuring = false;
                if has_room {
                    self.queue.hurry();
                }
            }
            Ok(Done::Answered(answer)) => match self.registries.answered(answer, now()) {
                true => self.look_at_all(),
                // An outage that goes on is fresh evidence for tags.
                false => self.look_at_outages(),
            },
            Ok(Done::Permitted { pod, said }) => self.on_permission(&pod, said),
            Ok(Done::KubeletSaid { pod, said }) => self.on_kubelet_said(&pod, said),
            Ok(Done::ConnectionsEnded(outcome)) => self.on_connections_ended(outcome),
            Ok(Done::Told) => {}
            // A bug of ours: let the supervisor see it rather than lose an image silently.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn on_new_rules(&mut self) {
        let concurrency = self.rules.borrow_and_update().budgets.concurrent_recoveries;
        self.queue.set_concurrency(concurrency);
        // What a limit forbade may be allowed now.
        self.queue.hurry();
        self.look_at_all();
    }

    /// A record that is new, or that has another target than before, without a recovery: containerd pulled the image, so
    /// containerd reaches its registry.
    fn on_names(&mut self) {
        let here = self.names_here.borrow_and_update().clone();
        if let (Some(before), Some(here)) = (&self.names_before, &here) {
            for (name, target) in here.iter().filter(|(name, target)| before.get(*name) != Some(*target)) {
                let Ok(name) = name.parse::<Reference>() else { continue };
                if !self.board.wrote(&name, *target) {
                    self.registries.pull_succeeded(&name.repository().registry, now());
                }
            }
        }
        self.ask_registries_of(here.as_deref());
        self.names_before = here;
    }

    /// Asks each registry of this node's images until it has answered once: only then does a later silence say that it is down.
    fn ask_registries_of(&mut self, here: Option<&BTreeMap<String, Digest>>) {
        let references = here.into_iter().flat_map(BTreeMap::keys).filter_map(|name| name.parse::<Reference>().ok());
        let registries: BTreeSet<_> = references.map(|reference| reference.repository().registry.clone()).collect();
        let unknown = registries.into_iter().filter(|registry| !self.registries.has_answered(registry));
        for registry in unknown.take(MAX_REGISTRIES).collect::<Vec<_>>() {
            self.ask_registry(&registry);
        }
    }

    fn on_tick(&mut self) {
        let now = now();
        for registry in self.registries.down(now) {
            self.ask_registry(&registry);
        }
        if now >= self.ask_unknown_at {
            self.ask_unknown_at = now + ASK_UNKNOWN;
            let here = self.names_before.clone();
            self.ask_registries_of(here.as_deref());
        }
        self.registries.publish(now);
        self.suspect_sandboxes(now);
        self.suspect_stalls(now);
        self.end_stalled_pulls(now);
        self.ask_kubelet_where_due(now);
        self.delete_where_due(now);
        self.look_for_room();
    }

    /// Free space sends no event, so it is asked for while a recovery waits for it. One question at
    /// a time: a disk may hang.
    fn look_for_room(&mut self) {
        if self.measuring || self.waiting.is_empty() || !self.recoverer.room.has_refused() {
            return;
        }
        self.measuring = true;
        let recoverer = Arc::clone(&self.recoverer);
        self.work.spawn(async move { Done::Measured(recoverer.has_room_again().await) });
    }

    /// Only what has a provider now is started: in a large cluster somebody announces something all the time.
    fn look_for_providers(&mut self) {
        let (resolver, lacking) = (&self.recoverer.resolver, &self.lacking);
        let is_held = |digest: &Digest| !resolver.holders.of_blob(*digest).is_empty();
        self.queue.providers_changed(|reference| {
            resolver.has_provider(reference) && lacking.get(reference).is_none_or(|blobs| blobs.iter().all(is_held))
        });
    }

    fn start_what_is_due(&mut self) {
        while let Some(reference) = self.queue.start_next(now()) {
            let stop = CancellationToken::new();
            let progress = self.board.begin(&reference);
            let running = Running {
                stop: stop.clone(),
                began: Instant::now(),
                since: self.wanted_since.remove(&reference),
                progress: Arc::clone(&progress),
                went_on: BTreeSet::new(),
            };
            self.running.insert(reference.clone(), running);
            self.metrics.recovery_started();
            let recoverer = Arc::clone(&self.recoverer);
            let wanted = self.wanted(reference);
            let dry_run = self.manner.dry_run;
            self.work.spawn(async move {
                if dry_run {
                    let result = recoverer.find(&wanted).await;
                    return Done::Found { reference: wanted.reference, result };
                }
                let result = recoverer.recover(&wanted, &progress, &stop).await;
                Done::Recovered { reference: wanted.reference, result }
            });
        }
    }

    /// The image with the secrets of all pods that wait for it.
    fn wanted(&self, reference: Reference) -> Wanted {
        let pods = self.waiting.iter().filter(|(_, pod)| pod.needed.contains(&reference));
        let secrets: BTreeSet<_> = pods
            .flat_map(|(pod, waiting)| {
                waiting.view.pull_secrets.iter().map(|name| (pod.k8s_namespace.clone(), name.clone()))
            })
            .collect();
        let in_doubt = self.waiting.values().any(|waiting| waiting.finds_content_missing(&reference));
        Wanted { reference, pull_secrets: secrets.into_iter().collect(), in_doubt, root: None }
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
