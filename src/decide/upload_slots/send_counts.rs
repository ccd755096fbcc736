//! The choice of pieces to send: of the requested pieces that are here, those that were sent least.
//! Every piece is then at another node before one is sent twice.
//!
//! Not here: the order of requests ([`super::UploadSlots`]).

use hashlink::LruCache;

use crate::oci::{Digest, MAX_PIECES};

/// Counted pieces of all blobs together, a byte each. Two blobs with [`MAX_PIECES`] pieces, or 500
/// usual blobs of 512 pieces: more than a node serves at a time.
const MAX_COUNTED: usize = 2 * MAX_PIECES as usize;

/// Send counts of each piece, for the most recently requested blobs.
#[derive(Debug)]
pub struct SendCounts {
    blobs: LruCache<Digest, Vec<u8>>,
    counted: usize,
}

impl Default for SendCounts {
    fn default() -> Self {
        Self { blobs: LruCache::new_unbounded(), counted: 0 }
    }
}

impl SendCounts {
    /// The `most` least sent pieces among the requested ones that are here; equal counts keep the
    /// requested order. The pieces count as sent, so the caller should be ready to send.
    pub fn choose(&mut self, digest: Digest, requested: &[u32], limit: usize, has: impl Fn(u32) -> bool) -> Vec<u32> {
        let exists = |piece: &u32| u64::from(*piece) < MAX_PIECES && has(*piece);
        let mut pieces: Vec<_> = requested.iter().copied().filter(exists).collect();
        let length = pieces.iter().max().map_or(0, |last| *last as usize + 1);
        let mut times = self.blobs.remove(&digest).unwrap_or_default();
        if times.len() < length {
            self.counted += length - times.len();
            times.resize(length, 0);
        }
        pieces.sort_by_key(|piece| times[*piece as usize]);
        pieces.dedup();
        pieces.truncate(limit);
        for piece in &pieces {
            if times[*piece as usize] == u8::MAX {
                times.iter_mut().for_each(|times| *times /= 2);
            }
            times[*piece as usize] += 1;
        }
        self.blobs.insert(digest, times);
        self.evict_oldest();
        pieces
    }

    /// Evicts the least recently requested blobs.
    fn evict_oldest(&mut self) {
        while self.counted > MAX_COUNTED || self.blobs.len() > MAX_COUNTED / 256 {
            let Some((_, oldest)) = self.blobs.remove_lru() else { return };
            self.counted -= oldest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_sent_piece_is_chosen_first_and_equal_pieces_in_the_requested_order() {
        let mut sent = SendCounts::default();
        let blob = Digest::of(b"blob");
        assert_eq!(sent.choose(blob, &[5, 3, 4], 2, |_| true), [5, 3]);
        assert_eq!(sent.choose(blob, &[3, 5, 4], 2, |_| true), [4, 3]);
        assert_eq!(sent.choose(blob, &[4, 5, 6], 9, |piece| piece != 6), [4, 5], "piece 6 is not here");
        assert_eq!(sent.choose(blob, &[u32::MAX], 1, |_| true), [0; 0]);
    }

    #[test]
    fn counts_stay_in_order_after_many_sends() {
        let mut sent = SendCounts::default();
        let blob = Digest::of(b"blob");
        for _ in 0..1000 {
            sent.choose(blob, &[0], 1, |_| true);
        }
        assert_eq!(sent.choose(blob, &[0, 1], 1, |_| true), [1]);
    }

    #[test]
    fn the_counted_pieces_are_bounded() {
        let mut sent = SendCounts::default();
        for n in 0..5000_u32 {
            sent.choose(Digest::of(&n.to_le_bytes()), &[n % 9 * 10_000], 1, |_| true);
            assert!(sent.counted <= MAX_COUNTED);
        }
        let total: usize = sent.blobs.iter().map(|(_, times)| times.len()).sum();
        assert_eq!(total, sent.counted);
    }
}
