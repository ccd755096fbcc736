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
//! [`RegistryOutages::has_fresh_evidence`] asks for evidence that is seconds old.
//!
//! Not here: what peers say about their registries ([`super::inventory`]), and the asking.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use crate::model::{Outage, OutageKind};

/// How long the kubelet's word counts when nothing more is heard. Its pull back-off ends at five
/// minutes, so that a pod that still cannot pull says so again within this.
const FAILED_PULL_LIFE: Duration = Duration::from_secs(10 * 60);

/// Age up to which evidence decides a tag. A registry that is down is asked every 10 s, and a
/// question ends within 5 s (`crate::registry`), so that the latest answer is never older while the
/// outage lasts.
const MAX_EVIDENCE_AGE: Duration = Duration::from_secs(30);

/// Age by which a pod's status may lag behind the failed pull that the status reports. The kubelet
/// writes the failure of a repeated pull into the status when the kubelet next syncs the pod, and
/// syncs a pod with a failed container after 10 s and up to half of that more (`backOffPeriod` and
/// `workerBackOffPeriodJitterFactor` in kubelet's `pod_workers.go`).
const STATUS_LAG: Duration = Duration::from_secs(15);

/// Between two questions to a registry that is down: recoveries should stop soon after it is back.
const PROBE_INTERVAL_DOWN: Duration = Duration::from_secs(10);

/// Between two questions to a registry that answers, and only while pods come that want images from
/// it.
const PROBE_INTERVAL_UP: Duration = Duration::from_secs(30);

/// Answers in a row that outweigh a pull that failed after the last of them began.
const ANSWERS_TO_END_OUTAGE: u32 = 2;

/// Registries remembered. A cluster uses a handful; pods may name any number, and the ones that
/// nothing is known of are then forgotten first.
const MAX_REGISTRIES: usize = 64;

/// What this node itself knows of registries.
#[derive(Debug, Default)]
pub struct RegistryOutages {
    registries: BTreeMap<String, RegistryState>,
}

#[derive(Debug)]
struct RegistryState {
    /// Since when and how it is down.
    down: Option<(Outage, Evidence)>,
    /// It answered this agent at least once.
    has_answered: bool,
    probed_at: Option<Instant>,
    /// Answers in a row.
    answers_in_a_row: u32,
    /// There was none when it was asked last.
    last_probe_failed: bool,
    /// The latest question that counts and had no answer, unless an answer came since.
    failed_probe_at: Option<Instant>,
    /// When a status reported the latest failed pull, and the one before, since the last pull that
    /// had an answer.
    failed_pulls: [Option<Instant>; 2],
    /// A failed pull named another host: containerd reaches this registry's images elsewhere, too.
    has_mirror: bool,
    used_at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Evidence {
    /// Until then.
    FailedPull(Instant),
    /// Until it answers.
    Probe,
}

impl RegistryOutages {
    /// A pull through containerd failed for a fault of the registry, as a pod's status of `now`
    /// says. `has_mirror` where the message names another host.
    pub fn record_failed_pull(
        &mut self,
        registry: &str,
        kind: OutageKind,
        has_mirror: bool,
        now: Instant,
        clock: SystemTime,
    ) {
        let known = self.state_mut(registry, now);
        known.answers_in_a_row = 0;
        known.failed_pulls = [Some(now), known.failed_pulls[0]];
        known.has_mirror |= has_mirror;
        self.record_outage(registry, kind, Evidence::FailedPull(now + FAILED_PULL_LIFE), now, clock);
    }

    /// A pull through containerd succeeded, which ends the outage here. Whether that changed what
    /// is known.
    pub fn record_successful_pull(&mut self, registry: &str, now: Instant) -> bool {
        let Some(known) = self.registries.get_mut(registry) else { return false };
        let was_down = known.outage(now).is_some();
        known.down = None;
        known.failed_pulls = [None; 2];
        known.failed_probe_at = None;
        was_down
    }

    /// A pull through containerd failed with an answer of the registry or of a mirror, such as 404.
    /// The outage of other hosts may go on, and digests are recovered as before. The next pull may
    /// succeed, so the kubelet decides tags first.
    pub fn record_answered_pull(&mut self, registry: &str) {
        if let Some(known) = self.registries.get_mut(registry) {
            known.failed_pulls = [None; 2];
        }
    }

