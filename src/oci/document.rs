//! Manifests and indexes, OCI's and Docker's alike.

use serde::Deserialize;

use super::{Descriptor, Platform};

/// The largest manifest or index that is read: what registries accept (distribution specification, "Pushing Manifests":
/// at least 4 MiB should be supported, and the common servers stop there).
pub const MAX_DOCUMENT_BYTES: u64 = 4 << 20;

/// The most children one document may name. Overlay file systems stop at 128 layers and multi-platform indexes at a few dozen
/// entries; at about 200 bytes an entry this is also far under [`MAX_DOCUMENT_BYTES`].
pub const MAX_CHILDREN: usize = 1024;

/// A blob that names other blobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image for several platforms.
    Index(Index),
    /// One image.
    Manifest(Manifest),
}

/// An OCI image index or a Docker manifest list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// What the document calls itself; where it does not say, OCI's name for its shape.
    pub media_type: String,
    /// The manifests, in the document's order.
    pub manifests: Vec<Descriptor>,
}

/// An OCI image manifest or a Docker manifest of schema 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// What the document calls itself; where it does not say, OCI's name for its shape.
    pub media_type: String,
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
    /// Not JSON, or not of this shape; also a digest or size inside it that is wrong.
    #[error("not a manifest: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Neither a list of manifests nor a configuration with layers, or both at once.
    #[error("neither an image index nor an image manifest")]
    NeitherOrBoth,
    /// More entries than [`MAX_CHILDREN`].
    #[error("{0} entries in a manifest are over the limit of {MAX_CHILDREN}")]
    TooManyChildren(usize),
    /// Only schema 2 is content-addressed all the way down.
    #[error("manifest schema version {0} is not supported")]
    Schema(u64),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u64,
    media_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// Reads a manifest or an index. Which of the two it is, the content decides; a document that could be read as
    /// both is refused, because two readers would see two images.
    ///
    /// # Errors
    /// [`DocumentError`] when it is too large, not JSON, or of another shape.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(DocumentError::TooLarge(bytes.len() as u64));
        }
        let raw: Raw = serde_json::from_slice(bytes)?;
        if raw.schema_version != 2 {
            return Err(DocumentError::Schema(raw.schema_version));
        }
        let document = match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) => {
                let media_type = raw.media_type.unwrap_or_else(|| "application/vnd.oci.image.index.v1+json".into());
                Self::Index(Index { media_type, manifests })
            }
            // `layers` is required by the specification; an artifact without any still writes an empty list.
            (None, Some(config), Some(layers)) => {
                let media_type = raw.media_type.unwrap_or_else(|| "application/vnd.oci.image.manifest.v1+json".into());
                Self::Manifest(Manifest { media_type, config, layers })
            }
            _ => return Err(DocumentError::NeitherOrBoth),
        };
        match document.children().count() {
            children if children > MAX_CHILDREN => Err(DocumentError::TooManyChildren(children)),
            _ => Ok(document),
        }
    }

    /// Its media type, which an image record repeats and containerd goes by.
    pub fn media_type(&self) -> &str {
        match self {
            Self::Index(index) => &index.media_type,
            Self::Manifest(manifest) => &manifest.media_type,
        }
    }

    /// Every descriptor that the document names.
    pub fn children(&self) -> impl Iterator<Item = &Descriptor> {
        let (one, many) = match self {
            Self::Index(index) => (None, &index.manifests),
            Self::Manifest(manifest) => (Some(&manifest.config), &manifest.layers),
        };
        one.into_iter().chain(many)
    }
}

