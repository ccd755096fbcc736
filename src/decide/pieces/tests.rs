//! What a pool asks, of whom, and when.

mod anything;
mod peers;

use std::time::Duration;

use super::*;
use crate::model::{Bits, MAX_CHOICE};

const PIECE: u64 = 1 << 20;

fn peer(n: u8) -> PeerId {
    PeerId::from_public_key([n; 32])
}

fn blob(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn cut(pieces: u64) -> Cut {
    Cut::new(pieces * PIECE, PIECE).unwrap()
}

fn partial(n: u8) -> Candidate {
    Candidate { peer: peer(n), zone: None, whole: false, standing: 0 }
}

fn whole(n: u8) -> Candidate {
    Candidate { whole: true, ..partial(n) }
}

fn of_zone(zone: &str, candidate: Candidate) -> Candidate {
    Candidate { zone: Some(zone.to_owned().try_into().unwrap()), ..candidate }
}

fn these(pieces: &[usize]) -> Availability {
    let mut bits = Bits::default();
    pieces.iter().for_each(|piece| bits.set(*piece));
    Availability::These(bits)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A pool with one blob, and a clock.
struct Bench {
    pool: Pool,
    digest: Digest,
    now: Instant,
}

impl Bench {
    fn of(pieces: u64, candidates: &[Candidate]) -> Self {
        Self::in_zone(None, pieces, candidates)
    }

    fn in_zone(zone: Option<&str>, pieces: u64, candidates: &[Candidate]) -> Self {
        let digest = blob("blob");
        let mut pool = Pool::new(zone.map(|zone| zone.to_owned().try_into().unwrap()), 1);
        pool.add(digest, cut(pieces));
        pool.lists(digest);
        candidates.iter().for_each(|candidate| pool.fits(candidate.peer, digest));
        pool.candidates(digest, candidates);
        let now = Instant::now();
        pool.neighbours(now);
        Self { pool, digest, now }
    }

    fn hears(&mut self, n: u8, word: &Availability) {
        self.pool.hears(peer(n), self.digest, word, self.now);
    }

    fn asks(&mut self) -> Vec<Ask> {
        std::iter::from_fn(|| self.pool.next(self.now)).collect()
    }

    fn after(&mut self, time: Duration) -> Vec<Ask> {
        self.now += time;
        self.asks()
    }

    /// The peer sends these pieces, each in so much time.
    fn sends(&mut self, ask: &Ask, pieces: &[u32], each: Duration) {
        for piece in pieces {
            self.pool.begins(ask.id, *piece, self.now);
            self.now += each;
            self.pool.brings(ask.id, ask.order.cut.length(*piece as usize), self.now);
            self.pool.has(ask.id, *piece, self.now);
        }
    }

    /// Answers an ask as an honest peer does.
    fn fulfils(&mut self, ask: &Ask, each: Duration) {
        let pieces = ask.order.choice[..usize::from(ask.order.most)].to_vec();
        self.sends(ask, &pieces, each);
        self.pool.ends(ask.id, End::Done, self.now);
    }
}

fn asked_of(asks: &[Ask], n: u8) -> Vec<u32> {
    asks.iter().filter(|ask| ask.order.peer == peer(n)).flat_map(|ask| ask.order.choice.clone()).collect()
}

#[test]
fn the_last_piece_is_asked_first_of_a_peer_that_has_it() {
    let mut bench = Bench::of(100, &[partial(1), partial(2)]);
    bench.hears(1, &these(&(0..100).collect::<Vec<_>>()));
    bench.hears(2, &these(&(0..99).collect::<Vec<_>>()));
    let asks = bench.asks();
    let first = asks.iter().find(|ask| ask.order.peer == peer(1)).unwrap();
    assert_eq!(first.order.choice[0], 99);
}

#[test]
fn the_rarest_come_first_and_in_another_order_for_everybody() {
    let order = |seed| {
        let mut pool = Pool::new(None, seed);
        pool.add(blob("blob"), cut(64));
        pool.lists(blob("blob"));
        pool.candidates(blob("blob"), &[partial(1), partial(2)]);
        let now = Instant::now();
        pool.neighbours(now);
        pool.hears(peer(1), blob("blob"), &these(&(0..63).collect::<Vec<_>>()), now);
        pool.hears(peer(2), blob("blob"), &these(&(0..60).collect::<Vec<_>>()), now);
        let asks: Vec<_> = std::iter::from_fn(|| pool.next(now)).collect();
        asked_of(&asks, 1)
    };
    assert!(order(1).iter().all(|piece| (60..63).contains(piece)), "{:?}", order(1));
    assert!((2..10).any(|seed| order(seed) != order(1)));
}

#[test]
fn a_lone_source_is_offered_the_tail_and_a_row_and_another_row_by_everybody() {
    let offer = |seed| {
        let mut pool = Pool::new(None, seed);
        pool.add(blob("blob"), cut(64));
        pool.lists(blob("blob"));
        pool.candidates(blob("blob"), &[whole(1)]);
        let now = Instant::now();
        pool.neighbours(now);
        pool.next(now).unwrap().order.choice
    };
    let choice = offer(1);
    assert_eq!((choice[0], choice.len()), (63, 16));
    assert!(choice[1..].windows(2).all(|pair| pair[1] == (pair[0] + 1) % 63), "{choice:?}");
    assert!((2..10).any(|seed| offer(seed)[1] != choice[1]));
}

#[test]
fn a_complete_holder_is_offered_more_than_it_is_to_send_and_less_towards_the_end() {
    let mut bench = Bench::of(256, &[whole(1), partial(2)]);
    let offers: Vec<_> = bench.asks().iter().map(|ask| (ask.order.choice.len(), ask.order.most)).collect();
    assert_eq!(offers, [(32, 1), (32, 1)]);

    let mut bench = Bench::of(256, &[whole(1), partial(2)]);
    (0..248).for_each(|piece| bench.pool.hold(bench.digest, piece));
    let offers: Vec<_> = bench.asks().iter().map(|ask| ask.order.choice.len()).collect();
    assert_eq!(offers, [2, 1]);
}

#[test]
fn what_is_set_aside_is_free_again_once_the_holder_has_chosen() {
    let mut bench = Bench::of(64, &[whole(1), partial(2)]);
    bench.hears(2, &these(&(0..64).collect::<Vec<_>>()));
    let asks = bench.asks();
    let offer = asks.iter().find(|ask| ask.order.choice.len() > 1).unwrap().clone();
    let asked = |asks: &[Ask]| asks.iter().flat_map(|ask| ask.order.choice.clone()).collect::<Vec<_>>();
    let mut all = asked(&asks);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), asked(&asks).len(), "nothing is asked of two");
    let left = offer.order.choice[0];
    bench.pool.begins(offer.id, offer.order.choice[1], bench.now);
    assert!(bench.pool.blobs[0].askers(left) == 0);
}

