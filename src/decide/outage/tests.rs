use super::*;

const R: &str = "r.test:5000";
const CLOCK: SystemTime = SystemTime::UNIX_EPOCH;

fn at(seconds: u64) -> SystemTime {
    CLOCK + Duration::from_secs(seconds)
}

#[test]
fn a_failed_pull_counts_for_ten_minutes_or_until_the_registry_answers() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    outages.record_failed_pull(R, OutageKind::TimedOut, false, now, at(100));
    assert!(outages.is_down(R, now));
    assert!(!outages.is_down("r.test", now), "another port is another registry");
    outages.record_failed_pull(R, OutageKind::Refused, false, now + FAILED_PULL_LIFE / 2, at(400));
    let expected = Outage { registry: R.into(), kind: OutageKind::Refused, since: 100 };
    assert_eq!(outages.local_outages(now + FAILED_PULL_LIFE), [expected], "one outage since the first failure");
    assert!(!outages.is_down(R, now + FAILED_PULL_LIFE * 2));
    assert!(outages.local_outages(now + FAILED_PULL_LIFE * 2).is_empty());
    outages.record_failed_pull(R, OutageKind::TimedOut, false, now, at(900));
    assert!(!outages.record_probe(R, Ok(()), now, at(901)), "a single answer may be a lucky one");
    assert!(outages.record_probe(R, Ok(()), now, at(911)), "the registry is back");
    assert!(!outages.is_down(R, now));
}

#[test]
fn a_failed_probe_counts_only_after_an_earlier_answer() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    assert!(!outages.record_probe(R, Err(OutageKind::TimedOut), now, CLOCK));
    assert!(!outages.is_down(R, now), "perhaps this agent reaches no registry at all");
    outages.record_probe(R, Ok(()), now, CLOCK);
    assert!(outages.record_probe(R, Err(OutageKind::TimedOut), now, CLOCK));
    assert!(outages.is_down(R, now + FAILED_PULL_LIFE * 9), "the outage lasts until an answer");
}

#[test]
fn a_successful_pull_ends_the_outage() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    outages.record_failed_pull(R, OutageKind::TimedOut, false, now, CLOCK);
    outages.record_failed_pull(R, OutageKind::TimedOut, false, now, CLOCK);
    assert!(outages.has_fresh_evidence(R, now));
    assert!(outages.record_successful_pull(R, now), "the outage is over");
    assert!(!outages.is_down(R, now) && !outages.has_fresh_evidence(R, now));
    assert!(!outages.record_successful_pull(R, now), "no outage ended");
    outages.record_failed_pull(R, OutageKind::TimedOut, false, now, CLOCK);
    assert!(!outages.has_fresh_evidence(R, now), "failures before the success do not count");
}

#[test]
fn a_single_failed_pull_decides_no_tag_and_a_second_does_until_its_age_may_be_30_s() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    outages.record_failed_pull(R, OutageKind::Refused, false, now, CLOCK);
    assert!(outages.is_down(R, now) && !outages.has_fresh_evidence(R, now));
    outages.record_failed_pull(R, OutageKind::Refused, false, now + MAX_EVIDENCE_AGE * 3, CLOCK);
    // The pull may have failed 15 s before its status was seen.
    let too_old = now + MAX_EVIDENCE_AGE * 3 + MAX_EVIDENCE_AGE - STATUS_LAG;
    assert!(outages.has_fresh_evidence(R, too_old - Duration::from_secs(1)));
    assert!(!outages.has_fresh_evidence(R, too_old), "the kubelet tries first");
    assert!(outages.is_down(R, now + MAX_EVIDENCE_AGE * 4), "a digest needs no fresh evidence");
}

#[test]
fn failed_pulls_before_an_answer_decide_no_tag() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    outages.record_failed_pull(R, OutageKind::Refused, true, now, CLOCK);
    outages.record_failed_pull(R, OutageKind::Refused, true, now, CLOCK);
    assert!(outages.has_fresh_evidence(R, now));
    outages.record_answered_pull(R);
    assert!(!outages.has_fresh_evidence(R, now), "the kubelet tries first");
    assert!(outages.is_down(R, now), "another host than the one that answered may still be down");
    outages.record_answered_pull("unknown.test");
    assert_eq!(outages.registries.len(), 1, "an answer of an unknown registry is not stored");
}

