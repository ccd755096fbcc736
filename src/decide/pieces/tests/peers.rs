//! Of whom it is asked.

use super::*;

#[test]
fn about_twenty_are_followed_a_quarter_of_them_in_other_zones() {
    let list: Vec<_> = (0..200).map(|n| of_zone(if n < 100 { "here" } else { "there" }, partial(n))).collect();
    let mut pool = Pool::new(Some("here".to_owned().try_into().unwrap()), 1);
    pool.cross(false);
    pool.add(blob("blob"), cut(10));
    pool.candidates(blob("blob"), &list);
    let changes = pool.neighbours(Instant::now());
    let followed: Vec<_> = changes.iter().map(|change| matches!(change, Neighbour::Follow { .. })).collect();
    assert_eq!(followed, [true; 20]);
    let far = pool.blobs[0].links.iter().filter(|link| link.is_far).count();
    assert_eq!(far, 5);
    pool.candidates(blob("blob"), &list);
    assert_eq!(pool.neighbours(Instant::now()), [], "the same list changes nothing");
}

#[test]
fn other_zones_are_asked_only_when_they_may_be_and_for_what_our_own_does_not_have() {
    let list = [of_zone("here", partial(1)), of_zone("there", partial(2))];
    let mut bench = Bench::in_zone(Some("here"), 8, &list);
    bench.hears(1, &these(&[0, 1, 2, 3]));
    bench.hears(2, &these(&[0, 1, 2, 3, 4, 5]));
    bench.pool.cross(false);
    assert!(asked_of(&bench.asks(), 2).is_empty());
    bench.pool.cross(true);
    let mut far = asked_of(&bench.asks(), 2);
    far.sort_unstable();
    assert_eq!(far, [4, 5]);
    bench.pool.cross(false);
    assert_eq!(bench.pool.cancels().len(), 2, "what has not begun is taken back");
}

#[test]
fn what_is_rare_in_our_own_zone_comes_first_however_common_it_is_elsewhere() {
    let near = [of_zone("a", partial(1)), of_zone("a", partial(2))];
    let far: Vec<_> = (3..=5).map(|n| of_zone("b", partial(n))).collect();
    let mut bench = Bench::in_zone(Some("a"), 40, &[&near[..], &far].concat());
    bench.pool.cross(false);
    // All but the first four, and none of them is the tail.
    let common: Vec<_> = (4..39).collect();
    bench.hears(2, &these(&common));
    (3..=5).for_each(|n| bench.hears(n, &these(&[0, 1, 2, 3])));
    bench.hears(1, &these(&(0..39).collect::<Vec<_>>()));
    let asks = bench.asks();
    let mut first = asked_of(&asks, 1)[..4].to_vec();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2, 3]);
}

#[test]
fn who_alone_has_pieces_in_our_zone_is_offered_many_of_them() {
    let offered = |second: &[usize]| {
        let mut bench = Bench::in_zone(Some("a"), 100, &[of_zone("a", partial(1)), of_zone("a", partial(2))]);
        bench.pool.cross(false);
        bench.hears(2, &these(second));
        bench.hears(1, &these(&(0..50).collect::<Vec<_>>()));
        let asks = bench.asks();
        let order = &asks.iter().find(|ask| ask.order.peer == peer(1)).unwrap().order;
        (order.choice.len(), usize::from(order.most))
    };
    let (choice, most) = offered(&[]);
    assert!(choice > most, "{most} of {choice}");
    let (choice, most) = offered(&(0..50).collect::<Vec<_>>());
    assert_eq!(choice, most, "somebody else has them too");
}

#[test]
fn who_has_no_zone_is_never_of_another_one() {
    let mut bench = Bench::in_zone(Some("here"), 4, &[whole(1)]);
    bench.pool.cross(false);
    assert!(!bench.asks().is_empty());
    let mut bench = Bench::in_zone(None, 4, &[of_zone("there", whole(1))]);
    bench.pool.cross(false);
    assert!(!bench.asks().is_empty());
}

#[test]
fn another_zone_is_asked_when_nothing_comes_of_our_own() {
    let list = [of_zone("here", whole(1)), of_zone("there", whole(2))];
    let mut bench = Bench::in_zone(Some("here"), 8, &list);
    let asks = bench.asks();
    assert!(asked_of(&asks, 2).is_empty());
    asks.iter().for_each(|ask| bench.pool.ends(ask.id, End::Failed, bench.now));
    assert!(!asked_of(&bench.asks(), 2).is_empty());
}

#[test]
fn a_liar_is_asked_only_when_nobody_else_is_left() {
    let liar = Candidate { standing: 2, ..whole(2) };
    let mut bench = Bench::of(8, &[whole(1), liar]);
    assert!(asked_of(&bench.asks(), 2).is_empty());
    bench.pool.forget(peer(1), bench.now + ms(5000));
    bench.pool.neighbours(bench.now);
    assert!(!asked_of(&bench.asks(), 2).is_empty());
}

