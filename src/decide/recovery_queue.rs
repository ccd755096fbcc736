//! The queue of recoveries: one per image on this node, a few at a time, the highest priority
//! first, failed ones again after a back-off.
//!
//! Neither pods nor providers can make the queue recover an image without end. Each kind of start
//! has a growing wait, and an image without waiting pods keeps its history for a while.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::PodRef;
use crate::oci::Reference;
use crate::util::backoff::Backoff;

/// The recoveries of this node. The pods of the node bound the jobs, because an image has a job
/// only while a pod waits; the histories of other images have a bound of their own.
#[derive(Debug)]
pub struct RecoveryQueue {
    concurrency: usize,
    jobs: BTreeMap<Reference, RecoveryJob>,
    /// Images that were recovered or tried, and that no pod waits for now.
    histories: BTreeMap<Reference, JobHistory>,
    /// Orders jobs by their creation.
    counter: u64,
}

#[derive(Debug)]
struct RecoveryJob {
    /// Waiting pods, with their priorities.
    pods: BTreeMap<PodRef, i64>,
    order: u64,
    history: JobHistory,
    state: JobState,
}

/// The counts that the waits of an image grow with.
#[derive(Debug, Clone, Copy, Default)]
struct JobHistory {
    failures: u32,
    /// Times that the image was here and a pod still waited afterwards.
    times_settled: u32,
    /// Starts without a back-off before them: for a new pod, or a new provider.
    immediate_starts: u32,
    /// The earliest instant of the next immediate start.
    not_before: Option<Instant>,
    /// The last start of any kind.
    started: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum JobState {
    Ready,
    Running,
    BackingOff {
        until: Instant,
        for_a_provider: bool,
    },
    /// The image is here and the pods were nudged. A pod that still waits at the end starts another
    /// recovery.
    Settling {
        until: Instant,
    },
}

/// The result of a pod's request for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinOutcome {
    /// The pod is the first for this image.
    First,
    /// Other pods wait already, and this pod joins them.
    JoinedOthers,
    /// This pod waits already.
    AlreadyWaiting,
    /// The image has just arrived; the pod only needs a nudge.
    Recovered,
}

/// The end of a recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoveryEnd {
    /// The image is here.
    Done,
    /// No peer provides the image; a new provider starts the recovery at once.
    NoProvider,
    /// The recovery failed and is retried.
    Failed,
    /// The recovery cannot succeed with these settings and this image. A change of settings starts
    /// the recovery again.
    Final,
    /// The recovery was canceled because no pod waited. A new pod starts the recovery again.
    Abandoned,
}

/// The longest wait is the kubelet's longest pull back-off, so recoveries are never slower than the
/// kubelet.
const BACKOFF: Backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(300) };
/// Time for a nudged pod to start before the image is checked again. A nudged kubelet needs less
/// than a second, and containerd unpacks a large image for up to a minute. Without this wait, a
/// stuck pod would cause a loop. The time doubles: the problem of such a pod is not its image.
const SETTLING: Backoff = Backoff { first: Duration::from_secs(60), longest: Duration::from_secs(16 * 60) };
/// Immediate starts of an image without a wait, because pods are replaced and providers appear in
/// twos and threes. Later immediate starts have the back-offs of failures between them.
const FREE_STARTS: u32 = 4;
/// Life of an image's history after the last start. Much longer than the longest back-off, or a
/// loop would outlast its own limit.
const HISTORY_LIFE: Duration = Duration::from_secs(3600);
/// Histories of images without waiting pods: about ten for each of the 110 pods that a node runs by
/// default. The oldest is evicted first.
const MAX_HISTORIES: usize = 1024;

impl RecoveryQueue {
    /// An empty queue that runs `concurrency` recoveries at a time.
    pub fn new(concurrency: usize) -> Self {
        Self { concurrency, jobs: BTreeMap::new(), histories: BTreeMap::new(), counter: 0 }
    }

    /// Changes the concurrency. Running recoveries beyond the new value end on their own.
    pub fn set_concurrency(&mut self, concurrency: usize) {
        self.concurrency = concurrency;
    }

    /// Adds a pod that needs an image. The highest priority of all such pods counts.
    pub fn join(&mut self, reference: &Reference, pod: &PodRef, priority: i64) -> JoinOutcome {
        if let Some(job) = self.jobs.get_mut(reference) {
            return match (job.pods.insert(pod.clone(), priority), job.state) {
                (Some(_), _) => JoinOutcome::AlreadyWaiting,
                (None, JobState::Settling { .. }) => JoinOutcome::Recovered,
                (None, _) => JoinOutcome::JoinedOthers,
            };
        }
        self.counter += 1;
        let history = self.histories.remove(reference).unwrap_or_default();
        let job = RecoveryJob {
            pods: [(pod.clone(), priority)].into(),
            order: self.counter,
            history,
            state: JobState::Ready,
        };
        self.jobs.insert(reference.clone(), job);
        JoinOutcome::First
    }

    /// Whether the image arrived recently and its pods are expected to start.
    pub fn is_settling(&self, reference: &Reference) -> bool {
        self.jobs.get(reference).is_some_and(|job| matches!(job.state, JobState::Settling { .. }))
    }

    /// The next recovery to start, which counts as running from here on. The highest priority comes
    /// first, then the oldest job; a running recovery is never stopped for another. A low priority
    /// waits while higher ones are due. Each of those ends or backs off, so the wait is endless
    /// only while new ones keep arriving.
    pub fn start_next(&mut self, now: Instant) -> Option<Reference> {
        if self.is_full() {
            return None;
        }
        let due = self.jobs.iter_mut().filter(|(_, job)| job.due().is_some_and(|due| due.is_none_or(|at| at <= now)));
        let (reference, job) = due.min_by_key(|(_, job)| (Reverse(job.priority()), job.order))?;
        job.history.start(now, job.state == JobState::Ready);
        job.state = JobState::Running;
        Some(reference.clone())
    }

