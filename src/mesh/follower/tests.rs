//! Order, gaps, restarts and lies; then all of it at random against a log.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::log::Log;
use super::*;
use crate::oci::{Digest, Repository};
use crate::wire;

fn blob(number: u64) -> ContentChange {
    ContentChange::BlobAdded(Digest::of(&number.to_le_bytes()))
}

/// Announces one blob of the same number.
fn announcement(epoch: u64, sequence: u64) -> Announcement {
    Announcement { epoch, sequence, changes: vec![blob(sequence)] }
}

fn snapshot(epoch: u64, sequence: u64) -> Snapshot {
    Snapshot { epoch, sequence, items: (1..=sequence).map(blob).collect() }
}

/// A follower that has taken the snapshot of epoch 1 up to `sequence`.
fn following(sequence: u64, now: Instant) -> Follower {
    let mut follower = Follower::new(now);
    assert!(follower.asks(now), "a new follower knows nothing");
    follower.asked();
    assert!(!follower.asks(now), "one question at a time");
    follower.replace(snapshot(1, sequence), now, 0.0).unwrap().unwrap();
    follower
}

#[test]
fn announcements_in_order_are_used_at_once() {
    let now = Instant::now();
    let mut follower = following(3, now);
    assert_eq!(follower.receive(announcement(1, 4), now), Receipt::Next(vec![blob(4)]));
    assert_eq!(follower.receive(announcement(1, 5), now), Receipt::Next(vec![blob(5)]));
    assert!(!follower.asks(now + REST));
}

#[test]
fn announcements_that_overtook_one_another_are_put_in_order_without_a_question() {
    let now = Instant::now();
    let mut follower = following(0, now);
    assert_eq!(follower.receive(announcement(1, 3), now), Receipt::Held);
    assert_eq!(follower.receive(announcement(1, 2), now), Receipt::Held);
    assert_eq!(follower.receive(announcement(1, 1), now), Receipt::Next(vec![blob(1), blob(2), blob(3)]));
    assert!(!follower.asks(now + Duration::from_secs(3600)));
}

#[test]
fn a_gap_is_repaired_by_a_snapshot_and_what_followed_it() {
    let now = Instant::now();
    let mut follower = following(1, now);
    let now = now + REST;
    assert_eq!(follower.receive(announcement(1, 3), now), Receipt::Held);
    assert!(!follower.asks(now), "it may still come");
    let now = now + PATIENCE;
    assert!(follower.asks(now));
    follower.asked();
    assert_eq!(follower.receive(announcement(1, 5), now), Receipt::Held);
    let replacement = follower.replace(snapshot(1, 4), now, 0.0).unwrap().unwrap();
    assert_eq!(replacement, Replacement { items: snapshot(1, 4).items, changes: vec![blob(5)] });
    assert_eq!(follower.receive(announcement(1, 6), now), Receipt::Next(vec![blob(6)]));
    assert!(!follower.asks(now + Duration::from_secs(3600)));
}

#[test]
fn what_a_snapshot_overtook_is_late_and_what_is_much_older_is_refused() {
    let now = Instant::now();
    let mut follower = following(100, now);
    assert_eq!(follower.receive(announcement(1, 100), now), Receipt::Late);
    assert_eq!(follower.receive(announcement(1, 101 - LATE), now), Receipt::Late);
    assert_eq!(follower.receive(announcement(1, 100 - LATE), now), Receipt::Refused("replayed"));
    assert_eq!(follower.receive(announcement(0, 101), now), Receipt::Refused("old_epoch"));
}

#[test]
fn a_new_epoch_makes_everything_before_void() {
    let now = Instant::now();
    let mut follower = following(9, now);
    let now = now + REST;
    assert_eq!(follower.receive(announcement(2, 2), now), Receipt::Held);
    assert!(follower.asks(now), "nothing of the old epoch helps, so there is nothing to wait for");
    follower.asked();
    let replacement = follower.replace(snapshot(2, 1), now, 0.0).unwrap().unwrap();
    assert_eq!(replacement, Replacement { items: vec![blob(1)], changes: vec![blob(2)] });
    assert_eq!(follower.receive(announcement(1, 10), now), Receipt::Refused("old_epoch"));
}

#[test]
fn the_peers_own_word_ends_an_epoch_even_if_its_clock_went_back() {
    let now = Instant::now();
    let mut follower = following(9, now);
    follower.doubt(now + REST);
    assert!(follower.asks(now + REST));
    follower.asked();
    assert!(follower.replace(snapshot(0, 2), now, 0.0).unwrap().is_some());
    assert_eq!(follower.receive(announcement(0, 3), now), Receipt::Next(vec![blob(3)]));
}

