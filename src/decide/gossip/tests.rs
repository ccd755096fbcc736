//! What the protocol does, among a few agents.

mod liars;
mod liveness;
mod village;

use std::time::Duration;

use super::*;
use crate::model::{
    ContentChange, Entry, Farewell, Head, Item, Profile, Refutation, Reply, Snapshot, Suspicion, changes_digest,
    state_digest,
};
use village::{Village, blob, id, peer, stamp};

const NOBODY: [PeerId; 0] = [];

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn entry_of(publisher: u8, sequence: u64, items: &[Item]) -> Entry {
    let changes: Vec<_> = items.iter().cloned().map(ContentChange::Added).collect();
    let mut head = Head {
        publisher: id(publisher),
        epoch: 1,
        sequence,
        changes: changes_digest(&changes),
        state: state_digest(items),
        signature: [0; 64].into(),
    };
    head.signature = stamp(id(publisher), &head.signed());
    Entry { head, changes }
}

#[test]
fn agents_that_know_one_of_them_come_to_know_all_and_what_all_hold() {
    let village = Village::grown(1..=20);
    for number in 1..=20 {
        let others: Vec<_> = (1..=20).filter(|other| *other != number).collect();
        assert_eq!(village.up(number), others, "according to {number}");
        for other in others {
            assert_eq!(village.holders(number, other), [id(other)], "{other}'s, according to {number}");
        }
    }
    assert!(village.houses.values().all(|house| house.blamed.is_empty() && house.refused.is_empty()));
}

#[test]
fn nobody_is_up_who_was_only_met_at_the_door() {
    let mut village = Village::of([1]);
    let now = village.now;
    let house = village.house(1);
    house.protocol.admitted(peer(2), seconds(60), &mut house.table, now);
    assert!(matches!(village.house(1).protocol.next(), Some(Output::Allow(_))));
    assert!(matches!(village.house(1).protocol.next(), Some(Output::Dial(_))));
    assert_eq!(village.house(1).protocol.next(), None);
    assert!(village.up(1).is_empty());
}

#[test]
fn a_newcomer_gets_everything_from_one_neighbour_in_one_question() {
    let mut village = Village::grown(1..=6);
    for number in 1..=6 {
        for round in 0..4 {
            village.adds(number, [blob(100 + 10 * number + round)]);
            village.pass(seconds(1));
        }
    }
    village.build(9, 1, "good 86400");
    village.meet(1, 9);
    village.pass(seconds(15));
    assert_eq!(village.holders(9, 163), [id(6)]);
    let snapshots = village.house(9).questions.iter().filter(|question| matches!(question, Question::Snapshot(_)));
    assert_eq!(snapshots.count(), 1);
}

#[test]
fn what_was_missed_is_asked_for_entry_by_entry_and_then_known() {
    let mut village = Village::grown(1..=3);
    village.house(3).is_cut_off = true;
    village.adds(1, [blob(101)]);
    village.pass(Duration::from_millis(1000));
    village.house(3).is_cut_off = false;
    village.house(3).questions.clear();
    assert_eq!(village.holders(3, 101), NOBODY);
    village.adds(1, [blob(102)]);
    village.pass(seconds(5));
    assert_eq!((village.holders(3, 101), village.holders(3, 102)), (vec![id(1)], vec![id(1)]));
    let asked = &village.house(3).questions;
    assert!(asked.iter().any(|question| matches!(question, Question::Entries { after: 1, .. })), "{asked:?}");
    assert!(!asked.iter().any(|question| matches!(question, Question::Snapshot(_))), "{asked:?}");
}

#[test]
fn a_loss_that_no_gap_shows_is_found_by_comparing() {
    let mut village = Village::grown(1..=3);
    village.house(3).is_cut_off = true;
    village.adds(1, [blob(101)]);
    village.pass(Duration::from_millis(1000));
    village.house(3).is_cut_off = false;
    village.pass(seconds(15));
    assert_eq!(village.holders(3, 101), [id(1)]);
}

#[test]
fn an_item_that_came_and_went_between_two_entries_is_not_told() {
    let mut log = Log::new(id(1), 1);
    log.record(vec![ContentChange::Added(blob(1)), ContentChange::Added(blob(2))]);
    log.record(vec![ContentChange::Removed(blob(1))]);
    let entries = log.entries(|message| stamp(id(1), message));
    assert_eq!(entries[0].changes, [ContentChange::Added(blob(2))]);
    assert_eq!(entries[0].head.state, state_digest(&[blob(2)]));
}

#[test]
fn each_entry_of_a_long_batch_is_signed_with_what_is_held_after_it() {
    let mut log = Log::new(id(1), 1);
    let items: Vec<_> = (0..300u32).map(|n| Item::Blob(crate::oci::Digest::of(&n.to_be_bytes()))).collect();
    log.record(items.into_iter().map(ContentChange::Added).collect());
    let mut held = std::collections::BTreeSet::new();
    let entries = log.entries(|message| stamp(id(1), message));
    assert_eq!(entries.len(), 3);
    for Entry { head, changes } in entries {
        held.extend(changes.into_iter().map(|change| change.item().clone()));
        assert_eq!(head.state, state_digest(&held));
    }
}

