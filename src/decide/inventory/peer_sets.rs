//! Sets of peer numbers: the peers of one item, and the peers that are up.

use std::mem::size_of;

/// A peer's number in the inventory. Numbers stay small, because the numbers of forgotten peers are
/// used again.
pub(super) type PeerNumber = u32;

/// One bit per number, without zero words at the end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Bitmap(Vec<u64>);

impl Bitmap {
    /// False when the number was there.
    pub(super) fn insert(&mut self, number: PeerNumber) -> bool {
        let (word, bit) = word_and_bit(number);
        if word >= self.0.len() {
            // Exact: an inventory has many bitmaps, and each grows once for every 64 peers.
            self.0.reserve_exact(word + 1 - self.0.len());
            self.0.resize(word + 1, 0);
        }
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }

    /// False when the number was not there.
    pub(super) fn remove(&mut self, number: PeerNumber) -> bool {
        if !self.contains(number) {
            return false;
        }
        let (word, bit) = word_and_bit(number);
        self.0[word] &= !bit;
        let used = self.0.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        self.0.truncate(used);
        true
    }

    pub(super) fn contains(&self, number: PeerNumber) -> bool {
        let (word, bit) = word_and_bit(number);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    /// At most one number per word: then a list is half as large as the bitmap.
    fn is_sparse(&self) -> bool {
        let mut count = 0;
        // Most bitmaps are dense, and their first words show that.
        !self.0.iter().any(|word| {
            count += word.count_ones() as usize;
            count > self.0.len()
        })
    }

    /// All numbers, in ascending order.
    fn numbers(&self) -> impl Iterator<Item = PeerNumber> {
        ones(self.0.iter().copied())
    }

    /// The numbers that are also in `mask`, in ascending order.
    fn within<'a>(&'a self, mask: &'a Self) -> impl Iterator<Item = PeerNumber> + 'a {
        ones(self.0.iter().zip(&mask.0).map(|(word, mask)| word & mask))
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<u64>()
    }
}

impl Extend<PeerNumber> for Bitmap {
    fn extend<T: IntoIterator<Item = PeerNumber>>(&mut self, numbers: T) {
        for number in numbers {
            self.insert(number);
        }
    }
}

/// The peers of one item, as a sorted list or as a bitmap, whichever is smaller. One provider takes
/// 8 bytes, and a layer of a thousand nodes takes 128.
#[derive(Debug, Clone)]
pub(super) enum Providers {
    Few(Vec<PeerNumber>),
    Many(Bitmap),
}

impl Default for Providers {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl Providers {
    /// False when the number was there.
    pub(super) fn insert(&mut self, number: PeerNumber) -> bool {
        match self {
            Self::Few(numbers) => {
                let Err(at) = numbers.binary_search(&number) else { return false };
                let last = numbers.last().map_or(number, |last| number.max(*last));
                if (numbers.len() + 1) * size_of::<PeerNumber>() > (word_and_bit(last).0 + 1) * size_of::<u64>() {
                    let mut many = Bitmap::default();
                    // The highest number first, so the bitmap grows once.
                    many.extend([last, number]);
                    many.extend(numbers.drain(..));
                    *self = Self::Many(many);
                } else {
                    if numbers.len() == numbers.capacity() {
                        // Most lists do not grow much further.
                        numbers.reserve_exact(2 + numbers.len() / 8);
                    }
                    numbers.insert(at, number);
                }
                true
            }
            Self::Many(bitmap) => {
                let words = bitmap.0.len();
                let inserted = bitmap.insert(number);
                if bitmap.0.len() > words {
                    self.shrink_if_sparse();
                }
                inserted
            }
        }
    }

    /// False when the number was not there.
    pub(super) fn remove(&mut self, number: PeerNumber) -> bool {
        match self {
            Self::Few(numbers) => {
                let Ok(at) = numbers.binary_search(&number) else { return false };
                numbers.remove(at);
                true
            }
            Self::Many(bitmap) => {
                let removed = bitmap.remove(number);
                if removed {
                    self.shrink_if_sparse();
                }
                removed
            }
        }
    }

