//! The choice of providers.

use super::*;

#[test]
fn twenty_providers_are_followed_a_quarter_of_them_in_other_zones() {
    let candidates: Vec<_> = (0..200).map(|n| of_zone(if n < 100 { "here" } else { "there" }, partial(n))).collect();
    let mut picker = PiecePicker::new(Some("here".to_owned().try_into().unwrap()), 1);
    picker.set_cross_zone(false);
    picker.add_blob(blob("blob"), layout(10));
    picker.set_providers(blob("blob"), &candidates);
    let changes = picker.take_follow_changes(Instant::now());
    let followed: Vec<_> = changes.iter().map(|change| matches!(change, FollowChange::Follow { .. })).collect();
    assert_eq!(followed, [true; 20]);
    let far = picker.blobs[0].selected.iter().filter(|provider| provider.is_far).count();
    assert_eq!(far, 5);
    picker.set_providers(blob("blob"), &candidates);
    assert_eq!(picker.take_follow_changes(Instant::now()), [], "the same list changes nothing");
}

#[test]
fn other_zones_are_used_only_when_allowed_and_for_pieces_missing_in_our_own_zone() {
    let candidates = [of_zone("here", partial(1)), of_zone("there", partial(2))];
    let mut fixture = PickerFixture::in_zone(Some("here"), 8, &candidates);
    fixture.piece_map(1, &map_of(&[0, 1, 2, 3]));
    fixture.piece_map(2, &map_of(&[0, 1, 2, 3, 4, 5]));
    fixture.picker.set_cross_zone(false);
    assert!(pieces_requested_of(&fixture.requests(), 2).is_empty());
    fixture.picker.set_cross_zone(true);
    let mut far = pieces_requested_of(&fixture.requests(), 2);
    far.sort_unstable();
    assert_eq!(far, [4, 5]);
    fixture.picker.set_cross_zone(false);
    assert_eq!(fixture.picker.take_cancellations().len(), 2, "requests without a begun piece are canceled");
}

#[test]
fn a_piece_that_is_rare_in_our_zone_comes_first_however_common_elsewhere() {
    let near = [of_zone("a", partial(1)), of_zone("a", partial(2))];
    let far: Vec<_> = (3..=5).map(|n| of_zone("b", partial(n))).collect();
    let mut fixture = PickerFixture::in_zone(Some("a"), 40, &[&near[..], &far].concat());
    fixture.picker.set_cross_zone(false);
    // Peer 2 has all but the first four pieces. The tail is at no peer.
    let common: Vec<_> = (4..39).collect();
    fixture.piece_map(2, &map_of(&common));
    (3..=5).for_each(|n| fixture.piece_map(n, &map_of(&[0, 1, 2, 3])));
    fixture.piece_map(1, &map_of(&(0..39).collect::<Vec<_>>()));
    let picks = fixture.requests();
    let mut first = pieces_requested_of(&picks, 1)[..4].to_vec();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2, 3]);
}

#[test]
fn the_only_provider_of_pieces_in_our_zone_is_offered_many_of_them() {
    let offered = |second: &[usize]| {
        let mut fixture = PickerFixture::in_zone(Some("a"), 100, &[of_zone("a", partial(1)), of_zone("a", partial(2))]);
        fixture.picker.set_cross_zone(false);
        fixture.piece_map(2, &map_of(second));
        fixture.piece_map(1, &map_of(&(0..50).collect::<Vec<_>>()));
        let picks = fixture.requests();
        let request = &picks.iter().find(|pick| pick.request.peer == peer(1)).unwrap().request;
        (request.pieces.len(), usize::from(request.limit))
    };
    let (count, limit) = offered(&[]);
    assert!(count > limit, "{limit} of {count}");
    let (count, limit) = offered(&(0..50).collect::<Vec<_>>());
    assert_eq!(count, limit, "a second provider has the pieces too");
}

