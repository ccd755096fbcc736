//! Who is taken for dead, by whose word, and who comes back.

use super::*;

#[test]
fn a_node_that_is_gone_is_forgotten_everywhere_within_three_seconds() {
    let mut village = Village::grown(1..=20);
    village.house(7).is_cut_off = true;
    village.pass(Duration::from_millis(2750));
    for number in (1..=20).filter(|number| *number != 7) {
        assert!(!village.up(number).contains(&7), "according to {number}");
        assert_eq!(village.holders(number, 7), NOBODY, "according to {number}");
        assert_eq!(village.up(number).len(), 18, "according to {number} nobody else is");
    }
}

#[test]
fn a_process_that_is_killed_is_forgotten_at_once() {
    let mut village = Village::grown(1..=20);
    village.kill(7);
    for number in (1..=20).filter(|number| *number != 7) {
        assert!(!village.up(number).contains(&7), "according to {number}");
    }
}

#[test]
fn one_that_was_cut_off_for_a_while_is_back_by_its_own_word_and_nobody_asks_for_what_it_holds() {
    let mut village = Village::grown(1..=20);
    village.house(7).is_cut_off = true;
    village.pass(seconds(20));
    assert!(!village.up(1).contains(&7));
    village.house(7).is_cut_off = false;
    village.houses.values_mut().for_each(|house| house.questions.clear());
    village.pass(seconds(60));
    for number in (1..=20).filter(|number| *number != 7) {
        assert!(village.up(number).contains(&7), "according to {number}");
        assert_eq!(village.holders(number, 7), [id(7)], "according to {number}");
        let asked = &village.house(number).questions;
        assert!(!asked.iter().any(|question| matches!(question, Question::Snapshot(_))), "{asked:?}");
    }
    assert_eq!(village.up(7).len(), 19, "and it knows everybody again");
}

fn suspicion(accused: u8, by: u8) -> Gossip {
    let mut suspicion =
        Suspicion { accused: id(accused), epoch: 1, incarnation: 0, by: id(by), signature: [0; 64].into() };
    suspicion.signature = stamp(id(by), &suspicion.signed());
    Gossip::Suspicion(suspicion)
}

#[test]
fn two_who_accuse_a_living_one_deceive_nobody_for_long() {
    let mut village = Village::grown(1..=20);
    village.says(2, suspicion(7, 2));
    village.says(3, suspicion(7, 3));
    village.pass(seconds(2));
    for number in (1..=20).filter(|number| *number != 7) {
        assert!(village.up(number).contains(&7), "according to {number}");
    }
}

#[test]
fn the_word_of_one_witness_is_not_enough() {
    let mut village = Village::grown(1..=6);
    village.house(5).is_cut_off = true;
    village.says(2, suspicion(5, 2));
    let gone = (1..=6).filter(|number| *number != 5 && !village.up(*number).contains(&5));
    assert_eq!(gone.count(), 0);
}

#[test]
fn one_whom_a_single_neighbour_saw_die_is_looked_for_by_others() {
    let mut village = Village::grown(1..=20);
    let linked: Vec<_> = (1..=20).filter(|number| *number != 7).collect();
    // Nobody but 2 is connected to it.
    for number in linked.into_iter().filter(|number| *number != 2) {
        village.part(7, number);
    }
    village.house(7).is_cut_off = true;
    village.pass(seconds(5));
    let alive = (1..=20).filter(|number| *number != 7 && village.up(*number).contains(&7));
    assert_eq!(alive.count(), 0);
}

#[test]
fn one_that_is_being_dialled_when_others_doubt_it_is_missed_when_the_dial_fails() {
    let mut village = Village::grown(1..=20);
    village.part(1, 7);
    let now = village.now + seconds(60);
    let house = village.house(1);
    assert!(house.protocol.try_one(id(7), now));
    house.protocol.look_for(id(7), now);
    house.protocol.unreachable(id(7), &mut house.table, now);
    assert_eq!(village.holders(1, 7), NOBODY);
}

#[test]
fn one_that_cannot_be_fetched_from_is_no_provider_here_at_once_and_again_when_it_is_found_alive() {
    let mut village = Village::grown(1..=20);
    village.part(1, 7);
    let now = village.now;
    let house = village.house(1);
    house.protocol.doubted(id(7), &mut house.table, now);
    assert_eq!(village.holders(1, 7), NOBODY);
    village.pass(seconds(60));
    assert_eq!(village.holders(1, 7), [id(7)]);
}

