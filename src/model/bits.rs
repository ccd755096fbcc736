//! One bit for each of some peers, as an answer carries it.

use serde::{Deserialize, Serialize};

/// Bits by place: bit `i` is bit `i % 8` of byte `i / 8`, counted from the lowest. What lies beyond
/// its end is not set, so one from outside may have any length.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bits(pub Vec<u8>);

impl Bits {
    /// So many bits, none of them set.
    pub fn none_of(count: usize) -> Self {
        Self(vec![0; count.div_ceil(8)])
    }

    /// Sets a bit, which may lie beyond the end.
    pub fn set(&mut self, bit: usize) {
        if self.0.len() <= bit / 8 {
            self.0.resize(bit / 8 + 1, 0);
        }
        self.0[bit / 8] |= 1 << (bit % 8);
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
    fn a_bit_stands_where_it_is_said_to_and_nothing_beyond_the_end() {
        let mut bits = Bits::none_of(10);
        [0, 3, 9, 16].into_iter().for_each(|bit| bits.set(bit));
        assert_eq!(bits, Bits(vec![0b1001, 0b10, 1]));
        let set: Vec<_> = (0..100).filter(|bit| bits.get(*bit)).collect();
        assert_eq!(set, [0, 3, 9, 16]);
    }
}
