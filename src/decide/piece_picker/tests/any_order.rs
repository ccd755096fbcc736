//! The picker under any order of events.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum PickerEvent {
    SetProviders(u8, Vec<(u8, bool, u8, u8)>),
    PieceMap(u8, u8, PieceMapUpdate),
    RemoveProvider(u8, u8),
    ExcludePeer(u8, u16),
    CrossZone(bool),
    Next,
    BeginPiece(usize, usize),
    Bytes(usize, u64),
    CompletePiece(usize),
    EndRequest(usize, u8),
    DiscardPiece(u8, u32),
    PiecePresent(u8, u32),
    HashChain(u8),
    Verified(u8, u8),
    Mismatch(u8, u8),
    Wait(u16),
}

const BLOBS: [&str; 3] = ["one", "two", "three"];
const PIECES: [u64; 3] = [1, 40, 130];

fn any_piece_map() -> impl Strategy<Value = PieceMapUpdate> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| PieceMapUpdate::Map(Bits(bytes))),
        prop::collection::vec(prop_oneof![0..140_u32, any::<u32>()], 0..40).prop_map(PieceMapUpdate::Have),
        Just(PieceMapUpdate::HaveAll),
    ]
}

fn any_event() -> impl Strategy<Value = PickerEvent> {
    use PickerEvent::*;
    let candidate = (0..30_u8, any::<bool>(), 0..3_u8, 0..3_u8);
    prop_oneof![
        2 => (0..3_u8, prop::collection::vec(candidate, 0..40)).prop_map(|(blob, list)| SetProviders(blob, list)),
        4 => (0..30_u8, 0..3_u8, any_piece_map()).prop_map(|(peer, blob, word)| PieceMap(peer, blob, word)),
        1 => (0..30_u8, 0..3_u8).prop_map(|(peer, blob)| RemoveProvider(peer, blob)),
        1 => (0..30_u8, any::<u16>()).prop_map(|(peer, ms)| ExcludePeer(peer, ms)),
        1 => any::<bool>().prop_map(CrossZone),
        4 => Just(Next),
        8 => (any::<usize>(), any::<usize>()).prop_map(|(ask, piece)| BeginPiece(ask, piece)),
        4 => (any::<usize>(), any::<u64>()).prop_map(|(ask, bytes)| Bytes(ask, bytes)),
        8 => any::<usize>().prop_map(CompletePiece),
        2 => (any::<usize>(), 0..3_u8).prop_map(|(ask, how)| EndRequest(ask, how)),
        1 => (0..3_u8, 0..140_u32).prop_map(|(blob, piece)| DiscardPiece(blob, piece)),
        1 => (0..3_u8, 0..140_u32).prop_map(|(blob, piece)| PiecePresent(blob, piece)),
        1 => (0..3_u8).prop_map(HashChain),
        2 => (0..30_u8, 0..3_u8).prop_map(|(peer, blob)| Verified(peer, blob)),
        1 => (0..30_u8, 0..3_u8).prop_map(|(peer, blob)| Mismatch(peer, blob)),
        3 => (0..3000_u16).prop_map(Wait),
    ]
}

/// A request in flight, as the driver sees it.
struct OpenRequest {
    request: PickedRequest,
    began: Option<u32>,
}

struct SimulatedDriver {
    pool: PiecePicker,
    now: Instant,
    open: Vec<OpenRequest>,
}

impl SimulatedDriver {
    fn new(seed: u64) -> Self {
        let mut pool = PiecePicker::new(Some("z0".to_owned().try_into().unwrap()), seed);
        BLOBS.iter().zip(PIECES).for_each(|(name, pieces)| pool.add_blob(blob(name), layout(pieces)));
        Self { pool, now: Instant::now(), open: Vec::new() }
    }

    fn take_requests(&mut self) {
        self.pool.take_follow_changes(self.now);
        self.drop_cancelled();
        while let Some(ask) = self.pool.next_request(self.now) {
            self.open.push(OpenRequest { request: ask, began: None });
        }
        self.drop_cancelled();
    }

    fn drop_cancelled(&mut self) {
        let gone = self.pool.take_cancellations();
        self.open.retain(|open| !gone.contains(&open.request.id));
    }