#[test]
fn a_process_whose_clock_went_back_finds_out_and_is_believed() {
    let mut village = Village::of([1, 2, 3]);
    village.build(3, 1_000, "good 86400");
    village.meet(1, 2);
    village.meet(1, 3);
    village.adds(3, [blob(3)]);
    village.pass(seconds(15));
    village.kill(3);
    village.build(3, 7, "good 86400");
    village.meet(1, 3);
    village.adds(3, [blob(103)]);
    village.pass(seconds(30));
    assert_eq!((village.holders(2, 103), village.holders(2, 3)), (vec![id(3)], vec![]));
    assert!(village.house(3).protocol.log.epoch() > 1_000);
}

#[test]
fn a_member_whose_credential_is_over_and_not_renewed_is_dropped() {
    let mut village = Village::of([1, 2]);
    village.build(3, 1, "good 60");
    village.meet(1, 2);
    village.meet(1, 3);
    village.pass(seconds(15));
    assert_eq!(village.up(2), [1, 3]);
    village.pass(seconds(60));
    assert_eq!(village.up(2), [1]);
    let (address, now) = (peer(3).transfer, village.now);
    village.house(3).protocol.introduce(Credential::new("good 600".into()), address, address, None, now);
    village.pass(seconds(30));
    assert_eq!(village.up(2), [1, 3], "renewed");
}

#[test]
fn nobody_believes_one_without_a_good_credential_whoever_lets_it_in() {
    let mut village = Village::grown(1..=4);
    village.build(9, 1, "stolen");
    village.meet(1, 9);
    village.adds(9, [blob(109)]);
    village.pass(seconds(30));
    for number in 1..=4 {
        assert!(!village.up(number).contains(&9));
        assert_eq!(village.holders(number, 109), NOBODY);
    }
}

#[test]
fn a_question_to_one_who_is_dropped_is_put_to_another() {
    let mut village = Village::grown(1..=4);
    let now = village.now;
    let house = village.house(4);
    house.protocol.gossip(id(2), Gossip::Entry(entry_of(1, 3, &[blob(1)])), &mut house.table, now);
    let later = now + seconds(3);
    house.protocol.ask(later);
    let Some(Output::Ask(_, asked, Question::Entries { .. })) = house.protocol.next() else { panic!("a question") };
    house.protocol.dismissed(asked, &mut house.table, later);
    house.protocol.ask(later + seconds(3));
    let again = std::iter::from_fn(|| house.protocol.next());
    let others: Vec<_> =
        again.filter_map(|output| if let Output::Ask(_, peer, _) = output { Some(peer) } else { None }).collect();
    assert!(!others.is_empty() && !others.contains(&asked), "{others:?}");
}

#[test]
fn of_one_pod_two_keys_are_believed() {
    let mut village = Village::grown(1..=3);
    for number in 11..=15 {
        village.build(number, number.into(), "good 86400 a-pod");
        village.meet(1, number);
        village.pass(seconds(3));
    }
    village.pass(seconds(15));
    assert_eq!(village.up(2), [1, 3, 14, 15]);
}

#[test]
fn one_whose_credential_is_over_when_it_moves_is_no_provider() {
    let mut village = Village::grown(1..=3);
    let (now, moved) = (village.now, ([10, 0, 9, 9], 4701).into());
    let late = format!("good {}", village.elapsed().as_secs());
    village.house(3).protocol.introduce(Credential::new(late), moved, moved, None, now);
    village.settle();
    assert_eq!((village.holders(1, 3), village.up(1)), (vec![], vec![2]));
}

#[test]
fn an_agent_with_as_many_members_as_may_be_counts_the_others_and_blames_nobody() {
    let mut village = Village::of(1..=5);
    village.house(1).protocol.roster.limit = 2;
    for number in 2..=5 {
        village.meet(1, number);
    }
    village.pass(seconds(30));
    assert_eq!(village.up(1).len(), 2);
    let (now, house) = (village.now, village.house(1));
    assert!(house.protocol.status(&house.table, now).over_limit > 0);
    assert!(house.blamed.is_empty());
}

#[test]
fn a_member_that_moves_is_told_of_again() {
    let mut village = Village::grown(1..=4);
    let (now, moved) = (village.now, ([10, 0, 9, 9], 4701).into());
    village.house(4).protocol.introduce(Credential::new("good 86400".into()), moved, moved, None, now);
    village.pass(seconds(1));
    let known = village.houses[&2].protocol.roster.get(id(4)).unwrap().introduction.clone().unwrap();
    let Profile { transfer, version, .. } = known.profile;
    assert_eq!((transfer, village.houses[&2].table.peers().len()), (moved, 3));
    assert!(version > 1);
    assert_eq!(village.holders(2, 4), [id(4)]);
}

#[test]
fn an_agent_to_whom_everybody_connected_keeps_those_it_chose_and_parts_with_the_rest() {
    let mut village = Village::of(1..=60);
    (2..=60).for_each(|number| village.meet(1, number));
    village.pass(seconds(90));
    assert_eq!(village.up(1).len(), 59);
    let now = village.now;
    let linked = village.houses[&1].protocol.status(&village.houses[&1].table, now).neighbours;
    assert!(linked <= neighbours::MANY, "{linked} neighbours");
    assert!((1..=60).all(|number| village.up(number).len() == 59));
}
