//! Which recoveries run now: one per image on this node, a few at a time, failed ones again after a while.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::PodRef;
use crate::oci::Reference;

/// The recoveries of this node. Bounded by its pods: an image is here only as long as a pod waits for it.
#[derive(Debug)]
pub struct Queue {
    concurrency: usize,
    jobs: BTreeMap<Reference, Job>,
    /// Orders jobs by when they were first wanted.
    counter: u64,
}

#[derive(Debug)]
struct Job {
    pods: BTreeSet<PodRef>,
    since: u64,
    failures: u32,
    /// Times that the image was here and a pod still waited afterwards.
    settled: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
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
pub enum Joined {
    /// It is the first for this image.
    First,
    /// Others wait for it already, and it waits with them.
    Others,
    /// This very pod waits already.
    Already,
    /// The image has just come; the pod only has to be nudged.
    Here,
}

/// How a recovery ended, for the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The image is here.
    Done,
    /// Nobody holds it; a provider that appears starts it again at once.
    NoProvider,
    /// It failed and is tried again.
    Failed,
    /// It was stopped because nobody waited for it. If somebody does again, it starts anew.
    Abandoned,
}

/// First wait after a failure, doubled each time up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_secs(1);
/// As the kubelet's own longest pull back-off, so that we are never the slower one.
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// How long a nudged pod may take to start before its image is looked at again. A nudged kubelet needs under a second, an unpacking
/// containerd up to a minute for a large image; without this wait a pod that stays stuck would make us loop.
const SETTLING: Duration = Duration::from_secs(60);

impl Queue {
    /// An empty queue that runs so many recoveries at a time.
    pub fn new(concurrency: usize) -> Self {
        Self { concurrency, jobs: BTreeMap::new(), counter: 0 }
    }

    /// A pod needs an image.
    pub fn want(&mut self, reference: &Reference, pod: &PodRef) -> Joined {
        if let Some(job) = self.jobs.get_mut(reference) {
            return match (job.pods.insert(pod.clone()), job.state) {
                (false, _) => Joined::Already,
                (true, State::Settling { .. }) => Joined::Here,
                (true, _) => Joined::Others,
            };
        }
        self.counter += 1;
        let job = Job { pods: [pod.clone()].into(), since: self.counter, failures: 0, settled: 0, state: State::Ready };
        self.jobs.insert(reference.clone(), job);
        Joined::First
    }

    /// The next recovery to start, if one may start now; it counts as running from here on.
    pub fn start_next(&mut self, now: Instant) -> Option<Reference> {
        if self.is_full() {
            return None;
        }
        let due = |job: &Job| match job.state {
            State::Ready => true,
            State::Running => false,
            State::BackingOff { until, .. } | State::Settling { until } => until <= now,
        };
        let (reference, job) = self.jobs.iter_mut().filter(|(_, job)| due(job)).min_by_key(|(_, job)| job.since)?;
        job.state = State::Running;
        Some(reference.clone())
    }

    fn is_full(&self) -> bool {
        self.jobs.values().filter(|job| job.state == State::Running).count() >= self.concurrency
    }

    /// When [`Queue::start_next`] is worth calling again although nothing happened. While as many run as may, that is only
    /// when one of them ends: a moment in the past would make the caller spin until then.
    pub fn next_due(&self) -> Option<Instant> {
        if self.is_full() {
            return None;
        }
        self.jobs
            .values()
            .filter_map(|job| match job.state {
                State::BackingOff { until, .. } | State::Settling { until } => Some(until),
                State::Ready | State::Running => None,
            })
            .min()
    }

    /// A recovery ended; answers the pods that waited for it. `jitter` in 0..1 spreads the next tries of many nodes.
    pub fn ended(&mut self, reference: &Reference, end: End, now: Instant, jitter: f64) -> Vec<PodRef> {
        let Some(job) = self.jobs.get_mut(reference) else { return Vec::new() };
        if job.pods.is_empty() {
            self.jobs.remove(reference);
            return Vec::new();
        }
        let pods = job.pods.iter().cloned().collect();
        match end {
            End::Done => {
                job.failures = 0;
                // One minute, then two, up to sixteen: what ails such a pod is not its image.
                job.state = State::Settling { until: now + SETTLING * (1 << job.settled.min(4)) };
                job.settled += 1;
            }
            End::Abandoned => job.state = State::Ready,
            End::NoProvider | End::Failed => {
                let doubled = MIN_BACKOFF.saturating_mul(1 << job.failures.min(16));
                let wait = doubled.min(MAX_BACKOFF).mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
                job.failures += 1;
                job.state = State::BackingOff { until: now + wait, for_a_provider: end == End::NoProvider };
            }
        }
        pods
    }

