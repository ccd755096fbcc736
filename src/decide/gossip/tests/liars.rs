//! What members do that no honest one does, and what comes of it.

use super::*;

#[test]
fn what_somebody_else_would_have_said_is_refused_and_the_third_time_its_forger_is_banned() {
    let mut village = Village::grown(1..=3);
    for number in 0..3 {
        let mut forged = entry_of(1, 2 + number, &[blob(99)]);
        forged.head.signature = stamp(id(2), &forged.head.signed());
        village.says(2, Gossip::Entry(forged));
    }
    assert_eq!(village.holders(3, 99), NOBODY);
    assert_eq!(village.house(3).blamed.last(), Some(&(id(2), "forged", true)));
    village.pass(seconds(1));
    assert_eq!(village.up(3), [1], "and nothing of it counts");
    village.pass(seconds(700));
    assert_eq!(village.up(3), [1, 2], "until the ban is over");
}

#[test]
fn changes_that_are_not_those_that_were_signed_are_refused() {
    let mut village = Village::grown(1..=3);
    let mut changed = entry_of(2, 2, &[blob(2), blob(102)]);
    changed.changes = vec![ContentChange::Added(blob(99))];
    village.says(1, Gossip::Entry(changed));
    assert_eq!(village.holders(3, 99), NOBODY);
    assert_eq!(village.house(3).blamed, [(id(1), "malformed", false)]);
}

#[test]
fn who_signs_two_entries_with_one_number_is_banned() {
    let mut village = Village::grown(1..=3);
    village.says(1, Gossip::Entry(entry_of(2, 2, &[blob(2), blob(102)])));
    assert!(village.house(3).blamed.is_empty(), "signed by 2, whoever brings it");
    village.says(1, Gossip::Entry(entry_of(2, 2, &[blob(2), blob(202)])));
    assert_eq!(village.house(3).blamed, [(id(2), "contradiction", true)], "and who brought it is not to blame");
}

#[test]
fn a_snapshot_that_is_not_what_its_publishers_signed_is_refused() {
    let mut village = Village::grown(1..=4);
    for round in 0..4 {
        village.adds(2, [blob(120 + round)]);
        village.pass(seconds(1));
    }
    village.liar = Some(|of, reply| match reply {
        Reply::Snapshot(Snapshot { heads, mut items }) if of == 1 => {
            items.retain(|(item, _)| *item != blob(121));
            Reply::Snapshot(Snapshot { heads, items })
        }
        reply => reply,
    });
    village.build(9, 1, "good 86400");
    village.meet(1, 9);
    village.pass(seconds(60));
    assert_eq!(village.holders(9, 121), [id(2)], "somebody else gave the true one");
    assert!(village.house(9).blamed.is_empty(), "it may have been the publisher who lied");
}

#[test]
fn who_tells_more_than_anybody_needs_to_is_slowed_down() {
    let mut village = Village::grown(1..=3);
    for sequence in 2..100 {
        village.says(1, Gossip::Entry(entry_of(2, sequence, &[blob(2)])));
    }
    let known = village.houses[&3].protocol.roster.get(id(2)).unwrap().log.at();
    assert!((60..70).contains(&known), "{known} entries were taken at once");
}

#[test]
fn who_plays_old_entries_again_harms_nobody() {
    let mut village = Village::grown(1..=3);
    for _ in 0..200 {
        let now = village.now;
        let house = village.house(3);
        house.protocol.gossip(id(1), Gossip::Entry(entry_of(2, 1, &[blob(2)])), &mut house.table, now);
    }
    village.adds(2, [blob(102)]);
    village.pass(seconds(2));
    assert_eq!(village.holders(3, 102), [id(2)]);
    assert!(village.house(3).blamed.is_empty());
}

#[test]
fn an_entry_that_nobody_has_is_not_asked_for_without_end() {
    let mut village = Village::grown(1..=3);
    village.liar = Some(|of, reply| match reply {
        Reply::Marks(_) if of == 1 => {
            let mark = |peer| Mark { peer, epoch: 1, version: 1, incarnation: 0, sequence: u64::MAX, down: false };
            Reply::Marks(vec![mark(id(2))])
        }
        reply => reply,
    });
    village.pass(seconds(60));
    village.liar = None;
    village.pass(seconds(20));
    let log = &village.houses[&3].protocol.roster.get(id(2)).unwrap().log;
    assert_eq!((log.at(), log.behind()), (1, 0));
}

#[test]
fn members_that_a_neighbour_calls_dead_are_looked_for_a_few_at_a_time() {
    let mut village = Village::grown(1..=60);
    let mark = |number| Mark { peer: id(number), epoch: 1, version: 2, incarnation: 0, sequence: 1, down: true };
    let marks = Reply::Marks((2..=60).map(mark).collect());
    let now = village.now;
    let house = village.house(1);
    house.protocol.compare_with(id(2));
    let Some(Output::Ask(ask, ..)) = house.protocol.next() else { panic!("a question") };
    house.protocol.answered(ask, marks, &mut house.table, now);
    let outputs: Vec<_> = std::iter::from_fn(|| house.protocol.next()).collect();
    let tried = outputs.iter().filter(|output| matches!(output, Output::Greet(_) | Output::Dial(_))).count();
    assert!((1..=16).contains(&tried), "{tried} at once");
}
