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

fn these(pieces: &[usize]) -> PieceMapUpdate {
    let mut bits = Bits::default();
    pieces.iter().for_each(|piece| bits.set(*piece));
    PieceMapUpdate::Map(bits)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A picker with one blob, and a clock.
struct PickerFixture {
    pool: PiecePicker,
    digest: Digest,
    now: Instant,
}

impl PickerFixture {
    fn of(pieces: u64, candidates: &[Provider]) -> Self {
        Self::in_zone(None, pieces, candidates)
    }

    fn in_zone(zone: Option<&str>, pieces: u64, candidates: &[Provider]) -> Self {
        let digest = blob("blob");
        let mut pool = PiecePicker::new(zone.map(|zone| zone.to_owned().try_into().unwrap()), 1);
        pool.add_blob(digest, layout(pieces));
        pool.mark_hash_chain_ready(digest);
        candidates.iter().for_each(|candidate| pool.record_verified_piece(candidate.peer, digest));
        pool.set_providers(digest, candidates);
        let now = Instant::now();
        pool.take_follow_changes(now);
        Self { pool, digest, now }
    }

    fn piece_map(&mut self, n: u8, word: &PieceMapUpdate) {
        self.pool.record_piece_map(peer(n), self.digest, word, self.now);
    }

    fn requests(&mut self) -> Vec<PickedRequest> {
        std::iter::from_fn(|| self.pool.next_request(self.now)).collect()
    }

    fn requests_after(&mut self, time: Duration) -> Vec<PickedRequest> {
        self.now += time;
        self.requests()
    }

    /// The peer sends these pieces, each within `each`.
    fn send_pieces(&mut self, ask: &PickedRequest, pieces: &[u32], each: Duration) {
        for piece in pieces {
            self.pool.begin_piece(ask.id, *piece, self.now);
            self.now += each;
            self.pool.record_bytes(ask.id, ask.request.layout.piece_length(*piece as usize), self.now);
            self.pool.complete_piece(ask.id, *piece, self.now);
        }
    }

    /// Answers a request like an honest peer.
    fn fulfil(&mut self, ask: &PickedRequest, each: Duration) {
        let pieces = ask.request.pieces[..usize::from(ask.request.limit)].to_vec();
        self.send_pieces(ask, &pieces, each);
        self.pool.end_request(ask.id, RequestEnd::Done, self.now);
    }
}

fn pieces_requested_of(asks: &[PickedRequest], n: u8) -> Vec<u32> {
    asks.iter().filter(|ask| ask.request.peer == peer(n)).flat_map(|ask| ask.request.pieces.clone()).collect()
}

#[test]
fn the_last_piece_is_requested_first_of_a_peer_that_has_it() {
    let mut bench = PickerFixture::of(100, &[partial(1), partial(2)]);
    bench.piece_map(1, &these(&(0..100).collect::<Vec<_>>()));
    bench.piece_map(2, &these(&(0..99).collect::<Vec<_>>()));
    let asks = bench.requests();
    let first = asks.iter().find(|ask| ask.request.peer == peer(1)).unwrap();
    assert_eq!(first.request.pieces[0], 99);
}

#[test]
fn the_rarest_pieces_come_first_and_every_picker_has_another_order() {
    let order = |seed| {
        let mut pool = PiecePicker::new(None, seed);
        pool.add_blob(blob("blob"), layout(64));
        pool.mark_hash_chain_ready(blob("blob"));
        pool.set_providers(blob("blob"), &[partial(1), partial(2)]);
        let now = Instant::now();
        pool.take_follow_changes(now);
        pool.record_piece_map(peer(1), blob("blob"), &these(&(0..63).collect::<Vec<_>>()), now);
        pool.record_piece_map(peer(2), blob("blob"), &these(&(0..60).collect::<Vec<_>>()), now);
        let asks: Vec<_> = std::iter::from_fn(|| pool.next_request(now)).collect();
        pieces_requested_of(&asks, 1)
    };
    assert!(order(1).iter().all(|piece| (60..63).contains(piece)), "{:?}", order(1));
    assert!((2..10).any(|seed| order(seed) != order(1)));
}

#[test]
fn a_lone_seed_is_offered_the_tail_and_a_row_that_differs_by_picker() {
    let offer = |seed| {
        let mut pool = PiecePicker::new(None, seed);
        pool.add_blob(blob("blob"), layout(64));
        pool.mark_hash_chain_ready(blob("blob"));
        pool.set_providers(blob("blob"), &[whole(1)]);
        let now = Instant::now();
        pool.take_follow_changes(now);
        pool.next_request(now).unwrap().request.pieces
    };
    let choice = offer(1);
    assert_eq!((choice[0], choice.len()), (63, 16));
    assert!(choice[1..].windows(2).all(|pair| pair[1] == (pair[0] + 1) % 63), "{choice:?}");
    assert!((2..10).any(|seed| offer(seed)[1] != choice[1]));
}

#[test]
fn a_seed_is_offered_more_pieces_than_it_sends_and_fewer_towards_the_end() {
    let mut bench = PickerFixture::of(256, &[whole(1), partial(2)]);
    let offers: Vec<_> = bench.requests().iter().map(|ask| (ask.request.pieces.len(), ask.request.limit)).collect();
    assert_eq!(offers, [(32, 1), (32, 1)]);

    let mut bench = PickerFixture::of(256, &[whole(1), partial(2)]);
    (0..248).for_each(|piece| bench.pool.mark_piece_present(bench.digest, piece));
    let offers: Vec<_> = bench.requests().iter().map(|ask| ask.request.pieces.len()).collect();
    assert_eq!(offers, [2, 1]);
}

#[test]
fn offered_pieces_are_unassigned_again_once_the_provider_has_chosen() {
    let mut bench = PickerFixture::of(64, &[whole(1), partial(2)]);
    bench.piece_map(2, &these(&(0..64).collect::<Vec<_>>()));
    let asks = bench.requests();
    let offer = asks.iter().find(|ask| ask.request.pieces.len() > 1).unwrap().clone();
    let asked = |asks: &[PickedRequest]| asks.iter().flat_map(|ask| ask.request.pieces.clone()).collect::<Vec<_>>();
    let mut all = asked(&asks);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), asked(&asks).len(), "no piece is requested twice");
    let left = offer.request.pieces[0];
    bench.pool.begin_piece(offer.id, offer.request.pieces[1], bench.now);
    assert!(bench.pool.blobs[0].request_count(left) == 0);
}