    /// Turns the bitmap into a list, if the list takes at most half as much. The factor of two
    /// keeps a set from changing to and fro.
    fn shrink_if_sparse(&mut self) {
        if let Self::Many(bitmap) = self
            && bitmap.is_sparse()
        {
            *self = Self::Few(bitmap.numbers().collect());
        }
    }

    pub(super) fn contains(&self, number: PeerNumber) -> bool {
        match self {
            Self::Few(numbers) => numbers.binary_search(&number).is_ok(),
            Self::Many(bitmap) => bitmap.contains(number),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Few(numbers) => numbers.is_empty(),
            Self::Many(bitmap) => bitmap.0.is_empty(),
        }
    }

    /// The numbers that are also in `mask`, in ascending order.
    pub(super) fn within<'a>(&'a self, mask: &'a Bitmap) -> impl Iterator<Item = PeerNumber> + 'a {
        let (few, many) = match self {
            Self::Few(numbers) => (numbers.as_slice(), None),
            Self::Many(bitmap) => (Default::default(), Some(bitmap)),
        };
        let few = few.iter().copied().filter(|number| mask.contains(*number));
        few.chain(many.into_iter().flat_map(|bitmap| bitmap.within(mask)))
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Few(numbers) => numbers.capacity() * size_of::<PeerNumber>(),
            Self::Many(bitmap) => bitmap.bytes(),
        }
    }
}

/// The index of a number's word, and the number's bit in the word.
fn word_and_bit(number: PeerNumber) -> (usize, u64) {
    (number as usize / 64, 1 << (number % 64))
}

/// The numbers of the set bits.
fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = PeerNumber> {
    (0..).step_by(64).zip(words).flat_map(|(first, mut word)| {
        std::iter::from_fn(move || {
            let lowest = (word != 0).then(|| word.trailing_zeros())?;
            word &= word - 1;
            Some(first + lowest)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_set_takes_the_smaller_form() {
        let set = |numbers: &[PeerNumber]| {
            let mut set = Providers::default();
            numbers.iter().for_each(|number| assert!(set.insert(*number)));
            set
        };
        assert!(matches!(set(&[4999, 3, 70]), Providers::Few(_)), "12 bytes and not 632");
        assert!(matches!(set(&[1, 2, 3]), Providers::Many(_)), "8 bytes and not 12");
        assert!(matches!(set(&[1, 2, 3, 4999]), Providers::Few(_)), "16 bytes and not 632");
        let mut many = set(&(0..5000).collect::<Vec<_>>());
        assert!(many.bytes() <= 5000 / 8 + size_of::<u64>(), "{} bytes", many.bytes());
        (3..5000).for_each(|number| assert!(many.remove(number)));
        assert!(matches!(many, Providers::Few(_)), "{} bytes for three numbers", many.bytes());
    }

    proptest! {
        #[test]
        fn a_provider_set_equals_a_plain_set_in_either_form(
            steps in proptest::collection::vec((prop_oneof![4 => 0..20u32, 1 => 0..400u32], 0..3u8), 0..200),
            mask in proptest::collection::btree_set(0..400u32, 0..200),
        ) {
            let mut counting = Bitmap::default();
            counting.extend(mask.iter().copied());
            let (mut set, mut plain) = (Providers::default(), BTreeSet::new());
            for (number, step) in steps {
                if step == 0 {
                    prop_assert_eq!(set.remove(number), plain.remove(&number));
                } else {
                    prop_assert_eq!(set.insert(number), plain.insert(number));
                }
                prop_assert_eq!(set.is_empty(), plain.is_empty());
                prop_assert_eq!(set.contains(number), plain.contains(&number));
                prop_assert!(set.within(&counting).eq(plain.intersection(&mask).copied()));
            }
        }
    }
}
