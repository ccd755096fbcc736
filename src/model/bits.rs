//! One bit per peer or per piece, as replies carry them.

use serde::{Deserialize, Serialize};

/// A bitmap: bit `i` is bit `i % 8` of byte `i / 8`, counted from the lowest. Bits beyond the end
/// are unset, so a bitmap from a peer may have any length.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bits(pub Vec<u8>);

impl Bits {
    /// `count` bits, none of them set.
    pub fn none_of(count: usize) -> Self {
        Self(vec![0; count.div_ceil(8)])
    }

    /// Sets a bit. A bit beyond the end makes the bitmap longer.
    pub fn set(&mut self, bit: usize) {
        if self.0.len() <= bit / 8 {
            self.0.resize(bit / 8 + 1, 0);
        }
        self.0[bit / 8] |= 1 << (bit % 8);
    }

    /// Clears a bit.
    pub fn clear(&mut self, bit: usize) {
        if let Some(byte) = self.0.get_mut(bit / 8) {
            *byte &= !(1 << (bit % 8));
        }
    }

    /// The number of set bits.
    pub fn count(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// The set bits, in ascending order.
    pub fn ones(&self) -> impl Iterator<Item = usize> + '_ {
        let of_byte = |(index, byte): (usize, &u8)| {
            let byte = *byte;
            (0..8).filter(move |bit| byte & 1 << bit != 0).map(move |bit| index * 8 + bit)
        };
        self.0.iter().enumerate().flat_map(of_byte)
    }

    /// Whether a bit is set.
    pub fn get(&self, bit: usize) -> bool {
        self.0.get(bit / 8).is_some_and(|byte| byte & 1 << (bit % 8) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_is_read_where_it_was_set_and_bits_beyond_the_end_are_unset() {
        let mut bits = Bits::none_of(10);
        [0, 3, 9, 16].into_iter().for_each(|bit| bits.set(bit));
        assert_eq!(bits, Bits(vec![0b1001, 0b10, 1]));
        let set: Vec<_> = (0..100).filter(|bit| bits.get(*bit)).collect();
        assert_eq!(set, [0, 3, 9, 16]);
        assert_eq!(bits.ones().collect::<Vec<_>>(), set);
        bits.clear(3);
        bits.clear(1000);
        assert_eq!((bits.get(3), bits.count()), (false, 3));
    }
}
