//! From the pods of this node to recoveries, and back to the pods: who needs which image, who runs now, who is told what.
//!
//! One task owns all of this state. What takes time (recovering, nudging, writing Events) runs beside it and reports back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::progress::Board;
use super::recover::{RecoverError, Recovered, Recoverer};
use super::tell::Tell;
use crate::decide::ledger::Ledger;
use crate::decide::pull_failure::{Leave, Policy, Verdict, cause, decide, waits_for_image};
use crate::decide::queue::{End, Joined, Queue};
use crate::metrics::{Metrics, Outcome};
use crate::model::{ContainerView, PodRef, PodView};
use crate::oci::Reference;
use crate::ports::{Cluster, PodEvent, ReportKind};

/// How soon a pod is looked at again whose namespace could not be read.
const UNDECIDED_RETRY: Duration = Duration::from_secs(5);

/// Longest wait for a namespace's annotations; the pods behind this one wait as well. Longer than the 5 s that the adapter gives the API
/// server: only when those are over does it answer with what it knew before, or remember for the next pod that nobody answers.
const NAMESPACE_WAIT: Duration = Duration::from_secs(6);

/// Watches over the pods of this node.
pub struct Salvager {
    recoverer: Arc<Recoverer>,
    board: Board,
    cluster: Arc<dyn Cluster>,
    tell: Arc<Tell>,
    policy: Policy,
    metrics: Metrics,
    queue: Queue,
    ledger: Ledger,
    /// Pods as last seen, while one of their containers waits for an image.
    waiting: BTreeMap<PodRef, PodView>,
    /// Pods whose namespace could not be read.
    undecided: BTreeSet<PodRef>,
    /// When they are looked at again. A moment, not a wait: other events come more often than that.
    decide_again_at: Option<Instant>,
    running: HashMap<Reference, Running>,
    /// Cancelled when the agent stops: messages are then not tried again.
    stopping: CancellationToken,
    /// Recoveries and messages under way: as many recoveries as the queue lets run, and a message for each waiting pod.
    work: JoinSet<Option<Finished>>,
}

struct Running {
    stop: CancellationToken,
    began: Instant,
}

/// A recovery that ended.
struct Finished {
    reference: Reference,
    result: Result<Recovered, RecoverError>,
}

impl Salvager {
    /// Puts the parts together; nothing runs yet.
    pub fn new(
        recoverer: Recoverer,
        board: Board,
        cluster: Arc<dyn Cluster>,
        policy: Policy,
        concurrent_recoveries: usize,
        metrics: Metrics,
    ) -> Self {
        let tell = Tell::new(Arc::clone(&cluster), recoverer.holders.clone(), metrics.clone());
        Self {
            recoverer: Arc::new(recoverer),
            board,
            cluster,
            tell: Arc::new(tell),
            policy,
            metrics,
            queue: Queue::new(concurrent_recoveries),
            ledger: Ledger::default(),
            waiting: BTreeMap::new(),
            undecided: BTreeSet::new(),
            decide_again_at: None,
            running: HashMap::new(),
            stopping: CancellationToken::new(),
            work: JoinSet::new(),
        }
    }

    /// Runs until stopped. What is being recovered then is abandoned cleanly.
    pub async fn run(mut self, mut pods: mpsc::Receiver<PodEvent>, stop: CancellationToken) {
        let mut providers = self.recoverer.holders.changes();
        loop {
            let due = self.queue.next_due().into_iter().chain(self.decide_again_at).min();
            tokio::select! {
                () = stop.cancelled() => break,
                event = pods.recv() => match event {
                    // An API server that does not answer must not hold up the stop.
                    Some(event) => if stop.run_until_cancelled(self.on_event(event)).await.is_none() { break },
                    // The watch ends only when the agent does.
                    None => { stop.cancelled().await; break }
                },
                Some(finished) = self.work.join_next() => self.on_finished(finished),
                Ok(()) = providers.changed() => self.look_for_providers(),
                () = sleep_until(due) => if stop.run_until_cancelled(self.decide_again()).await.is_none() { break },
            }
            self.start_what_is_due();
        }
        self.stopping.cancel();
        self.running.values().for_each(|running| running.stop.cancel());
        while self.work.join_next().await.is_some() {}
    }