#[test]
fn a_provider_without_a_zone_is_never_of_another_zone() {
    let mut fixture = PickerFixture::in_zone(Some("here"), 4, &[whole(1)]);
    fixture.picker.set_cross_zone(false);
    assert!(!fixture.requests().is_empty());
    let mut fixture = PickerFixture::in_zone(None, 4, &[of_zone("there", whole(1))]);
    fixture.picker.set_cross_zone(false);
    assert!(!fixture.requests().is_empty());
}

#[test]
fn another_zone_is_used_when_requests_in_our_zone_fail() {
    let candidates = [of_zone("here", whole(1)), of_zone("there", whole(2))];
    let mut fixture = PickerFixture::in_zone(Some("here"), 8, &candidates);
    let picks = fixture.requests();
    assert!(pieces_requested_of(&picks, 2).is_empty());
    picks.iter().for_each(|pick| fixture.picker.end_request(pick.id, RequestEnd::Failed, fixture.now));
    assert!(!pieces_requested_of(&fixture.requests(), 2).is_empty());
}

#[test]
fn a_lying_provider_is_used_only_when_no_other_is_left() {
    let liar = Provider { standing: 2, ..whole(2) };
    let mut fixture = PickerFixture::of(8, &[whole(1), liar]);
    assert!(pieces_requested_of(&fixture.requests(), 2).is_empty());
    fixture.picker.exclude_peer(peer(1), fixture.now + ms(5000));
    fixture.picker.take_follow_changes(fixture.now);
    assert!(!pieces_requested_of(&fixture.requests(), 2).is_empty());
}

#[test]
fn the_provider_that_would_finish_first_is_used() {
    let mut fixture = PickerFixture::of(2560, &[whole(1), whole(2)]);
    let (mut quick, slow): (Vec<_>, Vec<_>) =
        fixture.requests().into_iter().partition(|pick| pick.request.peer == peer(1));
    // Peer 1 sends a piece in 10 ms, peer 2 in 200 ms.
    for _ in 0..10 {
        quick.iter().for_each(|pick| fixture.fulfill(pick, ms(10)));
        quick = fixture.requests();
    }
    slow.iter().for_each(|pick| fixture.fulfill(pick, ms(200)));
    quick.iter().for_each(|pick| fixture.fulfill(pick, ms(10)));
    let picks = fixture.requests();
    assert_eq!(picks[0].request.peer, peer(1));
    assert!(picks[0].request.limit > 4, "pieces for 100 ms: {}", picks[0].request.limit);
    let slow = picks.iter().find(|pick| pick.request.peer == peer(2)).unwrap();
    assert!(slow.request.limit < picks[0].request.limit / 2, "{}", slow.request.limit);
}

#[test]
fn a_late_request_is_hedged_and_cancelled_when_the_hedge_completes() {
    let mut fixture = PickerFixture::of(8, &[partial(1), partial(2)]);
    fixture.piece_map(1, &map_of(&[0, 1]));
    let slow = fixture.requests();
    assert_eq!(pieces_requested_of(&slow, 1).len(), 2);
    fixture.piece_map(2, &map_of(&[0, 1]));
    assert!(pieces_requested_of(&fixture.requests(), 2).is_empty(), "not yet");
    let until = fixture.picker.wake_at().unwrap();
    assert_eq!(until - fixture.now, ms(1000));
    let mut hedges = fixture.requests_after(ms(1000));
    assert_eq!(pieces_requested_of(&hedges, 2).len(), 2);
    assert!(fixture.requests_after(ms(0)).is_empty(), "two requests per piece are enough");
    while !hedges.is_empty() {
        hedges.iter().for_each(|pick| fixture.fulfill(pick, ms(1)));
        hedges = fixture.requests();
    }
    assert_eq!(fixture.picker.take_cancellations(), slow.iter().map(|pick| pick.id).collect::<Vec<_>>());
}

#[test]
fn a_slow_but_regular_peer_is_hedged_by_its_own_pace() {
    let mut fixture = PickerFixture::of(2560, &[whole(1)]);
    for _ in 0..20 {
        fixture.requests().iter().for_each(|pick| fixture.fulfill(pick, ms(1200)));
    }
    fixture.requests();
    assert_eq!(fixture.picker.wake_at().unwrap() - fixture.now, ms(1200));
}