#[test]
fn a_failed_pull_of_long_ago_decides_no_tag() {
    let now = Instant::now();
    let later = now + FAILED_PULL_LIFE;
    // The evidence is a failed probe.
    let mut outages = RegistryOutages::default();
    outages.record_probe(R, Ok(()), now, CLOCK);
    outages.record_failed_pull(R, OutageKind::Refused, false, now, CLOCK);
    outages.record_probe(R, Err(OutageKind::Refused), later, CLOCK);
    assert!(outages.is_down(R, later) && !outages.has_fresh_evidence(R, later));
    // The evidence is another failed pull.
    let mut outages = RegistryOutages::default();
    outages.record_failed_pull(R, OutageKind::Refused, false, now, CLOCK);
    outages.record_failed_pull(R, OutageKind::Refused, false, later, CLOCK);
    assert!(outages.is_down(R, later) && !outages.has_fresh_evidence(R, later));
}

#[test]
fn a_probe_decides_a_tag_only_with_a_failed_pull_and_outweighs_older_pulls() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    outages.record_probe(R, Ok(()), now, CLOCK);
    outages.record_probe(R, Err(OutageKind::TimedOut), now, CLOCK);
    assert!(outages.is_down(R, now) && !outages.has_fresh_evidence(R, now), "no pull has failed");
    outages.record_failed_pull(R, OutageKind::TimedOut, false, now, CLOCK);
    assert!(outages.has_fresh_evidence(R, now));
    outages.record_failed_pull(R, OutageKind::TimedOut, false, now, CLOCK);
    outages.record_probe(R, Ok(()), now, CLOCK);
    assert!(outages.is_down(R, now) && !outages.has_fresh_evidence(R, now), "the registry answers again");
}

#[test]
fn a_probe_never_counts_where_containerd_pulls_from_another_host() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    outages.record_probe(R, Ok(()), now, CLOCK);
    outages.record_failed_pull(R, OutageKind::Refused, true, now, CLOCK);
    outages.record_successful_pull(R, now);
    assert!(!outages.record_probe(R, Err(OutageKind::NoSuchHost), now, CLOCK), "the mirror may be healthy");
    outages.record_failed_pull(R, OutageKind::Refused, false, now, CLOCK);
    outages.record_probe(R, Err(OutageKind::NoSuchHost), now, CLOCK);
    assert!(!outages.has_fresh_evidence(R, now));
}

/// An event at one registry.
#[derive(Debug, Clone, Copy)]
enum OutageStep {
    PullFails { names_mirror: bool },
    PullSucceeds,
    PullIsAnswered,
    ProbeSucceeds,
    ProbeFails,
}

/// Steps with the seconds before each, and the seconds until the decision on a tag.
fn steps() -> impl proptest::strategy::Strategy<Value = Vec<(u64, OutageStep, u64)>> {
    use proptest::prelude::*;
    let step = prop_oneof![
        4 => any::<bool>().prop_map(|names_mirror| OutageStep::PullFails { names_mirror }),
        1 => Just(OutageStep::PullSucceeds),
        1 => Just(OutageStep::PullIsAnswered),
        1 => Just(OutageStep::ProbeSucceeds),
        2 => Just(OutageStep::ProbeFails),
    ];
    // Sometimes long enough for a failed pull to expire.
    let wait = prop_oneof![4 => 0..60_u64, 1 => 500..900_u64];
    proptest::collection::vec((wait, step, 0..60_u64), 1..24)
}

