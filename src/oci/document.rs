//! Manifests and indexes in the formats of OCI and Docker.

use serde::Deserialize;

use super::{Descriptor, Platform};

/// The largest manifest or index that is read. Registries accept as much (distribution
/// specification, "Pushing Manifests": at least 4 MiB should be supported, and the common servers
/// stop there).
pub const MAX_DOCUMENT_BYTES: u64 = 4 << 20;

/// The most children of one document. Overlay file systems stop at 128 layers, and multi-platform
/// indexes at a few dozen entries. At about 200 bytes an entry this is also far under
/// [`MAX_DOCUMENT_BYTES`].
pub const MAX_CHILDREN: usize = 1024;

/// The most indexes on the way from an image's name to its manifest. containerd follows any number
/// (`images.Manifest`). Build tools write one index; tools that join the indexes of several builds
/// write two, as for goauthentik and gitlab-runner. Twice that is the bound: the documents of one
/// image are at most 4 indexes and a manifest of [`MAX_DOCUMENT_BYTES`] each, 20 MiB.
pub const MAX_INDEX_DEPTH: usize = 4;

/// The media types of an index, OCI's first (containerd: `images.IsIndexType`).
const INDEXES: &[&str] =
    &["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];

/// The media types of a manifest, OCI's first (containerd: `images.IsManifestType`).
const MANIFESTS: &[&str] =
    &["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];

/// The media types of a configuration that a container can be made from (containerd:
/// `images.IsConfigType`).
const CONFIGS: &[&str] =
    &["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// Most characters of a document's media type or artifact type in an error.
const MAX_QUOTED: usize = 80;

/// A blob that refers to other blobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// An image for several platforms.
    Index(Index),
    /// An image for one platform.
    Manifest(Manifest),
}

/// An OCI image index or a Docker manifest list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The media type in the document. A document without one gets OCI's media type for its shape.
    pub media_type: String,
    /// The manifests, and indexes of further manifests, in the document's order.
    pub manifests: Vec<Descriptor>,
}

/// An OCI image manifest or a Docker manifest of schema 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The media type in the document. A document without one gets OCI's media type for its shape.
    pub media_type: String,
    /// The type of an artifact that is no image.
    pub artifact_type: Option<String>,
    /// The image's configuration.
    pub config: Descriptor,
    /// The layers, the lowest first; there may be none.
    pub layers: Vec<Descriptor>,
}

