//! Registries that this node found unreachable, by failed pulls through containerd or by probes of
//! the agent.
//!
//! The two kinds of evidence differ. A failed pull is about the pull itself. A probe only shows
//! what the agent can reach: containerd may pull through a mirror that the agent does not use, or a
//! proxy. So a failed probe counts only where an earlier probe of that registry had an answer, and
//! never after a failed pull named another host than the registry's own.
//!
//! A digest means the same content everywhere, so an outage that ended long ago does no harm to a
//! pod with a digest. A tag is decided by its registry while the registry can be reached:
//! [`RegistryOutages::has_fresh_evidence`] needs evidence that is seconds old.
//!
//! Not here: the outages that peers announce ([`super::inventory`]), and the sending of probes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use crate::model::{Outage, OutageKind};

/// Life of the evidence of one failed pull. The kubelet's longest pull back-off is five minutes, so
/// a pod that still cannot pull fails again within this time.
const FAILED_PULL_LIFE: Duration = Duration::from_secs(10 * 60);

/// Age up to which evidence decides a tag. The agent probes a registry that is down every 10 s, and
/// a probe ends within 5 s (`crate::registry`), so the latest result is never older during an
/// outage.
const MAX_EVIDENCE_AGE: Duration = Duration::from_secs(30);

/// Delay of a pod's status behind the failed pull that the status reports. The kubelet writes the
/// failure of a repeated pull into the status at the pod's next sync. A pod with a failed container
/// is synced after 10 s and up to half of that more (`backOffPeriod` and
/// `workerBackOffPeriodJitterFactor` in kubelet's `pod_workers.go`).
const STATUS_LAG: Duration = Duration::from_secs(15);

/// Interval of probes to a registry that is down: recoveries should stop soon after its return.
const PROBE_INTERVAL_DOWN: Duration = Duration::from_secs(10);

/// Interval of probes to a registry that answers, and only while new pods need images from there.
const PROBE_INTERVAL_UP: Duration = Duration::from_secs(30);

/// Consecutive answers that outweigh a failed pull before them.
const ANSWERS_TO_END_OUTAGE: u32 = 2;

/// Registries that are remembered. A cluster uses a handful; pods may name any number, and
/// registries without evidence are dropped first.
const MAX_REGISTRIES: usize = 64;

/// This node's evidence about registries.
#[derive(Debug, Default)]
pub struct RegistryOutages {
    registries: BTreeMap<String, RegistryState>,
}

#[derive(Debug)]
struct RegistryState {
    /// The current outage, with the evidence.
    down: Option<(Outage, Evidence)>,
    /// The registry answered at least one probe of this agent.
    has_answered: bool,
    probed_at: Option<Instant>,
    /// Consecutive answers to probes.
    answers_in_a_row: u32,
    /// The latest probe had no answer.
    last_probe_failed: bool,
    /// The latest failed probe that counts, unless a later probe had an answer.
    failed_probe_at: Option<Instant>,
    /// When a status reported the latest two failed pulls, since the last pull that had an answer.
    failed_pulls: [Option<Instant>; 2],
    /// A failed pull named another host: containerd also pulls this registry's images from
    /// elsewhere.
    has_mirror: bool,
    used_at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Evidence {
    /// Valid until this instant.
    FailedPull(Instant),
    /// Valid until the registry answers.
    Probe,
}

impl RegistryOutages {
    /// Records a pull through containerd that failed for a fault of the registry, according to a
    /// pod's status at `now`. `has_mirror` if the message names another host.
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

    /// Records a successful pull through containerd, which ends the outage on this node. Returns
    /// whether an outage ended.
    pub fn record_successful_pull(&mut self, registry: &str, now: Instant) -> bool {
        let Some(known) = self.registries.get_mut(registry) else { return false };
        let was_down = known.outage(now).is_some();
        known.down = None;
        known.failed_pulls = [None; 2];
        known.failed_probe_at = None;
        was_down
    }

    /// Records a pull that failed with an answer of the registry or of a mirror, such as 404. Other
    /// hosts may still be down, so digests are recovered as before. The next pull may succeed, so
    /// the kubelet decides tags first.
    pub fn record_answered_pull(&mut self, registry: &str) {
        if let Some(known) = self.registries.get_mut(registry) {
            known.failed_pulls = [None; 2];
        }
    }

    /// Records a probe's result. Returns whether the registry went down or came back.
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
                // The next pull may succeed, at this host or at a mirror, so the kubelet tries
                // first.
                known.failed_pulls = [None; 2];
                // A single answer may be a lucky one.
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
    /// would fail too. That evidence is a probe where probes count, and another failed pull where
    /// they do not. The failed pull is at most 10 min old, because the registry may have been
    /// healthy since.
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