#[test]
fn pieces_of_all_blobs_are_requested_at_once() {
    let mut pool = PiecePicker::new(None, 1);
    let now = Instant::now();
    let names = ["one", "two", "three", "four"];
    for name in names {
        pool.add_blob(blob(name), layout(64));
        pool.mark_hash_chain_ready(blob(name));
        [1, 2, 3, 4].map(peer).into_iter().for_each(|peer| pool.record_verified_piece(peer, blob(name)));
        pool.set_providers(blob(name), &[1, 2, 3, 4].map(whole));
    }
    assert!(pool.take_follow_changes(now).is_empty(), "whole providers are not followed");
    let asks: Vec<_> = std::iter::from_fn(|| pool.next_request(now)).collect();
    assert_eq!(asks.len(), 8);
    for name in names {
        let first = asks.iter().find(|ask| ask.request.digest == blob(name)).expect("a request");
        assert_eq!(first.request.pieces[0], 63);
    }
}

#[test]
fn a_wrong_piece_is_fetched_again_from_another_provider() {
    let mut bench = PickerFixture::of(1, &[whole(1), whole(2)]);
    let ask = bench.requests().remove(0);
    bench.fulfil(&ask, ms(10));
    assert!(bench.pool.is_complete());
    bench.pool.discard_piece(bench.digest, 0);
    bench.pool.exclude_peer(ask.request.peer, bench.now + ms(60_000));
    assert_eq!((bench.pool.missing_pieces(bench.digest), bench.pool.is_complete()), (1, false));
    bench.pool.take_follow_changes(bench.now);
    let again = bench.requests();
    assert_eq!(again.len(), 1);
    assert_ne!(again[0].request.peer, ask.request.peer);
}

#[test]
fn absurd_piece_maps_are_harmless() {
    let mut bench = PickerFixture::of(9, &[partial(1)]);
    bench.piece_map(1, &PieceMapUpdate::Map(Bits(vec![0xff; 1000])));
    bench.piece_map(1, &PieceMapUpdate::Have(vec![0, 0, 8, 9, u32::MAX]));
    bench.piece_map(9, &PieceMapUpdate::HaveAll);
    let asks = bench.requests();
    assert!(asks.iter().all(|ask| ask.request.peer == peer(1) && ask.request.pieces.iter().all(|piece| *piece < 9)));
    bench.piece_map(1, &PieceMapUpdate::Map(Bits(Vec::new())));
    bench.pool.end_request(asks[0].id, RequestEnd::Done, bench.now);
    assert!(bench.requests_after(ms(200)).is_empty());
}

#[test]
fn an_empty_blob_is_a_single_empty_piece() {
    let mut bench = PickerFixture::of(0, &[whole(1)]);
    let ask = bench.requests().remove(0);
    assert_eq!((ask.request.pieces.clone(), ask.request.limit), (vec![0], 1));
    bench.fulfil(&ask, ms(1));
    assert!(bench.pool.is_complete());
}

