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
        2 => (0..3_u8, prop::collection::vec(candidate, 0..40)).prop_map(|(blob, providers)| SetProviders(blob, providers)),
        4 => (0..30_u8, 0..3_u8, any_piece_map()).prop_map(|(peer, blob, update)| PieceMap(peer, blob, update)),
        1 => (0..30_u8, 0..3_u8).prop_map(|(peer, blob)| RemoveProvider(peer, blob)),
        1 => (0..30_u8, any::<u16>()).prop_map(|(peer, ms)| ExcludePeer(peer, ms)),
        1 => any::<bool>().prop_map(CrossZone),
        4 => Just(Next),
        8 => (any::<usize>(), any::<usize>()).prop_map(|(number, piece)| BeginPiece(number, piece)),
        4 => (any::<usize>(), any::<u64>()).prop_map(|(number, bytes)| Bytes(number, bytes)),
        8 => any::<usize>().prop_map(CompletePiece),
        2 => (any::<usize>(), 0..3_u8).prop_map(|(number, end)| EndRequest(number, end)),
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
    picker: PiecePicker,
    now: Instant,
    open: Vec<OpenRequest>,
}

impl SimulatedDriver {
    fn new(seed: u64) -> Self {
        let mut picker = PiecePicker::new(Some("z0".to_owned().try_into().unwrap()), seed);
        BLOBS.iter().zip(PIECES).for_each(|(name, pieces)| picker.add_blob(blob(name), layout(pieces)));
        Self { picker, now: Instant::now(), open: Vec::new() }
    }

    fn take_requests(&mut self) {
        self.picker.take_follow_changes(self.now);
        self.drop_cancelled();
        while let Some(pick) = self.picker.next_request(self.now) {
            self.open.push(OpenRequest { request: pick, began: None });
        }
        self.drop_cancelled();
    }

    fn drop_cancelled(&mut self) {
        let cancelled = self.picker.take_cancellations();
        self.open.retain(|open| !cancelled.contains(&open.request.id));
    }

    fn apply(&mut self, event: PickerEvent) {
        let (now, digest) = (self.now, |n: u8| blob(BLOBS[usize::from(n)]));
        let open_index = |number: usize, open: &[OpenRequest]| (!open.is_empty()).then(|| number % open.len());
        match event {
            PickerEvent::SetProviders(blob_number, providers) => {
                let one = |(n, whole, standing, zone): (u8, bool, u8, u8)| {
                    let one = Provider { is_whole: whole, standing, ..partial(n) };
                    if zone == 0 { one } else { of_zone(&format!("z{}", zone - 1), one) }
                };
                self.picker.set_providers(digest(blob_number), &providers.into_iter().map(one).collect::<Vec<_>>());
            }
            PickerEvent::PieceMap(n, blob_number, update) => {
                self.picker.record_piece_map(peer(n), digest(blob_number), &update, now)
            }
            PickerEvent::RemoveProvider(n, blob_number) => self.picker.remove_provider(peer(n), digest(blob_number)),
            PickerEvent::ExcludePeer(n, time) => self.picker.exclude_peer(peer(n), now + ms(time.into())),
            PickerEvent::CrossZone(allowed) => self.picker.set_cross_zone(allowed),
            PickerEvent::Next => self.take_requests(),
            PickerEvent::BeginPiece(number, piece) => {
                if let Some(open) = open_index(number, &self.open).map(|index| &mut self.open[index]) {
                    let piece = open.request.request.pieces[piece % open.request.request.pieces.len()];
                    open.began = Some(piece);
                    self.picker.begin_piece(open.request.id, piece, now);
                }
            }
            PickerEvent::Bytes(number, bytes) => {
                if let Some(index) = open_index(number, &self.open) {
                    self.picker.record_bytes(self.open[index].request.id, bytes, now);
                }
            }
            PickerEvent::CompletePiece(number) => {
                if let Some(open) = open_index(number, &self.open).map(|index| &mut self.open[index])
                    && let Some(piece) = open.began
                {
                    self.picker.complete_piece(open.request.id, piece, now);
                }
            }
            PickerEvent::EndRequest(number, end) => {
                if let Some(index) = open_index(number, &self.open) {
                    let how = [RequestEnd::Done, RequestEnd::Busy, RequestEnd::Failed][usize::from(end)];
                    self.picker.end_request(self.open.swap_remove(index).request.id, how, now);
                }
            }
            PickerEvent::DiscardPiece(blob_number, piece) => self.picker.discard_piece(digest(blob_number), piece),
            PickerEvent::PiecePresent(blob_number, piece) => self.picker.mark_piece_present(digest(blob_number), piece),
            PickerEvent::HashChain(blob_number) => self.picker.mark_hash_chain_ready(digest(blob_number)),
            PickerEvent::Mismatch(n, blob_number) => self.picker.record_mismatch(peer(n), digest(blob_number), now),
            PickerEvent::Verified(n, blob_number) => self.picker.record_verified_piece(peer(n), digest(blob_number)),
            PickerEvent::Wait(time) => self.now += ms(time.into()),
        }
    }

    /// Every counter matches a recount, and no limit is exceeded.
    fn check_invariants(&self) {
        assert!(self.picker.in_flight.len() <= requests::MAX_IN_FLIGHT);
        for (blob_index, blob) in self.picker.blobs.iter().enumerate() {
            let pieces = 0..blob.layout.piece_count() as u32;
            let expected = |piece: u32| {
                let is_match = |request: &&InFlightRequest| {
                    request.blob_index == blob_index && request.reserved_pieces().any(|one| one == piece)
                };
                self.picker.in_flight.values().filter(is_match).count()
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
            for provider in &blob.selected {
                let useful = pieces.clone().filter(|piece| is_free(piece) && provider.has_piece(*piece)).count();
                assert_eq!(provider.useful_count, useful);
                let peer = self.picker.peers.get(provider.peer);
                let in_flight = self.picker.in_flight.values().filter(|request| request.peer == provider.peer);
                assert_eq!(usize::from(peer.in_flight), in_flight.count());
                assert!(peer.in_flight <= 4);
            }
        }
    }

    /// Adds an honest seed. Returns whether all blobs become complete.
    fn finish_with_honest_seed(&mut self) -> bool {
        for open in std::mem::take(&mut self.open) {
            self.picker.end_request(open.request.id, RequestEnd::Failed, self.now);
        }
        self.picker.set_cross_zone(true);
        BLOBS.iter().for_each(|name| self.picker.set_providers(blob(name), &[of_zone("z1", whole(200))]));
        for _ in 0..1000 {
            self.take_requests();
            for open in std::mem::take(&mut self.open) {
                let PieceRequest { pieces, limit, .. } = &open.request.request;
                for piece in pieces.iter().take((*limit).into()) {
                    self.picker.begin_piece(open.request.id, *piece, self.now);
                    self.now += ms(1);
                    self.picker.record_bytes(open.request.id, PIECE, self.now);
                    self.picker.complete_piece(open.request.id, *piece, self.now);
                }
                self.picker.end_request(open.request.id, RequestEnd::Done, self.now);
                self.check_invariants();
            }
            if self.picker.is_complete() {
                return true;
            }
            let wake = self.picker.wake_at().filter(|at| *at > self.now);
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
        events in prop::collection::vec(any_event(), 0..120),
    ) {
        let mut driver = SimulatedDriver::new(seed);
        for event in events {
            driver.apply(event);
            driver.check_invariants();
        }
        prop_assert!(driver.finish_with_honest_seed());
    }
}
