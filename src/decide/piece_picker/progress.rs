//! Results of requests: bytes, pieces, ends and cancellations.

use std::time::Instant;

use super::blob::MAX_REQUESTS_PER_PIECE;
use super::requests::InFlightRequest;
use super::{PiecePicker, PieceRequestId, RequestEnd};

impl PiecePicker {
    /// Records that the peer chose this piece of the request; the piece's bytes follow.
    pub fn begin_piece(&mut self, ask: PieceRequestId, piece: u32, now: Instant) {
        self.advance_clock(now);
        let Some(asked) = self.in_flight.get_mut(&ask) else { return };
        let Some(choice) = asked.choice.iter().position(|one| *one == piece) else { return };
        // A piece that was begun and not completed does not come any more.
        if let Some(earlier) = asked.current.take() {
            self.blobs[asked.blob_index].remove_request(earlier);
        }
        asked.choice.swap_remove(choice);
        asked.current = Some(piece);
        asked.is_late = false;
        asked.pieces_left = asked.pieces_left.saturating_sub(1);
        let blob = &mut self.blobs[asked.blob_index];
        let is_elsewhere =
            blob.is_present(piece) || (!asked.is_reserved && blob.request_count(piece) >= MAX_REQUESTS_PER_PIECE);
        if !asked.is_reserved {
            blob.add_request(piece);
        }
        if asked.pieces_left == 0 {
            asked.release_reservation(blob);
            asked.choice.clear();
        }
        if is_elsewhere {
            self.cancel(ask);
        }
    }

    /// Records the arrival of `bytes` bytes.
    pub fn record_bytes(&mut self, ask: PieceRequestId, bytes: u64, now: Instant) {
        self.advance_clock(now);
        let Some(asked) = self.in_flight.get_mut(&ask) else { return };
        self.rate.add(bytes, now);
        self.peers.get_mut(asked.peer).record_bytes(bytes, now);
        asked.last_progress = now;
        asked.is_late = false;
        let owed = bytes.min(asked.bytes_left);
        asked.bytes_left -= owed;
        let peer = self.peers.get_mut(asked.peer);
        peer.bytes_in_flight = peer.bytes_in_flight.saturating_sub(owed);
    }

    /// Records a complete piece. The last piece of a request ends the request.
    pub fn complete_piece(&mut self, ask: PieceRequestId, piece: u32, now: Instant) {
        self.advance_clock(now);
        let Some(asked) = self.in_flight.get_mut(&ask) else { return };
        if asked.current != Some(piece) {
            return;
        }
        asked.current = None;
        asked.has_completed_any = true;
        asked.last_progress = now;
        let (place, peer, is_over) = (asked.blob_index, asked.peer, asked.pieces_left == 0);
        self.peers.get_mut(peer).reset_back_off();
        let blob = &mut self.blobs[place];
        blob.record_unverified(peer, now);
        blob.remove_request(piece);
        if let Some(link) = blob.selected_index(peer) {
            blob.set_unproductive(link, false);
        }
        self.mark_present(place, piece, Some(ask));
        if is_over {
            self.remove_request(ask);
            if self.peers.get(peer).in_flight == 0 {
                self.peers.get_mut(peer).increase_depth();
            }
        }
    }

    /// Ends a request. Missing pieces become unassigned again; a peer that sent no piece, or
    /// failed, gets a back-off.
    pub fn end_request(&mut self, ask: PieceRequestId, how: RequestEnd, now: Instant) {
        self.advance_clock(now);
        let Some(asked) = self.remove_request(ask) else { return };
        let is_vain = how != RequestEnd::Done || !asked.has_completed_any;
        if is_vain {
            self.peers.get_mut(asked.peer).start_back_off(now);
        }
        let blob = &mut self.blobs[asked.blob_index];
        let Some(link) = blob.selected_index(asked.peer) else { return };
        if is_vain {
            blob.set_unproductive(link, true);
        }
        // The peer announced these pieces and did not send them.
        if how == RequestEnd::Done {
            asked.choice.iter().chain(&asked.current).for_each(|piece| blob.remove_piece(link, *piece));
        }
    }

    /// Requests that the picker canceled: their pieces came from elsewhere, or the peer may get
    /// no requests now. The driver drops them; later reports about them are ignored. A piece that
    /// came through one of them meanwhile is reported by [`PiecePicker::mark_piece_present`].
    pub fn take_cancellations(&mut self) -> Vec<PieceRequestId> {
        std::mem::take(&mut self.cancellations)
    }

    /// `by` is the request that fetched the piece, if any.
    pub(super) fn mark_present(&mut self, place: usize, piece: u32, by: Option<PieceRequestId>) {
        let blob = &mut self.blobs[place];
        if !blob.exists(piece) || !blob.mark_present(piece) {
            return;
        }
        if blob.missing() == 0 {
            blob.needs_selection = true;
        }
        let others = self.in_flight.iter_mut().filter(|(id, asked)| Some(**id) != by && asked.blob_index == place);
        let mut useless = Vec::new();
        for (id, asked) in others {
            if let Some(choice) = asked.choice.iter().position(|one| *one == piece) {
                asked.choice.swap_remove(choice);
                if asked.is_reserved {
                    blob.remove_request(piece);
                }
            }
            // The peer sends a piece that is already here, or the request has fewer pieces left
            // than its limit.
            if asked.current == Some(piece) || asked.choice.len() < usize::from(asked.pieces_left) {
                useless.push(*id);
            }
        }
        useless.into_iter().for_each(|id| self.cancel(id));
    }

    pub(super) fn cancel(&mut self, ask: PieceRequestId) {
        if self.remove_request(ask).is_some() {
            self.cancellations.push(ask);
        }
    }

    /// Cancels the requests to a peer: of one blob or of all; unstarted requests, or with
    /// `even_begun` all.
    pub(super) fn cancel_requests(&mut self, peer: usize, place: Option<usize>, even_begun: bool) {
        let fits = |asked: &InFlightRequest| {
            asked.peer == peer
                && place.is_none_or(|place| asked.blob_index == place)
                && (even_begun || (asked.current.is_none() && !asked.has_completed_any))
        };
        let ids: Vec<_> = self.in_flight.iter().filter(|(_, asked)| fits(asked)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.cancel(id));
    }

    /// Releases the pieces of a request and forgets the request.
    fn remove_request(&mut self, ask: PieceRequestId) -> Option<InFlightRequest> {
        let mut asked = self.in_flight.remove(&ask)?;
        let blob = &mut self.blobs[asked.blob_index];
        asked.release_reservation(blob);
        asked.current.iter().for_each(|piece| blob.remove_request(*piece));
        let now = self.now.unwrap_or(asked.last_progress);
        self.peers.get_mut(asked.peer).record_end(asked.bytes_left, now);
        if self.in_flight.is_empty() {
            self.rate.end(now);
        }
        Some(asked)
    }
}
