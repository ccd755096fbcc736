//! Queues driven by hand, and by chance.

use proptest::prelude::*;

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
    assert_eq!(queue.want(&image("a"), &pod("p"), 0), Joined::First);
    assert_eq!(
        queue.want(&image("docker.io/library/a:latest"), &pod("q"), 0),
        Joined::Others,
        "the same image in full"
    );
    assert_eq!(queue.want(&image("a"), &pod("p"), 0), Joined::Already);
    assert_eq!(queue.start_next(now), Some(image("a")));
    assert_eq!(queue.start_next(now), None);
    assert_eq!(queue.ended(&image("a"), End::Done, now, 0.0), [pod("p"), pod("q")]);
}

#[test]
fn a_pod_that_stays_stuck_is_looked_at_again_but_not_at_once() {
    let mut queue = Queue::new(1);
    let now = Instant::now();
    queue.want(&image("a"), &pod("p"), 0);
    queue.start_next(now);
    queue.ended(&image("a"), End::Done, now, 0.0);
    assert_eq!(queue.want(&image("a"), &pod("p"), 0), Joined::Already);
    assert_eq!(queue.want(&image("a"), &pod("late"), 0), Joined::Here);
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
        queue.want(&image(name), &pod(name), 0);
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
    queue.want(&image("failed"), &pod("p"), 0);
    queue.start_next(now);
    queue.ended(&image("failed"), End::Failed, now, 1.0);
    queue.want(&image("long"), &pod("q"), 0);
    assert_eq!(queue.start_next(now), Some(image("long")));
    assert_eq!(queue.next_due(), None, "or the caller would spin until it ends");
    queue.ended(&image("long"), End::Done, now, 1.0);
    assert_eq!(queue.next_due(), Some(now + MIN_BACKOFF));
}

#[test]
fn a_failure_is_tried_again_later_and_later() {
    let mut queue = Queue::new(1);
    let mut now = Instant::now();
    queue.want(&image("a"), &pod("p"), 0);
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
        queue.want(&image("a"), &pod("p"), 0);
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
    queue.want(&image("a"), &pod("p"), 0);
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
        queue.want(&image(name), &pod(name), 0);
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
    queue.want(&image("a"), &pod("p"), 0);
    assert_eq!(queue.start_next(now), Some(image("a")));
    assert_eq!(queue.needs_only(&pod("p"), &BTreeSet::new()), [image("a")]);
    assert_eq!(queue.want(&image("a"), &pod("again"), 0), Joined::Others);
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
    queue.want(&image("a"), &pod("p"), 0);
    queue.want(&image("a"), &pod("q"), 0);
    queue.want(&image("b"), &pod("q"), 0);
    let nothing = BTreeSet::new();
    assert_eq!(queue.needs_only(&pod("p"), &nothing), []);
    assert_eq!(queue.needs_only(&pod("q"), &[image("b")].into()), [image("a")], "one container has started");
    assert_eq!(queue.needs_only(&pod("q"), &nothing), [image("b")]);
    assert_eq!(queue.start_next(Instant::now()), None);
}

#[test]
fn the_highest_priority_goes_first_and_then_the_oldest() {
    let mut queue = Queue::new(1);
    let now = Instant::now();
    for (name, priority) in [("low", -5), ("old", 7), ("young", 7), ("lowest", i64::MIN), ("highest", i64::MAX)] {
        queue.want(&image(name), &pod(name), priority);
    }
    let mut order = Vec::new();
    while let Some(next) = queue.start_next(now) {
        queue.ended(&next, End::Done, now, 0.0);
        order.push(next);
    }
    assert_eq!(order, ["highest", "old", "young", "low", "lowest"].map(image));
}

