//! Requests, providers and times of one picker.

mod any_order;
mod providers;

use std::time::Duration;

use super::*;
use crate::model::{Bits, MAX_REQUEST_PIECES};

const PIECE: u64 = 1 << 20;

fn peer(n: u8) -> PeerId {
    PeerId::from_public_key([n; 32])
}

fn blob(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn layout(pieces: u64) -> PieceLayout {
    PieceLayout::new(pieces * PIECE, PIECE).unwrap()
}

fn partial(n: u8) -> Provider {
    Provider { peer: peer(n), zone: None, is_whole: false, standing: 0 }
}

fn whole(n: u8) -> Provider {
    Provider { is_whole: true, ..partial(n) }
}

fn of_zone(zone: &str, candidate: Provider) -> Provider {
    Provider { zone: Some(zone.to_owned().try_into().unwrap()), ..candidate }
}

fn map_of(pieces: &[usize]) -> PieceMapUpdate {
    let mut bits = Bits::default();
    pieces.iter().for_each(|piece| bits.set(*piece));
    PieceMapUpdate::Map(bits)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A picker with one blob, and a clock.
struct PickerFixture {
    picker: PiecePicker,
    digest: Digest,
    now: Instant,
}

impl PickerFixture {
    fn of(pieces: u64, candidates: &[Provider]) -> Self {
        Self::in_zone(None, pieces, candidates)
    }

    fn in_zone(zone: Option<&str>, pieces: u64, candidates: &[Provider]) -> Self {
        let digest = blob("blob");
        let mut picker = PiecePicker::new(zone.map(|zone| zone.to_owned().try_into().unwrap()), 1);
        picker.add_blob(digest, layout(pieces));
        picker.mark_hash_chain_ready(digest);
        candidates.iter().for_each(|candidate| picker.record_verified_piece(candidate.peer, digest));
        picker.set_providers(digest, candidates);
        let now = Instant::now();
        picker.take_follow_changes(now);
        Self { picker, digest, now }
    }

    fn piece_map(&mut self, n: u8, update: &PieceMapUpdate) {
        self.picker.record_piece_map(peer(n), self.digest, update, self.now);
    }

    fn requests(&mut self) -> Vec<PickedRequest> {
        std::iter::from_fn(|| self.picker.next_request(self.now)).collect()
    }

    fn requests_after(&mut self, time: Duration) -> Vec<PickedRequest> {
        self.now += time;
        self.requests()
    }

    /// The peer sends these pieces, each within `each`.
    fn send_pieces(&mut self, pick: &PickedRequest, pieces: &[u32], each: Duration) {
        for piece in pieces {
            self.picker.begin_piece(pick.id, *piece, self.now);
            self.now += each;
            self.picker.record_bytes(pick.id, pick.request.layout.piece_length(*piece as usize), self.now);
            self.picker.complete_piece(pick.id, *piece, self.now);
        }
    }

    /// Answers a request like an honest peer.
    fn fulfill(&mut self, pick: &PickedRequest, each: Duration) {
        let pieces = pick.request.pieces[..usize::from(pick.request.limit)].to_vec();
        self.send_pieces(pick, &pieces, each);
        self.picker.end_request(pick.id, RequestEnd::Done, self.now);
    }
}

fn pieces_requested_of(picks: &[PickedRequest], n: u8) -> Vec<u32> {
    picks.iter().filter(|pick| pick.request.peer == peer(n)).flat_map(|pick| pick.request.pieces.clone()).collect()
}

#[test]
fn the_last_piece_is_requested_first_of_a_peer_that_has_it() {
    let mut fixture = PickerFixture::of(100, &[partial(1), partial(2)]);
    fixture.piece_map(1, &map_of(&(0..100).collect::<Vec<_>>()));
    fixture.piece_map(2, &map_of(&(0..99).collect::<Vec<_>>()));
    let picks = fixture.requests();
    let first = picks.iter().find(|pick| pick.request.peer == peer(1)).unwrap();
    assert_eq!(first.request.pieces[0], 99);
}

#[test]
fn the_rarest_pieces_come_first_and_every_picker_has_another_order() {
    let order = |seed| {
        let mut picker = PiecePicker::new(None, seed);
        picker.add_blob(blob("blob"), layout(64));
        picker.mark_hash_chain_ready(blob("blob"));
        picker.set_providers(blob("blob"), &[partial(1), partial(2)]);
        let now = Instant::now();
        picker.take_follow_changes(now);
        picker.record_piece_map(peer(1), blob("blob"), &map_of(&(0..63).collect::<Vec<_>>()), now);
        picker.record_piece_map(peer(2), blob("blob"), &map_of(&(0..60).collect::<Vec<_>>()), now);
        let picks: Vec<_> = std::iter::from_fn(|| picker.next_request(now)).collect();
        pieces_requested_of(&picks, 1)
    };
    assert!(order(1).iter().all(|piece| (60..63).contains(piece)), "{:?}", order(1));
    assert!((2..10).any(|seed| order(seed) != order(1)));
}

#[test]
fn a_lone_seed_is_offered_the_tail_and_a_row_that_differs_by_picker() {
    let offer = |seed| {
        let mut picker = PiecePicker::new(None, seed);
        picker.add_blob(blob("blob"), layout(64));
        picker.mark_hash_chain_ready(blob("blob"));
        picker.set_providers(blob("blob"), &[whole(1)]);
        let now = Instant::now();
        picker.take_follow_changes(now);
        picker.next_request(now).unwrap().request.pieces
    };
    let pieces = offer(1);
    assert_eq!((pieces[0], pieces.len()), (63, 16));
    assert!(pieces[1..].windows(2).all(|pair| pair[1] == (pair[0] + 1) % 63), "{pieces:?}");
    assert!((2..10).any(|seed| offer(seed)[1] != pieces[1]));
}

#[test]
fn a_seed_is_offered_more_pieces_than_it_sends_and_fewer_towards_the_end() {
    let mut fixture = PickerFixture::of(256, &[whole(1), partial(2)]);
    let offers: Vec<_> =
        fixture.requests().iter().map(|pick| (pick.request.pieces.len(), pick.request.limit)).collect();
    assert_eq!(offers, [(32, 1), (32, 1)]);

    let mut fixture = PickerFixture::of(256, &[whole(1), partial(2)]);
    (0..248).for_each(|piece| fixture.picker.mark_piece_present(fixture.digest, piece));
    let offers: Vec<_> = fixture.requests().iter().map(|pick| pick.request.pieces.len()).collect();
    assert_eq!(offers, [2, 1]);
}

#[test]
fn offered_pieces_are_unassigned_again_once_the_provider_has_chosen() {
    let mut fixture = PickerFixture::of(64, &[whole(1), partial(2)]);
    fixture.piece_map(2, &map_of(&(0..64).collect::<Vec<_>>()));
    let picks = fixture.requests();
    let offer = picks.iter().find(|pick| pick.request.pieces.len() > 1).unwrap().clone();
    let requested_pieces =
        |picks: &[PickedRequest]| picks.iter().flat_map(|pick| pick.request.pieces.clone()).collect::<Vec<_>>();
    let mut all = requested_pieces(&picks);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), requested_pieces(&picks).len(), "no piece is requested twice");
    let left = offer.request.pieces[0];
    fixture.picker.begin_piece(offer.id, offer.request.pieces[1], fixture.now);
    assert!(fixture.picker.blobs[0].request_count(left) == 0);
}

