use std::collections::BTreeMap;

use crate::oci::{Digest, Reference};

/// Layers of one image that this node lacks.
#[derive(Debug, Clone)]
pub(super) struct MissingLayers {
    /// The manifest.
    pub(super) manifest: Digest,
    /// A name of the image here.
    pub(super) reference: Reference,
    /// The target of the record of this name.
    pub(super) image_digest: Digest,
    /// The layers with their sizes in bytes.
    pub(super) layers: BTreeMap<Digest, u64>,
}
