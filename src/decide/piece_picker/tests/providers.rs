//! The choice of providers.

use super::*;

#[test]
fn twenty_providers_are_followed_a_quarter_of_them_in_other_zones() {
    let list: Vec<_> = (0..200).map(|n| of_zone(if n < 100 { "here" } else { "there" }, partial(n))).collect();
    let mut pool = PiecePicker::new(Some("here".to_owned().try_into().unwrap()), 1);
    pool.set_cross_zone(false);
    pool.add_blob(blob("blob"), layout(10));
    pool.set_providers(blob("blob"), &list);
    let changes = pool.take_follow_changes(Instant::now());
    let followed: Vec<_> = changes.iter().map(|change| matches!(change, FollowChange::Follow { .. })).collect();
    assert_eq!(followed, [true; 20]);
    let far = pool.blobs[0].selected.iter().filter(|link| link.is_far).count();
    assert_eq!(far, 5);
    pool.set_providers(blob("blob"), &list);
    assert_eq!(pool.take_follow_changes(Instant::now()), [], "the same list changes nothing");
}

#[test]
fn other_zones_are_used_only_when_allowed_and_for_pieces_missing_in_our_own_zone() {
    let list = [of_zone("here", partial(1)), of_zone("there", partial(2))];
    let mut bench = PickerFixture::in_zone(Some("here"), 8, &list);
    bench.piece_map(1, &these(&[0, 1, 2, 3]));
    bench.piece_map(2, &these(&[0, 1, 2, 3, 4, 5]));
    bench.pool.set_cross_zone(false);
    assert!(pieces_requested_of(&bench.requests(), 2).is_empty());
    bench.pool.set_cross_zone(true);
    let mut far = pieces_requested_of(&bench.requests(), 2);
    far.sort_unstable();
    assert_eq!(far, [4, 5]);
    bench.pool.set_cross_zone(false);
    assert_eq!(bench.pool.take_cancellations().len(), 2, "requests without a begun piece are canceled");
}

#[test]
fn a_piece_that_is_rare_in_our_zone_comes_first_however_common_elsewhere() {
    let near = [of_zone("a", partial(1)), of_zone("a", partial(2))];
    let far: Vec<_> = (3..=5).map(|n| of_zone("b", partial(n))).collect();
    let mut bench = PickerFixture::in_zone(Some("a"), 40, &[&near[..], &far].concat());
    bench.pool.set_cross_zone(false);
    // Peer 2 has all but the first four pieces. The tail is at no peer.
    let common: Vec<_> = (4..39).collect();
    bench.piece_map(2, &these(&common));
    (3..=5).for_each(|n| bench.piece_map(n, &these(&[0, 1, 2, 3])));
    bench.piece_map(1, &these(&(0..39).collect::<Vec<_>>()));
    let asks = bench.requests();
    let mut first = pieces_requested_of(&asks, 1)[..4].to_vec();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2, 3]);
}

#[test]
fn the_only_provider_of_pieces_in_our_zone_is_offered_many_of_them() {
    let offered = |second: &[usize]| {
        let mut bench = PickerFixture::in_zone(Some("a"), 100, &[of_zone("a", partial(1)), of_zone("a", partial(2))]);
        bench.pool.set_cross_zone(false);
        bench.piece_map(2, &these(second));
        bench.piece_map(1, &these(&(0..50).collect::<Vec<_>>()));
        let asks = bench.requests();
        let order = &asks.iter().find(|ask| ask.request.peer == peer(1)).unwrap().request;
        (order.pieces.len(), usize::from(order.limit))
    };
    let (choice, most) = offered(&[]);
    assert!(choice > most, "{most} of {choice}");
    let (choice, most) = offered(&(0..50).collect::<Vec<_>>());
    assert_eq!(choice, most, "a second provider has the pieces too");
}

