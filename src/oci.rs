//! What images are made of: digests, references, descriptors, manifests and indexes.
//!
//! Everything here is parsed once, at the edge, into a type that cannot be wrong; what is refused is refused
//! with a reason that names the text. Not here: where content is kept or who holds it.

mod descriptor;
mod digest;
mod document;
mod hash_chain;
mod platform;
mod reference;
mod rootfs;

pub use descriptor::{Descriptor, DescriptorError};
pub use digest::{BlobProof, Digest, DigestError, Hasher, VerifyError};
pub use document::{Document, DocumentError, Index, MAX_CHILDREN, MAX_DOCUMENT_BYTES, MAX_INDEX_DEPTH, Manifest};
pub use hash_chain::{
    ChainConflict, ChainLengthError, ChainPrefix, ConflictOutcome, HashChain, HashChainBuilder, HashState, MAX_PIECES,
    MIN_PIECE_SIZE, PieceHasher, PieceLayout, PieceLayoutError, PieceVerifier,
};
pub use platform::Platform;
pub use reference::{Reference, ReferenceError, Repository};
pub use rootfs::{RootFs, RootFsError, StackedLayer};