#[test]
fn no_request_exceeds_its_limits() {
    let mut bench = PickerFixture::of(2560, &(1..=20).map(whole).collect::<Vec<_>>());
    for _ in 0..50 {
        for ask in bench.requests() {
            let PieceRequest { pieces: choice, limit: most, .. } = &ask.request;
            assert!(
                choice.len() <= MAX_REQUEST_PIECES && (1..=16).contains(most) && usize::from(*most) <= choice.len()
            );
            bench.fulfil(&ask, ms(1));
        }
    }
}

/// A blob without a hash chain, with two unverified whole providers.
fn unverified_providers() -> PickerFixture {
    let mut pool = PiecePicker::new(None, 1);
    pool.add_blob(blob("blob"), layout(64));
    pool.set_providers(blob("blob"), &[whole(1), whole(2)]);
    let now = Instant::now();
    pool.take_follow_changes(now);
    PickerFixture { pool, digest: blob("blob"), now }
}

#[test]
fn an_unverified_provider_gets_no_second_request_before_its_first_piece_is_verified() {
    let mut bench = unverified_providers();
    let asks = bench.requests();
    assert_eq!(asks.iter().map(|ask| ask.request.limit).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(
        asks.iter().map(|ask| ask.request.pieces[0]).collect::<Vec<_>>(),
        [0, 1],
        "the hash chain reaches these pieces first"
    );
    asks.iter().for_each(|ask| bench.fulfil(ask, ms(1)));
    assert!(bench.requests().is_empty(), "the pieces are not verified yet");
    bench.pool.record_verified_piece(peer(1), bench.digest);
    let asks = bench.requests();
    assert!(
        asks.iter().all(|ask| ask.request.peer == peer(1)) && asks.iter().any(|ask| ask.request.limit > 1),
        "{asks:?}"
    );
}

#[test]
fn a_provider_verified_for_a_blob_is_unverified_for_another_blob() {
    let mut bench = unverified_providers();
    bench.pool.add_blob(blob("other"), layout(64));
    bench.pool.record_verified_piece(peer(1), blob("other"));
    bench.pool.record_verified_piece(peer(2), blob("other"));
    let asks = bench.requests();
    assert!(asks.iter().all(|ask| ask.request.limit == 1), "{asks:?}");
    assert_eq!(asks.len(), 2);
}

#[test]
fn a_provider_that_contradicts_a_partial_hash_chain_is_left_alone_for_longer() {
    let mut bench = unverified_providers();
    bench.requests().iter().for_each(|ask| bench.fulfil(ask, ms(1)));
    bench.pool.record_mismatch(peer(1), bench.digest, bench.now);
    assert!(bench.requests_after(ms(600)).iter().all(|ask| ask.request.peer == peer(2)));
    assert!(bench.requests_after(ms(1890)).iter().all(|ask| ask.request.peer == peer(2)));
    assert!(
        bench.requests_after(ms(10)).iter().any(|ask| ask.request.peer == peer(1)),
        "the hash chain may be the lie"
    );
}

#[test]
fn unverified_providers_get_single_pieces_in_turn_while_no_hash_chain_comes() {
    let mut bench = unverified_providers();
    bench.requests().iter().for_each(|ask| bench.fulfil(ask, ms(1)));
    assert!(bench.requests_after(ms(490)).is_empty());
    bench.now = bench.pool.wake_at().unwrap() + ms(1);
    for _ in 0..5 {
        let asks = bench.requests();
        assert_eq!(asks.iter().map(|ask| ask.request.limit).collect::<Vec<_>>(), [1, 1]);
        asks.iter().for_each(|ask| bench.fulfil(ask, ms(1)));
    }
}

#[test]
fn a_starved_picker_has_more_requests_in_flight() {
    let peers: Vec<_> = (1..=20).map(partial).collect();
    let mut bench = PickerFixture::of(200, &peers);
    (1..=20).for_each(|n| bench.piece_map(n, &these(&(0..200).collect::<Vec<_>>())));
    let first = bench.requests();
    assert_eq!(first.len(), 8);
    first.iter().for_each(|ask| bench.fulfil(ask, ms(40)));
    let second = bench.requests();
    assert_eq!(second.len(), 8, "the rate is 25 MiB a second, as before");
    second[..4].iter().for_each(|ask| bench.fulfil(ask, ms(80)));
    bench.requests();
    assert_eq!(bench.pool.in_flight.values().filter(|asked| !asked.is_late).count(), 12, "the rate has halved");
}
