//! Registries that this node itself found unreachable: by failed pulls through containerd, or by
//! questions of the agent.
//!
//! Two witnesses, of unequal worth. A failed pull is about the pull itself. A question of the agent
//! only shows what the agent can reach: containerd may pull through a mirror that the agent does
//! not know, or a proxy. A failed question therefore counts only where this agent has had an answer
//! from that registry before, and never once a failed pull named another host than the registry's
//! own.
//!
//! A digest means the same content everywhere, so an outage that is long over does no harm to a pod
//! that names one. A tag is decided by its registry while that registry can be reached:
//! [`Outages::confirms_now`] asks for evidence that is seconds old.
//!
//! Not here: what peers say about their registries ([`super::inventory`]), and the asking.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use crate::model::{Outage, OutageKind};

/// How long the kubelet's word counts when nothing more is heard. Its pull back-off ends at five
/// minutes, so that a pod that still cannot pull says so again within this.
const KUBELETS_WORD: Duration = Duration::from_secs(10 * 60);

/// Age up to which evidence decides a tag. A registry that is down is asked every 10 s, and a
/// question ends within 5 s (`crate::registry`), so that the latest answer is never older while the
/// outage lasts.
const FRESH: Duration = Duration::from_secs(30);

/// Age by which a pod's status may lag behind the failed pull that the status reports. The kubelet
/// writes the failure of a repeated pull into the status when the kubelet next syncs the pod, and
/// syncs a pod with a failed container after 10 s and up to half of that more (`backOffPeriod` and
/// `workerBackOffPeriodJitterFactor` in kubelet's `pod_workers.go`).
const STATUS_LAG: Duration = Duration::from_secs(15);

/// Between two questions to a registry that is down: recoveries should stop soon after it is back.
const WHILE_DOWN: Duration = Duration::from_secs(10);

/// Between two questions to a registry that answers, and only while pods come that want images from
/// it.
const WHILE_UP: Duration = Duration::from_secs(30);

/// Answers in a row that outweigh a pull that failed after the last of them began.
const AGAINST_THE_KUBELET: u32 = 2;

/// Registries remembered. A cluster uses a handful; pods may name any number, and the ones that
/// nothing is known of are then forgotten first.
const MOST: usize = 64;

/// What this node itself knows of registries.
#[derive(Debug, Default)]
pub struct Outages {
    registries: BTreeMap<String, Known>,
}

#[derive(Debug)]
struct Known {
    /// Since when and how it is down.
    down: Option<(Outage, Evidence)>,
    /// It answered this agent at least once.
    answered: bool,
    asked: Option<Instant>,
    /// Answers in a row.
    answers: u32,
    /// There was none when it was asked last.
    is_silent: bool,
    /// The latest question that counts and had no answer, unless an answer came since.
    silent_since_asked: Option<Instant>,
    /// When a status reported the latest failed pull, and the one before, since the last pull that
    /// had an answer.
    failed_pulls: [Option<Instant>; 2],
    /// A failed pull named another host: containerd reaches this registry's images elsewhere, too.
    has_mirror: bool,
    heard: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Evidence {
    /// Until then.
    Kubelet(Instant),
    /// Until it answers.
    Asked,
}

impl Outages {
    /// A pull through containerd failed for a fault of the registry, as a pod's status of `now`
    /// says. `has_mirror` where the message names another host.
    pub fn pull_failed(&mut self, registry: &str, kind: OutageKind, has_mirror: bool, now: Instant, clock: SystemTime) {
        let known = self.known(registry, now);
        known.answers = 0;
        known.failed_pulls = [Some(now), known.failed_pulls[0]];
        known.has_mirror |= has_mirror;
        self.note(registry, kind, Evidence::Kubelet(now + KUBELETS_WORD), now, clock);
    }

    /// A pull through containerd succeeded, which ends the outage here. Whether that changed what
    /// is known.
    pub fn pull_succeeded(&mut self, registry: &str, now: Instant) -> bool {
        let Some(known) = self.registries.get_mut(registry) else { return false };
        let was_down = known.outage(now).is_some();
        known.down = None;
        known.failed_pulls = [None; 2];
        known.silent_since_asked = None;
        was_down
    }

    /// A pull through containerd failed with an answer of the registry or of a mirror, such as 404.
    /// The outage of other hosts may go on, and digests are recovered as before. The next pull may
    /// succeed, so the kubelet decides tags first.
    pub fn pull_answered(&mut self, registry: &str) {
        if let Some(known) = self.registries.get_mut(registry) {
            known.failed_pulls = [None; 2];
        }
    }

    /// The agent asked, and the registry answered or did not. Whether that changed what is known.
    pub fn asked(&mut self, registry: &str, answer: Result<(), OutageKind>, now: Instant, clock: SystemTime) -> bool {
        let before = self.is_down(registry, now);
        let known = self.known(registry, now);
        known.is_silent = answer.is_err();
        match answer {
            Ok(()) => {
                known.answered = true;
                known.answers = known.answers.saturating_add(1);
                known.silent_since_asked = None;
                // The next pull may succeed, at this host or at a mirror: the kubelet tries first.
                known.failed_pulls = [None; 2];
                // One answer may be the one that got through.
                if known.answers >= AGAINST_THE_KUBELET || !matches!(known.down, Some((_, Evidence::Kubelet(_)))) {
                    known.down = None;
                }
            }
            Err(kind) => {
                known.answers = 0;
                if known.question_counts() {
                    known.silent_since_asked = Some(now);
                    self.note(registry, kind, Evidence::Asked, now, clock);
                }
            }
        }
        self.is_down(registry, now) != before
    }

