//! The choice of the next request: pieces, peer and size.

use std::time::Instant;

use rand::Rng;

use super::blob::{BlobPicker, MAX_REQUESTS_PER_PIECE, SelectedProvider};
use super::peers::PeerIndex;
use super::{PickedRequest, PiecePicker, PieceRequestId};
use crate::model::{MAX_REQUEST_PIECES, PieceRequest};

/// Requests in flight per picker: each is a stream here and one at a peer. Two for each of twenty
/// providers, and as many again.
pub const MAX_IN_FLIGHT: usize = 80;

/// Target duration of a request, in seconds, at the peer's rate: long against the round trip, short
/// against the wait for a slow peer.
const REQUEST_DURATION: f64 = 0.1;

/// Pieces per request, and the bytes of a request while no peer's rate is measured.
const MAX_PIECES_PER_REQUEST: usize = 16;
const FIRST_BYTES: u64 = 1 << 20;

/// Pieces offered to a whole provider, or to the only provider of our zone that has them. Among so
/// many the provider nearly always finds a piece that it has not sent.
const MAX_OFFER: usize = 32;
const _: () = assert!(MAX_OFFER <= MAX_REQUEST_PIECES && MAX_PIECES_PER_REQUEST <= MAX_OFFER);

/// Window over all peers: the bytes of so many seconds at the current rate, and at least so many
/// requests. A larger window waits in the providers' queues, where choices are made too early; a
/// smaller one leaves providers idle.
const WINDOW: f64 = 0.2;
const MIN_IN_FLIGHT: usize = 8;

/// Minimum of requests in flight while the rate is below this part of its largest value: the peers
/// with requests are busy then, and more peers get requests until one has time. Of 300 simulated
/// nodes the last finishes after 1.21 times its link's minimum; after 1.25 to 1.28 with constantly
/// eight or ten requests, and after 1.35 with twenty, because late answers were chosen too early.
const STARVED: f64 = 0.9;
const STARVED_MIN_IN_FLIGHT: usize = 12;

/// With at most so many missing pieces, each is requested from two providers.
const ENDGAME_PIECES: usize = 4;

/// A request in flight: its remaining pieces and bytes.
#[derive(Debug)]
pub(super) struct InFlightRequest {
    pub(super) peer: PeerIndex,
    pub(super) blob_index: usize,
    /// Pieces that the peer may still choose from.
    pub(super) pieces: Vec<u32>,
    /// The piece that the peer is sending.
    pub(super) current: Option<u32>,
    /// Pieces that the peer has still to begin.
    pub(super) pieces_left: u8,
    pub(super) bytes_left: u64,
    pub(super) has_completed_any: bool,
    /// The last arrival of bytes, or the instant of the request.
    pub(super) last_progress: Instant,
    /// The silence exceeded the limit; the request no longer counts as in flight in the window.
    pub(super) is_late: bool,
    /// No other peer gets a request for the pieces of `choice`.
    pub(super) is_reserved: bool,
}

impl InFlightRequest {
    /// Pieces that count as requested because of this request.
    pub(super) fn reserved_pieces(&self) -> impl Iterator<Item = u32> + '_ {
        let pieces = if self.is_reserved { &self.pieces[..] } else { &[] };
        self.current.iter().chain(pieces).copied()
    }

    /// Makes the pieces of `choice` available to other requests.
    pub(super) fn release_reservation(&mut self, blob: &mut BlobPicker) {
        if std::mem::take(&mut self.is_reserved) {
            self.pieces.iter().for_each(|piece| blob.remove_request(*piece));
        }
    }
}

/// A ready provider, and the seconds after which one more piece would be complete.
#[derive(Clone, Copy)]
struct RankedProvider {
    peer: PeerIndex,
    finish_seconds: f64,
}

impl PiecePicker {
    /// The next request, if any. The driver calls this until the result is `None`.
    pub fn next_request(&mut self, now: Instant) -> Option<PickedRequest> {
        self.advance_clock(now);
        self.mark_late(now);
        if self.in_flight.len() < MAX_IN_FLIGHT && self.blobs.iter().any(|blob| blob.missing() > 0) {
            let default_rate = self.peers.usual_rate(now).unwrap_or(FIRST_BYTES as f64 / REQUEST_DURATION);
            let picked = self.request_unassigned(default_rate, now).or_else(|| self.hedge_request(default_rate, now));
            if picked.is_some() {
                return picked;
            }
        }
        self.wake_at = self.next_wake(now);
        None
    }

    /// When to call [`PiecePicker::take_follow_changes`] and [`PiecePicker::next_request`] again
    /// without another event: a request is late then, or a peer's back-off ends.
    pub fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    fn next_wake(&self, now: Instant) -> Option<Instant> {
        if self.is_complete() {
            return None;
        }
        let late = self.in_flight.values().filter(|request| !request.is_late).map(|asked| self.deadline(asked));
        late.chain(self.peers.wake_at(now)).chain(self.blobs.iter().filter_map(|blob| blob.wake_at(now))).min()
    }