#[test]
fn pieces_of_all_blobs_are_asked_for_at_once() {
    let mut pool = Pool::new(None, 1);
    let now = Instant::now();
    let names = ["one", "two", "three", "four"];
    for name in names {
        pool.add(blob(name), cut(64));
        pool.lists(blob(name));
        [1, 2, 3, 4].map(peer).into_iter().for_each(|peer| pool.fits(peer, blob(name)));
        pool.candidates(blob(name), &[1, 2, 3, 4].map(whole));
    }
    assert!(pool.neighbours(now).is_empty(), "complete holders are not followed");
    let asks: Vec<_> = std::iter::from_fn(|| pool.next(now)).collect();
    assert_eq!(asks.len(), 8);
    for name in names {
        let first = asks.iter().find(|ask| ask.order.digest == blob(name)).expect("asked for");
        assert_eq!(first.order.choice[0], 63);
    }
}

#[test]
fn a_piece_that_was_wrong_is_fetched_again() {
    let mut bench = Bench::of(1, &[whole(1), whole(2)]);
    let ask = bench.asks().remove(0);
    bench.fulfils(&ask, ms(10));
    assert!(bench.pool.is_done());
    bench.pool.unfit(bench.digest, 0);
    bench.pool.forget(ask.order.peer, bench.now + ms(60_000));
    assert_eq!((bench.pool.missing(bench.digest), bench.pool.is_done()), (1, false));
    bench.pool.neighbours(bench.now);
    let again = bench.asks();
    assert_eq!(again.len(), 1);
    assert_ne!(again[0].order.peer, ask.order.peer);
}

#[test]
fn absurd_words_are_harmless() {
    let mut bench = Bench::of(9, &[partial(1)]);
    bench.hears(1, &Availability::These(Bits(vec![0xff; 1000])));
    bench.hears(1, &Availability::Also(vec![0, 0, 8, 9, u32::MAX]));
    bench.hears(9, &Availability::Whole);
    let asks = bench.asks();
    assert!(asks.iter().all(|ask| ask.order.peer == peer(1) && ask.order.choice.iter().all(|piece| *piece < 9)));
    bench.hears(1, &Availability::These(Bits(Vec::new())));
    bench.pool.ends(asks[0].id, End::Done, bench.now);
    assert!(bench.after(ms(200)).is_empty());
}

