//! What images are made of: digests, references, descriptors, manifests and indexes.
//!
//! Everything here is parsed once, at the edge, into a type that cannot be wrong; what is refused is refused
//! with a reason that names the text. Not here: where content is kept or who holds it.

mod chain;
mod descriptor;
mod digest;
mod document;
mod platform;
mod reference;
mod rootfs;

pub use chain::{
    Beginning, Chain, ChainBuilder, Cut, CutError, Dispute, LengthError, MAX_PIECES, PieceHasher, Proving, Ruling,
    SMALLEST_PIECE, State,
};
pub use descriptor::{Descriptor, DescriptorError};
pub use digest::{Digest, DigestError, Hasher, Verified, VerifyError};
pub use document::{Document, DocumentError, Index, MAX_CHILDREN, MAX_DOCUMENT_BYTES, MAX_INDEX_DEPTH, Manifest};
pub use platform::Platform;
pub use reference::{Reference, ReferenceError, Repository};
pub use rootfs::{RootFs, RootFsError, StackedLayer};
