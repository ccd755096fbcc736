//! Single rules, with exact times.

mod any_order;
mod test_node;

use std::time::Duration;

use self::test_node::{BACK_OFF, IMAGE, REFUSED, TestNode, failed, opted_in, pending_pod, pod, recovered, waiting};
use super::*;
use crate::decide::recovery_queue::RecoveryEnd;
use crate::decide::stalled_connections::TcpConnection;
use crate::model::{KubeletEvent, NamespaceView, Owner, PodView, RecoveryOutcome};

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// The kinds of the Events in these actions, by pod.
fn reports(actions: &[Action]) -> Vec<(&str, PodReportKind)> {
    fn report(action: &Action) -> Option<(&str, PodReportKind)> {
        match action {
            Action::Report(pod, PodReport { kind, .. }) => Some((&pod.name, *kind)),
            _ => None,
        }
    }
    actions.iter().filter_map(report).collect()
}

fn nudges(actions: &[Action]) -> Vec<&str> {
    fn nudge(action: &Action) -> Option<&str> {
        if let Action::Nudge(pod) = action { Some(&pod.name) } else { None }
    }
    actions.iter().filter_map(nudge).collect()
}

fn recovers(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Recover(_)))
}

#[test]
fn a_failing_pod_is_recovered_nudged_and_reported() {
    let mut node = TestNode::new();
    let actions = node.apply(pod("p", REFUSED));
    assert_eq!(actions, [Action::ReadOptIn(pod("p", REFUSED))], "nothing happens before the opt-in is known");
    assert!(recovers(&node.answer("p", opted_in())));
    let actions = node.end(recovered(3));
    assert_eq!((nudges(&actions), reports(&actions)), (vec!["p"], vec![("p", PodReportKind::Recovered)]));
}

#[test]
fn an_order_has_the_pull_secrets_of_every_pod_that_waits_for_the_image() {
    let mut node = TestNode::new();
    node.policy.budgets.concurrent_recoveries = 0;
    node.handle(Input::PolicyChanged);
    for (name, secret) in [("p", "one"), ("q", "two"), ("r", "one")] {
        node.apply(PodView { pull_secrets: vec![secret.into()], ..pod(name, REFUSED) });
        node.answer(name, opted_in());
    }
    node.policy.budgets.concurrent_recoveries = 1;
    let actions = node.handle(Input::PolicyChanged);
    let order = actions.iter().find_map(|action| if let Action::Recover(order) = action { Some(order) } else { None });
    let secret = |name: &str| ("shop".to_owned(), name.to_owned());
    assert_eq!(order.expect("a recovery").pull_secrets, [secret("one"), secret("two")]);
}

#[test]
fn an_unreadable_opt_in_is_read_again_after_six_seconds_and_observed_once() {
    let mut node = TestNode::new();
    node.apply(pod("p", REFUSED));
    for round in 0..3 {
        let actions = node.answer("p", Err("unreachable".into()));
        assert_eq!(actions.len(), usize::from(round == 0), "{actions:?}");
        assert_eq!(node.pods.next_due(), Some(node.now + seconds(6)));
        node.now += seconds(5);
        assert!(node.handle(Input::Due).is_empty());
        node.now += seconds(1);
        assert_eq!(node.handle(Input::Due), [Action::ReadOptIn(pod("p", REFUSED))]);
    }
}

#[test]
fn a_changed_pod_has_one_read_of_its_opt_in_at_a_time() {
    let mut node = TestNode::new();
    node.apply(pod("p", REFUSED));
    assert!(node.apply(pod("p", "403 Forbidden")).is_empty());
    let actions = node.answer("p", opted_in());
    assert_eq!(reports(&actions), [("p", PodReportKind::NotRecoverable)], "the latest status decides");
}

#[test]
fn a_recovery_is_canceled_once_after_its_last_pod() {
    let mut node = TestNode::new();
    for name in ["p", "q"] {
        node.apply(pod(name, REFUSED));
        node.answer(name, opted_in());
    }
    let gone = |name| Input::Pod(PodEvent::Deleted(pod(name, REFUSED).pod));
    assert!(node.handle(gone("p")).is_empty());
    assert_eq!(node.handle(gone("q")), [Action::Cancel(IMAGE.parse().unwrap())]);
    assert!(node.handle(gone("q")).is_empty());
    assert!(node.end(failed(RecoveryEnd::Abandoned, RecoveryOutcome::Abandoned)).is_empty());
}