#[test]
fn a_snapshot_that_announcements_have_overtaken_changes_nothing() {
    let now = Instant::now();
    let mut follower = following(3, now);
    follower.doubt(now);
    follower.asked();
    assert_eq!(follower.receive(announcement(1, 4), now), Receipt::Next(vec![blob(4)]));
    assert_eq!(follower.replace(snapshot(1, 3), now, 0.0), Ok(None));
    assert!(!follower.asks(now + Duration::from_secs(3600)));
    assert_eq!(follower.receive(announcement(1, 5), now), Receipt::Next(vec![blob(5)]));
}

#[test]
fn a_peer_that_does_not_answer_is_asked_more_and_more_rarely() {
    let mut now = Instant::now();
    let mut follower = Follower::new(now);
    let mut waits = Vec::new();
    for _ in 0..8 {
        follower.asked();
        follower.failed(now, 1.0);
        let wait = (0..).map(Duration::from_secs).find(|wait| follower.asks(now + *wait)).unwrap();
        waits.push(wait.as_secs());
        now += wait;
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30, 30]);
}

#[test]
fn a_publisher_that_skips_numbers_without_end_costs_little() {
    let mut now = Instant::now();
    let mut follower = following(0, now);
    let mut asked = 0;
    // An hour, in which it announces every second what its snapshot never reaches.
    for second in 0..3600 {
        now += Duration::from_secs(1);
        follower.receive(announcement(1, 1000 + 2 * second), now);
        if follower.asks(now) {
            asked += 1;
            follower.asked();
            let _ = follower.replace(snapshot(1, 1), now, 0.5);
        }
        assert!(follower.held.len() <= MAX_HELD);
    }
    assert!(asked < 200, "asked {asked} times");
}

#[test]
fn a_publisher_that_leaves_gaps_in_earnest_is_asked_at_intervals() {
    let mut now = Instant::now();
    let mut follower = following(0, now);
    let mut asked = 0;
    for second in 1..=600 {
        now += Duration::from_secs(1);
        follower.receive(announcement(1, 2 * second), now);
        if follower.asks(now) {
            asked += 1;
            follower.asked();
            follower.replace(snapshot(1, 2 * second), now, 0.5).unwrap().unwrap();
        }
    }
    assert!((100..=120).contains(&asked), "asked {asked} times in 600 s");
}

#[test]
fn what_no_honest_peer_sends_is_refused() {
    let now = Instant::now();
    let name = |registry: &str, path: &str, tag: Option<&str>| {
        let repository = Repository { registry: registry.into(), path: path.into() };
        ContentChange::Tagged(repository, tag.map(str::to_owned), Digest::of(b""))
    };
    let long = "a".repeat(60_000);
    let refusals = [
        (announcement(1, 0), "bad_sequence"),
        (Announcement { epoch: 1, sequence: 1, changes: vec![blob(0); MAX_CHANGES + 1] }, "too_many_changes"),
        (Announcement { epoch: 1, sequence: 1, changes: vec![name("registry.test", &long, None)] }, "bad_name"),
        (Announcement { epoch: 1, sequence: 1, changes: vec![name("registry.test", "app", Some(&long))] }, "bad_name"),
        (Announcement { epoch: 1, sequence: 1, changes: vec![name("docker.io", "nginx", Some("v1"))] }, "bad_name"),
        (Announcement { epoch: 1, sequence: 1, changes: vec![name("", "", Some(""))] }, "bad_name"),
    ];
    for (announcement, reason) in refusals {
        assert_eq!(following(0, now).receive(announcement, now), Receipt::Refused(reason));
    }
    let proper = vec![name("registry.test:5000", "team/app", Some("v1")), name("docker.io", "library/nginx", None)];
    let fine = Announcement { epoch: 1, sequence: 1, changes: proper.clone() };
    assert_eq!(following(0, now).receive(fine, now), Receipt::Next(proper));
}

#[test]
fn a_snapshot_that_no_honest_peer_sends_is_refused_and_asked_again() {
    let now = Instant::now();
    let removal = vec![ContentChange::BlobRemoved(Digest::of(b""))];
    for (items, reason) in [(vec![blob(0); MAX_ITEMS + 1], "snapshot_too_long"), (removal, "snapshot_malformed")] {
        let mut follower = Follower::new(now);
        follower.asked();
        assert_eq!(follower.replace(Snapshot { epoch: 1, sequence: 1, items }, now, 1.0), Err(reason));
        assert!(!follower.asks(now) && follower.asks(now + Duration::from_secs(1)));
    }
}