#[test]
fn an_image_is_as_important_as_the_most_important_pod_that_still_waits_for_it() {
    let mut queue = Queue::new(1);
    let now = Instant::now();
    queue.want(&image("old"), &pod("p"), 1);
    queue.want(&image("young"), &pod("q"), 0);
    queue.want(&image("young"), &pod("urgent"), 2);
    queue.needs_only(&pod("urgent"), &BTreeSet::new());
    assert_eq!(queue.start_next(now), Some(image("old")), "who was urgent has gone");
    queue.ended(&image("old"), End::Failed, now, 0.0);
    let now = now + MAX_BACKOFF;
    assert_eq!(queue.want(&image("young"), &pod("q"), 3), Joined::Already);
    assert_eq!(queue.start_next(now), Some(image("young")), "it has become urgent");
}

#[test]
fn what_runs_is_not_stopped_for_something_more_important() {
    let mut queue = Queue::new(1);
    let now = Instant::now();
    queue.want(&image("low"), &pod("p"), 0);
    assert_eq!(queue.start_next(now), Some(image("low")));
    queue.want(&image("high"), &pod("q"), 1000);
    assert_eq!(queue.start_next(now), None);
    queue.ended(&image("low"), End::Done, now, 0.0);
    assert_eq!(queue.start_next(now), Some(image("high")));
}

#[test]
fn another_concurrency_counts_from_the_next_start_on() {
    let mut queue = Queue::new(2);
    let now = Instant::now();
    for name in ["a", "b", "c", "d"] {
        queue.want(&image(name), &pod(name), 0);
    }
    let started = |queue: &mut Queue| std::iter::from_fn(|| queue.start_next(now)).count();
    assert_eq!(started(&mut queue), 2);
    queue.set_concurrency(1);
    queue.ended(&image("a"), End::Done, now, 0.0);
    assert_eq!(started(&mut queue), 0, "the other one still runs");
    queue.set_concurrency(3);
    assert_eq!(started(&mut queue), 2);
}

/// More starts of one image in an hour than this are a loop. Without a wait there are 4, nine while the wait doubles from 1 to 256 s, and
/// ten 300 s apart. After each of those that succeeds, and of the six that settling allows, failures may begin to double anew: that many
/// times a second, at half a wait each, leaves room for 8 between two successes.
const MOST_IN_AN_HOUR: usize = 23 + 6 + 8 * (23 + 6);

#[test]
fn an_image_is_not_recovered_again_and_again_however_its_pod_flaps() {
    let begin = Instant::now();
    for end in [End::Done, End::Failed, End::NoProvider, End::Abandoned] {
        let mut queue = Queue::new(1);
        let mut starts = 0;
        for tick in 0..7200 {
            let now = begin + Duration::from_millis(500) * tick;
            queue.want(&image("a"), &pod(&tick.to_string()), 0);
            while let Some(started) = queue.start_next(now) {
                starts += 1;
                queue.ended(&started, end, now, 0.0);
                queue.providers_changed(|_| true);
            }
            queue.needs_only(&pod(&tick.to_string()), &BTreeSet::new());
        }
        assert!((20..=23).contains(&starts), "{end:?}: {starts}");
    }
}

#[test]
fn a_pod_that_comes_back_the_next_day_is_not_kept_waiting_for_what_was() {
    let mut queue = Queue::new(1);
    let mut now = Instant::now();
    for _ in 0..20 {
        queue.want(&image("a"), &pod("p"), 0);
        if let Some(started) = queue.start_next(now) {
            queue.ended(&started, End::Failed, now, 0.0);
        }
        queue.needs_only(&pod("p"), &BTreeSet::new());
    }
    queue.want(&image("a"), &pod("p"), 0);
    assert_eq!(queue.start_next(now), None);
    queue.needs_only(&pod("p"), &BTreeSet::new());
    now += REMEMBERED;
    for _ in 0..FREE_STARTS {
        queue.want(&image("a"), &pod("p"), 0);
        assert_eq!(queue.start_next(now), Some(image("a")));
        queue.ended(&image("a"), End::Failed, now, 0.0);
        queue.needs_only(&pod("p"), &BTreeSet::new());
    }
}

