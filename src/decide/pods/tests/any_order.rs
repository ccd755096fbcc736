//! Any order of events, for three pods with two containers each and three images.

mod driver;

use proptest::prelude::*;
use proptest::sample::Index;

use self::driver::{Driver, FORGOTTEN_AFTER};
use super::*;

/// The status of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Pending,
    Refused,
    NotFound,
    Denied,
    BackOff,
    NotUnderstood,
    Crashing,
    Running,
}

/// The answer to a read of the opt-in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Yes,
    No,
    Failed,
}

#[derive(Debug, Clone)]
enum Event {
    /// A pod is new or changed. Each container has an image and a status.
    Apply {
        pod: u8,
        containers: [(u8, Status); 2],
        is_ending: bool,
    },
    Delete(u8),
    Sync(Vec<u8>),
    OptIn(Index, Answer),
    /// The kubelet's Events say that it pulls, or nothing.
    KubeletEvents(Index, bool),
    Probe(Index, bool),
    /// The recovery ends. A canceled recovery may end in any way.
    End(Index, Option<RecoveryEnd>),
    RemoveRecord(Index),
    /// The list of connections ends one, or none.
    Connections(bool),
    Providers(bool),
    KillSwitch(bool),
    Concurrency(u8),
    ImageRecords(Vec<u8>),
    Imports,
    Recording(bool),
    Tick,
    /// In milliseconds.
    Wait(u64),
    WaitUntilDue,
}

fn apply() -> impl Strategy<Value = Event> {
    let status = prop_oneof![
        3 => Just(Status::Pending),
        4 => Just(Status::Refused),
        1 => Just(Status::NotFound),
        1 => Just(Status::Denied),
        1 => Just(Status::BackOff),
        1 => Just(Status::NotUnderstood),
        1 => Just(Status::Crashing),
        2 => Just(Status::Running),
    ];
    let container = || (0_u8..3, status.clone());
    (0_u8..3, container(), container(), prop::bool::weighted(0.1)).prop_map(|(pod, one, two, is_ending)| Event::Apply {
        pod,
        containers: [one, two],
        is_ending,
    })
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let answer = prop_oneof![6 => Just(Answer::Yes), 1 => Just(Answer::No), 2 => Just(Answer::Failed)];
    let end = prop_oneof![
        4 => Just(Some(RecoveryEnd::Done)),
        2 => Just(Some(RecoveryEnd::NoProvider)),
        2 => Just(Some(RecoveryEnd::Failed)),
        1 => Just(Some(RecoveryEnd::Final)),
        2 => Just(None),
    ];
    let one = prop_oneof![
        8 => apply(),
        1 => (0_u8..3).prop_map(Event::Delete),
        1 => prop::collection::vec(0_u8..3, 0..3).prop_map(Event::Sync),
        10 => (any::<Index>(), answer).prop_map(|(index, answer)| Event::OptIn(index, answer)),
        3 => (any::<Index>(), any::<bool>()).prop_map(|(index, pulls)| Event::KubeletEvents(index, pulls)),
        3 => (any::<Index>(), any::<bool>()).prop_map(|(index, answers)| Event::Probe(index, answers)),
        6 => (any::<Index>(), end).prop_map(|(index, end)| Event::End(index, end)),
        1 => any::<Index>().prop_map(Event::RemoveRecord),
        1 => any::<bool>().prop_map(Event::Connections),
        1 => any::<bool>().prop_map(Event::Providers),
        1 => prop::bool::weighted(0.3).prop_map(Event::KillSwitch),
        1 => (1_u8..3).prop_map(Event::Concurrency),
        1 => prop::collection::vec(0_u8..3, 0..3).prop_map(Event::ImageRecords),
        1 => Just(Event::Imports),
        1 => any::<bool>().prop_map(Event::Recording),
        3 => Just(Event::Tick),
        3 => (0_u64..60_000).prop_map(Event::Wait),
        4 => Just(Event::WaitUntilDue),
    ];
    prop::collection::vec(one, 1..250)
}

fn options() -> impl Strategy<Value = RecoveryOptions> {
    let default = RecoveryOptions::default();
    prop_oneof![
        2 => Just(default),
        2 => Just(RecoveryOptions { delete_pods: true, end_stalled_pulls: true, ..default }),
        1 => Just(RecoveryOptions { dry_run: true, ..default }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// The driver checks every action: no topic is reported twice about a subject, no recovery runs
    /// twice at a time or is canceled twice, and no pod is nudged without an import.
    #[test]
    fn no_pod_is_told_twice_or_forgotten_and_every_recovery_ends(events in events(), options in options()) {
        let mut driver = Driver::new(options);
        for event in events {
            driver.apply(event)?;
        }
        driver.rest(FORGOTTEN_AFTER)?;
        driver.check_that_no_pod_is_forgotten()?;
        driver.remove_all_pods()?;
    }
}