    async fn on_event(&mut self, event: PodEvent) {
        match event {
            PodEvent::Seen(pod) => self.on_pod(pod).await,
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

    async fn on_pod(&mut self, pod: PodView) {
        for container in pod.containers.iter().filter(|container| container.waiting.is_none()) {
            self.ledger.settle(&pod.pod, &container.name);
        }
        if pod.ending || !pod.containers.iter().any(waits_for_image) {
            self.stop_waiting(&pod.pod);
            return;
        }
        self.waiting.insert(pod.pod.clone(), pod.clone());
        let namespace = &pod.pod.k8s_namespace;
        let asked = tokio::time::timeout(NAMESPACE_WAIT, self.cluster.namespace_annotations(namespace)).await;
        let annotations = match asked {
            Ok(Ok(annotations)) => annotations,
            Ok(Err(error)) => return self.put_off(&pod.pod, &error.to_string()),
            Err(_) => return self.put_off(&pod.pod, "no answer"),
        };
        self.undecided.remove(&pod.pod);
        let failing = pod.containers.iter().filter(|container| waits_for_image(container));
        let needed = failing.filter_map(|container| self.on_failure(&pod, container, &annotations)).collect();
        self.needs_only(&pod.pod, &needed);
    }

    /// Only what has a provider now is started: in a large cluster somebody announces something all the time.
    fn look_for_providers(&mut self) {
        let recoverer = &self.recoverer;
        self.queue.providers_changed(|reference| recoverer.has_provider(reference));
    }

    fn put_off(&mut self, pod: &PodRef, error: &str) {
        self.decide_again_at.get_or_insert(now() + UNDECIDED_RETRY);
        if self.undecided.insert(pod.clone()) {
            tracing::warn!(%pod, error, "cannot read the pod's namespace, so whether it opted in; trying again");
        }
    }

    async fn decide_again(&mut self) {
        if self.decide_again_at.is_none_or(|at| at > now()) {
            return;
        }
        self.decide_again_at = None;
        for pod in std::mem::take(&mut self.undecided) {
            if let Some(view) = self.waiting.get(&pod).cloned() {
                self.on_pod(view).await;
            }
        }
    }

    /// One container that waits for its image; answers the image if it is to be recovered.
    fn on_failure(
        &mut self,
        pod: &PodView,
        container: &ContainerView,
        namespace_annotations: &BTreeMap<String, String>,
    ) -> Option<Reference> {
        let (pod_ref, name, image) = (&pod.pod, container.name.as_str(), container.image.as_str());
        let said = container.waiting.as_ref().and_then(cause);
        let known = self.ledger.learn(pod_ref, name, image, said);
        match decide(pod, container, known, namespace_annotations, &self.policy) {
            Verdict::Recover(reference, cause) => {
                if self.ledger.is_news(pod_ref, name, image, "recover") {
                    self.metrics.pod_failure_seen("recover");
                    tracing::info!(pod = %pod_ref, container = name, %reference, ?cause, "a pod cannot get its image");
                }
                if self.queue.want(&reference, pod_ref) == Joined::Here {
                    self.spawn_nudge(pod_ref.clone());
                }
                return Some(reference);
            }
            Verdict::Tell(reason) => {
                if self.ledger.is_news(pod_ref, name, image, reason.label()) {
                    self.metrics.pod_failure_seen(reason.label());
                    let note = reason.note(image);
                    tracing::info!(pod = %pod_ref, container = name, note, "not actionable");
                    self.spawn_report(pod_ref.clone(), ReportKind::NotActionable, note);
                }
            }
            Verdict::Leave(reason) => {
                // The cause comes with the next message; until then the failure is not decided on, so not counted.
                if reason != Leave::CauseUnknown && self.ledger.is_news(pod_ref, name, image, reason.label()) {
                    self.metrics.pod_failure_seen(reason.label());
                    tracing::debug!(pod = %pod_ref, container = name, ?reason, "left alone");
                }
            }
        }
        None
    }

    fn on_gone(&mut self, pod: &PodRef) {
        self.ledger.forget(pod);
        self.stop_waiting(pod);
    }

    fn stop_waiting(&mut self, pod: &PodRef) {
        self.waiting.remove(pod);
        self.undecided.remove(pod);
        self.needs_only(pod, &BTreeSet::new());
    }

    fn needs_only(&mut self, pod: &PodRef, needed: &BTreeSet<Reference>) {
        for reference in self.queue.needs_only(pod, needed) {
            if let Some(running) = self.running.get(&reference) {
                running.stop.cancel();
            }
        }
    }

    fn start_what_is_due(&mut self) {
        while let Some(reference) = self.queue.start_next(now()) {
            let stop = CancellationToken::new();
            self.running.insert(reference.clone(), Running { stop: stop.clone(), began: Instant::now() });
            self.metrics.recovery_started();
            let recoverer = Arc::clone(&self.recoverer);
            let progress = self.board.begin(&reference);
            self.work.spawn(async move {
                let result = recoverer.recover(&reference, &progress, &stop).await;
                Some(Finished { reference, result })
            });
        }
    }

    fn on_finished(&mut self, joined: Result<Option<Finished>, tokio::task::JoinError>) {
        let Finished { reference, result } = match joined {
            Ok(Some(finished)) => finished,
            Ok(None) => return,
            // A bug of ours: let the supervisor see it rather than lose an image silently.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let took = self.running.remove(&reference).map(|running| running.began.elapsed()).unwrap_or_default();
        let (end, outcome) = match &result {
            Ok(recovered) if recovered.fetched == 0 => (End::Done, Outcome::AlreadyHere),
            Ok(_) => (End::Done, Outcome::Recovered),
            Err(error) => (error.end(), error.outcome()),
        };
        self.metrics.recovery_ended(outcome, took);
        self.spawn_retire(reference.clone());
        self.board.end(&reference, result.as_ref().map(Recovered::clone).map_err(RecoverError::to_string));
        let pods = self.queue.ended(&reference, end, now(), rand::random());
        // One that came while the recovery ended would go unnoticed: its change may have been seen before.
        self.look_for_providers();
        match result {
            Ok(recovered) => self.on_recovered(&reference, &recovered, pods),
            Err(RecoverError::Abandoned) => tracing::info!(%reference, "nobody waits for the image any more"),
            Err(error) => self.on_not_recovered(&reference, &error, pods),
        }
    }

    fn on_recovered(&mut self, reference: &Reference, recovered: &Recovered, pods: Vec<PodRef>) {
        let note = self.tell.recovered_note(reference, recovered);
        tracing::info!(
            %reference, digest = %recovered.root, bytes = recovered.bytes, fetched = recovered.fetched,
            there = recovered.there, took = ?recovered.took, pods = pods.len(), "recovered"
        );
        for pod in pods {
            self.spawn_nudge(pod.clone());
            if recovered.fetched > 0 {
                self.spawn_report(pod, ReportKind::Salvaged, note.clone());
            }
        }
    }

    fn on_not_recovered(&mut self, reference: &Reference, error: &RecoverError, pods: Vec<PodRef>) {
        tracing::warn!(%reference, %error, "not recovered");
        let kind = error.report_kind();
        for pod in pods {
            // Told once per pod and image, unless it is a failure that we try again after a longer and longer wait.
            let image = reference.to_string();
            if kind == ReportKind::Failed || self.ledger.is_news(&pod, "", &image, kind.reason()) {
                self.spawn_report(pod, kind, self.tell.failed_note(error));
            }
        }
    }

    fn spawn_retire(&mut self, reference: Reference) {
        let recoverer = Arc::clone(&self.recoverer);
        self.work.spawn(async move {
            recoverer.lead.retire(&reference).await;
            None
        });
    }

    fn spawn_nudge(&mut self, pod: PodRef) {
        let (tell, stopping) = (Arc::clone(&self.tell), self.stopping.clone());
        self.work.spawn(async move {
            stopping.run_until_cancelled(tell.nudge(&pod)).await;
            None
        });
    }

    fn spawn_report(&mut self, pod: PodRef, kind: ReportKind, note: String) {
        let (tell, stopping) = (Arc::clone(&self.tell), self.stopping.clone());
        self.work.spawn(async move {
            stopping.run_until_cancelled(tell.report(&pod, kind, note)).await;
            None
        });
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
