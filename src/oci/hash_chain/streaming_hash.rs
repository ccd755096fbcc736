//! SHA-256 from any state on, over bytes in chunks of any length.

use super::{BLOCK, Digest, HashState};

#[derive(Clone, Debug)]
pub(super) struct StreamingHash {
    state: HashState,
    taken: u64,
    /// The bytes after the last whole block.
    rest: [u8; BLOCK],
    rest_length: usize,
}

impl StreamingHash {
    pub(super) fn new(state: HashState) -> Self {
        Self { state, taken: 0, rest: [0; BLOCK], rest_length: 0 }
    }

    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        self.taken += bytes.len() as u64;
        if self.rest_length > 0 {
            let (filling, later) = bytes.split_at(bytes.len().min(BLOCK - self.rest_length));
            self.rest[self.rest_length..][..filling.len()].copy_from_slice(filling);
            self.rest_length += filling.len();
            bytes = later;
            if self.rest_length < BLOCK {
                return;
            }
            self.state.absorb(&self.rest);
        }
        let rest = self.state.absorb(bytes);
        self.rest[..rest.len()].copy_from_slice(rest);
        self.rest_length = rest.len();
    }

    /// Bytes hashed since the beginning.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Has a meaning only after whole blocks.
    pub(super) fn state(&self) -> HashState {
        self.state
    }

    /// The digest, where the hashed bytes end a message of `length` bytes.
    pub(super) fn finish(self, length: u64) -> Digest {
        self.state.finish(&self.rest[..self.rest_length], length)
    }
}
