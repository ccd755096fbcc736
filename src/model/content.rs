//! What a node holds, as it tells others.

use serde::{Deserialize, Serialize};

use crate::oci::{Digest, Repository};

/// One change of what a node holds. Announcements are hints: whoever fetches verifies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ContentChange {
    /// A blob is wholly there.
    BlobAdded(Digest),
    /// A blob is gone.
    BlobRemoved(Digest),
    /// An image is known under this repository, by this tag when there is one.
    Tagged(Repository, Option<String>, Digest),
    /// It is no longer.
    Untagged(Repository, Option<String>, Digest),
}