    fn apply(&mut self, what: PickerEvent) {
        let (now, digest) = (self.now, |n: u8| blob(BLOBS[usize::from(n)]));
        let place = |ask: usize, open: &[OpenRequest]| (!open.is_empty()).then(|| ask % open.len());
        match what {
            PickerEvent::SetProviders(of, list) => {
                let one = |(n, whole, standing, zone): (u8, bool, u8, u8)| {
                    let one = Provider { is_whole: whole, standing, ..partial(n) };
                    if zone == 0 { one } else { of_zone(&format!("z{}", zone - 1), one) }
                };
                self.pool.set_providers(digest(of), &list.into_iter().map(one).collect::<Vec<_>>());
            }
            PickerEvent::PieceMap(n, of, word) => self.pool.record_piece_map(peer(n), digest(of), &word, now),
            PickerEvent::RemoveProvider(n, of) => self.pool.remove_provider(peer(n), digest(of)),
            PickerEvent::ExcludePeer(n, time) => self.pool.exclude_peer(peer(n), now + ms(time.into())),
            PickerEvent::CrossZone(allowed) => self.pool.set_cross_zone(allowed),
            PickerEvent::Next => self.take_requests(),
            PickerEvent::BeginPiece(ask, piece) => {
                if let Some(open) = place(ask, &self.open).map(|place| &mut self.open[place]) {
                    let piece = open.request.request.pieces[piece % open.request.request.pieces.len()];
                    open.began = Some(piece);
                    self.pool.begin_piece(open.request.id, piece, now);
                }
            }
            PickerEvent::Bytes(ask, bytes) => {
                if let Some(place) = place(ask, &self.open) {
                    self.pool.record_bytes(self.open[place].request.id, bytes, now);
                }
            }
            PickerEvent::CompletePiece(ask) => {
                if let Some(open) = place(ask, &self.open).map(|place| &mut self.open[place])
                    && let Some(piece) = open.began
                {
                    self.pool.complete_piece(open.request.id, piece, now);
                }
            }
            PickerEvent::EndRequest(ask, how) => {
                if let Some(place) = place(ask, &self.open) {
                    let how = [RequestEnd::Done, RequestEnd::Busy, RequestEnd::Failed][usize::from(how)];
                    self.pool.end_request(self.open.swap_remove(place).request.id, how, now);
                }
            }
            PickerEvent::DiscardPiece(of, piece) => self.pool.discard_piece(digest(of), piece),
            PickerEvent::PiecePresent(of, piece) => self.pool.mark_piece_present(digest(of), piece),
            PickerEvent::HashChain(of) => self.pool.mark_hash_chain_ready(digest(of)),
            PickerEvent::Mismatch(n, of) => self.pool.record_mismatch(peer(n), digest(of), now),
            PickerEvent::Verified(n, of) => self.pool.record_verified_piece(peer(n), digest(of)),
            PickerEvent::Wait(time) => self.now += ms(time.into()),
        }
    }

    /// Every counter matches a recount, and no limit is exceeded.
    fn check_invariants(&self) {
        assert!(self.pool.in_flight.len() <= requests::MAX_IN_FLIGHT);
        for (place, blob) in self.pool.blobs.iter().enumerate() {
            let pieces = 0..blob.layout.piece_count() as u32;
            let expected = |piece: u32| {
                let of = |asked: &&InFlightRequest| {
                    asked.blob_index == place && asked.reserved_pieces().any(|one| one == piece)
                };
                self.pool.in_flight.values().filter(of).count()
            };
            let is_free = |piece: &u32| !blob.is_present(*piece) && expected(*piece) == 0;
            for piece in pieces.clone() {
                assert_eq!(usize::from(blob.request_count(piece)), expected(piece), "{piece}");
                assert!(
                    expected(piece) <= 2 || blob.is_present(piece),
                    "piece {piece} is requested from too many peers"
                );
            }
            assert_eq!(blob.unassigned_count(), pieces.clone().filter(is_free).count());
            assert_eq!(blob.missing(), pieces.clone().filter(|piece| !blob.is_present(*piece)).count());
            assert!(blob.selected.len() <= provider_selection::MAX_SELECTED);
            for link in &blob.selected {
                let useful = pieces.clone().filter(|piece| is_free(piece) && link.has_piece(*piece)).count();
                assert_eq!(link.useful_count, useful);
                let peer = self.pool.peers.get(link.peer);
                let asks = self.pool.in_flight.values().filter(|asked| asked.peer == link.peer);
                assert_eq!(usize::from(peer.in_flight), asks.count());
                assert!(peer.in_flight <= 4);
            }
        }
    }

    /// Adds an honest seed. Returns whether all blobs become complete.
    fn finish_with_honest_seed(&mut self) -> bool {
        for open in std::mem::take(&mut self.open) {
            self.pool.end_request(open.request.id, RequestEnd::Failed, self.now);
        }
        self.pool.set_cross_zone(true);
        BLOBS.iter().for_each(|name| self.pool.set_providers(blob(name), &[of_zone("z1", whole(200))]));
        for _ in 0..1000 {
            self.take_requests();
            for open in std::mem::take(&mut self.open) {
                let PieceRequest { pieces: choice, limit: most, .. } = &open.request.request;
                for piece in choice.iter().take((*most).into()) {
                    self.pool.begin_piece(open.request.id, *piece, self.now);
                    self.now += ms(1);
                    self.pool.record_bytes(open.request.id, PIECE, self.now);
                    self.pool.complete_piece(open.request.id, *piece, self.now);
                }
                self.pool.end_request(open.request.id, RequestEnd::Done, self.now);
                self.check_invariants();
            }
            if self.pool.is_complete() {
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
    fn every_piece_arrives_in_the_end_after_any_order_of_events(
        seed in any::<u64>(),
        happenings in prop::collection::vec(any_event(), 0..120),
    ) {
        let mut world = SimulatedDriver::new(seed);
        for what in happenings {
            world.apply(what);
            world.check_invariants();
        }
        prop_assert!(world.finish_with_honest_seed());
    }
}