#[test]
fn two_keys_of_one_pod_are_one_witness() {
    let mut village = Village::of(1..=4);
    for number in [5, 6] {
        village.build(number, 1, "good 86400 a-pod");
    }
    (2..=6).for_each(|number| village.meet(1, number));
    village.pass(seconds(30));
    village.house(4).is_cut_off = true;
    // Nobody has heard it lately, and nobody accuses it yet.
    village.pass(Duration::from_millis(1250));
    village.says(5, suspicion(4, 5));
    village.says(6, suspicion(4, 6));
    assert!((1..=3).all(|number| village.up(number).contains(&4)));
    village.says(3, suspicion(4, 3));
    assert!((1..=2).all(|number| !village.up(number).contains(&4)));
}

#[test]
fn who_accuses_without_end_is_answered_once_in_a_while_and_believed_by_nobody() {
    let mut village = Village::grown(1..=6);
    let refutations = |village: &mut Village| village.house(5).protocol.incarnation;
    for incarnation in 0..100 {
        let mut suspicion = Suspicion { accused: id(5), epoch: 1, incarnation, by: id(2), signature: [0; 64].into() };
        suspicion.signature = stamp(id(2), &suspicion.signed());
        village.says(2, Gossip::Suspicion(suspicion));
    }
    assert_eq!(refutations(&mut village), 1, "of those that are not of its present incarnation it hears none");
    let mut high =
        Suspicion { accused: id(5), epoch: 1, incarnation: u64::MAX - 1, by: id(2), signature: [0; 64].into() };
    high.signature = stamp(id(2), &high.signed());
    village.says(2, Gossip::Suspicion(high));
    village.pass(seconds(5));
    assert!(refutations(&mut village) < 10);
    assert!((1..=6).filter(|number| *number != 5).all(|number| village.up(number).contains(&5)));
}

#[test]
fn who_answers_and_would_not_have_us_is_not_accused() {
    let mut village = Village::grown(1..=20);
    village.part(1, 7);
    let now = village.now;
    let house = village.house(1);
    house.protocol.look_for(id(7), now);
    house.protocol.declined(id(7), now);
    village.pass(seconds(5));
    assert!(village.up(1).contains(&7));
    assert!(village.houses[&7].protocol.incarnation == 0, "it had nothing to refute");
}

#[test]
fn of_two_agents_one_is_witness_enough() {
    let mut village = Village::grown(1..=2);
    village.kill(2);
    village.pass(seconds(1));
    assert!(village.up(1).is_empty());
}

#[test]
fn who_says_farewell_is_gone_and_a_new_process_of_it_is_believed() {
    let mut village = Village::grown(1..=5);
    village.house(5).protocol.leave();
    village.pass(Duration::from_millis(250));
    assert!((1..=4).all(|number| !village.up(number).contains(&5)));
    village.kill(5);
    village.build(5, 2, "good 86400");
    village.meet(1, 5);
    village.adds(5, [blob(105)]);
    village.pass(seconds(15));
    for number in 1..=4 {
        assert_eq!(village.holders(number, 105), [id(5)]);
        assert_eq!(village.holders(number, 5), NOBODY, "what the process before it told is void");
    }
}

#[test]
fn a_neighbour_with_two_connections_of_which_one_never_answered_is_missed_when_both_break() {
    let mut village = Village::grown(1..=20);
    village.doubly_linked(1, 7);
    village.kill(7);
    assert!((1..=20).filter(|number| *number != 7).all(|number| !village.up(number).contains(&7)));
}

#[test]
fn what_is_said_in_the_name_of_the_dead_process_is_ignored() {
    let mut village = Village::grown(1..=3);
    let mut farewell = Farewell { peer: id(2), epoch: 0, signature: [0; 64].into() };
    farewell.signature = stamp(id(2), &farewell.signed());
    village.says(1, Gossip::Farewell(farewell));
    let mut refutation = Refutation { peer: id(2), epoch: 0, incarnation: 9, signature: [0; 64].into() };
    refutation.signature = stamp(id(2), &refutation.signed());
    village.says(1, Gossip::Refutation(refutation));
    assert_eq!(village.up(3), [1, 2]);
    assert!(village.house(3).blamed.is_empty());
}
