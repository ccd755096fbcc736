//! The parts of an image: digests, references, descriptors, manifests and indexes.
//!
//! Input is parsed once, at the edge, into a type without invalid values. An error names the
//! rejected text. Not here: the storage of content, and its providers.

mod blob_verifier;
mod descriptor;
mod digest;
mod document;
mod hash_chain;
mod platform;
mod reference;
mod rootfs;

pub use blob_verifier::{BlobProof, Hasher, VerifyError};
pub use descriptor::{Descriptor, DescriptorError};
pub use digest::{Digest, DigestError};
pub use document::{Document, DocumentError, Index, MAX_CHILDREN, MAX_DOCUMENT_BYTES, MAX_INDEX_DEPTH, Manifest};
pub use hash_chain::{
    ChainConflict, ChainLengthError, ChainPrefix, ConflictOutcome, HashChain, HashChainBuilder, HashState, MAX_PIECES,
    MIN_PIECE_SIZE, PieceHasher, PieceLayout, PieceLayoutError, PieceVerifier,
};
pub use platform::Platform;
pub use reference::{Reference, ReferenceError, Repository};
pub use rootfs::{RootFs, RootFsError, StackedLayer};
