//! The queue under chosen and random events.

use proptest::prelude::*;

use super::*;

fn image(name: &str) -> Reference {
    name.parse().unwrap()
}

fn pod(name: &str) -> PodRef {
    PodRef { k8s_namespace: "default".into(), name: name.into(), uid: name.into() }
}

#[test]
fn pods_that_wait_for_the_same_image_share_a_recovery() {
    let mut queue = RecoveryQueue::new(2);
    let now = Instant::now();
    assert_eq!(queue.join(&image("a"), &pod("p"), 0), JoinOutcome::First);
    assert_eq!(
        queue.join(&image("docker.io/library/a:latest"), &pod("q"), 0),
        JoinOutcome::JoinedOthers,
        "both names are the same reference"
    );
    assert_eq!(queue.join(&image("a"), &pod("p"), 0), JoinOutcome::AlreadyWaiting);
    assert_eq!(queue.start_next(now), Some(image("a")));
    assert_eq!(queue.start_next(now), None);
    assert_eq!(queue.finish(&image("a"), RecoveryEnd::Done, now, 0.0), [pod("p"), pod("q")]);
}

#[test]
fn a_pod_that_stays_stuck_is_retried_after_a_growing_wait() {
    let mut queue = RecoveryQueue::new(1);
    let now = Instant::now();
    queue.join(&image("a"), &pod("p"), 0);
    queue.start_next(now);
    queue.finish(&image("a"), RecoveryEnd::Done, now, 0.0);
    assert_eq!(queue.join(&image("a"), &pod("p"), 0), JoinOutcome::AlreadyWaiting);
    assert_eq!(queue.join(&image("a"), &pod("late"), 0), JoinOutcome::Recovered);
    assert_eq!(queue.start_next(now), None);
    queue.retain_wanted(&pod("late"), &BTreeSet::new());
    assert_eq!(queue.start_next(now + SETTLING.first), Some(image("a")));
    let mut now = now + SETTLING.first;
    for minutes in [2, 4, 8, 16, 16] {
        queue.finish(&image("a"), RecoveryEnd::Done, now, 0.0);
        let due = queue.next_due().unwrap();
        assert_eq!(due - now, SETTLING.first * minutes, "the wait doubles");
        now = due;
        assert_eq!(queue.start_next(now), Some(image("a")));
    }
}

#[test]
fn recoveries_run_up_to_the_concurrency_and_the_oldest_starts_first() {
    let mut queue = RecoveryQueue::new(2);
    let now = Instant::now();
    for name in ["z", "y", "x"] {
        queue.join(&image(name), &pod(name), 0);
    }
    assert_eq!(queue.start_next(now), Some(image("z")));
    assert_eq!(queue.start_next(now), Some(image("y")));
    assert_eq!(queue.start_next(now), None);
    queue.finish(&image("y"), RecoveryEnd::Done, now, 0.0);
    assert_eq!(queue.start_next(now), Some(image("x")));
}

#[test]
fn a_full_queue_has_no_due_time() {
    let mut queue = RecoveryQueue::new(1);
    let now = Instant::now();
    queue.join(&image("failed"), &pod("p"), 0);
    queue.start_next(now);
    queue.finish(&image("failed"), RecoveryEnd::Failed, now, 1.0);
    queue.join(&image("long"), &pod("q"), 0);
    assert_eq!(queue.start_next(now), Some(image("long")));
    assert_eq!(queue.next_due(), None, "a due time would make the caller spin");
    queue.finish(&image("long"), RecoveryEnd::Done, now, 1.0);
    assert_eq!(queue.next_due(), Some(now + BACKOFF.first));
}