/// A document that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Longer than [`MAX_DOCUMENT_BYTES`].
    #[error("a manifest of {0} bytes is over the limit of {MAX_DOCUMENT_BYTES}")]
    TooLarge(u64),
    /// Not JSON, or not of this shape; also an invalid digest or size inside.
    #[error("not a manifest: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Neither a list of manifests nor a configuration with layers, or both at once.
    #[error("neither an image index nor an image manifest")]
    UnknownShape,
    /// More entries than [`MAX_CHILDREN`].
    #[error("{0} entries in a manifest are over the limit of {MAX_CHILDREN}")]
    TooManyChildren(usize),
    /// Docker's first schema: its layers are no content-addressed blobs of an image that containerd
    /// runs.
    #[error("a Docker manifest of schema 1, which no current runtime takes; push the image again with a current tool")]
    Schema1,
    /// A schema other than 1 and 2.
    #[error("manifest schema version {0} is not supported")]
    Schema(u64),
    /// The document, or its descriptor, has the media type of another shape.
    #[error("{shape} is called {claimed:?}")]
    MediaType {
        /// The shape of the document.
        shape: &'static str,
        /// The media type, shortened.
        claimed: String,
    },
    /// A manifest of an artifact that cannot run: a chart, a signature, a list of materials.
    #[error("an artifact of type {0:?}, not an image that can run")]
    Artifact(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u64,
    media_type: Option<String>,
    artifact_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// Parses a manifest or an index. The content decides between the two. A document with both
    /// shapes is rejected, because two readers would see two images.
    ///
    /// # Errors
    /// [`DocumentError`] when the document is too large, not JSON, or of another shape.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(DocumentError::TooLarge(bytes.len() as u64));
        }
        let raw: Raw = serde_json::from_slice(bytes)?;
        match raw.schema_version {
            2 => {}
            1 => return Err(DocumentError::Schema1),
            other => return Err(DocumentError::Schema(other)),
        }
        let document = match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) => {
                let media_type = raw.media_type.unwrap_or_else(|| INDEXES[0].into());
                Self::Index(Index { media_type, manifests })
            }
            // The specification requires `layers`; an artifact without layers still writes an empty
            // list.
            (None, Some(config), Some(layers)) => {
                let media_type = raw.media_type.unwrap_or_else(|| MANIFESTS[0].into());
                Self::Manifest(Manifest { media_type, artifact_type: raw.artifact_type, config, layers })
            }
            _ => return Err(DocumentError::UnknownShape),
        };
        let children = document.children().count();
        if children > MAX_CHILDREN {
            return Err(DocumentError::TooManyChildren(children));
        }
        document.check_media_type(document.media_type())?;
        Ok(document)
    }

    /// Whether this is the media type of an index or a manifest.
    pub fn is_document_type(media_type: &str) -> bool {
        INDEXES.contains(&media_type) || MANIFESTS.contains(&media_type)
    }

    /// Checks the media type in a descriptor of the document. containerd goes by the descriptor,
    /// and rejects a document of the other shape.
    ///
    /// # Errors
    /// [`DocumentError::MediaType`].
    pub fn check_media_type(&self, media_type: &str) -> Result<(), DocumentError> {
        let (shape, names) = match self {
            Self::Index(_) => ("an image index", INDEXES),
            Self::Manifest(_) => ("an image manifest", MANIFESTS),
        };
        if names.contains(&media_type) {
            return Ok(());
        }
        Err(DocumentError::MediaType { shape, claimed: media_type.chars().take(MAX_QUOTED).collect() })
    }

    /// Checks that a runtime can run the document. An index passes, because one of its manifests
    /// may be an image; a manifest needs the configuration of an image.
    ///
    /// # Errors
    /// [`DocumentError::Artifact`].
    pub fn check_runnable(&self) -> Result<(), DocumentError> {
        match self {
            Self::Manifest(manifest) if manifest.is_artifact() => Err(DocumentError::Artifact(manifest.kind())),
            _ => Ok(()),
        }
    }

    /// The document's media type, which an image record repeats and containerd goes by.
    pub fn media_type(&self) -> &str {
        match self {
            Self::Index(index) => &index.media_type,
            Self::Manifest(manifest) => &manifest.media_type,
        }
    }

    /// All descriptors in the document.
    pub fn children(&self) -> impl Iterator<Item = &Descriptor> {
        let (one, many) = match self {
            Self::Index(index) => (None, &index.manifests),
            Self::Manifest(manifest) => (Some(&manifest.config), &manifest.layers),
        };
        one.into_iter().chain(many)
    }
}

impl Manifest {
    /// Whether the manifest is no image: containerd runs only manifests with the configuration of
    /// an image, whatever the other fields say.
    pub fn is_artifact(&self) -> bool {
        !CONFIGS.contains(&self.config.media_type.as_str())
    }

    fn kind(&self) -> String {
        let kind = self.artifact_type.as_ref().unwrap_or(&self.config.media_type);
        kind.chars().take(MAX_QUOTED).collect()
    }
}

impl Index {
    /// The entry that containerd follows on `here` (`images.Manifest`, `images.LimitManifests`):
    /// the best match of the entries that name a platform, else the first entry that names none.
    /// The caller has to read the platform of the latter in its configuration.
    ///
    /// containerd tries no second entry and reads no annotation: an attestation without a platform
    /// is chosen too, and its configuration then matches no node.
    pub fn select(&self, platform: &Platform) -> Option<&Descriptor> {
        let mut best: Option<(u8, &Descriptor)> = None;
        for entry in &self.manifests {
            let Some(rank) = entry.platform.as_ref().and_then(|offered| platform.preference(offered)) else { continue };
            // The first of equals wins, as in containerd.
            if best.is_none_or(|(highest, _)| rank > highest) {
                best = Some((rank, entry));
            }
        }
        let unnamed = || self.manifests.iter().find(|entry| entry.platform.is_none());
        best.map(|(_, entry)| entry).or_else(unnamed)
    }

    /// The entry whose documents CRI reads on `here` to compute the image's size
    /// (`images.LimitManifests` without a filter): the best match, else the first entry that names
    /// a platform, else the first entry. CRI lists no image without these documents, although
    /// containers are made from the entry of [`Index::select`].
    pub fn select_for_size(&self, platform: &Platform) -> Option<&Descriptor> {
        let has_platform = |entry: &&Descriptor| entry.platform.is_some();
        let best = self.select(platform).filter(has_platform);
        best.or_else(|| self.manifests.iter().find(has_platform)).or_else(|| self.manifests.first())
    }
}

#[cfg(test)]
mod tests;