#[test]
fn a_pod_that_starts_before_the_end_of_its_recovery_gets_an_event_and_no_nudge() {
    let mut node = TestNode::new();
    for name in ["p", "q"] {
        node.apply(pod(name, REFUSED));
        node.answer(name, opted_in());
    }
    node.facts.recording = true;
    let mut started = pod("p", REFUSED);
    started.containers[0].waiting = None;
    node.apply(started);
    let actions = node.end(recovered(1));
    assert_eq!(nudges(&actions), ["q"]);
    assert_eq!(reports(&actions), [("p", PodReportKind::Recovered), ("q", PodReportKind::Recovered)]);
}

#[test]
fn a_repeated_status_causes_no_second_nudge() {
    let mut node = TestNode::new();
    node.apply(pod("p", REFUSED));
    node.answer("p", opted_in());
    node.end(recovered(1));
    for reason in ["ImagePullBackOff", "ErrImagePull"].repeat(3) {
        let mut view = pod("p", REFUSED);
        view.containers[0].waiting = waiting(reason, REFUSED);
        node.apply(view);
        assert!(node.answer("p", opted_in()).is_empty(), "{reason}");
    }
}

#[test]
fn a_pod_that_still_waits_is_deleted_once_thirty_seconds_after_its_nudge() {
    let options = RecoveryOptions { delete_pods: true, ..RecoveryOptions::default() };
    let mut node = TestNode::with_options(options);
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "o".into(), uid: "o".into() };
    node.apply(PodView { owner: Some(owner), ..pod("p", REFUSED) });
    node.answer("p", opted_in());
    node.end(recovered(1));
    let is_deletion = |action: &Action| matches!(action, Action::Delete(_));
    node.now += seconds(29);
    assert!(!node.handle(Input::Tick).iter().any(is_deletion));
    node.now += seconds(1);
    assert_eq!(node.handle(Input::Tick).into_iter().filter(is_deletion).count(), 1);
    node.now += seconds(1);
    assert!(!node.handle(Input::Tick).iter().any(is_deletion));
}

#[test]
fn a_dry_run_reports_once_and_never_nudges() {
    let mut node = TestNode::with_options(RecoveryOptions { dry_run: true, ..RecoveryOptions::default() });
    node.apply(pod("p", REFUSED));
    assert!(recovers(&node.answer("p", opted_in())));
    for is_reported in [true, false] {
        let actions = node.end(RecoveryResult::DryRun { note: "found".into() });
        assert_eq!((reports(&actions).len(), nudges(&actions)), (usize::from(is_reported), vec![]));
        node.apply(pod("late", REFUSED));
        assert!(nudges(&node.answer("late", opted_in())).is_empty(), "the image is not here");
        node.handle(Input::Pod(PodEvent::Deleted(pod("late", REFUSED).pod)));
        node.now += seconds(120);
        assert!(recovers(&node.handle(Input::Due)));
    }
}

#[test]
fn a_recovery_without_some_blobs_waits_for_providers_of_all_of_them() {
    let mut node = TestNode::new();
    node.apply(pod("p", REFUSED));
    node.answer("p", opted_in());
    let blobs = [Digest::of(b"1"), Digest::of(b"2")];
    let RecoveryResult::NotRecovered(failed) = failed(RecoveryEnd::NoProvider, RecoveryOutcome::BlobsWithoutProvider)
    else {
        panic!("a failed recovery")
    };
    node.facts.provided = true;
    node.end(RecoveryResult::NotRecovered(FailedRecovery { unprovided_blobs: blobs.into(), ..failed }));
    node.facts.blobs.insert(blobs[0]);
    assert!(!recovers(&node.handle(Input::ProvidersChanged)));
    node.facts.blobs.insert(blobs[1]);
    assert!(recovers(&node.handle(Input::ProvidersChanged)));
}

#[test]
fn reads_of_events_about_an_unknown_cause_grow_apart_and_end() {
    let mut node = TestNode::new();
    let mut view = pod("p", BACK_OFF);
    view.containers[0].waiting = waiting("ImagePullBackOff", BACK_OFF);
    node.apply(view.clone());
    node.answer("p", opted_in());
    let (begin, mut reads) = (node.now, Vec::new());
    while node.now < begin + seconds(7200) {
        for action in node.handle(Input::Tick) {
            if let Action::ReadKubeletEvents(pod) = action {
                reads.push((node.now - begin).as_secs());
                node.handle(Input::KubeletEventsRead { pod, events: Vec::new() });
                node.answer("p", opted_in());
            }
        }
        node.now += seconds(2);
    }
    assert_eq!(reads, [0, 40, 200, 500, 800, 1100, 1400, 1700]);
}

