//! The pieces of each selected provider, and the number of providers of each piece.

use super::BlobPicker;
use crate::decide::piece_picker::piece_set::PieceSet;
use crate::model::{MAX_HAVE_PIECES, PieceMapUpdate};

impl BlobPicker {
    pub(in crate::decide::piece_picker) fn record_piece_map(&mut self, index: usize, update: &PieceMapUpdate) {
        match update {
            PieceMapUpdate::HaveAll => {
                self.set_whole(index);
                self.selected[index].is_followed = false;
                self.selected[index].announced_whole = true;
            }
            PieceMapUpdate::Map(bits) => {
                let pieces = self.request_counts.len();
                let mut announced = PieceSet::none(pieces);
                for piece in bits.ones().take_while(|piece| *piece < pieces) {
                    announced.insert(piece as u32);
                }
                self.set_pieces(index, announced);
            }
            PieceMapUpdate::Have(pieces) => {
                pieces.iter().take(MAX_HAVE_PIECES).for_each(|piece| self.add_piece(index, *piece))
            }
        }
    }

    pub(in crate::decide::piece_picker) fn set_whole(&mut self, index: usize) {
        self.clear_pieces(index);
        let provider = &mut self.selected[index];
        (provider.is_whole, provider.useful_count) = (true, self.unassigned_count);
        self.near_whole += usize::from(provider.is_near());
    }

    pub(in crate::decide::piece_picker) fn clear_pieces(&mut self, index: usize) {
        self.set_pieces(index, PieceSet::none(self.request_counts.len()));
    }

    pub(super) fn set_pieces(&mut self, index: usize, pieces: PieceSet) {
        self.count_availability(index, false);
        let provider = &mut self.selected[index];
        (provider.is_whole, provider.useful_count) = (false, pieces.and(&self.unassigned).count());
        provider.pieces = pieces;
        self.count_availability(index, true);
    }

    /// Adds a provider's pieces to the availability counts, or subtracts them.
    fn count_availability(&mut self, index: usize, is_more: bool) {
        let Self { selected: providers, availability: counts, near_availability: near_counts, near_whole, .. } = self;
        let provider = &providers[index];
        let step = |count: &mut u16| if is_more { *count += 1 } else { *count -= 1 };
        provider.pieces.iter().for_each(|piece| step(&mut counts[piece as usize]));
        if !provider.is_near() {
            return;
        }
        provider.pieces.iter().for_each(|piece| step(&mut near_counts[piece as usize]));
        if provider.is_whole && is_more {
            *near_whole += 1;
        } else if provider.is_whole {
            *near_whole -= 1;
        }
    }

    pub(in crate::decide::piece_picker) fn set_unproductive(&mut self, index: usize, is_unproductive: bool) {
        if self.selected[index].is_unproductive != is_unproductive {
            self.count_availability(index, false);
            self.selected[index].is_unproductive = is_unproductive;
            self.count_availability(index, true);
        }
    }

    fn add_piece(&mut self, index: usize, piece: u32) {
        let provider = &mut self.selected[index];
        if provider.is_whole || !provider.pieces.insert(piece) {
            return;
        }
        provider.useful_count += usize::from(self.unassigned.contains(piece));
        self.availability[piece as usize] += 1;
        self.near_availability[piece as usize] += u16::from(provider.is_near());
    }

    /// For a provider that announced the piece and did not send the piece.
    pub(in crate::decide::piece_picker) fn remove_piece(&mut self, index: usize, piece: u32) {
        let provider = &mut self.selected[index];
        if provider.is_whole || !provider.pieces.remove(piece) {
            return;
        }
        provider.useful_count -= usize::from(self.unassigned.contains(piece));
        self.availability[piece as usize] -= 1;
        self.near_availability[piece as usize] -= u16::from(provider.is_near());
    }
}