#[test]
fn a_request_with_slow_progress_is_not_late() {
    let mut fixture = PickerFixture::of(64, &[partial(1), partial(2)]);
    fixture.piece_map(1, &map_of(&[0, 1]));
    let picks = fixture.requests();
    fixture.piece_map(2, &map_of(&[0, 1]));
    for _ in 0..20 {
        fixture.now += ms(500);
        fixture.picker.record_bytes(picks[0].id, 1000, fixture.now);
        assert!(fixture.requests().is_empty(), "the provider serves us, if slowly");
    }
}

#[test]
fn the_endgame_pieces_are_requested_twice() {
    let mut fixture = PickerFixture::of(64, &[whole(1), whole(2), whole(3)]);
    (0..60).for_each(|piece| fixture.picker.mark_piece_present(fixture.digest, piece));
    let picks = fixture.requests();
    for piece in 60..64 {
        let count = picks.iter().filter(|pick| pick.request.pieces.contains(&piece)).count();
        assert!((1..=2).contains(&count), "{piece}: {picks:?}");
    }
    assert_eq!(picks.len(), 6, "no provider idles");
}

#[test]
fn the_back_off_of_a_busy_provider_doubles() {
    let mut fixture = PickerFixture::of(8, &[whole(1)]);
    for pause in [100, 200, 400, 800, 1600, 1600] {
        let picks = fixture.requests();
        fixture.picker.end_request(picks[0].id, RequestEnd::Busy, fixture.now);
        assert!(picks[1..].iter().all(|pick| {
            fixture.picker.cancel(pick.id);
            true
        }));
        assert!(fixture.requests().is_empty());
        assert_eq!(fixture.picker.wake_at(), Some(fixture.now + ms(pause)));
        fixture.now += ms(pause);
    }
    let picks = fixture.requests();
    fixture.fulfill(&picks[0], ms(10));
    fixture.picker.end_request(picks[1].id, RequestEnd::Busy, fixture.now);
    assert_eq!((fixture.requests().len(), fixture.picker.wake_at()), (0, Some(fixture.now + ms(100))));
}

#[test]
fn an_excluded_peer_returns_when_its_exclusion_ends() {
    let mut fixture = PickerFixture::of(8, &[whole(1)]);
    let picks = fixture.requests();
    fixture.picker.exclude_peer(peer(1), fixture.now + ms(500));
    assert_eq!(fixture.picker.take_cancellations().len(), picks.len());
    assert!(fixture.requests().is_empty());
    let at = fixture.picker.wake_at().unwrap();
    assert_eq!(at - fixture.now, ms(500));
    fixture.now = at;
    fixture.picker.take_follow_changes(at);
    assert!(!fixture.requests().is_empty());
}

#[test]
fn a_provider_that_lost_the_blob_is_not_selected_until_listed_again() {
    let mut fixture = PickerFixture::of(8, &[whole(1)]);
    let picks = fixture.requests();
    fixture.picker.remove_provider(peer(1), fixture.digest);
    picks.iter().for_each(|pick| fixture.picker.end_request(pick.id, RequestEnd::Failed, fixture.now));
    fixture.picker.take_follow_changes(fixture.now);
    assert!(fixture.requests_after(ms(10_000)).is_empty());
    fixture.picker.set_providers(fixture.digest, &[partial(1)]);
    let follow = FollowChange::Follow { peer: peer(1), digest: fixture.digest };
    assert_eq!(fixture.picker.take_follow_changes(fixture.now), [follow]);
}

#[test]
fn a_complete_blob_has_no_selected_provider() {
    let mut fixture = PickerFixture::of(1, &[partial(1)]);
    fixture.picker.mark_piece_present(fixture.digest, 0);
    let unfollow = FollowChange::Unfollow { peer: peer(1), digest: fixture.digest };
    assert_eq!(fixture.picker.take_follow_changes(fixture.now), [unfollow]);
}