    fn deadline(&self, request: &InFlightRequest) -> Instant {
        let peer = self.peers.get(request.peer);
        peer.last_progress.map_or(request.last_progress, |moved| moved.max(request.last_progress))
            + peer.silence_limit()
    }

    fn mark_late(&mut self, now: Instant) {
        let is_overdue = |request: &InFlightRequest| !request.is_late && self.deadline(request) <= now;
        let late: Vec<_> =
            self.in_flight.iter().filter(|(_, request)| is_overdue(request)).map(|(id, _)| *id).collect();
        for id in late {
            let Some(request) = self.in_flight.get_mut(&id) else { continue };
            request.is_late = true;
            let blob = &mut self.blobs[request.blob_index];
            if request.pieces.len() > usize::from(request.pieces_left) {
                request.release_reservation(blob);
            }
            if let Some(provider_index) = blob.selected_index(request.peer) {
                blob.set_unproductive(provider_index, true);
            }
        }
    }

    /// Whether the requests in flight keep the link busy.
    fn is_window_full(&self, now: Instant) -> bool {
        let on_time = self.in_flight.values().filter(|request| !request.is_late);
        let (count, bytes) = on_time.fold((0, 0), |(count, bytes), request| (count + 1, bytes + request.bytes_left));
        let rate = self.rate.now(now).unwrap_or(0.0);
        let least = if rate < self.rate.peak() * STARVED { STARVED_MIN_IN_FLIGHT } else { MIN_IN_FLIGHT };
        count >= least && bytes as f64 >= rate * WINDOW
    }

    /// Requests unassigned pieces.
    fn request_unassigned(&mut self, default_rate: f64, now: Instant) -> Option<PickedRequest> {
        if self.is_window_full(now) {
            return None;
        }
        let mut candidates = self.ready_providers(default_rate, now);
        candidates.sort_unstable_by(|one, other| f64::total_cmp(&one.finish_seconds, &other.finish_seconds));
        candidates.into_iter().find_map(|candidate| {
            let blob_indexes = self.blobs_for(candidate.peer, now);
            blob_indexes
                .into_iter()
                .find_map(|blob_index| self.request_from(candidate.peer, blob_index, default_rate, now))
        })
    }

    /// Providers that have unassigned pieces and may get a request.
    fn ready_providers(&self, default_rate: f64, now: Instant) -> Vec<RankedProvider> {
        let mut candidates: Vec<RankedProvider> = Vec::new();
        for blob in self.blobs.iter().filter(|blob| blob.unassigned_count() > 0) {
            let piece = blob.length(0);
            for provider in blob
                .selected
                .iter()
                .filter(|provider| provider.useful_count > 0 && self.may_request(blob, provider, now))
            {
                if candidates.iter().all(|candidate| candidate.peer != provider.peer) {
                    candidates.push(RankedProvider {
                        peer: provider.peer,
                        finish_seconds: self.finish_seconds(provider.peer, piece, default_rate, now),
                    });
                }
            }
        }
        candidates
    }

    fn may_request(&self, blob: &BlobPicker, provider: &SelectedProvider, now: Instant) -> bool {
        (self.is_cross_zone_allowed || !provider.is_far)
            && self.peers.get(provider.peer).is_ready(now)
            && self.has_no_unverified_piece(blob, provider.peer, now)
    }

    /// Whether the peer's first piece of this blob was verified, or its wait is over. Before
    /// verification a peer has one request per blob at a time.
    fn has_no_unverified_piece(&self, blob: &BlobPicker, peer: PeerIndex, now: Instant) -> bool {
        if blob.is_verified(peer) {
            return true;
        }
        let is_requested = || {
            self.in_flight
                .values()
                .any(|request| request.peer == peer && self.blobs[request.blob_index].digest == blob.digest)
        };
        blob.verification_deadline(peer).is_none_or(|until| until <= now) && !is_requested()
    }

    /// Seconds until a peer would have sent its bytes in flight and `bytes` more.
    fn finish_seconds(&self, peer: PeerIndex, bytes: u64, default_rate: f64, now: Instant) -> f64 {
        let peer = self.peers.get(peer);
        (peer.bytes_in_flight + bytes) as f64 / peer.rate.now(now).unwrap_or(default_rate)
    }

    /// The blobs for which this peer has unassigned pieces: those whose tail the peer has come
    /// first, then a random order, weighted by the number of pieces.
    fn blobs_for(&mut self, peer: PeerIndex, now: Instant) -> Vec<usize> {
        let mut weighted = Vec::new();
        for (blob_index, blob) in self.blobs.iter().enumerate() {
            if let Some(provider) =
                blob.selected.iter().find(|provider| provider.peer == peer && provider.useful_count > 0)
                && self.has_no_unverified_piece(blob, peer, now)
            {
                let chance = self.rng.random::<f64>().powf(1.0 / provider.useful_count as f64);
                weighted.push((blob_index, if blob.has_unassigned_tail(provider) { 2.0 } else { chance }));
            }
        }
        weighted.sort_by(|(_, one), (_, other)| f64::total_cmp(other, one));
        weighted.into_iter().map(|(blob_index, _)| blob_index).collect()
    }