proptest::proptest! {
    #[test]
    fn no_tag_is_decided_without_a_recent_failed_pull_and_evidence_of_the_last_30_s(steps in steps()) {
        let mut outages = RegistryOutages::default();
        let mut now = Instant::now();
        let mut failed_pulls = Vec::<Instant>::new();
        for (wait, step, delay) in steps {
            now += Duration::from_secs(wait);
            let evidence = match step {
                OutageStep::PullFails { names_mirror } => {
                    outages.record_failed_pull(R, OutageKind::Refused, names_mirror, now, CLOCK);
                    failed_pulls.push(now);
                    true
                }
                OutageStep::PullSucceeds => {
                    outages.record_successful_pull(R, now);
                    failed_pulls.clear();
                    false
                }
                OutageStep::PullIsAnswered => {
                    outages.record_answered_pull(R);
                    failed_pulls.clear();
                    false
                }
                OutageStep::ProbeSucceeds => {
                    outages.record_probe(R, Ok(()), now, CLOCK);
                    failed_pulls.clear();
                    false
                }
                OutageStep::ProbeFails => {
                    outages.record_probe(R, Err(OutageKind::TimedOut), now, CLOCK);
                    true
                }
            };
            let decided = now + Duration::from_secs(delay);
            if outages.has_fresh_evidence(R, decided) {
                proptest::prop_assert!(evidence && decided - now < MAX_EVIDENCE_AGE);
                proptest::prop_assert!(failed_pulls.iter().any(|at| decided - *at < FAILED_PULL_LIFE));
                proptest::prop_assert!(outages.is_down(R, decided));
            }
            now = decided;
        }
    }
}

#[test]
fn a_registry_is_probed_more_often_while_down() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    assert!(outages.begin_probe_if_due(R, false, now));
    assert!(!outages.begin_probe_if_due(R, false, now + PROBE_INTERVAL_DOWN));
    assert!(outages.begin_probe_if_due(R, true, now + PROBE_INTERVAL_DOWN), "a peer announces an outage");
    assert!(outages.begin_probe_if_due(R, false, now + PROBE_INTERVAL_DOWN + PROBE_INTERVAL_UP));
    outages.record_failed_pull(R, OutageKind::Refused, false, now, CLOCK);
    assert_eq!(outages.down_registries(now), [R]);
    assert!(outages.begin_probe_if_due(R, false, now + PROBE_INTERVAL_DOWN * 2 + PROBE_INTERVAL_UP));
}

#[test]
fn a_recent_answer_outweighs_the_outages_of_peers() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    assert!(!outages.is_answering(R, now));
    assert!(outages.begin_probe_if_due(R, true, now));
    outages.record_probe(R, Ok(()), now, CLOCK);
    assert!(outages.is_answering(R, now));
    assert!(!outages.is_answering(R, now + PROBE_INTERVAL_UP * 2), "too long ago");
}

#[test]
fn a_failed_probe_leaves_the_outages_of_peers_in_force_also_with_a_mirror() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    outages.record_probe(R, Ok(()), now, CLOCK);
    outages.record_failed_pull(R, OutageKind::Refused, true, now, CLOCK);
    outages.record_successful_pull(R, now);
    assert!(outages.begin_probe_if_due(R, true, now));
    outages.record_probe(R, Err(OutageKind::TimedOut), now, CLOCK);
    assert!(!outages.is_down(R, now), "the probe of a registry with a mirror is no outage");
    assert!(!outages.is_answering(R, now), "nor is it an answer");
}

#[test]
fn a_pod_that_names_new_registries_without_end_does_not_fill_the_memory() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    for number in 0..1000 {
        outages.begin_probe_if_due(&format!("r{number}.test"), false, now + Duration::from_secs(number));
    }
    assert_eq!(outages.registries.len(), MAX_REGISTRIES);
    assert!(outages.registries.contains_key("r999.test"));
}

#[test]
fn a_registry_that_has_answered_and_is_not_down_is_healthy() {
    let mut outages = RegistryOutages::default();
    let now = Instant::now();
    let healthy = |outages: &RegistryOutages| outages.healthy(now).map(str::to_owned).collect::<Vec<_>>();
    outages.record_probe("mirrored.test", Err(OutageKind::NoSuchHost), now, CLOCK);
    assert!(healthy(&outages).is_empty(), "the registry has never answered");
    outages.record_probe(R, Ok(()), now, CLOCK);
    assert_eq!(healthy(&outages), [R]);
    outages.record_probe(R, Err(OutageKind::TimedOut), now, CLOCK);
    assert!(healthy(&outages).is_empty());
    outages.record_successful_pull(R, now);
    assert_eq!(healthy(&outages), [R]);
}
