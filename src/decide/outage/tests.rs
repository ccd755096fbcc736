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
    outages.pull_failed(R, OutageKind::TimedOut, false, now, at(100));
    assert!(outages.is_down(R, now));
    assert!(!outages.is_down("r.test", now), "another port is another registry");
    outages.pull_failed(R, OutageKind::Refused, false, now + KUBELETS_WORD / 2, at(400));
    let expected = Outage { registry: R.into(), kind: OutageKind::Refused, since: 100 };
    assert_eq!(outages.first_hand(now + KUBELETS_WORD), [expected], "one outage since the first failure");
    assert!(!outages.is_down(R, now + KUBELETS_WORD * 2));
    assert!(outages.first_hand(now + KUBELETS_WORD * 2).is_empty());
    outages.pull_failed(R, OutageKind::TimedOut, false, now, at(900));
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
fn a_successful_pull_ends_the_outage() {
    let mut outages = Outages::default();
    let now = Instant::now();
    outages.pull_failed(R, OutageKind::TimedOut, false, now, CLOCK);
    outages.pull_failed(R, OutageKind::TimedOut, false, now, CLOCK);
    assert!(outages.confirms_now(R, now));
    assert!(outages.pull_succeeded(R, now), "the outage is over");
    assert!(!outages.is_down(R, now) && !outages.confirms_now(R, now));
    assert!(!outages.pull_succeeded(R, now), "a pull from a registry that was up is no news");
    outages.pull_failed(R, OutageKind::TimedOut, false, now, CLOCK);
    assert!(!outages.confirms_now(R, now), "failures before the success do not count");
}

#[test]
fn one_failed_pull_decides_no_tag_and_two_do_so_until_the_later_may_be_30_s_old() {
    let mut outages = Outages::default();
    let now = Instant::now();
    outages.pull_failed(R, OutageKind::Refused, false, now, CLOCK);
    assert!(outages.is_down(R, now) && !outages.confirms_now(R, now));
    outages.pull_failed(R, OutageKind::Refused, false, now + FRESH * 3, CLOCK);
    // The pull may have failed 15 s before its status was seen.
    let too_old = now + FRESH * 3 + FRESH - STATUS_LAG;
    assert!(outages.confirms_now(R, too_old - Duration::from_secs(1)));
    assert!(!outages.confirms_now(R, too_old), "the kubelet tries first");
    assert!(outages.is_down(R, now + FRESH * 4), "a digest needs no fresh evidence");
}

#[test]
fn failed_pulls_before_an_answer_decide_no_tag() {
    let mut outages = Outages::default();
    let now = Instant::now();
    outages.pull_failed(R, OutageKind::Refused, true, now, CLOCK);
    outages.pull_failed(R, OutageKind::Refused, true, now, CLOCK);
    assert!(outages.confirms_now(R, now));
    outages.pull_answered(R);
    assert!(!outages.confirms_now(R, now), "the kubelet tries first");
    assert!(outages.is_down(R, now), "another host than the one that answered may still be down");
    outages.pull_answered("unknown.test");
    assert_eq!(outages.registries.len(), 1, "an answer needs no memory");
}

#[test]
fn a_failed_pull_of_long_ago_decides_no_tag() {
    let now = Instant::now();
    let later = now + KUBELETS_WORD;
    // By a question without an answer.
    let mut outages = Outages::default();
    outages.asked(R, Ok(()), now, CLOCK);
    outages.pull_failed(R, OutageKind::Refused, false, now, CLOCK);
    outages.asked(R, Err(OutageKind::Refused), later, CLOCK);
    assert!(outages.is_down(R, later) && !outages.confirms_now(R, later));
    // By another failed pull.
    let mut outages = Outages::default();
    outages.pull_failed(R, OutageKind::Refused, false, now, CLOCK);
    outages.pull_failed(R, OutageKind::Refused, false, later, CLOCK);
    assert!(outages.is_down(R, later) && !outages.confirms_now(R, later));
}

#[test]
fn a_question_decides_a_tag_only_with_a_failed_pull_and_outweighs_older_ones() {
    let mut outages = Outages::default();
    let now = Instant::now();
    outages.asked(R, Ok(()), now, CLOCK);
    outages.asked(R, Err(OutageKind::TimedOut), now, CLOCK);
    assert!(outages.is_down(R, now) && !outages.confirms_now(R, now), "no pull has failed");
    outages.pull_failed(R, OutageKind::TimedOut, false, now, CLOCK);
    assert!(outages.confirms_now(R, now));
    outages.pull_failed(R, OutageKind::TimedOut, false, now, CLOCK);
    outages.asked(R, Ok(()), now, CLOCK);
    assert!(outages.is_down(R, now) && !outages.confirms_now(R, now), "the registry answers again");
}

