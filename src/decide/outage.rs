//! Registries that this node itself found unreachable: by what the kubelet said, or by asking them.
//!
//! Not here: what peers say about theirs ([`super::inventory`]), and the asking.
//!
//! Two witnesses, of unequal worth. The kubelet's words are about the pull itself. An answer to our own question is worth as much, but no
//! answer may only mean that an agent cannot get out (a NetworkPolicy, a proxy that only containerd knows), so it counts where this agent
//! has had an answer from that registry before.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use crate::model::{Outage, OutageKind};

/// How long the kubelet's word counts when nothing more is heard. Its pull back-off ends at five minutes, so that a pod that still cannot
/// pull says so again within this.
const KUBELETS_WORD: Duration = Duration::from_secs(10 * 60);

/// Between two questions to a registry that is down: recoveries should stop soon after it is back.
const WHILE_DOWN: Duration = Duration::from_secs(10);

/// Between two questions to a registry that answers, and only while pods come that want images from it.
const WHILE_UP: Duration = Duration::from_secs(30);

/// Answers in a row that outweigh a pull that failed after the last of them began.
const AGAINST_THE_KUBELET: u32 = 2;

/// Registries remembered. A cluster uses a handful; pods may name any number, and the ones that nothing is known of are then forgotten first.
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
    /// The kubelet could not pull from it.
    pub fn kubelet_failed(&mut self, registry: &str, kind: OutageKind, now: Instant, clock: SystemTime) {
        let evidence = Evidence::Kubelet(now + KUBELETS_WORD);
        self.known(registry, now).answers = 0;
        self.note(registry, kind, evidence, now, clock);
    }

    /// We asked, and it answered or did not. Whether that changed what is known.
    pub fn asked(&mut self, registry: &str, answer: Result<(), OutageKind>, now: Instant, clock: SystemTime) -> bool {
        let before = self.is_down(registry, now);
        let known = self.known(registry, now);
        known.is_silent = answer.is_err();
        match answer {
            Ok(()) => {
                known.answered = true;
                known.answers = known.answers.saturating_add(1);
                // One answer may be the one that got through.
                if known.answers >= AGAINST_THE_KUBELET || !matches!(known.down, Some((_, Evidence::Kubelet(_)))) {
                    known.down = None;
                }
            }
            Err(kind) => {
                known.answers = 0;
                if known.answered {
                    self.note(registry, kind, Evidence::Asked, now, clock);
                }
            }
        }
        self.is_down(registry, now) != before
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

    /// Whether it did not answer us when it was asked last.
    pub fn is_silent(&self, registry: &str) -> bool {
        self.registries.get(registry).is_some_and(|known| known.is_silent)
    }

    /// Everything that this node found out, for its peers.
    pub fn first_hand(&self, now: Instant) -> Vec<Outage> {
        self.registries.values().filter_map(|known| known.outage(now)).cloned().collect()
    }

    /// Whether it is worth asking now; if so, the question counts as asked. `suspected` when a peer says that it is down.
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
        let fresh = Known { down: None, answered: false, asked: None, answers: 0, is_silent: false, heard: now };
        let known = self.registries.entry(registry.to_owned()).or_insert(fresh);
        known.heard = now;
        known
    }
}

impl Known {
    fn outage(&self, now: Instant) -> Option<&Outage> {
        let (outage, evidence) = self.down.as_ref()?;
        match evidence {
            Evidence::Kubelet(until) if *until <= now => None,
            Evidence::Kubelet(_) | Evidence::Asked => Some(outage),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const R: &str = "r.test:5000";
    const CLOCK: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        CLOCK + Duration::from_secs(seconds)
    }

    #[test]
    fn what_the_kubelet_says_counts_for_a_while_and_until_the_registry_answers() {
        let mut outages = Outages::default();
        let now = Instant::now();
        outages.kubelet_failed(R, OutageKind::TimedOut, now, at(100));
        assert!(outages.is_down(R, now));
        assert!(!outages.is_down("r.test", now), "another port is another registry");
        outages.kubelet_failed(R, OutageKind::Refused, now + KUBELETS_WORD / 2, at(400));
        let expected = Outage { registry: R.into(), kind: OutageKind::Refused, since: 100 };
        assert_eq!(outages.first_hand(now + KUBELETS_WORD), [expected], "one outage since the first failure");
        assert!(!outages.is_down(R, now + KUBELETS_WORD * 2));
        assert!(outages.first_hand(now + KUBELETS_WORD * 2).is_empty());
        outages.kubelet_failed(R, OutageKind::TimedOut, now, at(900));
        assert!(!outages.asked(R, Ok(()), now, at(901)), "one answer may be the one that got through");
        assert!(outages.asked(R, Ok(()), now, at(911)), "it is back");
        assert!(!outages.is_down(R, now));
    }

    #[test]
    fn no_answer_counts_only_where_there_was_one_before() {
        let mut outages = Outages::default();
        let now = Instant::now();
        assert!(!outages.asked(R, Err(OutageKind::TimedOut), now, CLOCK));
        assert!(!outages.is_down(R, now), "perhaps this agent cannot get out at all");
        outages.asked(R, Ok(()), now, CLOCK);
        assert!(outages.asked(R, Err(OutageKind::TimedOut), now, CLOCK));
        assert!(outages.is_down(R, now + KUBELETS_WORD * 9), "it is asked until it answers");
    }

    #[test]
    fn a_registry_is_asked_seldom_and_more_often_while_it_is_down() {
        let mut outages = Outages::default();
        let now = Instant::now();
        assert!(outages.should_ask(R, false, now));
        assert!(!outages.should_ask(R, false, now + WHILE_DOWN));
        assert!(outages.should_ask(R, true, now + WHILE_DOWN), "a peer says that it is down");
        assert!(outages.should_ask(R, false, now + WHILE_DOWN + WHILE_UP));
        outages.kubelet_failed(R, OutageKind::Refused, now, CLOCK);
        assert_eq!(outages.down(now), [R]);
        assert!(outages.should_ask(R, false, now + WHILE_DOWN * 2 + WHILE_UP));
    }

    #[test]
    fn an_answer_of_late_outweighs_what_peers_say() {
        let mut outages = Outages::default();
        let now = Instant::now();
        assert!(!outages.answers(R, now));
        assert!(outages.should_ask(R, true, now));
        outages.asked(R, Ok(()), now, CLOCK);
        assert!(outages.answers(R, now));
        assert!(!outages.answers(R, now + WHILE_UP * 2), "too long ago");
    }

    #[test]
    fn a_pod_that_names_ever_new_registries_does_not_fill_the_memory() {
        let mut outages = Outages::default();
        let now = Instant::now();
        for number in 0..1000 {
            outages.should_ask(&format!("r{number}.test"), false, now + Duration::from_secs(number));
        }
        assert_eq!(outages.registries.len(), MOST);
        assert!(outages.registries.contains_key("r999.test"));
    }
}