#[test]
fn pieces_of_all_blobs_are_requested_at_once() {
    let mut picker = PiecePicker::new(None, 1);
    let now = Instant::now();
    let names = ["one", "two", "three", "four"];
    for name in names {
        picker.add_blob(blob(name), layout(64));
        picker.mark_hash_chain_ready(blob(name));
        [1, 2, 3, 4].map(peer).into_iter().for_each(|peer| picker.record_verified_piece(peer, blob(name)));
        picker.set_providers(blob(name), &[1, 2, 3, 4].map(whole));
    }
    assert!(picker.take_follow_changes(now).is_empty(), "whole providers are not followed");
    let picks: Vec<_> = std::iter::from_fn(|| picker.next_request(now)).collect();
    assert_eq!(picks.len(), 8);
    for name in names {
        let first = picks.iter().find(|pick| pick.request.digest == blob(name)).expect("a request");
        assert_eq!(first.request.pieces[0], 63);
    }
}

#[test]
fn a_wrong_piece_is_fetched_again_from_another_provider() {
    let mut fixture = PickerFixture::of(1, &[whole(1), whole(2)]);
    let pick = fixture.requests().remove(0);
    fixture.fulfill(&pick, ms(10));
    assert!(fixture.picker.is_complete());
    fixture.picker.discard_piece(fixture.digest, 0);
    fixture.picker.exclude_peer(pick.request.peer, fixture.now + ms(60_000));
    assert_eq!((fixture.picker.missing_pieces(fixture.digest), fixture.picker.is_complete()), (1, false));
    fixture.picker.take_follow_changes(fixture.now);
    let again = fixture.requests();
    assert_eq!(again.len(), 1);
    assert_ne!(again[0].request.peer, pick.request.peer);
}

#[test]
fn absurd_piece_maps_are_harmless() {
    let mut fixture = PickerFixture::of(9, &[partial(1)]);
    fixture.piece_map(1, &PieceMapUpdate::Map(Bits(vec![0xff; 1000])));
    fixture.piece_map(1, &PieceMapUpdate::Have(vec![0, 0, 8, 9, u32::MAX]));
    fixture.piece_map(9, &PieceMapUpdate::HaveAll);
    let picks = fixture.requests();
    assert!(
        picks.iter().all(|pick| pick.request.peer == peer(1) && pick.request.pieces.iter().all(|piece| *piece < 9))
    );
    fixture.piece_map(1, &PieceMapUpdate::Map(Bits(Vec::new())));
    fixture.picker.end_request(picks[0].id, RequestEnd::Done, fixture.now);
    assert!(fixture.requests_after(ms(200)).is_empty());
}