#[test]
fn a_question_never_counts_where_containerd_pulls_from_another_host() {
    let mut outages = Outages::default();
    let now = Instant::now();
    outages.asked(R, Ok(()), now, CLOCK);
    outages.pull_failed(R, OutageKind::Refused, true, now, CLOCK);
    outages.pull_succeeded(R, now);
    assert!(!outages.asked(R, Err(OutageKind::NoSuchHost), now, CLOCK), "the mirror may be well");
    outages.pull_failed(R, OutageKind::Refused, false, now, CLOCK);
    outages.asked(R, Err(OutageKind::NoSuchHost), now, CLOCK);
    assert!(!outages.confirms_now(R, now));
}

/// What may happen to one registry, with the seconds since the step before.
#[derive(Debug, Clone, Copy)]
enum Step {
    PullFails { names_mirror: bool },
    PullSucceeds,
    PullIsAnswered,
    Answers,
    IsSilent,
}

/// Steps, each after so many seconds, with the seconds until the tag is decided.
fn steps() -> impl proptest::strategy::Strategy<Value = Vec<(u64, Step, u64)>> {
    use proptest::prelude::*;
    let step = prop_oneof![
        4 => any::<bool>().prop_map(|names_mirror| Step::PullFails { names_mirror }),
        1 => Just(Step::PullSucceeds),
        1 => Just(Step::PullIsAnswered),
        1 => Just(Step::Answers),
        2 => Just(Step::IsSilent),
    ];
    // Long enough now and then for a failed pull to be too old.
    let wait = prop_oneof![4 => 0..60_u64, 1 => 500..900_u64];
    proptest::collection::vec((wait, step, 0..60_u64), 1..24)
}

proptest::proptest! {
    #[test]
    fn no_tag_is_decided_without_a_recent_failed_pull_and_evidence_of_the_last_30_s(steps in steps()) {
        let mut outages = Outages::default();
        let mut now = Instant::now();
        let mut failed_pulls = Vec::<Instant>::new();
        for (wait, step, delay) in steps {
            now += Duration::from_secs(wait);
            let evidence = match step {
                Step::PullFails { names_mirror } => {
                    outages.pull_failed(R, OutageKind::Refused, names_mirror, now, CLOCK);
                    failed_pulls.push(now);
                    true
                }
                Step::PullSucceeds => {
                    outages.pull_succeeded(R, now);
                    failed_pulls.clear();
                    false
                }
                Step::PullIsAnswered => {
                    outages.pull_answered(R);
                    failed_pulls.clear();
                    false
                }
                Step::Answers => {
                    outages.asked(R, Ok(()), now, CLOCK);
                    failed_pulls.clear();
                    false
                }
                Step::IsSilent => {
                    outages.asked(R, Err(OutageKind::TimedOut), now, CLOCK);
                    true
                }
            };
            let decided = now + Duration::from_secs(delay);
            if outages.confirms_now(R, decided) {
                proptest::prop_assert!(evidence && decided - now < FRESH);
                proptest::prop_assert!(failed_pulls.iter().any(|at| decided - *at < KUBELETS_WORD));
                proptest::prop_assert!(outages.is_down(R, decided));
            }
            now = decided;
        }
    }
}

#[test]
fn a_registry_is_asked_seldom_and_more_often_while_it_is_down() {
    let mut outages = Outages::default();
    let now = Instant::now();
    assert!(outages.should_ask(R, false, now));
    assert!(!outages.should_ask(R, false, now + WHILE_DOWN));
    assert!(outages.should_ask(R, true, now + WHILE_DOWN), "a peer says that it is down");
    assert!(outages.should_ask(R, false, now + WHILE_DOWN + WHILE_UP));
    outages.pull_failed(R, OutageKind::Refused, false, now, CLOCK);
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

#[test]
fn a_registry_is_healthy_that_has_answered_and_is_not_down() {
    let mut outages = Outages::default();
    let now = Instant::now();
    let healthy = |outages: &Outages| outages.healthy(now).map(str::to_owned).collect::<Vec<_>>();
    outages.asked("mirrored.test", Err(OutageKind::NoSuchHost), now, CLOCK);
    assert!(healthy(&outages).is_empty(), "it has never answered");
    outages.asked(R, Ok(()), now, CLOCK);
    assert_eq!(healthy(&outages), [R]);
    outages.asked(R, Err(OutageKind::TimedOut), now, CLOCK);
    assert!(healthy(&outages).is_empty());
    outages.pull_succeeded(R, now);
    assert_eq!(healthy(&outages), [R]);
}