    /// The agent asked, and the registry answered or did not. Whether that changed what is known.
    pub fn record_probe(
        &mut self,
        registry: &str,
        answer: Result<(), OutageKind>,
        now: Instant,
        clock: SystemTime,
    ) -> bool {
        let before = self.is_down(registry, now);
        let known = self.state_mut(registry, now);
        known.last_probe_failed = answer.is_err();
        match answer {
            Ok(()) => {
                known.has_answered = true;
                known.answers_in_a_row = known.answers_in_a_row.saturating_add(1);
                known.failed_probe_at = None;
                // The next pull may succeed, at this host or at a mirror: the kubelet tries first.
                known.failed_pulls = [None; 2];
                // One answer may be the one that got through.
                if known.answers_in_a_row >= ANSWERS_TO_END_OUTAGE
                    || !matches!(known.down, Some((_, Evidence::FailedPull(_))))
                {
                    known.down = None;
                }
            }
            Err(kind) => {
                known.answers_in_a_row = 0;
                if known.do_probes_count() {
                    known.failed_probe_at = Some(now);
                    self.record_outage(registry, kind, Evidence::Probe, now, clock);
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
    pub fn has_fresh_evidence(&self, registry: &str, now: Instant) -> bool {
        let is_within =
            |at: Option<Instant>, age: Duration| at.is_some_and(|at| now.saturating_duration_since(at) < age);
        self.registries.get(registry).filter(|known| known.outage(now).is_some()).is_some_and(|known| {
            let [latest, before] = known.failed_pulls;
            match known.do_probes_count() {
                true => is_within(latest, FAILED_PULL_LIFE) && is_within(known.failed_probe_at, MAX_EVIDENCE_AGE),
                false => is_within(before, FAILED_PULL_LIFE) && is_within(latest, MAX_EVIDENCE_AGE - STATUS_LAG),
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
    pub fn is_answering(&self, registry: &str, now: Instant) -> bool {
        self.registries.get(registry).is_some_and(|known| {
            known.has_answered
                && known.outage(now).is_none()
                && known.probed_at.is_some_and(|at| now.saturating_duration_since(at) < 2 * PROBE_INTERVAL_UP)
        })
    }

    /// Whether the registry answered this agent at least once, so that a later silence counts.
    pub fn has_answered(&self, registry: &str) -> bool {
        self.registries.get(registry).is_some_and(|known| known.has_answered)
    }

    /// The registries that answered this agent at least once and are not known to be down.
    pub fn healthy(&self, now: Instant) -> impl Iterator<Item = &str> {
        let healthy = move |known: &RegistryState| known.has_answered && known.outage(now).is_none();
        self.registries.iter().filter(move |(_, known)| healthy(known)).map(|(registry, _)| registry.as_str())
    }

    /// Whether it did not answer us when it was asked last.
    pub fn did_last_probe_fail(&self, registry: &str) -> bool {
        self.registries.get(registry).is_some_and(|known| known.last_probe_failed)
    }

    /// Everything that this node found out, for its peers.
    pub fn local_outages(&self, now: Instant) -> Vec<Outage> {
        self.registries.values().filter_map(|known| known.outage(now)).cloned().collect()
    }

    /// Whether it is worth asking now; if so, the question counts as asked. `suspected` when a peer
    /// says that it is down.
    pub fn begin_probe_if_due(&mut self, registry: &str, suspected: bool, now: Instant) -> bool {
        let known = self.state_mut(registry, now);
        let pause = if suspected || known.outage(now).is_some() { PROBE_INTERVAL_DOWN } else { PROBE_INTERVAL_UP };
        let due = known.probed_at.is_none_or(|at| now.saturating_duration_since(at) >= pause);
        if due {
            known.probed_at = Some(now);
        }
        due
    }

    /// The registries that are known to be down, to be asked again.
    pub fn down_registries(&self, now: Instant) -> Vec<String> {
        let down = self.registries.iter().filter(|(_, known)| known.outage(now).is_some());
        down.map(|(registry, _)| registry.clone()).collect()
    }

    fn record_outage(&mut self, registry: &str, kind: OutageKind, evidence: Evidence, now: Instant, clock: SystemTime) {
        let known = self.state_mut(registry, now);
        // Down for one reason and then another is one outage.
        let since = match known.outage(now) {
            Some(outage) => outage.since,
            None => clock.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        known.down = Some((Outage { registry: registry.to_owned(), kind, since }, evidence));
    }

    fn state_mut(&mut self, registry: &str, now: Instant) -> &mut RegistryState {
        if !self.registries.contains_key(registry) && self.registries.len() == MAX_REGISTRIES {
            // Those of which something is known stay longest: names cost nobody anything.
            let least = |known: &RegistryState| (known.down.is_some(), known.has_answered, known.used_at);
            let oldest = self.registries.iter().min_by_key(|(_, known)| least(known)).map(|(name, _)| name.clone());
            oldest.and_then(|name| self.registries.remove(&name));
        }
        let fresh = RegistryState {
            down: None,
            has_answered: false,
            probed_at: None,
            answers_in_a_row: 0,
            last_probe_failed: false,
            failed_probe_at: None,
            failed_pulls: [None; 2],
            has_mirror: false,
            used_at: now,
        };
        let known = self.registries.entry(registry.to_owned()).or_insert(fresh);
        known.used_at = now;
        known
    }
}

impl RegistryState {
    /// Whether a question of the agent says something about containerd's pulls.
    fn do_probes_count(&self) -> bool {
        self.has_answered && !self.has_mirror
    }

    fn outage(&self, now: Instant) -> Option<&Outage> {
        let (outage, evidence) = self.down.as_ref()?;
        match evidence {
            Evidence::FailedPull(until) if *until <= now => None,
            Evidence::FailedPull(_) | Evidence::Probe => Some(outage),
        }
    }
}

#[cfg(test)]
mod tests;