#[test]
fn an_empty_blob_is_a_single_empty_piece() {
    let mut fixture = PickerFixture::of(0, &[whole(1)]);
    let pick = fixture.requests().remove(0);
    assert_eq!((pick.request.pieces.clone(), pick.request.limit), (vec![0], 1));
    fixture.fulfill(&pick, ms(1));
    assert!(fixture.picker.is_complete());
}

#[test]
fn no_request_exceeds_its_limits() {
    let mut fixture = PickerFixture::of(2560, &(1..=20).map(whole).collect::<Vec<_>>());
    for _ in 0..50 {
        for pick in fixture.requests() {
            let PieceRequest { pieces, limit, .. } = &pick.request;
            assert!(
                pieces.len() <= MAX_REQUEST_PIECES && (1..=16).contains(limit) && usize::from(*limit) <= pieces.len()
            );
            fixture.fulfill(&pick, ms(1));
        }
    }
}

/// A blob without a hash chain, with two unverified whole providers.
fn unverified_providers() -> PickerFixture {
    let mut picker = PiecePicker::new(None, 1);
    picker.add_blob(blob("blob"), layout(64));
    picker.set_providers(blob("blob"), &[whole(1), whole(2)]);
    let now = Instant::now();
    picker.take_follow_changes(now);
    PickerFixture { picker, digest: blob("blob"), now }
}

#[test]
fn an_unverified_provider_gets_no_second_request_before_its_first_piece_is_verified() {
    let mut fixture = unverified_providers();
    let picks = fixture.requests();
    assert_eq!(picks.iter().map(|pick| pick.request.limit).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(
        picks.iter().map(|pick| pick.request.pieces[0]).collect::<Vec<_>>(),
        [0, 1],
        "the hash chain reaches these pieces first"
    );
    picks.iter().for_each(|pick| fixture.fulfill(pick, ms(1)));
    assert!(fixture.requests().is_empty(), "the pieces are not verified yet");
    fixture.picker.record_verified_piece(peer(1), fixture.digest);
    let picks = fixture.requests();
    assert!(
        picks.iter().all(|pick| pick.request.peer == peer(1)) && picks.iter().any(|pick| pick.request.limit > 1),
        "{picks:?}"
    );
}

#[test]
fn a_provider_verified_for_a_blob_is_unverified_for_another_blob() {
    let mut fixture = unverified_providers();
    fixture.picker.add_blob(blob("other"), layout(64));
    fixture.picker.record_verified_piece(peer(1), blob("other"));
    fixture.picker.record_verified_piece(peer(2), blob("other"));
    let picks = fixture.requests();
    assert!(picks.iter().all(|pick| pick.request.limit == 1), "{picks:?}");
    assert_eq!(picks.len(), 2);
}

#[test]
fn a_provider_that_contradicts_a_partial_hash_chain_is_left_alone_for_longer() {
    let mut fixture = unverified_providers();
    fixture.requests().iter().for_each(|pick| fixture.fulfill(pick, ms(1)));
    fixture.picker.record_mismatch(peer(1), fixture.digest, fixture.now);
    assert!(fixture.requests_after(ms(600)).iter().all(|pick| pick.request.peer == peer(2)));
    assert!(fixture.requests_after(ms(1890)).iter().all(|pick| pick.request.peer == peer(2)));
    assert!(
        fixture.requests_after(ms(10)).iter().any(|pick| pick.request.peer == peer(1)),
        "the hash chain may be the lie"
    );
}

#[test]
fn unverified_providers_get_single_pieces_in_turn_while_no_hash_chain_comes() {
    let mut fixture = unverified_providers();
    fixture.requests().iter().for_each(|pick| fixture.fulfill(pick, ms(1)));
    assert!(fixture.requests_after(ms(490)).is_empty());
    fixture.now = fixture.picker.wake_at().unwrap() + ms(1);
    for _ in 0..5 {
        let picks = fixture.requests();
        assert_eq!(picks.iter().map(|pick| pick.request.limit).collect::<Vec<_>>(), [1, 1]);
        picks.iter().for_each(|pick| fixture.fulfill(pick, ms(1)));
    }
}

#[test]
fn a_starved_picker_has_more_requests_in_flight() {
    let peers: Vec<_> = (1..=20).map(partial).collect();
    let mut fixture = PickerFixture::of(200, &peers);
    (1..=20).for_each(|n| fixture.piece_map(n, &map_of(&(0..200).collect::<Vec<_>>())));
    let first = fixture.requests();
    assert_eq!(first.len(), 8);
    first.iter().for_each(|pick| fixture.fulfill(pick, ms(40)));
    let second = fixture.requests();
    assert_eq!(second.len(), 8, "the rate is 25 MiB a second, as before");
    second[..4].iter().for_each(|pick| fixture.fulfill(pick, ms(80)));
    fixture.requests();
    assert_eq!(fixture.picker.in_flight.values().filter(|request| !request.is_late).count(), 12, "the rate has halved");
}