    /// Somebody announced something new: what only lacked a provider, and `has_provider` now, may start at once.
    pub fn providers_changed(&mut self, has_provider: impl Fn(&Reference) -> bool) {
        for (reference, job) in &mut self.jobs {
            if matches!(job.state, State::BackingOff { for_a_provider: true, .. }) && has_provider(reference) {
                job.state = State::Ready;
            }
        }
    }

    /// The pod needs these images and no others any more; none when it is gone. Answers the images that nobody here waits for now; a
    /// running recovery of one is to be stopped, and keeps its place until [`Queue::ended`]: whoever wants the image meanwhile must
    /// not start a second one beside it.
    pub fn needs_only(&mut self, pod: &PodRef, needed: &BTreeSet<Reference>) -> Vec<Reference> {
        for (_, job) in self.jobs.iter_mut().filter(|(reference, _)| !needed.contains(*reference)) {
            job.pods.remove(pod);
        }
        let abandoned = |job: &Job| job.pods.is_empty();
        let left = self.jobs.iter().filter(|(_, job)| abandoned(job)).map(|(reference, _)| reference.clone()).collect();
        self.jobs.retain(|_, job| !abandoned(job) || job.state == State::Running);
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> Reference {
        name.parse().unwrap()
    }

    fn pod(name: &str) -> PodRef {
        PodRef { k8s_namespace: "default".into(), name: name.into(), uid: name.into() }
    }

    #[test]
    fn pods_that_want_one_image_share_one_recovery() {
        let mut queue = Queue::new(2);
        let now = Instant::now();
        assert_eq!(queue.want(&image("a"), &pod("p")), Joined::First);
        assert_eq!(
            queue.want(&image("docker.io/library/a:latest"), &pod("q")),
            Joined::Others,
            "the same image in full"
        );
        assert_eq!(queue.want(&image("a"), &pod("p")), Joined::Already);
        assert_eq!(queue.start_next(now), Some(image("a")));
        assert_eq!(queue.start_next(now), None);
        assert_eq!(queue.ended(&image("a"), End::Done, now, 0.0), [pod("p"), pod("q")]);
    }

    #[test]
    fn a_pod_that_stays_stuck_is_looked_at_again_but_not_at_once() {
        let mut queue = Queue::new(1);
        let now = Instant::now();
        queue.want(&image("a"), &pod("p"));
        queue.start_next(now);
        queue.ended(&image("a"), End::Done, now, 0.0);
        assert_eq!(queue.want(&image("a"), &pod("p")), Joined::Already);
        assert_eq!(queue.want(&image("a"), &pod("late")), Joined::Here);
        assert_eq!(queue.start_next(now), None);
        queue.needs_only(&pod("late"), &BTreeSet::new());
        assert_eq!(queue.start_next(now + SETTLING), Some(image("a")));
        let mut now = now + SETTLING;
        for minutes in [2, 4, 8, 16, 16] {
            queue.ended(&image("a"), End::Done, now, 0.0);
            let due = queue.next_due().unwrap();
            assert_eq!(due - now, SETTLING * minutes, "later and later");
            now = due;
            assert_eq!(queue.start_next(now), Some(image("a")));
        }
    }

    #[test]
    fn only_so_many_run_at_a_time_and_the_oldest_first() {
        let mut queue = Queue::new(2);
        let now = Instant::now();
        for name in ["z", "y", "x"] {
            queue.want(&image(name), &pod(name));
        }
        assert_eq!(queue.start_next(now), Some(image("z")));
        assert_eq!(queue.start_next(now), Some(image("y")));
        assert_eq!(queue.start_next(now), None);
        queue.ended(&image("y"), End::Done, now, 0.0);
        assert_eq!(queue.start_next(now), Some(image("x")));
    }

    #[test]
    fn while_as_many_run_as_may_nothing_is_due() {
        let mut queue = Queue::new(1);
        let now = Instant::now();
        queue.want(&image("failed"), &pod("p"));
        queue.start_next(now);
        queue.ended(&image("failed"), End::Failed, now, 1.0);
        queue.want(&image("long"), &pod("q"));
        assert_eq!(queue.start_next(now), Some(image("long")));
        assert_eq!(queue.next_due(), None, "or the caller would spin until it ends");
        queue.ended(&image("long"), End::Done, now, 1.0);
        assert_eq!(queue.next_due(), Some(now + MIN_BACKOFF));
    }

    #[test]
    fn a_failure_is_tried_again_later_and_later() {
        let mut queue = Queue::new(1);
        let mut now = Instant::now();
        queue.want(&image("a"), &pod("p"));
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(queue.start_next(now), Some(image("a")));
            queue.ended(&image("a"), End::Failed, now, 1.0);
            assert_eq!(queue.start_next(now), None, "not at once");
            let due = queue.next_due().unwrap();
            waits.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
    }

    #[test]
    fn the_waits_of_many_nodes_are_spread() {
        let wait = |jitter| {
            let mut queue = Queue::new(1);
            let now = Instant::now();
            queue.want(&image("a"), &pod("p"));
            queue.start_next(now);
            queue.ended(&image("a"), End::Failed, now, jitter);
            queue.next_due().unwrap() - now
        };
        assert_eq!((wait(0.0), wait(1.0)), (MIN_BACKOFF / 2, MIN_BACKOFF));
    }

    #[test]
    fn after_a_success_the_waits_begin_anew() {
        let mut queue = Queue::new(1);
        let mut now = Instant::now();
        queue.want(&image("a"), &pod("p"));
        for end in [End::Failed, End::Failed, End::Failed, End::Done, End::Failed] {
            assert_eq!(queue.start_next(now), Some(image("a")));
            queue.ended(&image("a"), end, now, 1.0);
            now = queue.next_due().unwrap_or(now);
        }
        queue.start_next(now);
        queue.ended(&image("a"), End::Failed, now, 1.0);
        assert_eq!(queue.next_due(), Some(now + 2 * MIN_BACKOFF));
    }

    #[test]
    fn a_new_provider_ends_the_wait_for_one_but_not_a_failures_back_off() {
        let mut queue = Queue::new(2);
        let now = Instant::now();
        for (name, end) in [("nobody-has-it", End::NoProvider), ("broken", End::Failed)] {
            queue.want(&image(name), &pod(name));
            queue.start_next(now);
            queue.ended(&image(name), end, now, 0.0);
        }
        queue.providers_changed(|_| false);
        assert_eq!(queue.start_next(now), None, "what somebody announced was something else");
        queue.providers_changed(|_| true);
        assert_eq!(queue.start_next(now), Some(image("nobody-has-it")));
        assert_eq!(queue.start_next(now), None);
    }

    #[test]
    fn a_recovery_that_is_being_stopped_is_not_started_a_second_time_beside_itself() {
        let mut queue = Queue::new(2);
        let now = Instant::now();
        queue.want(&image("a"), &pod("p"));
        assert_eq!(queue.start_next(now), Some(image("a")));
        assert_eq!(queue.needs_only(&pod("p"), &BTreeSet::new()), [image("a")]);
        assert_eq!(queue.want(&image("a"), &pod("again")), Joined::Others);
        assert_eq!(queue.start_next(now), None, "the first has not ended yet");
        queue.ended(&image("a"), End::Abandoned, now, 1.0);
        assert_eq!(queue.next_due(), None, "it is ready");
        assert_eq!(queue.start_next(now), Some(image("a")), "it was no failure, so there is no wait");
        queue.needs_only(&pod("again"), &BTreeSet::new());
        assert_eq!(queue.ended(&image("a"), End::Abandoned, now, 1.0), []);
        assert!(queue.jobs.is_empty());
    }

    #[test]
    fn a_recovery_ends_with_the_last_pod_that_wanted_it() {
        let mut queue = Queue::new(1);
        queue.want(&image("a"), &pod("p"));
        queue.want(&image("a"), &pod("q"));
        queue.want(&image("b"), &pod("q"));
        let nothing = BTreeSet::new();
        assert_eq!(queue.needs_only(&pod("p"), &nothing), []);
        assert_eq!(queue.needs_only(&pod("q"), &[image("b")].into()), [image("a")], "one container has started");
        assert_eq!(queue.needs_only(&pod("q"), &nothing), [image("b")]);
        assert_eq!(queue.start_next(Instant::now()), None);
    }
}
