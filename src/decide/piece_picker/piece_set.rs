//! Sets of pieces, and their iteration in ascending order.
/// A bit per piece. Numbers beyond the end are in no set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PieceSet {
    words: Vec<u64>,
    pieces: usize,
}

impl PieceSet {
    pub(super) fn none(pieces: usize) -> Self {
        Self { words: vec![0; pieces.div_ceil(64)], pieces }
    }

    pub(super) fn all(pieces: usize) -> Self {
        let mut set = Self { words: vec![u64::MAX; pieces.div_ceil(64)], pieces };
        if let (Some(last), rest @ 1..) = (set.words.last_mut(), pieces % 64) {
            *last = (1 << rest) - 1;
        }
        set
    }

    pub(super) fn contains(&self, piece: u32) -> bool {
        self.words.get(piece as usize / 64).is_some_and(|word| word & 1 << (piece % 64) != 0)
    }

    /// False when the piece was in the set already, or lies beyond the end.
    pub(super) fn insert(&mut self, piece: u32) -> bool {
        let is_new = (piece as usize) < self.pieces && !self.contains(piece);
        if is_new {
            self.words[piece as usize / 64] |= 1 << (piece % 64);
        }
        is_new
    }

    /// False when the piece was not in the set.
    pub(super) fn remove(&mut self, piece: u32) -> bool {
        let was_present = self.contains(piece);
        if was_present {
            self.words[piece as usize / 64] &= !(1 << (piece % 64));
        }
        was_present
    }

    /// Ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        ones(self.words.iter().copied())
    }

    /// The intersection, ascending.
    pub(super) fn and<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = u32> + 'a {
        ones(self.words.iter().zip(&other.words).map(|(one, other)| one & other))
    }
}

fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = u32> {
    words.enumerate().flat_map(|(word_index, mut word)| {
        std::iter::from_fn(move || {
            let bit = word.trailing_zeros();
            (word != 0).then(|| {
                word &= word - 1;
                word_index as u32 * 64 + bit
            })
        })
    })
}
