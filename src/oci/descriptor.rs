//! References to blobs: media type, digest and size.

use serde::{Deserialize, Serialize};

use super::{Digest, DigestError, Platform};

/// A descriptor (OCI image specification, "Descriptors"), checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Raw", into = "Raw")]
pub struct Descriptor {
    /// The media type; may be empty in old Docker documents.
    pub media_type: String,
    /// The blob's digest.
    pub digest: Digest,
    /// The blob's length in bytes.
    pub size: u64,
    /// In an index: the platform of the manifest.
    pub platform: Option<Platform>,
    /// The blob is an attestation about another image, and cannot run.
    pub attestation: bool,
}

/// A descriptor that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// The digest is invalid, or of another algorithm.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// The size is negative.
    #[error("size {0} of {1} is impossible")]
    Size(i64, Digest),
}

impl Descriptor {
    /// Whether the layer must not be distributed and usually has `urls`. Agents do not announce
    /// such a layer, and pulls skip the layer.
    pub fn is_foreign(&self) -> bool {
        self.media_type.contains(".foreign.") || self.media_type.contains(".nondistributable.")
    }
}

/// The JSON form; unused fields are left out.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    annotations: Option<Annotations>,
}

#[derive(Serialize, Deserialize)]
struct Annotations {
    /// BuildKit's mark of an attestation manifest.
    #[serde(rename = "vnd.docker.reference.type", default, skip_serializing_if = "Option::is_none")]
    reference_type: Option<String>,
}

const ATTESTATION: &str = "attestation-manifest";

impl TryFrom<Raw> for Descriptor {
    type Error = DescriptorError;

    fn try_from(raw: Raw) -> Result<Self, DescriptorError> {
        let digest = raw.digest.parse()?;
        let size = u64::try_from(raw.size).map_err(|_| DescriptorError::Size(raw.size, digest))?;
        let attestation =
            raw.annotations.and_then(|annotations| annotations.reference_type).as_deref() == Some(ATTESTATION);
        Ok(Self { media_type: raw.media_type, digest, size, platform: raw.platform, attestation })
    }
}

impl From<Descriptor> for Raw {
    fn from(descriptor: Descriptor) -> Self {
        let Descriptor { media_type, digest, size, platform, attestation } = descriptor;
        let annotations = attestation.then(|| Annotations { reference_type: Some(ATTESTATION.into()) });
        // Sizes came from an i64, or from a file's length, which the kernel bounds by one.
        Self { media_type, digest: digest.to_string(), size: size.cast_signed(), platform, annotations }
    }
}