#[test]
fn histories_are_bounded_and_the_oldest_goes() {
    let mut queue = Queue::new(1);
    let begin = Instant::now();
    for number in 0..2 * MAX_PAST as u32 {
        let now = begin + Duration::from_millis(1) * number;
        queue.want(&image(&format!("a{number}")), &pod("p"), 0);
        let started = queue.start_next(now).unwrap();
        queue.needs_only(&pod("p"), &BTreeSet::new());
        queue.ended(&started, End::Abandoned, now, 0.0);
    }
    assert_eq!((queue.jobs.len(), queue.past.len()), (0, MAX_PAST));
    assert!(queue.past.contains_key(&image(&format!("a{}", 2 * MAX_PAST - 1))));
}

#[derive(Debug, Clone)]
enum Move {
    Want(u8, u8, i8),
    NeedsOnly(u8, Vec<u8>),
    End(u8, End),
    Providers(bool),
    Concurrency(u8),
    /// In milliseconds.
    Wait(u64),
    /// Until something is due.
    WaitForTheNext,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let end = prop_oneof![Just(End::Done), Just(End::Failed), Just(End::NoProvider), Just(End::Abandoned)];
    let one = prop_oneof![
        3 => (0_u8..3, 0_u8..3, any::<i8>()).prop_map(|(pod, image, priority)| Move::Want(pod, image, priority)),
        2 => (0_u8..3, proptest::collection::vec(0_u8..3, 0..2)).prop_map(|(pod, kept)| Move::NeedsOnly(pod, kept)),
        4 => (0_u8..3, end).prop_map(|(image, end)| Move::End(image, end)),
        1 => any::<bool>().prop_map(Move::Providers),
        1 => (1_u8..4).prop_map(Move::Concurrency),
        1 => (0_u64..2000).prop_map(Move::Wait),
        2 => Just(Move::WaitForTheNext),
    ];
    proptest::collection::vec(one, 1..1000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Three pods, three images, an hour.
    #[test]
    fn whatever_happens_no_image_is_recovered_twice_at_a_time_or_without_end(moves in moves()) {
        let mut queue = Queue::new(1);
        let begin = Instant::now();
        let (mut now, mut running, mut starts) = (begin, BTreeSet::new(), BTreeMap::new());
        let mut concurrency = 1;
        let name = |number: u8| image(&format!("a{number}"));
        for step in moves {
            match step {
                Move::Want(number, wanted, priority) => {
                    queue.want(&name(wanted), &pod(&number.to_string()), priority.into());
                }
                Move::NeedsOnly(number, kept) => {
                    queue.needs_only(&pod(&number.to_string()), &kept.into_iter().map(name).collect());
                }
                Move::End(ended, end) => {
                    if running.remove(&name(ended)) {
                        queue.ended(&name(ended), end, now, 0.0);
                    }
                }
                Move::Providers(found) => queue.providers_changed(|_| found),
                Move::Concurrency(number) => {
                    concurrency = usize::from(number);
                    queue.set_concurrency(concurrency);
                }
                Move::Wait(milliseconds) => now += Duration::from_millis(milliseconds),
                Move::WaitForTheNext => now = queue.next_due().map_or(now, |due| due.max(now)),
            }
            if now - begin >= Duration::from_secs(3600) {
                break;
            }
            let most = running.len().max(concurrency);
            while let Some(started) = queue.start_next(now) {
                *starts.entry(started.clone()).or_insert(0) += 1;
                prop_assert!(running.insert(started), "it runs already");
            }
            prop_assert!(running.len() <= most);
            prop_assert!(queue.next_due().is_none_or(|due| due > now), "the caller would spin");
        }
        prop_assert!(starts.values().all(|&starts| starts <= MOST_IN_AN_HOUR), "{starts:?}");
    }
}

#[test]
fn what_cannot_succeed_is_tried_again_when_settings_change_and_not_when_a_provider_appears() {
    let mut queue = Queue::new(1);
    let now = Instant::now();
    queue.want(&image("a"), &pod("p"), 0);
    queue.start_next(now);
    queue.ended(&image("a"), End::Final, now, 0.5);
    queue.providers_changed(|_| true);
    assert_eq!(queue.start_next(now + MAX_BACKOFF * 2), None, "an Event that sounds final is final");
    queue.hurry();
    assert_eq!(queue.start_next(now + MAX_BACKOFF * 2), Some(image("a")));
}