#[test]
fn an_empty_blob_is_one_empty_piece() {
    let mut bench = Bench::of(0, &[whole(1)]);
    let ask = bench.asks().remove(0);
    assert_eq!((ask.order.choice.clone(), ask.order.most), (vec![0], 1));
    bench.fulfils(&ask, ms(1));
    assert!(bench.pool.is_done());
}

#[test]
fn no_order_says_more_than_it_may() {
    let mut bench = Bench::of(2560, &(1..=20).map(whole).collect::<Vec<_>>());
    for _ in 0..50 {
        for ask in bench.asks() {
            let Order { choice, most, .. } = &ask.order;
            assert!(choice.len() <= MAX_CHOICE && (1..=16).contains(most) && usize::from(*most) <= choice.len());
            bench.fulfils(&ask, ms(1));
        }
    }
}

/// A blob that two strangers hold, without a list.
fn strangers() -> Bench {
    let mut pool = Pool::new(None, 1);
    pool.add(blob("blob"), cut(64));
    pool.candidates(blob("blob"), &[whole(1), whole(2)]);
    let now = Instant::now();
    pool.neighbours(now);
    Bench { pool, digest: blob("blob"), now }
}

#[test]
fn a_stranger_is_asked_for_one_piece_and_for_no_other_before_it_is_compared() {
    let mut bench = strangers();
    let asks = bench.asks();
    assert_eq!(asks.iter().map(|ask| ask.order.most).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(asks.iter().map(|ask| ask.order.choice[0]).collect::<Vec<_>>(), [0, 1], "a list reaches these first");
    asks.iter().for_each(|ask| bench.fulfils(ask, ms(1)));
    assert!(bench.asks().is_empty(), "they came, and may be wrong");
    bench.pool.fits(peer(1), bench.digest);
    let asks = bench.asks();
    assert!(asks.iter().all(|ask| ask.order.peer == peer(1)) && asks.iter().any(|ask| ask.order.most > 1), "{asks:?}");
}

#[test]
fn who_was_right_about_one_blob_is_a_stranger_about_another() {
    let mut bench = strangers();
    bench.pool.add(blob("other"), cut(64));
    bench.pool.fits(peer(1), blob("other"));
    bench.pool.fits(peer(2), blob("other"));
    let asks = bench.asks();
    assert!(asks.iter().all(|ask| ask.order.most == 1), "{asks:?}");
    assert_eq!(asks.len(), 2);
}

#[test]
fn one_that_does_not_fit_the_beginning_of_a_list_is_left_alone_for_longer() {
    let mut bench = strangers();
    bench.asks().iter().for_each(|ask| bench.fulfils(ask, ms(1)));
    bench.pool.doubts(peer(1), bench.digest, bench.now);
    assert!(bench.after(ms(600)).iter().all(|ask| ask.order.peer == peer(2)));
    assert!(bench.after(ms(1890)).iter().all(|ask| ask.order.peer == peer(2)));
    assert!(bench.after(ms(10)).iter().any(|ask| ask.order.peer == peer(1)), "the list may be the lie");
}

#[test]
fn where_no_list_comes_strangers_are_asked_for_one_piece_after_the_other() {
    let mut bench = strangers();
    bench.asks().iter().for_each(|ask| bench.fulfils(ask, ms(1)));
    assert!(bench.after(ms(490)).is_empty());
    bench.now = bench.pool.wake_at().unwrap() + ms(1);
    for _ in 0..5 {
        let asks = bench.asks();
        assert_eq!(asks.iter().map(|ask| ask.order.most).collect::<Vec<_>>(), [1, 1]);
        asks.iter().for_each(|ask| bench.fulfils(ask, ms(1)));
    }
}

#[test]
fn who_gets_less_than_it_once_got_asks_for_more_at_a_time() {
    let peers: Vec<_> = (1..=20).map(partial).collect();
    let mut bench = Bench::of(200, &peers);
    (1..=20).for_each(|n| bench.hears(n, &these(&(0..200).collect::<Vec<_>>())));
    let first = bench.asks();
    assert_eq!(first.len(), 8);
    first.iter().for_each(|ask| bench.fulfils(ask, ms(40)));
    let second = bench.asks();
    assert_eq!(second.len(), 8, "25 MiB in a second, as before");
    second[..4].iter().for_each(|ask| bench.fulfils(ask, ms(80)));
    bench.asks();
    assert_eq!(bench.pool.asks.values().filter(|asked| !asked.is_late).count(), 12, "half of it");
}
