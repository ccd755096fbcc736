//! The verification of a whole blob: its bytes are hashed and compared with its digest and size.
//! [`super::PieceVerifier`] verifies a blob piece by piece.

use sha2::{Digest as _, Sha256};

use super::Digest;

/// Proof that bytes with this digest and of this size went through a [`Hasher`], or piece by piece
/// through a [`super::PieceVerifier`].
///
/// No other module can make a proof, so a function that takes a proof cannot be called with
/// unverified content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobProof {
    digest: Digest,
    size: u64,
}

impl BlobProof {
    /// The caller has verified the bytes.
    pub(super) fn new(digest: Digest, size: u64) -> Self {
        Self { digest, size }
    }

    /// The digest of the bytes.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The number of bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// The bytes are not the requested blob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Fewer or more bytes than the descriptor says.
    #[error("{expected} should have {expected_size} bytes and has {actual_size}")]
    Size {
        /// The requested blob.
        expected: Digest,
        /// The size in the descriptor.
        expected_size: u64,
        /// The number of bytes that arrived.
        actual_size: u64,
    },
    /// The right number of bytes, but other content.
    #[error("bytes for {expected} hash to {actual}")]
    Digest {
        /// The requested blob.
        expected: Digest,
        /// The digest of the bytes that arrived.
        actual: Digest,
    },
    /// A piece that is not the blob's.
    #[error("piece {piece} of {expected} does not match the hash chain")]
    Piece {
        /// The requested blob.
        expected: Digest,
        /// The number of the piece, counted from 0.
        piece: usize,
    },
}

/// Hashes a blob while its bytes arrive.
#[derive(Clone, Default)]
pub struct Hasher {
    sha: Sha256,
    size: u64,
}

impl Hasher {
    /// Hashes the next bytes of the blob.
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha.update(bytes);
        self.size += bytes.len() as u64;
    }

    /// The number of bytes that were hashed.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of the hashed bytes, without an expected digest. The digest alone proves nothing
    /// about a blob.
    pub fn digest(self) -> Digest {
        Digest::from_bytes(self.sha.finalize().into())
    }

    /// Compares the hashed bytes with the expected digest and size.
    ///
    /// # Errors
    /// [`VerifyError`] when the size or the digest differ.
    pub fn verify(self, expected: Digest, expected_size: u64) -> Result<BlobProof, VerifyError> {
        if self.size != expected_size {
            return Err(VerifyError::Size { expected, expected_size, actual_size: self.size });
        }
        let size = self.size;
        let actual = self.digest();
        if actual != expected {
            return Err(VerifyError::Digest { expected, actual });
        }
        Ok(BlobProof { digest: actual, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_bytes_are_verified() {
        let wanted = Digest::of(b"cargo");
        let hash = |bytes: &[u8]| {
            let mut hasher = Hasher::default();
            bytes.chunks(2).for_each(|chunk| hasher.update(chunk));
            hasher.verify(wanted, 5)
        };
        assert_eq!(hash(b"cargo").unwrap(), BlobProof { digest: wanted, size: 5 });
        assert!(matches!(hash(b"carg"), Err(VerifyError::Size { actual_size: 4, .. })), "short");
        assert!(matches!(hash(b"cargoo"), Err(VerifyError::Size { actual_size: 6, .. })), "long");
        assert!(matches!(hash(b"argo!"), Err(VerifyError::Digest { .. })), "other bytes");
    }
}