#[test]
fn the_one_that_will_be_done_first_is_asked() {
    let mut bench = Bench::of(2560, &[whole(1), whole(2)]);
    let (mut quick, slow): (Vec<_>, Vec<_>) = bench.asks().into_iter().partition(|ask| ask.order.peer == peer(1));
    // The first needs 10 ms for a piece, the second 200.
    for _ in 0..10 {
        quick.iter().for_each(|ask| bench.fulfils(ask, ms(10)));
        quick = bench.asks();
    }
    slow.iter().for_each(|ask| bench.fulfils(ask, ms(200)));
    quick.iter().for_each(|ask| bench.fulfils(ask, ms(10)));
    let asks = bench.asks();
    assert_eq!(asks[0].order.peer, peer(1));
    assert!(asks[0].order.most > 4, "as many as take it 100 ms: {}", asks[0].order.most);
    let slow = asks.iter().find(|ask| ask.order.peer == peer(2)).unwrap();
    assert!(slow.order.most < asks[0].order.most / 2, "{}", slow.order.most);
}

#[test]
fn what_is_late_is_asked_of_another_and_taken_back_when_it_came_from_there() {
    let mut bench = Bench::of(8, &[partial(1), partial(2)]);
    bench.hears(1, &these(&[0, 1]));
    let slow = bench.asks();
    assert_eq!(asked_of(&slow, 1).len(), 2);
    bench.hears(2, &these(&[0, 1]));
    assert!(asked_of(&bench.asks(), 2).is_empty(), "not yet");
    let until = bench.pool.wake_at().unwrap();
    assert_eq!(until - bench.now, ms(1000));
    let mut hedges = bench.after(ms(1000));
    assert_eq!(asked_of(&hedges, 2).len(), 2);
    assert!(bench.after(ms(0)).is_empty(), "two are enough");
    while !hedges.is_empty() {
        hedges.iter().for_each(|ask| bench.fulfils(ask, ms(1)));
        hedges = bench.asks();
    }
    assert_eq!(bench.pool.cancels(), slow.iter().map(|ask| ask.id).collect::<Vec<_>>());
}

#[test]
fn a_slow_but_regular_peer_is_hedged_by_its_own_pace() {
    let mut bench = Bench::of(2560, &[whole(1)]);
    for _ in 0..20 {
        bench.asks().iter().for_each(|ask| bench.fulfils(ask, ms(1200)));
    }
    bench.asks();
    assert_eq!(bench.pool.wake_at().unwrap() - bench.now, ms(1200));
}

#[test]
fn who_waits_in_a_queue_is_not_late() {
    let mut bench = Bench::of(64, &[partial(1), partial(2)]);
    bench.hears(1, &these(&[0, 1]));
    let asks = bench.asks();
    bench.hears(2, &these(&[0, 1]));
    for _ in 0..20 {
        bench.now += ms(500);
        bench.pool.brings(asks[0].id, 1000, bench.now);
        assert!(bench.asks().is_empty(), "it serves us, if slowly");
    }
}

#[test]
fn the_very_last_are_asked_of_two() {
    let mut bench = Bench::of(64, &[whole(1), whole(2), whole(3)]);
    (0..60).for_each(|piece| bench.pool.hold(bench.digest, piece));
    let asks = bench.asks();
    for piece in 60..64 {
        let asked = asks.iter().filter(|ask| ask.order.choice.contains(&piece)).count();
        assert!((1..=2).contains(&asked), "{piece}: {asks:?}");
    }
    assert_eq!(asks.len(), 6, "nobody waits");
}

#[test]
fn who_is_busy_is_left_alone_for_longer_each_time() {
    let mut bench = Bench::of(8, &[whole(1)]);
    for pause in [100, 200, 400, 800, 1600, 1600] {
        let asks = bench.asks();
        bench.pool.ends(asks[0].id, End::Busy, bench.now);
        assert!(asks[1..].iter().all(|ask| {
            bench.pool.cancel(ask.id);
            true
        }));
        assert!(bench.asks().is_empty());
        assert_eq!(bench.pool.wake_at(), Some(bench.now + ms(pause)));
        bench.now += ms(pause);
    }
    let asks = bench.asks();
    bench.fulfils(&asks[0], ms(10));
    bench.pool.ends(asks[1].id, End::Busy, bench.now);
    assert_eq!((bench.asks().len(), bench.pool.wake_at()), (0, Some(bench.now + ms(100))));
}

#[test]
fn who_was_forgotten_comes_back() {
    let mut bench = Bench::of(8, &[whole(1)]);
    let asks = bench.asks();
    bench.pool.forget(peer(1), bench.now + ms(500));
    assert_eq!(bench.pool.cancels().len(), asks.len());
    assert!(bench.asks().is_empty());
    let at = bench.pool.wake_at().unwrap();
    assert_eq!(at - bench.now, ms(500));
    bench.now = at;
    bench.pool.neighbours(at);
    assert!(!bench.asks().is_empty());
}

#[test]
fn who_lost_the_blob_is_no_neighbour_until_it_is_named_again() {
    let mut bench = Bench::of(8, &[whole(1)]);
    let asks = bench.asks();
    bench.pool.loses(peer(1), bench.digest);
    asks.iter().for_each(|ask| bench.pool.ends(ask.id, End::Failed, bench.now));
    bench.pool.neighbours(bench.now);
    assert!(bench.after(ms(10_000)).is_empty());
    bench.pool.candidates(bench.digest, &[partial(1)]);
    let follow = Neighbour::Follow { peer: peer(1), digest: bench.digest };
    assert_eq!(bench.pool.neighbours(bench.now), [follow]);
}

#[test]
fn nobody_is_a_neighbour_of_what_is_here() {
    let mut bench = Bench::of(1, &[partial(1)]);
    bench.pool.hold(bench.digest, 0);
    let leave = Neighbour::Leave { peer: peer(1), digest: bench.digest };
    assert_eq!(bench.pool.neighbours(bench.now), [leave]);
}
