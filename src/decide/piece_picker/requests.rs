//! What is asked next, and of whom.

use std::time::Instant;

use rand::Rng;

use super::blob::{BlobPicker, MAX_REQUESTS_PER_PIECE, SelectedProvider};
use super::peers::PeerIndex;
use super::{PickedRequest, PiecePicker, PieceRequestId};
use crate::model::{MAX_REQUEST_PIECES, PieceRequest};

/// Most asks under way in one pool: each is a stream here and one at a peer. Twenty neighbours with two each, and as many again.
pub const MAX_IN_FLIGHT: usize = 80;

/// How long an ask should take at its peer's rate: long against the way there and back, short against waiting for a slow one.
const REQUEST_DURATION: f64 = 0.1;

/// Most pieces of one ask, and bytes of one at a peer whose rate nobody can guess.
const MAX_PIECES_PER_REQUEST: usize = 16;
const FIRST_BYTES: u64 = 1 << 20;

/// Pieces offered to one that holds everything, or has what nobody else near has: with so many to choose from, it nearly always finds one that it has not sent.
const MAX_OFFER: usize = 32;
const _: () = assert!(MAX_OFFER <= MAX_REQUEST_PIECES && MAX_PIECES_PER_REQUEST <= MAX_OFFER);

/// What is under way at all peers together: so many seconds' worth of what comes, and always so many asks. More would wait in queues, and what
/// waits there is decided on too early; with less, nodes stand idle that could serve.
const WINDOW: f64 = 0.2;
const MIN_IN_FLIGHT: usize = 8;

/// How many asks there always are when less comes than that part of the most that came: those that were asked have little time for us, and more of them
/// are asked until one has. Of 300 simulated nodes the last is done after 1.21 times the time that its link needs; after 1.25 to 1.28 with eight or ten asks
/// at all times, after 1.35 with twenty, whose answers come late and are decided on early.
const STARVED: f64 = 0.9;
const STARVED_MIN_IN_FLIGHT: usize = 12;

/// Pieces of a blob that are asked of two at once: the very last.
const ENDGAME_PIECES: usize = 4;

/// What was asked, and what of it is still to come.
#[derive(Debug)]
pub(super) struct InFlightRequest {
    pub(super) peer: PeerIndex,
    pub(super) blob_index: usize,
    /// What the peer may still choose.
    pub(super) choice: Vec<u32>,
    /// What it sends.
    pub(super) current: Option<u32>,
    /// How many it has still to begin.
    pub(super) pieces_left: u8,
    /// Bytes that are still to come.
    pub(super) bytes_left: u64,
    pub(super) has_completed_any: bool,
    /// When something came, or it was asked.
    pub(super) last_progress: Instant,
    /// It was silent for too long, and counts no longer as under way.
    pub(super) is_late: bool,
    /// Nobody else is asked for what it may choose.
    pub(super) is_reserved: bool,
}

impl InFlightRequest {
    /// What nobody else is asked for because of it.
    pub(super) fn reserved_pieces(&self) -> impl Iterator<Item = u32> + '_ {
        let choice = if self.is_reserved { &self.choice[..] } else { &[] };
        self.current.iter().chain(choice).copied()
    }

    /// Others may be asked for what this one may still choose.
    pub(super) fn release_reservation(&mut self, blob: &mut BlobPicker) {
        if std::mem::take(&mut self.is_reserved) {
            self.choice.iter().for_each(|piece| blob.remove_request(*piece));
        }
    }
}

/// A peer that could be asked, and when it would be done.
#[derive(Clone, Copy)]
struct RankedProvider {
    peer: PeerIndex,
    finish_seconds: f64,
}

impl PiecePicker {
    /// What to ask now; to be called until there is nothing.
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

    /// When to call [`PiecePicker::take_follow_changes`] and [`PiecePicker::next_request`] again though nothing happens: somebody is late then, or may be asked again.
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

    /// Whether what is under way keeps the link busy.
    fn is_window_full(&self, now: Instant) -> bool {
        let punctual = self.in_flight.values().filter(|asked| !asked.is_late);
        let (asks, bytes) = punctual.fold((0, 0), |(asks, bytes), asked| (asks + 1, bytes + asked.bytes_left));
        let rate = self.rate.now(now).unwrap_or(0.0);
        let least = if rate < self.rate.most() * STARVED { STARVED_MIN_IN_FLIGHT } else { MIN_IN_FLIGHT };
        asks >= least && bytes as f64 >= rate * WINDOW
    }

    /// Asks for what is asked of nobody.
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

    /// Who has something that is wanted, and time for it.
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

    /// Whether it may be asked for a piece of this blob, after what it sent of it. One of which nothing was compared yet has one ask at a time.
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

    /// In how many seconds a peer would be done with what it owes and so many bytes more.
    fn finish_seconds(&self, peer: PeerIndex, bytes: u64, usual: f64, now: Instant) -> f64 {
        let peer = self.peers.get(peer);
        (peer.bytes_in_flight + bytes) as f64 / peer.rate.now(now).unwrap_or(usual)
    }

    /// The blobs of which this peer has something free: those whose tail it has, then by chance, each as likely as it has pieces.
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
            // A quarter of what there is, so that others find something too, down to the last.
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

    /// How many pieces of a blob take this peer the time that an ask should take.
    fn pieces_per_request(&self, peer: PeerIndex, place: usize, usual: f64, now: Instant) -> usize {
        let blob = &self.blobs[place];
        let bytes = self.peers.get(peer).rate.now(now).unwrap_or(usual) * REQUEST_DURATION;
        let most = if blob.is_verified(peer) { MAX_PIECES_PER_REQUEST } else { 1 };
        ((bytes / blob.length(0).max(1) as f64) as usize).clamp(1, most)
    }

    /// Asks for what somebody else owes who is late, or has the very last. Whoever only waits in a queue is not late: in a swarm at work
    /// everybody does, and what is asked for twice takes the place of something else.
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

    /// Who else would bring this piece first.
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