#[test]
fn a_provider_without_a_zone_is_never_of_another_zone() {
    let mut bench = PickerFixture::in_zone(Some("here"), 4, &[whole(1)]);
    bench.pool.set_cross_zone(false);
    assert!(!bench.requests().is_empty());
    let mut bench = PickerFixture::in_zone(None, 4, &[of_zone("there", whole(1))]);
    bench.pool.set_cross_zone(false);
    assert!(!bench.requests().is_empty());
}

#[test]
fn another_zone_is_used_when_requests_in_our_zone_fail() {
    let list = [of_zone("here", whole(1)), of_zone("there", whole(2))];
    let mut bench = PickerFixture::in_zone(Some("here"), 8, &list);
    let asks = bench.requests();
    assert!(pieces_requested_of(&asks, 2).is_empty());
    asks.iter().for_each(|ask| bench.pool.end_request(ask.id, RequestEnd::Failed, bench.now));
    assert!(!pieces_requested_of(&bench.requests(), 2).is_empty());
}

#[test]
fn a_lying_provider_is_used_only_when_no_other_is_left() {
    let liar = Provider { standing: 2, ..whole(2) };
    let mut bench = PickerFixture::of(8, &[whole(1), liar]);
    assert!(pieces_requested_of(&bench.requests(), 2).is_empty());
    bench.pool.exclude_peer(peer(1), bench.now + ms(5000));
    bench.pool.take_follow_changes(bench.now);
    assert!(!pieces_requested_of(&bench.requests(), 2).is_empty());
}

#[test]
fn the_provider_that_would_finish_first_is_used() {
    let mut bench = PickerFixture::of(2560, &[whole(1), whole(2)]);
    let (mut quick, slow): (Vec<_>, Vec<_>) = bench.requests().into_iter().partition(|ask| ask.request.peer == peer(1));
    // Peer 1 sends a piece in 10 ms, peer 2 in 200 ms.
    for _ in 0..10 {
        quick.iter().for_each(|ask| bench.fulfil(ask, ms(10)));
        quick = bench.requests();
    }
    slow.iter().for_each(|ask| bench.fulfil(ask, ms(200)));
    quick.iter().for_each(|ask| bench.fulfil(ask, ms(10)));
    let asks = bench.requests();
    assert_eq!(asks[0].request.peer, peer(1));
    assert!(asks[0].request.limit > 4, "pieces for 100 ms: {}", asks[0].request.limit);
    let slow = asks.iter().find(|ask| ask.request.peer == peer(2)).unwrap();
    assert!(slow.request.limit < asks[0].request.limit / 2, "{}", slow.request.limit);
}

#[test]
fn a_late_request_is_hedged_and_cancelled_when_the_hedge_completes() {
    let mut bench = PickerFixture::of(8, &[partial(1), partial(2)]);
    bench.piece_map(1, &these(&[0, 1]));
    let slow = bench.requests();
    assert_eq!(pieces_requested_of(&slow, 1).len(), 2);
    bench.piece_map(2, &these(&[0, 1]));
    assert!(pieces_requested_of(&bench.requests(), 2).is_empty(), "not yet");
    let until = bench.pool.wake_at().unwrap();
    assert_eq!(until - bench.now, ms(1000));
    let mut hedges = bench.requests_after(ms(1000));
    assert_eq!(pieces_requested_of(&hedges, 2).len(), 2);
    assert!(bench.requests_after(ms(0)).is_empty(), "two requests per piece are enough");
    while !hedges.is_empty() {
        hedges.iter().for_each(|ask| bench.fulfil(ask, ms(1)));
        hedges = bench.requests();
    }
    assert_eq!(bench.pool.take_cancellations(), slow.iter().map(|ask| ask.id).collect::<Vec<_>>());
}

#[test]
fn a_slow_but_regular_peer_is_hedged_by_its_own_pace() {
    let mut bench = PickerFixture::of(2560, &[whole(1)]);
    for _ in 0..20 {
        bench.requests().iter().for_each(|ask| bench.fulfil(ask, ms(1200)));
    }
    bench.requests();
    assert_eq!(bench.pool.wake_at().unwrap() - bench.now, ms(1200));
}

