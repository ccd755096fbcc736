//! Anything in any order.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Happening {
    Candidates(u8, Vec<(u8, bool, u8, u8)>),
    Hears(u8, u8, Availability),
    Loses(u8, u8),
    Forget(u8, u16),
    Cross(bool),
    Next,
    Begins(usize, usize),
    Brings(usize, u64),
    Has(usize),
    Ends(usize, u8),
    Unfit(u8, u32),
    Hold(u8, u32),
    Lists(u8),
    Fits(u8, u8),
    Doubts(u8, u8),
    Wait(u16),
}

const BLOBS: [&str; 3] = ["one", "two", "three"];
const PIECES: [u64; 3] = [1, 40, 130];

fn availability() -> impl Strategy<Value = Availability> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Availability::These(Bits(bytes))),
        prop::collection::vec(prop_oneof![0..140_u32, any::<u32>()], 0..40).prop_map(Availability::Also),
        Just(Availability::Whole),
    ]
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    let candidate = (0..30_u8, any::<bool>(), 0..3_u8, 0..3_u8);
    prop_oneof![
        2 => (0..3_u8, prop::collection::vec(candidate, 0..40)).prop_map(|(blob, list)| Candidates(blob, list)),
        4 => (0..30_u8, 0..3_u8, availability()).prop_map(|(peer, blob, word)| Hears(peer, blob, word)),
        1 => (0..30_u8, 0..3_u8).prop_map(|(peer, blob)| Loses(peer, blob)),
        1 => (0..30_u8, any::<u16>()).prop_map(|(peer, ms)| Forget(peer, ms)),
        1 => any::<bool>().prop_map(Cross),
        4 => Just(Next),
        8 => (any::<usize>(), any::<usize>()).prop_map(|(ask, piece)| Begins(ask, piece)),
        4 => (any::<usize>(), any::<u64>()).prop_map(|(ask, bytes)| Brings(ask, bytes)),
        8 => any::<usize>().prop_map(Has),
        2 => (any::<usize>(), 0..3_u8).prop_map(|(ask, how)| Ends(ask, how)),
        1 => (0..3_u8, 0..140_u32).prop_map(|(blob, piece)| Unfit(blob, piece)),
        1 => (0..3_u8, 0..140_u32).prop_map(|(blob, piece)| Hold(blob, piece)),
        1 => (0..3_u8).prop_map(Lists),
        2 => (0..30_u8, 0..3_u8).prop_map(|(peer, blob)| Fits(peer, blob)),
        1 => (0..30_u8, 0..3_u8).prop_map(|(peer, blob)| Doubts(peer, blob)),
        3 => (0..3000_u16).prop_map(Wait),
    ]
}

/// What the driver knows of an ask.
struct Open {
    ask: Ask,
    began: Option<u32>,
}