    /// Whether a tag of this registry may be decided before the pod's own pull has failed: a pull
    /// through containerd has failed here, and evidence of the last 30 s says that the next one
    /// would fail as well. That is a question of the agent where questions count, and another
    /// failed pull where they do not. The failed pull is at most 10 min old: its registry may have
    /// been well since.
    pub fn confirms_now(&self, registry: &str, now: Instant) -> bool {
        let is_within =
            |at: Option<Instant>, age: Duration| at.is_some_and(|at| now.saturating_duration_since(at) < age);
        self.registries.get(registry).filter(|known| known.outage(now).is_some()).is_some_and(|known| {
            let [latest, before] = known.failed_pulls;
            match known.question_counts() {
                true => is_within(latest, KUBELETS_WORD) && is_within(known.silent_since_asked, FRESH),
                false => is_within(before, KUBELETS_WORD) && is_within(latest, FRESH - STATUS_LAG),
            }
        })
    }

    /// Since when the registry is known to be down here, in seconds since 1970.
    pub fn down_since(&self, registry: &str, now: Instant) -> Option<u64> {
        self.registries.get(registry)?.outage(now).map(|outage| outage.since)
    }

    /// Whether this node itself found it unreachable.
    pub fn is_down(&self, registry: &str, now: Instant) -> bool {
        self.registries.get(registry).is_some_and(|known| known.outage(now).is_some())
    }

    /// Whether it answered us when it was asked last. Stronger than what a peer says.
    pub fn answers(&self, registry: &str, now: Instant) -> bool {
        self.registries.get(registry).is_some_and(|known| {
            known.answered
                && known.outage(now).is_none()
                && known.asked.is_some_and(|at| now.saturating_duration_since(at) < 2 * WHILE_UP)
        })
    }

    /// Whether the registry answered this agent at least once, so that a later silence counts.
    pub fn has_answered(&self, registry: &str) -> bool {
        self.registries.get(registry).is_some_and(|known| known.answered)
    }

    /// The registries that answered this agent at least once and are not known to be down.
    pub fn healthy(&self, now: Instant) -> impl Iterator<Item = &str> {
        let healthy = move |known: &Known| known.answered && known.outage(now).is_none();
        self.registries.iter().filter(move |(_, known)| healthy(known)).map(|(registry, _)| registry.as_str())
    }

    /// Whether it did not answer us when it was asked last.
    pub fn is_silent(&self, registry: &str) -> bool {
        self.registries.get(registry).is_some_and(|known| known.is_silent)
    }

    /// Everything that this node found out, for its peers.
    pub fn first_hand(&self, now: Instant) -> Vec<Outage> {
        self.registries.values().filter_map(|known| known.outage(now)).cloned().collect()
    }

    /// Whether it is worth asking now; if so, the question counts as asked. `suspected` when a peer
    /// says that it is down.
    pub fn should_ask(&mut self, registry: &str, suspected: bool, now: Instant) -> bool {
        let known = self.known(registry, now);
        let pause = if suspected || known.outage(now).is_some() { WHILE_DOWN } else { WHILE_UP };
        let due = known.asked.is_none_or(|at| now.saturating_duration_since(at) >= pause);
        if due {
            known.asked = Some(now);
        }
        due
    }

    /// The registries that are known to be down, to be asked again.
    pub fn down(&self, now: Instant) -> Vec<String> {
        let down = self.registries.iter().filter(|(_, known)| known.outage(now).is_some());
        down.map(|(registry, _)| registry.clone()).collect()
    }

    fn note(&mut self, registry: &str, kind: OutageKind, evidence: Evidence, now: Instant, clock: SystemTime) {
        let known = self.known(registry, now);
        // Down for one reason and then another is one outage.
        let since = match known.outage(now) {
            Some(outage) => outage.since,
            None => clock.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        known.down = Some((Outage { registry: registry.to_owned(), kind, since }, evidence));
    }

    fn known(&mut self, registry: &str, now: Instant) -> &mut Known {
        if !self.registries.contains_key(registry) && self.registries.len() == MOST {
            // Those of which something is known stay longest: names cost nobody anything.
            let least = |known: &Known| (known.down.is_some(), known.answered, known.heard);
            let oldest = self.registries.iter().min_by_key(|(_, known)| least(known)).map(|(name, _)| name.clone());
            oldest.and_then(|name| self.registries.remove(&name));
        }
        let fresh = Known {
            down: None,
            answered: false,
            asked: None,
            answers: 0,
            is_silent: false,
            silent_since_asked: None,
            failed_pulls: [None; 2],
            has_mirror: false,
            heard: now,
        };
        let known = self.registries.entry(registry.to_owned()).or_insert(fresh);
        known.heard = now;
        known
    }
}

impl Known {
    /// Whether a question of the agent says something about containerd's pulls.
    fn question_counts(&self) -> bool {
        self.answered && !self.has_mirror
    }

    fn outage(&self, now: Instant) -> Option<&Outage> {
        let (outage, evidence) = self.down.as_ref()?;
        match evidence {
            Evidence::Kubelet(until) if *until <= now => None,
            Evidence::Kubelet(_) | Evidence::Asked => Some(outage),
        }
    }
}

#[cfg(test)]
mod tests;