#[test]
fn a_cause_in_an_event_of_the_kubelet_starts_the_recovery() {
    let mut node = TestNode::new();
    let mut view = pod("p", BACK_OFF);
    view.containers[0].waiting = waiting("ImagePullBackOff", BACK_OFF);
    node.apply(view.clone());
    assert!(node.answer("p", opted_in()).is_empty(), "the cause is unknown");
    let message = format!("Failed to pull image \"{IMAGE}\": {REFUSED}");
    let event = KubeletEvent { reason: "Failed".into(), container: Some("c".into()), message };
    node.handle(Input::KubeletEventsRead { pod: view.pod, events: vec![event] });
    assert!(recovers(&node.answer("p", opted_in())));
}

#[test]
fn one_list_of_connections_is_requested_at_a_time_and_ten_seconds_apart() {
    let options = RecoveryOptions { end_stalled_pulls: true, ..RecoveryOptions::default() };
    let mut node = TestNode::with_options(options);
    node.apply(pending_pod("p"));
    node.apply(pod("q", REFUSED));
    node.answer("q", opted_in());
    let is_listing = |actions: Vec<Action>| actions.iter().any(|a| matches!(a, Action::EndConnections { .. }));
    node.now += seconds(119);
    assert!(!is_listing(node.handle(Input::Tick)), "a pull may take a while");
    node.now += seconds(1);
    assert!(is_listing(node.handle(Input::Tick)));
    node.now += seconds(60);
    assert!(!is_listing(node.handle(Input::Tick)), "the first list is not answered");
    let remote = "192.0.2.1:443".parse().unwrap();
    let silent = TcpConnection {
        local: "10.0.0.7:40000".parse().unwrap(),
        remote,
        cookie: 1,
        silent_for: seconds(150),
        unread: 0,
    };
    let actions = node.handle(Input::ConnectionsEnded(vec![silent]));
    assert_eq!(reports(&actions), [("q", PodReportKind::PullEnded)], "q opted in, and p did not");
    let actions = node.handle(Input::Tick);
    let expected = Action::EndConnections { after: seconds(120), silent_before: [remote].into() };
    assert!(actions.contains(&expected), "{actions:?}");
    assert!(reports(&node.handle(Input::ConnectionsEnded(vec![silent]))).is_empty(), "one Event for each pod");
    node.now += seconds(9);
    assert!(!is_listing(node.handle(Input::Tick)));
}

#[test]
fn a_broken_record_is_removed_after_two_minutes_where_registries_are_probed() {
    for is_probing in [true, false] {
        let mut node = TestNode::new();
        node.pods.options.is_probing = is_probing;
        let mut view = pod("p", "");
        view.containers[0].waiting =
            waiting("CreateContainerError", "failed to unpack: content digest sha256:00: not found");
        node.apply(view);
        node.answer("p", opted_in());
        let is_removal = |actions: Vec<Action>| actions.iter().any(|a| matches!(a, Action::RemoveRecord { .. }));
        node.now += seconds(119);
        assert!(!is_removal(node.end(failed(RecoveryEnd::NoProvider, RecoveryOutcome::NoProvider))));
        node.now += seconds(1);
        assert!(recovers(&node.handle(Input::Due)));
        assert_eq!(is_removal(node.end(failed(RecoveryEnd::NoProvider, RecoveryOutcome::NoProvider))), is_probing);
    }
}

#[test]
fn one_measurement_of_the_disks_is_in_flight_while_a_refused_recovery_waits() {
    let mut node = TestNode::new();
    let is_measured = |actions: Vec<Action>| actions.contains(&Action::MeasureDisks);
    node.facts.rejected = true;
    assert!(!is_measured(node.handle(Input::Tick)), "no pod waits");
    node.apply(pod("p", REFUSED));
    assert!(is_measured(node.handle(Input::Tick)));
    assert!(!is_measured(node.handle(Input::Tick)));
    node.handle(Input::DisksMeasured { has_room: false });
    assert!(is_measured(node.handle(Input::Tick)));
}

#[test]
fn a_namespace_without_opt_in_recovers_nothing_and_is_observed_once() {
    let mut node = TestNode::new();
    let sources = || Ok(OptInSources { namespace: Arc::new(NamespaceView::default()), owners: None });
    for round in 0..3 {
        node.apply(pod("p", REFUSED));
        assert_eq!(node.answer("p", sources()).len(), usize::from(round == 0));
    }
}
