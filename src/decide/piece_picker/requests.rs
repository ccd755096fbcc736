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
    pub(super) choice: Vec<u32>,
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
        let choice = if self.is_reserved { &self.choice[..] } else { &[] };
        self.current.iter().chain(choice).copied()
    }

    /// Makes the pieces of `choice` available to other requests.
    pub(super) fn release_reservation(&mut self, blob: &mut BlobPicker) {
        if std::mem::take(&mut self.is_reserved) {
            self.choice.iter().for_each(|piece| blob.remove_request(*piece));
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
            let usual = self.peers.usual_rate(now).unwrap_or(FIRST_BYTES as f64 / REQUEST_DURATION);
            let ask = self.request_unassigned(usual, now).or_else(|| self.hedge_request(usual, now));
            if ask.is_some() {
                return ask;
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
        let late = self.in_flight.values().filter(|asked| !asked.is_late).map(|asked| self.deadline(asked));
        late.chain(self.peers.wake_at(now)).chain(self.blobs.iter().filter_map(|blob| blob.wake_at(now))).min()
    }

    fn deadline(&self, asked: &InFlightRequest) -> Instant {
        let peer = self.peers.get(asked.peer);
        peer.last_progress.map_or(asked.last_progress, |moved| moved.max(asked.last_progress)) + peer.silence_limit()
    }

    fn mark_late(&mut self, now: Instant) {
        let late = |asked: &InFlightRequest| !asked.is_late && self.deadline(asked) <= now;
        let late: Vec<_> = self.in_flight.iter().filter(|(_, asked)| late(asked)).map(|(id, _)| *id).collect();
        for id in late {
            let Some(asked) = self.in_flight.get_mut(&id) else { continue };
            asked.is_late = true;
            let blob = &mut self.blobs[asked.blob_index];
            if asked.choice.len() > usize::from(asked.pieces_left) {
                asked.release_reservation(blob);
            }
            if let Some(link) = blob.selected_index(asked.peer) {
                blob.set_unproductive(link, true);
            }
        }
    }

    /// Whether the requests in flight keep the link busy.
    fn is_window_full(&self, now: Instant) -> bool {
        let punctual = self.in_flight.values().filter(|asked| !asked.is_late);
        let (asks, bytes) = punctual.fold((0, 0), |(asks, bytes), asked| (asks + 1, bytes + asked.bytes_left));
        let rate = self.rate.now(now).unwrap_or(0.0);
        let least = if rate < self.rate.most() * STARVED { STARVED_MIN_IN_FLIGHT } else { MIN_IN_FLIGHT };
        asks >= least && bytes as f64 >= rate * WINDOW
    }

    /// Requests unassigned pieces.
    fn request_unassigned(&mut self, usual: f64, now: Instant) -> Option<PickedRequest> {
        if self.is_window_full(now) {
            return None;
        }
        let mut offers = self.ready_providers(usual, now);
        offers.sort_unstable_by(|one, other| f64::total_cmp(&one.finish_seconds, &other.finish_seconds));
        offers.into_iter().find_map(|offer| {
            let places = self.blobs_for(offer.peer, now);
            places.into_iter().find_map(|place| self.request_from(offer.peer, place, usual, now))
        })
    }

    /// Providers that have unassigned pieces and may get a request.
    fn ready_providers(&self, usual: f64, now: Instant) -> Vec<RankedProvider> {
        let mut offers: Vec<RankedProvider> = Vec::new();
        for blob in self.blobs.iter().filter(|blob| blob.unassigned_count() > 0) {
            let piece = blob.length(0);
            for link in blob.selected.iter().filter(|link| link.useful_count > 0 && self.may_request(blob, link, now)) {
                if offers.iter().all(|offer| offer.peer != link.peer) {
                    offers.push(RankedProvider {
                        peer: link.peer,
                        finish_seconds: self.finish_seconds(link.peer, piece, usual, now),
                    });
                }
            }
        }
        offers
    }

    fn may_request(&self, blob: &BlobPicker, link: &SelectedProvider, now: Instant) -> bool {
        (self.is_cross_zone_allowed || !link.is_far)
            && self.peers.get(link.peer).is_ready(now)
            && self.has_no_unverified_piece(blob, link.peer, now)
    }

    /// Whether the peer's first piece of this blob was verified, or its wait is over. Before
    /// verification a peer has one request per blob at a time.
    fn has_no_unverified_piece(&self, blob: &BlobPicker, peer: PeerIndex, now: Instant) -> bool {
        if blob.is_verified(peer) {
            return true;
        }
        let is_asked = || {
            self.in_flight
                .values()
                .any(|asked| asked.peer == peer && self.blobs[asked.blob_index].digest == blob.digest)
        };
        blob.verification_deadline(peer).is_none_or(|until| until <= now) && !is_asked()
    }

    /// Seconds until a peer would have sent its bytes in flight and `bytes` more.
    fn finish_seconds(&self, peer: PeerIndex, bytes: u64, usual: f64, now: Instant) -> f64 {
        let peer = self.peers.get(peer);
        (peer.bytes_in_flight + bytes) as f64 / peer.rate.now(now).unwrap_or(usual)
    }

    /// The blobs for which this peer has unassigned pieces: those whose tail the peer has come
    /// first, then a random order, weighted by the number of pieces.
    fn blobs_for(&mut self, peer: PeerIndex, now: Instant) -> Vec<usize> {
        let mut places = Vec::new();
        for (place, blob) in self.blobs.iter().enumerate() {
            if let Some(link) = blob.selected.iter().find(|link| link.peer == peer && link.useful_count > 0)
                && self.has_no_unverified_piece(blob, peer, now)
            {
                let chance = self.rng.random::<f64>().powf(1.0 / link.useful_count as f64);
                places.push((place, if blob.has_unassigned_tail(link) { 2.0 } else { chance }));
            }
        }
        places.sort_by(|(_, one), (_, other)| f64::total_cmp(other, one));
        places.into_iter().map(|(place, _)| place).collect()
    }

    fn request_from(&mut self, peer: PeerIndex, place: usize, usual: f64, now: Instant) -> Option<PickedRequest> {
        let most = self.pieces_per_request(peer, place, usual, now);
        let blob = &mut self.blobs[place];
        let link = blob.selected_index(peer)?;
        let choice = if blob.selected[link].is_whole {
            // At most a quarter of the unassigned pieces, so that other providers find some down to
            // the last.
            blob.rarest(
                link,
                (blob.unassigned_count() / 4).clamp(most.min(blob.unassigned_count().div_ceil(4)), MAX_OFFER),
            )
        } else {
            let fair = blob.unassigned_count().div_ceil(4);
            blob.rarest(link, most.max(blob.sole_count(link)).min(MAX_OFFER).min(fair))
        };
        let most = most.min(choice.len());
        (most > 0).then(|| self.create_request(peer, place, choice, most, now))
    }

    /// Pieces of a blob that this peer sends within [`REQUEST_DURATION`].
    fn pieces_per_request(&self, peer: PeerIndex, place: usize, usual: f64, now: Instant) -> usize {
        let blob = &self.blobs[place];
        let bytes = self.peers.get(peer).rate.now(now).unwrap_or(usual) * REQUEST_DURATION;
        let most = if blob.is_verified(peer) { MAX_PIECES_PER_REQUEST } else { 1 };
        ((bytes / blob.length(0).max(1) as f64) as usize).clamp(1, most)
    }

    /// Requests pieces a second time: those of a late request, or the last [`ENDGAME_PIECES`]. A
    /// request that waits in a queue is not late: in a busy swarm all requests wait, and a second
    /// request would take the place of another piece.
    fn hedge_request(&mut self, usual: f64, now: Instant) -> Option<PickedRequest> {
        let ids: Vec<PieceRequestId> = self.in_flight.keys().copied().collect();
        ids.into_iter().find_map(|id| {
            let asked = &self.in_flight[&id];
            let blob = &self.blobs[asked.blob_index];
            let first = asked.reserved_pieces().find(|piece| blob.request_count(*piece) < MAX_REQUESTS_PER_PIECE)?;
            let (place, bytes) = (asked.blob_index, blob.length(first));
            let of = self.fastest_other(asked, first, bytes, usual, now)?;
            if !asked.is_late && blob.missing() > ENDGAME_PIECES {
                return None;
            }
            let link = &blob.selected[blob.selected_index(of.peer)?];
            let most = self.pieces_per_request(of.peer, place, usual, now).min(usize::from(asked.pieces_left).max(1));
            let fits =
                |piece: &u32| blob.request_count(*piece) < MAX_REQUESTS_PER_PIECE && blob.may_provide(link, *piece);
            let choice: Vec<_> = asked.reserved_pieces().filter(fits).take(most).collect();
            let most = choice.len();
            (most > 0).then(|| self.create_request(of.peer, place, choice, most, now))
        })
    }

    /// The provider that would send this piece first, other than the current one.
    fn fastest_other(
        &self,
        asked: &InFlightRequest,
        piece: u32,
        bytes: u64,
        usual: f64,
        now: Instant,
    ) -> Option<RankedProvider> {
        let blob = &self.blobs[asked.blob_index];
        let others = blob.selected.iter().filter(|link| link.peer != asked.peer);
        let fit = others.filter(|link| blob.may_provide(link, piece) && self.may_request(blob, link, now));
        let offers = fit.map(|link| RankedProvider {
            peer: link.peer,
            finish_seconds: self.finish_seconds(link.peer, bytes, usual, now),
        });
        offers.min_by(|one, other| f64::total_cmp(&one.finish_seconds, &other.finish_seconds))
    }

    fn create_request(
        &mut self,
        peer: PeerIndex,
        place: usize,
        choice: Vec<u32>,
        most: usize,
        now: Instant,
    ) -> PickedRequest {
        let blob = &mut self.blobs[place];
        choice.iter().for_each(|piece| blob.add_request(*piece));
        let bytes = choice.iter().take(most).map(|piece| blob.length(*piece)).sum();
        self.peers.get_mut(peer).record_request(bytes, now);
        self.rate.begin(now);
        let id = self.next_id;
        self.next_id += 1;
        let most = most as u8;
        let order = PieceRequest {
            peer: self.peers.get(peer).id,
            digest: blob.digest,
            layout: blob.layout,
            pieces: choice,
            limit: most,
        };
        let asked = InFlightRequest {
            peer,
            blob_index: place,
            choice: order.pieces.clone(),
            current: None,
            pieces_left: most,
            bytes_left: bytes,
            has_completed_any: false,
            last_progress: now,
            is_late: false,
            is_reserved: true,
        };
        self.in_flight.insert(id, asked);
        PickedRequest { id, request: order }
    }
}
