//! Which recoveries run now: one per image on this node, a few at a time, the most important first, failed ones again after a while.
//!
//! Whatever pods and providers do, one image is not recovered without end: each way to a start has a wait that grows, and an image
//! that nobody waits for any more is remembered with its waits for a while.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::PodRef;
use crate::oci::Reference;

/// The recoveries of this node. Bounded by its pods: an image is here only as long as a pod waits for it, and for a bounded number
/// of others their history is.
#[derive(Debug)]
pub struct RecoveryQueue {
    concurrency: usize,
    jobs: BTreeMap<Reference, RecoveryJob>,
    /// Images that were recovered, or tried, and that nobody waits for now.
    histories: BTreeMap<Reference, JobHistory>,
    /// Orders jobs by when they were first wanted.
    counter: u64,
}

#[derive(Debug)]
struct RecoveryJob {
    /// Who waits, and how important it is.
    pods: BTreeMap<PodRef, i64>,
    order: u64,
    history: JobHistory,
    state: JobState,
}

/// What the waits of an image grow with.
#[derive(Debug, Clone, Copy, Default)]
struct JobHistory {
    failures: u32,
    /// Times that the image was here and a pod still waited afterwards.
    times_settled: u32,
    /// Starts that no wait of the image's own came before: a pod that was new, a provider that appeared.
    immediate_starts: u32,
    /// When the next such start may be.
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
    /// The image is here and the pods were nudged. A pod that still waits at the end of this makes us look again.
    Settling {
        until: Instant,
    },
}

/// What became of a pod's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinOutcome {
    /// It is the first for this image.
    First,
    /// Others wait for it already, and it waits with them.
    JoinedOthers,
    /// This very pod waits already.
    AlreadyWaiting,
    /// The image has just come; the pod only has to be nudged.
    Recovered,
}

/// How a recovery ended, for the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoveryEnd {
    /// The image is here.
    Done,
    /// Nobody holds it; a provider that appears starts it again at once.
    NoProvider,
    /// It failed and is tried again.
    Failed,
    /// It cannot succeed while settings and the image are what they are. A change of settings starts it again.
    Final,
    /// It was stopped because nobody waited for it. If somebody does again, it starts anew.
    Abandoned,
}

/// First wait after a failure, doubled each time up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_secs(1);
/// As the kubelet's own longest pull back-off, so that we are never the slower one.
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// How long a nudged pod may take to start before its image is looked at again. A nudged kubelet needs under a second, an unpacking
/// containerd up to a minute for a large image; without this wait a pod that stays stuck would make us loop.
const SETTLING_TIME: Duration = Duration::from_secs(60);
/// Starts without a wait that an image has at once: pods are replaced and providers come in twos and threes, and nobody is to wait for
/// that. From then on the waits of failures come between them.
const FREE_STARTS: u32 = 4;
/// How long after its last start an image's history counts. Much longer than the longest wait, or a loop would outlive its own brake.
const HISTORY_LIFE: Duration = Duration::from_secs(3600);
/// Histories kept of images that nobody waits for: ten for each of the 110 pods that a node runs by default. The oldest goes first.
const MAX_HISTORIES: usize = 1024;

impl RecoveryQueue {
    /// An empty queue that runs so many recoveries at a time.
    pub fn new(concurrency: usize) -> Self {
        Self { concurrency, jobs: BTreeMap::new(), histories: BTreeMap::new(), counter: 0 }
    }

    /// So many at a time from now on. What runs beyond that ends by itself.
    pub fn set_concurrency(&mut self, concurrency: usize) {
        self.concurrency = concurrency;
    }

    /// A pod needs an image. Of the priorities of all pods that do, the highest counts.
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

    /// Whether the image came of late and its pods are expected to start.
    pub fn is_settling(&self, reference: &Reference) -> bool {
        self.jobs.get(reference).is_some_and(|job| matches!(job.state, JobState::Settling { .. }))
    }

    /// The next recovery to start, if one may start now; it counts as running from here on. The highest priority goes first, then the
    /// oldest; what runs is never stopped for another. A low one waits as long as higher ones are due: each of them ends or waits
    /// longer after each failure, so that is forever only where new ones never cease to come.
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

    /// When [`RecoveryQueue::start_next`] is worth calling again although nothing happened. While as many run as may, that is only
    /// when one of them ends: a moment in the past would make the caller spin until then.
    pub fn next_due(&self) -> Option<Instant> {
        if self.is_full() {
            return None;
        }
        self.jobs.values().filter_map(|job| job.due().flatten()).min()
    }