#[test]
fn a_request_with_slow_progress_is_not_late() {
    let mut bench = PickerFixture::of(64, &[partial(1), partial(2)]);
    bench.piece_map(1, &these(&[0, 1]));
    let asks = bench.requests();
    bench.piece_map(2, &these(&[0, 1]));
    for _ in 0..20 {
        bench.now += ms(500);
        bench.pool.record_bytes(asks[0].id, 1000, bench.now);
        assert!(bench.requests().is_empty(), "the provider serves us, if slowly");
    }
}

#[test]
fn the_endgame_pieces_are_requested_twice() {
    let mut bench = PickerFixture::of(64, &[whole(1), whole(2), whole(3)]);
    (0..60).for_each(|piece| bench.pool.mark_piece_present(bench.digest, piece));
    let asks = bench.requests();
    for piece in 60..64 {
        let asked = asks.iter().filter(|ask| ask.request.pieces.contains(&piece)).count();
        assert!((1..=2).contains(&asked), "{piece}: {asks:?}");
    }
    assert_eq!(asks.len(), 6, "no provider idles");
}

#[test]
fn the_back_off_of_a_busy_provider_doubles() {
    let mut bench = PickerFixture::of(8, &[whole(1)]);
    for pause in [100, 200, 400, 800, 1600, 1600] {
        let asks = bench.requests();
        bench.pool.end_request(asks[0].id, RequestEnd::Busy, bench.now);
        assert!(asks[1..].iter().all(|ask| {
            bench.pool.cancel(ask.id);
            true
        }));
        assert!(bench.requests().is_empty());
        assert_eq!(bench.pool.wake_at(), Some(bench.now + ms(pause)));
        bench.now += ms(pause);
    }
    let asks = bench.requests();
    bench.fulfil(&asks[0], ms(10));
    bench.pool.end_request(asks[1].id, RequestEnd::Busy, bench.now);
    assert_eq!((bench.requests().len(), bench.pool.wake_at()), (0, Some(bench.now + ms(100))));
}

#[test]
fn an_excluded_peer_returns_when_its_exclusion_ends() {
    let mut bench = PickerFixture::of(8, &[whole(1)]);
    let asks = bench.requests();
    bench.pool.exclude_peer(peer(1), bench.now + ms(500));
    assert_eq!(bench.pool.take_cancellations().len(), asks.len());
    assert!(bench.requests().is_empty());
    let at = bench.pool.wake_at().unwrap();
    assert_eq!(at - bench.now, ms(500));
    bench.now = at;
    bench.pool.take_follow_changes(at);
    assert!(!bench.requests().is_empty());
}

#[test]
fn a_provider_that_lost_the_blob_is_not_selected_until_listed_again() {
    let mut bench = PickerFixture::of(8, &[whole(1)]);
    let asks = bench.requests();
    bench.pool.remove_provider(peer(1), bench.digest);
    asks.iter().for_each(|ask| bench.pool.end_request(ask.id, RequestEnd::Failed, bench.now));
    bench.pool.take_follow_changes(bench.now);
    assert!(bench.requests_after(ms(10_000)).is_empty());
    bench.pool.set_providers(bench.digest, &[partial(1)]);
    let follow = FollowChange::Follow { peer: peer(1), digest: bench.digest };
    assert_eq!(bench.pool.take_follow_changes(bench.now), [follow]);
}

#[test]
fn a_complete_blob_has_no_selected_provider() {
    let mut bench = PickerFixture::of(1, &[partial(1)]);
    bench.pool.mark_piece_present(bench.digest, 0);
    let leave = FollowChange::Unfollow { peer: peer(1), digest: bench.digest };
    assert_eq!(bench.pool.take_follow_changes(bench.now), [leave]);
}