    fn request_from(
        &mut self,
        peer: PeerIndex,
        blob_index: usize,
        default_rate: f64,
        now: Instant,
    ) -> Option<PickedRequest> {
        let limit = self.pieces_per_request(peer, blob_index, default_rate, now);
        let blob = &mut self.blobs[blob_index];
        let provider_index = blob.selected_index(peer)?;
        let pieces = if blob.selected[provider_index].is_whole {
            // At most a quarter of the unassigned pieces, so that other providers find some down to
            // the last.
            blob.rarest(
                provider_index,
                (blob.unassigned_count() / 4).clamp(limit.min(blob.unassigned_count().div_ceil(4)), MAX_OFFER),
            )
        } else {
            let fair = blob.unassigned_count().div_ceil(4);
            blob.rarest(provider_index, limit.max(blob.sole_count(provider_index)).min(MAX_OFFER).min(fair))
        };
        let limit = limit.min(pieces.len());
        (limit > 0).then(|| self.create_request(peer, blob_index, pieces, limit, now))
    }

    /// Pieces of a blob that this peer sends within [`REQUEST_DURATION`].
    fn pieces_per_request(&self, peer: PeerIndex, blob_index: usize, default_rate: f64, now: Instant) -> usize {
        let blob = &self.blobs[blob_index];
        let bytes = self.peers.get(peer).rate.now(now).unwrap_or(default_rate) * REQUEST_DURATION;
        let limit = if blob.is_verified(peer) { MAX_PIECES_PER_REQUEST } else { 1 };
        ((bytes / blob.length(0).max(1) as f64) as usize).clamp(1, limit)
    }

    /// Requests pieces a second time: those of a late request, or the last [`ENDGAME_PIECES`]. A
    /// request that waits in a queue is not late: in a busy swarm all requests wait, and a second
    /// request would take the place of another piece.
    fn hedge_request(&mut self, default_rate: f64, now: Instant) -> Option<PickedRequest> {
        let ids: Vec<PieceRequestId> = self.in_flight.keys().copied().collect();
        ids.into_iter().find_map(|id| {
            let request = &self.in_flight[&id];
            let blob = &self.blobs[request.blob_index];
            let first = request.reserved_pieces().find(|piece| blob.request_count(*piece) < MAX_REQUESTS_PER_PIECE)?;
            let (blob_index, bytes) = (request.blob_index, blob.length(first));
            let provider = self.fastest_other(request, first, bytes, default_rate, now)?;
            if !request.is_late && blob.missing() > ENDGAME_PIECES {
                return None;
            }
            let selected = &blob.selected[blob.selected_index(provider.peer)?];
            let limit = self
                .pieces_per_request(provider.peer, blob_index, default_rate, now)
                .min(usize::from(request.pieces_left).max(1));
            let fits =
                |piece: &u32| blob.request_count(*piece) < MAX_REQUESTS_PER_PIECE && blob.may_provide(selected, *piece);
            let pieces: Vec<_> = request.reserved_pieces().filter(fits).take(limit).collect();
            let limit = pieces.len();
            (limit > 0).then(|| self.create_request(provider.peer, blob_index, pieces, limit, now))
        })
    }

    /// The provider that would send this piece first, other than the current one.
    fn fastest_other(
        &self,
        request: &InFlightRequest,
        piece: u32,
        bytes: u64,
        default_rate: f64,
        now: Instant,
    ) -> Option<RankedProvider> {
        let blob = &self.blobs[request.blob_index];
        let others = blob.selected.iter().filter(|provider| provider.peer != request.peer);
        let usable =
            others.filter(|provider| blob.may_provide(provider, piece) && self.may_request(blob, provider, now));
        let candidates = usable.map(|provider| RankedProvider {
            peer: provider.peer,
            finish_seconds: self.finish_seconds(provider.peer, bytes, default_rate, now),
        });
        candidates.min_by(|one, other| f64::total_cmp(&one.finish_seconds, &other.finish_seconds))
    }

    fn create_request(
        &mut self,
        peer: PeerIndex,
        blob_index: usize,
        pieces: Vec<u32>,
        limit: usize,
        now: Instant,
    ) -> PickedRequest {
        let blob = &mut self.blobs[blob_index];
        pieces.iter().for_each(|piece| blob.add_request(*piece));
        let bytes = pieces.iter().take(limit).map(|piece| blob.length(*piece)).sum();
        self.peers.get_mut(peer).record_request(bytes, now);
        self.rate.begin(now);
        let id = self.next_id;
        self.next_id += 1;
        let limit = limit as u8;
        let request =
            PieceRequest { peer: self.peers.get(peer).id, digest: blob.digest, layout: blob.layout, pieces, limit };
        let in_flight = InFlightRequest {
            peer,
            blob_index,
            pieces: request.pieces.clone(),
            current: None,
            pieces_left: limit,
            bytes_left: bytes,
            has_completed_any: false,
            last_progress: now,
            is_late: false,
            is_reserved: true,
        };
        self.in_flight.insert(id, in_flight);
        PickedRequest { id, request }
    }
}