    /// Start of the outage on this node, in seconds since 1970.
    pub fn down_since(&self, registry: &str, now: Instant) -> Option<u64> {
        self.registries.get(registry)?.outage(now).map(|outage| outage.since)
    }

    /// Whether this node's own evidence says that the registry is down.
    pub fn is_down(&self, registry: &str, now: Instant) -> bool {
        self.registries.get(registry).is_some_and(|known| known.outage(now).is_some())
    }

    /// Whether the registry counts as down. This node's own evidence suffices. Otherwise two peers
    /// must announce the outage, or one peer if the last probe from here failed too; a recent
    /// answer to this node outweighs both. One peer alone does not suffice: a lying peer could then
    /// decide for every node which content a tag has.
    pub fn counts_as_down(&self, registry: &str, reporting_peers: usize, now: Instant) -> bool {
        let required_peers = if self.did_last_probe_fail(registry) { 1 } else { 2 };
        self.is_down(registry, now) || (reporting_peers >= required_peers && !self.is_answering(registry, now))
    }

    /// Whether the registry answered the last probe, which is at most 60 s old, and is not down
    /// here. Stronger than the outages that peers announce.
    pub fn is_answering(&self, registry: &str, now: Instant) -> bool {
        self.registries.get(registry).is_some_and(|known| {
            known.has_answered
                && !known.last_probe_failed
                && known.outage(now).is_none()
                && known.probed_at.is_some_and(|at| now.saturating_duration_since(at) < 2 * PROBE_INTERVAL_UP)
        })
    }

    /// Whether the registry answered this agent at least once, so that a later failed probe counts.
    pub fn has_answered(&self, registry: &str) -> bool {
        self.registries.get(registry).is_some_and(|known| known.has_answered)
    }

    /// The registries that answered this agent at least once and are not known to be down.
    pub fn healthy(&self, now: Instant) -> impl Iterator<Item = &str> {
        let healthy = move |known: &RegistryState| known.has_answered && known.outage(now).is_none();
        self.registries.iter().filter(move |(_, known)| healthy(known)).map(|(registry, _)| registry.as_str())
    }

    /// Whether the latest probe had no answer.
    pub fn did_last_probe_fail(&self, registry: &str) -> bool {
        self.registries.get(registry).is_some_and(|known| known.last_probe_failed)
    }

    /// All outages that this node found, for announcement to peers.
    pub fn local_outages(&self, now: Instant) -> Vec<Outage> {
        self.registries.values().filter_map(|known| known.outage(now)).cloned().collect()
    }

    /// Whether a probe is due; a due probe counts as sent. `suspected` if a peer announces an
    /// outage of the registry.
    pub fn begin_probe_if_due(&mut self, registry: &str, suspected: bool, now: Instant) -> bool {
        let known = self.state_mut(registry, now);
        let pause = if suspected || known.outage(now).is_some() { PROBE_INTERVAL_DOWN } else { PROBE_INTERVAL_UP };
        let due = known.probed_at.is_none_or(|at| now.saturating_duration_since(at) >= pause);
        if due {
            known.probed_at = Some(now);
        }
        due
    }

    /// The registries that are down, and are probed again.
    pub fn down_registries(&self, now: Instant) -> Vec<String> {
        let down = self.registries.iter().filter(|(_, known)| known.outage(now).is_some());
        down.map(|(registry, _)| registry.clone()).collect()
    }

    fn record_outage(&mut self, registry: &str, kind: OutageKind, evidence: Evidence, now: Instant, clock: SystemTime) {
        let known = self.state_mut(registry, now);
        // A change of the kind continues the same outage.
        let since = match known.outage(now) {
            Some(outage) => outage.since,
            None => clock.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        known.down = Some((Outage { registry: registry.to_owned(), kind, since }, evidence));
    }

    fn state_mut(&mut self, registry: &str, now: Instant) -> &mut RegistryState {
        if !self.registries.contains_key(registry) && self.registries.len() == MAX_REGISTRIES {
            // Registries with evidence are dropped last, because any pod can invent names.
            let eviction_key = |known: &RegistryState| (known.down.is_some(), known.has_answered, known.used_at);
            let oldest =
                self.registries.iter().min_by_key(|(_, known)| eviction_key(known)).map(|(name, _)| name.clone());
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
    /// Whether the agent's probes are evidence about containerd's pulls.
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
