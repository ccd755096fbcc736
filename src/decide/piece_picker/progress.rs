//! Results of requests: bytes, pieces, ends and cancellations.

use std::time::Instant;

use super::blob::MAX_REQUESTS_PER_PIECE;
use super::requests::InFlightRequest;
use super::{PiecePicker, PieceRequestId, RequestEnd};

impl PiecePicker {
    /// Records that the peer chose this piece of the request; the piece's bytes follow.
    pub fn begin_piece(&mut self, id: PieceRequestId, piece: u32, now: Instant) {
        self.advance_clock(now);
        let Some(request) = self.in_flight.get_mut(&id) else { return };
        let Some(index) = request.pieces.iter().position(|offered| *offered == piece) else { return };
        // A piece that was begun and not completed does not come any more.
        if let Some(earlier) = request.current.take() {
            self.blobs[request.blob_index].remove_request(earlier);
        }
        request.pieces.swap_remove(index);
        request.current = Some(piece);
        request.is_late = false;
        request.pieces_left = request.pieces_left.saturating_sub(1);
        let blob = &mut self.blobs[request.blob_index];
        let is_redundant =
            blob.is_present(piece) || (!request.is_reserved && blob.request_count(piece) >= MAX_REQUESTS_PER_PIECE);
        if !request.is_reserved {
            blob.add_request(piece);
        }
        if request.pieces_left == 0 {
            request.release_reservation(blob);
            request.pieces.clear();
        }
        if is_redundant {
            self.cancel(id);
        }
    }

    /// Records the arrival of `bytes` bytes.
    pub fn record_bytes(&mut self, id: PieceRequestId, bytes: u64, now: Instant) {
        self.advance_clock(now);
        let Some(request) = self.in_flight.get_mut(&id) else { return };
        self.rate.add(bytes, now);
        self.peers.get_mut(request.peer).record_bytes(bytes, now);
        request.last_progress = now;
        request.is_late = false;
        let counted = bytes.min(request.bytes_left);
        request.bytes_left -= counted;
        let peer = self.peers.get_mut(request.peer);
        peer.bytes_in_flight = peer.bytes_in_flight.saturating_sub(counted);
    }

    /// Records a complete piece. The last piece of a request ends the request.
    pub fn complete_piece(&mut self, id: PieceRequestId, piece: u32, now: Instant) {
        self.advance_clock(now);
        let Some(request) = self.in_flight.get_mut(&id) else { return };
        if request.current != Some(piece) {
            return;
        }
        request.current = None;
        request.has_completed_any = true;
        request.last_progress = now;
        let (blob_index, peer, is_over) = (request.blob_index, request.peer, request.pieces_left == 0);
        self.peers.get_mut(peer).reset_back_off();
        let blob = &mut self.blobs[blob_index];
        blob.record_unverified(peer, now);
        blob.remove_request(piece);
        if let Some(provider_index) = blob.selected_index(peer) {
            blob.set_unproductive(provider_index, false);
        }
        self.mark_present(blob_index, piece, Some(id));
        if is_over {
            self.remove_request(id);
            if self.peers.get(peer).in_flight == 0 {
                self.peers.get_mut(peer).increase_depth();
            }
        }
    }

    /// Ends a request. Missing pieces become unassigned again; a peer that sent no piece, or
    /// failed, gets a back-off.
    pub fn end_request(&mut self, id: PieceRequestId, end: RequestEnd, now: Instant) {
        self.advance_clock(now);
        let Some(request) = self.remove_request(id) else { return };
        let is_unproductive = end != RequestEnd::Done || !request.has_completed_any;
        if is_unproductive {
            self.peers.get_mut(request.peer).start_back_off(now);
        }
        let blob = &mut self.blobs[request.blob_index];
        let Some(provider_index) = blob.selected_index(request.peer) else { return };
        if is_unproductive {
            blob.set_unproductive(provider_index, true);
        }
        // The peer announced these pieces and did not send them.
        if end == RequestEnd::Done {
            request.pieces.iter().chain(&request.current).for_each(|piece| blob.remove_piece(provider_index, *piece));
        }
    }

    /// Requests that the picker canceled: their pieces came from elsewhere, or the peer may get
    /// no requests now. The driver drops them; later reports about them are ignored. A piece that
    /// came through one of them meanwhile is reported by [`PiecePicker::mark_piece_present`].
    pub fn take_cancellations(&mut self) -> Vec<PieceRequestId> {
        std::mem::take(&mut self.cancellations)
    }

    /// `by` is the request that fetched the piece, if any.
    pub(super) fn mark_present(&mut self, blob_index: usize, piece: u32, completed_by: Option<PieceRequestId>) {
        let blob = &mut self.blobs[blob_index];
        if !blob.exists(piece) || !blob.mark_present(piece) {
            return;
        }
        if blob.missing() == 0 {
            blob.needs_selection = true;
        }
        let others = self
            .in_flight
            .iter_mut()
            .filter(|(id, request)| Some(**id) != completed_by && request.blob_index == blob_index);
        let mut useless = Vec::new();
        for (id, request) in others {
            if let Some(index) = request.pieces.iter().position(|offered| *offered == piece) {
                request.pieces.swap_remove(index);
                if request.is_reserved {
                    blob.remove_request(piece);
                }
            }
            // The peer sends a piece that is already here, or the request has fewer pieces left
            // than its limit.
            if request.current == Some(piece) || request.pieces.len() < usize::from(request.pieces_left) {
                useless.push(*id);
            }
        }
        useless.into_iter().for_each(|id| self.cancel(id));
    }

    pub(super) fn cancel(&mut self, id: PieceRequestId) {
        if self.remove_request(id).is_some() {
            self.cancellations.push(id);
        }
    }

    /// Cancels the requests to a peer: of one blob or of all; unstarted requests, or with
    /// `even_begun` all.
    pub(super) fn cancel_requests(&mut self, peer: usize, blob_index: Option<usize>, even_begun: bool) {
        let fits = |request: &InFlightRequest| {
            request.peer == peer
                && blob_index.is_none_or(|index| request.blob_index == index)
                && (even_begun || (request.current.is_none() && !request.has_completed_any))
        };
        let ids: Vec<_> = self.in_flight.iter().filter(|(_, request)| fits(request)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.cancel(id));
    }

    /// Releases the pieces of a request and forgets the request.
    fn remove_request(&mut self, id: PieceRequestId) -> Option<InFlightRequest> {
        let mut request = self.in_flight.remove(&id)?;
        let blob = &mut self.blobs[request.blob_index];
        request.release_reservation(blob);
        request.current.iter().for_each(|piece| blob.remove_request(*piece));
        let now = self.now.unwrap_or(request.last_progress);
        self.peers.get_mut(request.peer).record_end(request.bytes_left, now);
        if self.in_flight.is_empty() {
            self.rate.end(now);
        }
        Some(request)
    }
}