    fn is_full(&self) -> bool {
        self.jobs.values().filter(|job| job.state == JobState::Running).count() >= self.concurrency
    }

    /// When to call [`RecoveryQueue::start_next`] again without another event. `None` while the
    /// concurrency is exhausted: an instant in the past would make the caller spin until a recovery
    /// ends.
    pub fn next_due(&self) -> Option<Instant> {
        if self.is_full() {
            return None;
        }
        self.jobs.values().filter_map(|job| job.due().flatten()).min()
    }

    /// Records the end of a recovery and returns the waiting pods. `jitter` in 0..1 spreads the
    /// retries of many nodes.
    pub fn finish(&mut self, reference: &Reference, end: RecoveryEnd, now: Instant, jitter: f64) -> Vec<PodRef> {
        let Some(job) = self.jobs.get_mut(reference) else { return Vec::new() };
        job.state = job.history.end(end, now, jitter);
        let pods: Vec<_> = job.pods.keys().cloned().collect();
        if pods.is_empty() {
            self.remove_job(reference);
        }
        pods
    }

    /// Readies the jobs that only lacked a provider and for which `has_provider` is true now.
    pub fn providers_changed(&mut self, has_provider: impl Fn(&Reference) -> bool) {
        for (reference, job) in &mut self.jobs {
            if matches!(job.state, JobState::BackingOff { for_a_provider: true, .. }) && has_provider(reference) {
                job.state = JobState::Ready;
            }
        }
    }

    /// Readies every job that backs off, within the limits of its history: the reason of the
    /// failures may be gone.
    pub fn retry_now(&mut self) {
        for job in self.jobs.values_mut().filter(|job| matches!(job.state, JobState::BackingOff { .. })) {
            job.state = JobState::Ready;
        }
    }

    /// Removes the pod from all images except the `needed` ones. Returns the images without waiting
    /// pods; the caller cancels their running recoveries. A running recovery keeps its job until
    /// [`RecoveryQueue::finish`], so that a new pod does not start a second recovery beside it.
    pub fn retain_wanted(&mut self, pod: &PodRef, needed: &BTreeSet<Reference>) -> Vec<Reference> {
        for (_, job) in self.jobs.iter_mut().filter(|(reference, _)| !needed.contains(*reference)) {
            job.pods.remove(pod);
        }
        let abandoned = self.jobs.iter().filter(|(_, job)| job.pods.is_empty());
        let references: Vec<_> = abandoned.map(|(reference, _)| reference.clone()).collect();
        for reference in &references {
            if self.jobs.get(reference).is_some_and(|job| job.state != JobState::Running) {
                self.remove_job(reference);
            }
        }
        references
    }

    /// Keeps only the history of an image without waiting pods.
    fn remove_job(&mut self, reference: &Reference) {
        let Some(RecoveryJob { history, .. }) = self.jobs.remove(reference) else { return };
        let Some(started) = history.started else { return };
        self.histories
            .retain(|_, past| past.started.is_some_and(|at| started.saturating_duration_since(at) < HISTORY_LIFE));
        if self.histories.len() >= MAX_HISTORIES {
            let oldest =
                self.histories.iter().min_by_key(|(_, past)| past.started).map(|(reference, _)| reference.clone());
            oldest.and_then(|oldest| self.histories.remove(&oldest));
        }
        self.histories.insert(reference.clone(), history);
    }
}

impl RecoveryJob {
    fn priority(&self) -> Option<i64> {
        self.pods.values().max().copied()
    }

    /// `None` while running; otherwise the instant of the next start, or `Some(None)` for at once.
    fn due(&self) -> Option<Option<Instant>> {
        match self.state {
            JobState::Running => None,
            JobState::Ready => Some(self.history.not_before),
            JobState::BackingOff { until, .. } | JobState::Settling { until } => Some(Some(until)),
        }
    }
}

impl JobHistory {
    fn start(&mut self, now: Instant, is_immediate: bool) {
        if self.started.is_some_and(|at| now.saturating_duration_since(at) >= HISTORY_LIFE) {
            *self = Self::default();
        }
        self.started = Some(now);
        if is_immediate {
            self.immediate_starts = self.immediate_starts.saturating_add(1);
            self.not_before =
                self.immediate_starts.checked_sub(FREE_STARTS).map(|doublings| now + BACKOFF.wait(doublings));
        }
    }

    /// The state of the job after this end.
    fn end(&mut self, end: RecoveryEnd, now: Instant, jitter: f64) -> JobState {
        match end {
            RecoveryEnd::Done => {
                self.failures = 0;
                let until = now + SETTLING.wait(self.times_settled);
                self.times_settled = self.times_settled.saturating_add(1);
                JobState::Settling { until }
            }
            RecoveryEnd::Abandoned => JobState::Ready,
            // A tag may name another digest by then.
            RecoveryEnd::Final => JobState::BackingOff { until: now + HISTORY_LIFE, for_a_provider: false },
            RecoveryEnd::NoProvider | RecoveryEnd::Failed => {
                let wait = BACKOFF.jittered_wait(self.failures, jitter);
                self.failures = self.failures.saturating_add(1);
                JobState::BackingOff { until: now + wait, for_a_provider: end == RecoveryEnd::NoProvider }
            }
        }
    }
}

#[cfg(test)]
mod tests;