#[test]
fn the_last_number_there_is_overflows_nothing() {
    let now = Instant::now();
    let mut follower = following(0, now);
    assert_eq!(follower.receive(announcement(1, u64::MAX), now), Receipt::Held);
    assert_eq!(follower.receive(announcement(u64::MAX, u64::MAX), now), Receipt::Held);
    follower.asked();
    let last = Snapshot { epoch: u64::MAX, sequence: u64::MAX, items: vec![] };
    assert!(follower.replace(last, now, 0.0).unwrap().is_some());
    assert_eq!(follower.receive(announcement(u64::MAX, u64::MAX), now), Receipt::Late);
}

/// What may happen between a publisher and a follower.
#[derive(Debug, Clone)]
enum Step {
    Change(u64, bool),
    Announce,
    /// The message at this place among those under way arrives.
    Deliver(usize),
    Lose(usize),
    Pass(u64),
    /// The publisher's answer to a question under way arrives, or does not.
    Answer(bool),
    Restart,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..6u64, any::<bool>()).prop_map(|(number, added)| Step::Change(number, added)),
        4 => Just(Step::Announce),
        6 => any::<usize>().prop_map(Step::Deliver),
        1 => any::<usize>().prop_map(Step::Lose),
        2 => (0..4000u64).prop_map(Step::Pass),
        3 => any::<bool>().prop_map(Step::Answer),
        1 => Just(Step::Restart),
    ]
}

/// A publisher, a network and a follower, and what the follower has told.
struct Scene {
    log: Log,
    holds: BTreeSet<ContentChange>,
    epoch: u64,
    under_way: Vec<Announcement>,
    follower: Follower,
    told: BTreeSet<ContentChange>,
    /// The snapshot on its way to the follower.
    answer: Option<Snapshot>,
    now: Instant,
}

impl Scene {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            log: Log::new(1),
            holds: BTreeSet::new(),
            epoch: 1,
            under_way: Vec::new(),
            follower: Follower::new(now),
            told: BTreeSet::new(),
            answer: None,
            now,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Change(number, true) => {
                self.holds.insert(blob(number));
                self.log.record(vec![blob(number)]);
            }
            Step::Change(number, false) => {
                self.holds.remove(&blob(number));
                self.log.record(vec![removal(blob(number))]);
            }
            Step::Announce => self.under_way.extend(self.log.announce()),
            Step::Deliver(at) if !self.under_way.is_empty() => {
                let announcement = self.under_way.remove(at % self.under_way.len());
                if let Receipt::Next(changes) = self.follower.receive(announcement, self.now) {
                    self.tell(changes);
                }
            }
            Step::Lose(at) if !self.under_way.is_empty() => {
                self.under_way.remove(at % self.under_way.len());
            }
            Step::Deliver(_) | Step::Lose(_) => {}
            Step::Pass(milliseconds) => self.now += Duration::from_millis(milliseconds),
            Step::Answer(arrives) => self.answer(arrives),
            Step::Restart => {
                self.epoch += 1;
                self.log = Log::new(self.epoch);
                self.log.record(self.holds.iter().cloned().collect());
            }
        }
        if self.follower.asks(self.now) {
            self.follower.asked();
            self.answer = Some(wire::decode(&self.log.snapshot().unwrap()).unwrap());
        }
    }

    fn answer(&mut self, arrives: bool) {
        let Some(snapshot) = self.answer.take() else { return };
        if !arrives {
            return self.follower.failed(self.now, 0.5);
        }
        if let Some(Replacement { items, changes }) = self.follower.replace(snapshot, self.now, 0.5).unwrap() {
            self.told = items.into_iter().collect();
            self.tell(changes);
        }
    }

    fn tell(&mut self, changes: Vec<ContentChange>) {
        for change in changes {
            match change {
                ContentChange::BlobRemoved(digest) => self.told.remove(&ContentChange::BlobAdded(digest)),
                added => self.told.insert(added),
            };
        }
    }
}

fn removal(item: ContentChange) -> ContentChange {
    let ContentChange::BlobAdded(digest) = item else { unreachable!("only blobs here") };
    ContentChange::BlobRemoved(digest)
}

proptest! {
    #[test]
    fn whatever_is_lost_or_overtaken_a_mark_and_some_time_make_it_right(
        steps in proptest::collection::vec(any_step(), 0..120),
    ) {
        let mut scene = Scene::new();
        for step in steps {
            scene.step(step);
        }
        // All under way is lost but the mark at the end.
        scene.under_way.clear();
        scene.step(Step::Announce);
        scene.under_way = vec![scene.log.mark()];
        scene.step(Step::Deliver(0));
        for _ in 0..4 {
            scene.step(Step::Pass(31_000));
            scene.step(Step::Answer(true));
        }
        prop_assert_eq!(&scene.told, &scene.holds);
        prop_assert!(scene.follower.held.is_empty(), "{:?}", scene.follower);
    }
}