#[test]
fn the_back_off_of_a_failing_recovery_doubles_up_to_300_s() {
    let mut queue = RecoveryQueue::new(1);
    let mut now = Instant::now();
    queue.join(&image("a"), &pod("p"), 0);
    let mut waits = Vec::new();
    for _ in 0..12 {
        assert_eq!(queue.start_next(now), Some(image("a")));
        queue.finish(&image("a"), RecoveryEnd::Failed, now, 1.0);
        assert_eq!(queue.start_next(now), None, "the recovery backs off");
        let due = queue.next_due().unwrap();
        waits.push((due - now).as_secs());
        now = due;
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
}

#[test]
fn the_back_offs_of_many_nodes_are_spread() {
    let wait = |jitter| {
        let mut queue = RecoveryQueue::new(1);
        let now = Instant::now();
        queue.join(&image("a"), &pod("p"), 0);
        queue.start_next(now);
        queue.finish(&image("a"), RecoveryEnd::Failed, now, jitter);
        queue.next_due().unwrap() - now
    };
    assert_eq!((wait(0.0), wait(1.0)), (BACKOFF.first / 2, BACKOFF.first));
}

#[test]
fn a_success_resets_the_back_off() {
    let mut queue = RecoveryQueue::new(1);
    let mut now = Instant::now();
    queue.join(&image("a"), &pod("p"), 0);
    for end in [RecoveryEnd::Failed, RecoveryEnd::Failed, RecoveryEnd::Failed, RecoveryEnd::Done, RecoveryEnd::Failed] {
        assert_eq!(queue.start_next(now), Some(image("a")));
        queue.finish(&image("a"), end, now, 1.0);
        now = queue.next_due().unwrap_or(now);
    }
    queue.start_next(now);
    queue.finish(&image("a"), RecoveryEnd::Failed, now, 1.0);
    assert_eq!(queue.next_due(), Some(now + 2 * BACKOFF.first));
}

#[test]
fn a_new_provider_ends_the_wait_for_providers_and_not_the_back_off_of_a_failure() {
    let mut queue = RecoveryQueue::new(2);
    let now = Instant::now();
    for (name, end) in [("nobody-has-it", RecoveryEnd::NoProvider), ("broken", RecoveryEnd::Failed)] {
        queue.join(&image(name), &pod(name), 0);
        queue.start_next(now);
        queue.finish(&image(name), end, now, 0.0);
    }
    queue.providers_changed(|_| false);
    assert_eq!(queue.start_next(now), None, "the announcement was for another image");
    queue.providers_changed(|_| true);
    assert_eq!(queue.start_next(now), Some(image("nobody-has-it")));
    assert_eq!(queue.start_next(now), None);
}

#[test]
fn a_recovery_that_is_being_cancelled_is_not_started_a_second_time() {
    let mut queue = RecoveryQueue::new(2);
    let now = Instant::now();
    queue.join(&image("a"), &pod("p"), 0);
    assert_eq!(queue.start_next(now), Some(image("a")));
    assert_eq!(queue.retain_wanted(&pod("p"), &BTreeSet::new()), [image("a")]);
    assert_eq!(queue.join(&image("a"), &pod("again"), 0), JoinOutcome::JoinedOthers);
    assert_eq!(queue.start_next(now), None, "the first recovery has not ended yet");
    queue.finish(&image("a"), RecoveryEnd::Abandoned, now, 1.0);
    assert_eq!(queue.next_due(), None, "the job is ready");
    assert_eq!(queue.start_next(now), Some(image("a")), "a cancellation is no failure, so there is no wait");
    queue.retain_wanted(&pod("again"), &BTreeSet::new());
    assert_eq!(queue.finish(&image("a"), RecoveryEnd::Abandoned, now, 1.0), []);
    assert!(queue.jobs.is_empty());
}

#[test]
fn a_recovery_ends_with_the_last_pod_that_waits_for_its_image() {
    let mut queue = RecoveryQueue::new(1);
    queue.join(&image("a"), &pod("p"), 0);
    queue.join(&image("a"), &pod("q"), 0);
    queue.join(&image("b"), &pod("q"), 0);
    let nothing = BTreeSet::new();
    assert_eq!(queue.retain_wanted(&pod("p"), &nothing), []);
    assert_eq!(queue.retain_wanted(&pod("q"), &[image("b")].into()), [image("a")], "one container has started");
    assert_eq!(queue.retain_wanted(&pod("q"), &nothing), [image("b")]);
    assert_eq!(queue.start_next(Instant::now()), None);
}

#[test]
fn the_highest_priority_goes_first_and_then_the_oldest() {
    let mut queue = RecoveryQueue::new(1);
    let now = Instant::now();
    for (name, priority) in [("low", -5), ("old", 7), ("young", 7), ("lowest", i64::MIN), ("highest", i64::MAX)] {
        queue.join(&image(name), &pod(name), priority);
    }
    let mut order = Vec::new();
    while let Some(next) = queue.start_next(now) {
        queue.finish(&next, RecoveryEnd::Done, now, 0.0);
        order.push(next);
    }
    assert_eq!(order, ["highest", "old", "young", "low", "lowest"].map(image));
}

#[test]
fn an_image_is_as_important_as_the_most_important_pod_that_still_waits_for_it() {
    let mut queue = RecoveryQueue::new(1);
    let now = Instant::now();
    queue.join(&image("old"), &pod("p"), 1);
    queue.join(&image("young"), &pod("q"), 0);
    queue.join(&image("young"), &pod("urgent"), 2);
    queue.retain_wanted(&pod("urgent"), &BTreeSet::new());
    assert_eq!(queue.start_next(now), Some(image("old")), "the urgent pod has gone");
    queue.finish(&image("old"), RecoveryEnd::Failed, now, 0.0);
    let now = now + BACKOFF.longest;
    assert_eq!(queue.join(&image("young"), &pod("q"), 3), JoinOutcome::AlreadyWaiting);
    assert_eq!(queue.start_next(now), Some(image("young")), "the image has become urgent");
}

#[test]
fn a_running_recovery_is_not_stopped_for_a_more_important_image() {
    let mut queue = RecoveryQueue::new(1);
    let now = Instant::now();
    queue.join(&image("low"), &pod("p"), 0);
    assert_eq!(queue.start_next(now), Some(image("low")));
    queue.join(&image("high"), &pod("q"), 1000);
    assert_eq!(queue.start_next(now), None);
    queue.finish(&image("low"), RecoveryEnd::Done, now, 0.0);
    assert_eq!(queue.start_next(now), Some(image("high")));
}

#[test]
fn a_changed_concurrency_counts_from_the_next_start() {
    let mut queue = RecoveryQueue::new(2);
    let now = Instant::now();
    for name in ["a", "b", "c", "d"] {
        queue.join(&image(name), &pod(name), 0);
    }
    let started = |queue: &mut RecoveryQueue| std::iter::from_fn(|| queue.start_next(now)).count();
    assert_eq!(started(&mut queue), 2);
    queue.set_concurrency(1);
    queue.finish(&image("a"), RecoveryEnd::Done, now, 0.0);
    assert_eq!(started(&mut queue), 0, "the other recovery still runs");
    queue.set_concurrency(3);
    assert_eq!(started(&mut queue), 2);
}

/// Bound on the starts of one image in an hour; more starts are a loop. Without a wait there are 4,
/// then nine while the wait doubles from 1 to 256 s, and ten 300 s apart. After each of those that
/// succeeds, and of the six that settling allows, failures may begin to double again. Doublings
/// from a second, at half a wait each, leave room for 8 between two successes.
const MAX_STARTS_PER_HOUR: usize = 23 + 6 + 8 * (23 + 6);

#[test]
fn an_image_is_not_recovered_again_and_again_however_its_pod_flaps() {
    let begin = Instant::now();
    for end in [RecoveryEnd::Done, RecoveryEnd::Failed, RecoveryEnd::NoProvider, RecoveryEnd::Abandoned] {
        let mut queue = RecoveryQueue::new(1);
        let mut starts = 0;
        for tick in 0..7200 {
            let now = begin + Duration::from_millis(500) * tick;
            queue.join(&image("a"), &pod(&tick.to_string()), 0);
            while let Some(started) = queue.start_next(now) {
                starts += 1;
                queue.finish(&started, end, now, 0.0);
                queue.providers_changed(|_| true);
            }
            queue.retain_wanted(&pod(&tick.to_string()), &BTreeSet::new());
        }
        assert!((20..=23).contains(&starts), "{end:?}: {starts}");
    }
}

#[test]
fn a_pod_that_returns_after_an_hour_starts_without_back_off() {
    let mut queue = RecoveryQueue::new(1);
    let mut now = Instant::now();
    for _ in 0..20 {
        queue.join(&image("a"), &pod("p"), 0);
        if let Some(started) = queue.start_next(now) {
            queue.finish(&started, RecoveryEnd::Failed, now, 0.0);
        }
        queue.retain_wanted(&pod("p"), &BTreeSet::new());
    }
    queue.join(&image("a"), &pod("p"), 0);
    assert_eq!(queue.start_next(now), None);
    queue.retain_wanted(&pod("p"), &BTreeSet::new());
    now += HISTORY_LIFE;
    for _ in 0..FREE_STARTS {
        queue.join(&image("a"), &pod("p"), 0);
        assert_eq!(queue.start_next(now), Some(image("a")));
        queue.finish(&image("a"), RecoveryEnd::Failed, now, 0.0);
        queue.retain_wanted(&pod("p"), &BTreeSet::new());
    }
}

#[test]
fn histories_are_bounded_and_the_oldest_is_evicted() {
    let mut queue = RecoveryQueue::new(1);
    let begin = Instant::now();
    for number in 0..2 * MAX_HISTORIES as u32 {
        let now = begin + Duration::from_millis(1) * number;
        queue.join(&image(&format!("a{number}")), &pod("p"), 0);
        let started = queue.start_next(now).unwrap();
        queue.retain_wanted(&pod("p"), &BTreeSet::new());
        queue.finish(&started, RecoveryEnd::Abandoned, now, 0.0);
    }
    assert_eq!((queue.jobs.len(), queue.histories.len()), (0, MAX_HISTORIES));
    assert!(queue.histories.contains_key(&image(&format!("a{}", 2 * MAX_HISTORIES - 1))));
}

#[derive(Debug, Clone)]
enum QueueStep {
    Join(u8, u8, i8),
    RetainWanted(u8, Vec<u8>),
    End(u8, RecoveryEnd),
    Providers(bool),
    Concurrency(u8),
    /// In milliseconds.
    Wait(u64),
    /// Waits for the next due time.
    WaitUntilDue,
}

fn steps() -> impl Strategy<Value = Vec<QueueStep>> {
    let end = prop_oneof![
        Just(RecoveryEnd::Done),
        Just(RecoveryEnd::Failed),
        Just(RecoveryEnd::NoProvider),
        Just(RecoveryEnd::Abandoned)
    ];
    let one = prop_oneof![
        3 => (0_u8..3, 0_u8..3, any::<i8>()).prop_map(|(pod, image, priority)| QueueStep::Join(pod, image, priority)),
        2 => (0_u8..3, proptest::collection::vec(0_u8..3, 0..2)).prop_map(|(pod, kept)| QueueStep::RetainWanted(pod, kept)),
        4 => (0_u8..3, end).prop_map(|(image, end)| QueueStep::End(image, end)),
        1 => any::<bool>().prop_map(QueueStep::Providers),
        1 => (1_u8..4).prop_map(QueueStep::Concurrency),
        1 => (0_u64..2000).prop_map(QueueStep::Wait),
        2 => Just(QueueStep::WaitUntilDue),
    ];
    proptest::collection::vec(one, 1..1000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Three pods, three images, an hour.
    #[test]
    fn no_order_of_events_recovers_an_image_twice_at_a_time_or_without_end(steps in steps()) {
        let mut queue = RecoveryQueue::new(1);
        let begin = Instant::now();
        let (mut now, mut running, mut starts) = (begin, BTreeSet::new(), BTreeMap::new());
        let mut concurrency = 1;
        let name = |number: u8| image(&format!("a{number}"));
        for step in steps {
            match step {
                QueueStep::Join(number, wanted, priority) => {
                    queue.join(&name(wanted), &pod(&number.to_string()), priority.into());
                }
                QueueStep::RetainWanted(number, kept) => {
                    queue.retain_wanted(&pod(&number.to_string()), &kept.into_iter().map(name).collect());
                }
                QueueStep::End(ended, end) => {
                    if running.remove(&name(ended)) {
                        queue.finish(&name(ended), end, now, 0.0);
                    }
                }
                QueueStep::Providers(found) => queue.providers_changed(|_| found),
                QueueStep::Concurrency(number) => {
                    concurrency = usize::from(number);
                    queue.set_concurrency(concurrency);
                }
                QueueStep::Wait(milliseconds) => now += Duration::from_millis(milliseconds),
                QueueStep::WaitUntilDue => now = queue.next_due().map_or(now, |due| due.max(now)),
            }
            if now - begin >= Duration::from_secs(3600) {
                break;
            }
            let limit = running.len().max(concurrency);
            while let Some(started) = queue.start_next(now) {
                *starts.entry(started.clone()).or_insert(0) += 1;
                prop_assert!(running.insert(started), "the recovery runs already");
            }
            prop_assert!(running.len() <= limit);
            prop_assert!(queue.next_due().is_none_or(|due| due > now), "the caller would spin");
        }
        prop_assert!(starts.values().all(|&starts| starts <= MAX_STARTS_PER_HOUR), "{starts:?}");
    }
}

#[test]
fn a_final_failure_is_retried_when_settings_change_and_not_when_a_provider_appears() {
    let mut queue = RecoveryQueue::new(1);
    let now = Instant::now();
    queue.join(&image("a"), &pod("p"), 0);
    queue.start_next(now);
    queue.finish(&image("a"), RecoveryEnd::Final, now, 0.5);
    queue.providers_changed(|_| true);
    assert_eq!(queue.start_next(now + BACKOFF.longest * 2), None, "a provider does not end a final failure");
    queue.retry_now();
    assert_eq!(queue.start_next(now + BACKOFF.longest * 2), Some(image("a")));
}