impl Index {
    /// The manifest that runs on `here`, the best match first; entries without a platform only when no entry has one.
    pub fn select(&self, here: &Platform) -> Option<&Descriptor> {
        let runnable = || self.manifests.iter().filter(|entry| !entry.attestation);
        let mut best: Option<(u8, &Descriptor)> = None;
        for entry in runnable() {
            let Some(rank) = entry.platform.as_ref().and_then(|offered| here.preference(offered)) else { continue };
            // The first of equals wins, as in containerd.
            if best.is_none_or(|(highest, _)| rank > highest) {
                best = Some((rank, entry));
            }
        }
        let unnamed = || runnable().all(|entry| entry.platform.is_none()).then(|| runnable().next()).flatten();
        best.map(|(_, entry)| entry).or_else(unnamed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;

    fn descriptor(name: &str, rest: &str) -> String {
        format!(r#"{{"mediaType":"m","digest":"{}","size":7{rest}}}"#, Digest::of(name.as_bytes()))
    }

    fn index(entries: &[(&str, &str)]) -> Index {
        let entries: Vec<_> = entries.iter().map(|(name, rest)| descriptor(name, rest)).collect();
        let json = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        match Document::parse(json.as_bytes()).unwrap() {
            Document::Index(index) => index,
            Document::Manifest(_) => panic!("an index was read as a manifest"),
        }
    }

    const AMD: &str = r#","platform":{"architecture":"amd64","os":"linux"}"#;
    const ARM: &str = r#","platform":{"architecture":"arm64","os":"linux"}"#;
    const ATTESTATION: &str = r#","platform":{"architecture":"unknown","os":"unknown"},"annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#;

    fn linux_amd64() -> Platform {
        Platform { architecture: "amd64".into(), os: "linux".into(), variant: None }
    }

    #[test]
    fn a_manifest_names_its_config_and_layers() {
        let json =
            format!(r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#, descriptor("c", ""), descriptor("l", ""));
        let document = Document::parse(json.as_bytes()).unwrap();
        let digests: Vec<_> = document.children().map(|child| child.digest).collect();
        assert_eq!(digests, [Digest::of(b"c"), Digest::of(b"l")]);
    }

    #[test]
    fn a_manifest_may_have_no_layers() {
        let json = format!(r#"{{"schemaVersion":2,"config":{},"layers":[]}}"#, descriptor("c", ""));
        assert_eq!(Document::parse(json.as_bytes()).unwrap().children().count(), 1);
    }

    #[test]
    fn an_index_gives_the_manifest_of_this_platform() {
        let select = |entries: &[(&str, &str)]| index(entries).select(&linux_amd64()).map(|found| found.digest);
        assert_eq!(select(&[("arm", ARM), ("amd", AMD), ("note", ATTESTATION)]), Some(Digest::of(b"amd")));
        assert_eq!(select(&[("arm", ARM), ("note", ATTESTATION)]), None, "only other platforms");
        assert_eq!(select(&[("only", "")]), Some(Digest::of(b"only")), "no platform named at all");
        assert_eq!(
            select(&[("plain", ""), ("arm", ARM)]),
            None,
            "an unnamed entry beside named ones is not a guess to make"
        );
        assert_eq!(select(&[]), None);
    }

    #[test]
    fn what_is_no_document_is_refused() {
        let (c, l) = (descriptor("c", ""), descriptor("l", ""));
        let negative = c.replace(":7", ":-7");
        let sha512 = c.replace("sha256", "sha512");
        for (what, json) in [
            ("not JSON", "<html>".to_owned()),
            ("empty", String::new()),
            ("nothing in it", r#"{"schemaVersion":2}"#.into()),
            ("both", format!(r#"{{"schemaVersion":2,"manifests":[],"config":{c},"layers":[{l}]}}"#)),
            ("schema 1", format!(r#"{{"schemaVersion":1,"config":{c},"layers":[]}}"#)),
            ("negative size", format!(r#"{{"schemaVersion":2,"config":{negative},"layers":[]}}"#)),
            ("sha512", format!(r#"{{"schemaVersion":2,"config":{sha512},"layers":[]}}"#)),
            (
                "too many",
                format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, vec![c.as_str(); MAX_CHILDREN + 1].join(",")),
            ),
            ("too large", " ".repeat(MAX_DOCUMENT_BYTES as usize + 1)),
            ("nested", "[".repeat(100_000)),
        ] {
            assert!(Document::parse(json.as_bytes()).is_err(), "{what}");
        }
    }
}