struct World {
    pool: Pool,
    now: Instant,
    open: Vec<Open>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut pool = Pool::new(Some("z0".to_owned().try_into().unwrap()), seed);
        BLOBS.iter().zip(PIECES).for_each(|(name, pieces)| pool.add(blob(name), cut(pieces)));
        Self { pool, now: Instant::now(), open: Vec::new() }
    }

    fn takes(&mut self) {
        self.pool.neighbours(self.now);
        self.drops();
        while let Some(ask) = self.pool.next(self.now) {
            self.open.push(Open { ask, began: None });
        }
        self.drops();
    }

    fn drops(&mut self) {
        let gone = self.pool.cancels();
        self.open.retain(|open| !gone.contains(&open.ask.id));
    }

    fn happens(&mut self, what: Happening) {
        let (now, digest) = (self.now, |n: u8| blob(BLOBS[usize::from(n)]));
        let place = |ask: usize, open: &[Open]| (!open.is_empty()).then(|| ask % open.len());
        match what {
            Happening::Candidates(of, list) => {
                let one = |(n, whole, standing, zone): (u8, bool, u8, u8)| {
                    let one = Candidate { whole, standing, ..partial(n) };
                    if zone == 0 { one } else { of_zone(&format!("z{}", zone - 1), one) }
                };
                self.pool.candidates(digest(of), &list.into_iter().map(one).collect::<Vec<_>>());
            }
            Happening::Hears(n, of, word) => self.pool.hears(peer(n), digest(of), &word, now),
            Happening::Loses(n, of) => self.pool.loses(peer(n), digest(of)),
            Happening::Forget(n, time) => self.pool.forget(peer(n), now + ms(time.into())),
            Happening::Cross(allowed) => self.pool.cross(allowed),
            Happening::Next => self.takes(),
            Happening::Begins(ask, piece) => {
                if let Some(open) = place(ask, &self.open).map(|place| &mut self.open[place]) {
                    let piece = open.ask.order.choice[piece % open.ask.order.choice.len()];
                    open.began = Some(piece);
                    self.pool.begins(open.ask.id, piece, now);
                }
            }
            Happening::Brings(ask, bytes) => {
                if let Some(place) = place(ask, &self.open) {
                    self.pool.brings(self.open[place].ask.id, bytes, now);
                }
            }
            Happening::Has(ask) => {
                if let Some(open) = place(ask, &self.open).map(|place| &mut self.open[place])
                    && let Some(piece) = open.began
                {
                    self.pool.has(open.ask.id, piece, now);
                }
            }
            Happening::Ends(ask, how) => {
                if let Some(place) = place(ask, &self.open) {
                    let how = [End::Done, End::Busy, End::Failed][usize::from(how)];
                    self.pool.ends(self.open.swap_remove(place).ask.id, how, now);
                }
            }
            Happening::Unfit(of, piece) => self.pool.unfit(digest(of), piece),
            Happening::Hold(of, piece) => self.pool.hold(digest(of), piece),
            Happening::Lists(of) => self.pool.lists(digest(of)),
            Happening::Doubts(n, of) => self.pool.doubts(peer(n), digest(of), now),
            Happening::Fits(n, of) => self.pool.fits(peer(n), digest(of)),
            Happening::Wait(time) => self.now += ms(time.into()),
        }
    }

    /// What is counted is what a recount finds, and no bound is passed.
    fn holds(&self) {
        assert!(self.pool.asks.len() <= asking::MAX_ASKS);
        for (place, blob) in self.pool.blobs.iter().enumerate() {
            let pieces = 0..blob.cut.pieces() as u32;
            let expected = |piece: u32| {
                let of = |asked: &&Asked| asked.place == place && asked.owed().any(|one| one == piece);
                self.pool.asks.values().filter(of).count()
            };
            let is_free = |piece: &u32| !blob.is_here(*piece) && expected(*piece) == 0;
            for piece in pieces.clone() {
                assert_eq!(usize::from(blob.askers(piece)), expected(piece), "{piece}");
                assert!(expected(piece) <= 2 || blob.is_here(piece), "{piece} is asked of too many");
            }
            assert_eq!(blob.free_count(), pieces.clone().filter(is_free).count());
            assert_eq!(blob.missing(), pieces.clone().filter(|piece| !blob.is_here(*piece)).count());
            assert!(blob.links.len() <= neighbours::NEIGHBOURS);
            for link in &blob.links {
                let useful = pieces.clone().filter(|piece| is_free(piece) && link.has(*piece)).count();
                assert_eq!(link.useful, useful);
                let peer = self.pool.peers.get(link.peer);
                let asks = self.pool.asks.values().filter(|asked| asked.peer == link.peer);
                assert_eq!(usize::from(peer.asks), asks.count());
                assert!(peer.asks <= 4);
            }
        }
    }

    /// From now on somebody is honest. Returns whether everything came.
    fn comes_true(&mut self) -> bool {
        for open in std::mem::take(&mut self.open) {
            self.pool.ends(open.ask.id, End::Failed, self.now);
        }
        self.pool.cross(true);
        BLOBS.iter().for_each(|name| self.pool.candidates(blob(name), &[of_zone("z1", whole(200))]));
        for _ in 0..1000 {
            self.takes();
            for open in std::mem::take(&mut self.open) {
                let Order { choice, most, .. } = &open.ask.order;
                for piece in choice.iter().take((*most).into()) {
                    self.pool.begins(open.ask.id, *piece, self.now);
                    self.now += ms(1);
                    self.pool.brings(open.ask.id, PIECE, self.now);
                    self.pool.has(open.ask.id, *piece, self.now);
                }
                self.pool.ends(open.ask.id, End::Done, self.now);
                self.holds();
            }
            if self.pool.is_done() {
                return true;
            }
            let wake = self.pool.wake_at().filter(|at| *at > self.now);
            self.now = wake.unwrap_or(self.now + ms(1));
        }
        false
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 64 } else { 5000 }))]

    #[test]
    fn whatever_happens_every_piece_is_asked_for_at_last(
        seed in any::<u64>(),
        happenings in prop::collection::vec(happening(), 0..120),
    ) {
        let mut world = World::new(seed);
        for what in happenings {
            world.happens(what);
            world.holds();
        }
        prop_assert!(world.comes_true());
    }
}