    /// A recovery ended; answers the pods that waited for it. `jitter` in 0..1 spreads the next tries of many nodes.
    pub fn finish(&mut self, reference: &Reference, end: RecoveryEnd, now: Instant, jitter: f64) -> Vec<PodRef> {
        let Some(job) = self.jobs.get_mut(reference) else { return Vec::new() };
        job.state = job.history.end(end, now, jitter);
        let pods: Vec<_> = job.pods.keys().cloned().collect();
        if pods.is_empty() {
            self.remove_job(reference);
        }
        pods
    }

    /// Somebody announced something new: what only lacked a provider, and `has_provider` now, may start at once.
    pub fn providers_changed(&mut self, has_provider: impl Fn(&Reference) -> bool) {
        for (reference, job) in &mut self.jobs {
            if matches!(job.state, JobState::BackingOff { for_a_provider: true, .. }) && has_provider(reference) {
                job.state = JobState::Ready;
            }
        }
    }

    /// What made recoveries fail may have changed: what backs off may start at once, as far as its history allows.
    pub fn retry_now(&mut self) {
        for job in self.jobs.values_mut().filter(|job| matches!(job.state, JobState::BackingOff { .. })) {
            job.state = JobState::Ready;
        }
    }

    /// The pod needs these images and no others any more; none when it is gone. Answers the images that nobody here waits for now; a
    /// running recovery of one is to be stopped, and keeps its place until [`RecoveryQueue::finish`]: whoever wants the image meanwhile must
    /// not start a second one beside it.
    pub fn retain_wanted(&mut self, pod: &PodRef, needed: &BTreeSet<Reference>) -> Vec<Reference> {
        for (_, job) in self.jobs.iter_mut().filter(|(reference, _)| !needed.contains(*reference)) {
            job.pods.remove(pod);
        }
        let abandoned = self.jobs.iter().filter(|(_, job)| job.pods.is_empty());
        let left: Vec<_> = abandoned.map(|(reference, _)| reference.clone()).collect();
        for reference in &left {
            if self.jobs.get(reference).is_some_and(|job| job.state != JobState::Running) {
                self.remove_job(reference);
            }
        }
        left
    }

    /// Nobody waits for the image; only its history is kept.
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

    /// Nothing when it runs; else when it may start, if that is not at once.
    fn due(&self) -> Option<Option<Instant>> {
        match self.state {
            JobState::Running => None,
            JobState::Ready => Some(self.history.not_before),
            JobState::BackingOff { until, .. } | JobState::Settling { until } => Some(Some(until)),
        }
    }
}

impl JobHistory {
    fn start(&mut self, now: Instant, hurried: bool) {
        if self.started.is_some_and(|at| now.saturating_duration_since(at) >= HISTORY_LIFE) {
            *self = Self::default();
        }
        self.started = Some(now);
        if hurried {
            self.immediate_starts = self.immediate_starts.saturating_add(1);
            self.not_before = self.immediate_starts.checked_sub(FREE_STARTS).map(|doublings| now + backoff(doublings));
        }
    }

    /// What the recovery's end makes of its job.
    fn end(&mut self, end: RecoveryEnd, now: Instant, jitter: f64) -> JobState {
        match end {
            RecoveryEnd::Done => {
                self.failures = 0;
                // One minute, then two, up to sixteen: what ails such a pod is not its image.
                let until = now + SETTLING_TIME * (1 << self.times_settled.min(4));
                self.times_settled = self.times_settled.saturating_add(1);
                JobState::Settling { until }
            }
            RecoveryEnd::Abandoned => JobState::Ready,
            // A tag may name something else by then.
            RecoveryEnd::Final => JobState::BackingOff { until: now + HISTORY_LIFE, for_a_provider: false },
            RecoveryEnd::NoProvider | RecoveryEnd::Failed => {
                let wait = backoff(self.failures).mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
                self.failures = self.failures.saturating_add(1);
                JobState::BackingOff { until: now + wait, for_a_provider: end == RecoveryEnd::NoProvider }
            }
        }
    }
}

fn backoff(doublings: u32) -> Duration {
    MIN_BACKOFF.saturating_mul(1 << doublings.min(16)).min(MAX_BACKOFF)
}

#[cfg(test)]
mod tests;
