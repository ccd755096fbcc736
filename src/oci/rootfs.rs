//! The layers in an image's configuration, and the names of the snapshots of the unpacked layers.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{Descriptor, Digest};

/// The digests of the uncompressed layers, the lowest first (OCI image specification, "Image
/// configuration", `rootfs`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootFs {
    diff_ids: Vec<Digest>,
}

/// A layer and its place in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StackedLayer {
    /// The blob of the layer.
    pub blob: Descriptor,
    /// The digest of the uncompressed archive.
    pub diff_id: Digest,
    /// The chain ID of the layers beneath; `None` for the lowest layer.
    pub parent: Option<Digest>,
    /// The chain ID of this layer and all layers beneath: the name of the snapshot.
    pub chain_id: Digest,
}

/// A configuration that does not describe its layers.
#[derive(Debug, thiserror::Error)]
pub enum RootFsError {
    /// Not JSON, or without a list of digests.
    #[error("not an image's configuration: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The manifest has another number of layers.
    #[error("the configuration has {diff_ids} layers and the manifest {layers}")]
    Count {
        /// The number in the configuration.
        diff_ids: usize,
        /// The number in the manifest.
        layers: usize,
    },
}

#[derive(Deserialize)]
struct Raw {
    rootfs: RawRootFs,
}

#[derive(Deserialize)]
struct RawRootFs {
    /// An image without layers may omit the list, or write `null`.
    diff_ids: Option<Vec<Digest>>,
}

impl RootFs {
    /// Parses the configuration. The caller bounds its length.
    ///
    /// # Errors
    /// [`RootFsError::Malformed`].
    pub fn parse(config: &[u8]) -> Result<Self, RootFsError> {
        let Raw { rootfs } = serde_json::from_slice(config)?;
        Ok(Self { diff_ids: rootfs.diff_ids.unwrap_or_default() })
    }

    /// The chain ID of all layers together; `None` for an image without layers.
    pub fn top_chain_id(&self) -> Option<Digest> {
        self.diff_ids.iter().copied().reduce(chain_id_of)
    }

    /// The manifest's layers with their chain IDs, the lowest first.
    ///
    /// # Errors
    /// [`RootFsError::Count`].
    pub fn stack(&self, layers: &[Descriptor]) -> Result<Vec<StackedLayer>, RootFsError> {
        if self.diff_ids.len() != layers.len() {
            return Err(RootFsError::Count { diff_ids: self.diff_ids.len(), layers: layers.len() });
        }
        let mut parent = None;
        let stacked = layers.iter().zip(&self.diff_ids).map(|(blob, diff_id)| {
            let chain_id = parent.map_or(*diff_id, |beneath| chain_id_of(beneath, *diff_id));
            StackedLayer { blob: blob.clone(), diff_id: *diff_id, parent: parent.replace(chain_id), chain_id }
        });
        Ok(stacked.collect())
    }
}

/// OCI image specification, "Image configuration", section "Layer ChainID".
fn chain_id_of(beneath: Digest, diff_id: Digest) -> Digest {
    Digest::from_bytes(Sha256::digest(format!("{beneath} {diff_id}")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: &str) -> Descriptor {
        let digest = Digest::of(name.as_bytes());
        Descriptor { media_type: String::new(), digest, size: 1, platform: None, attestation: false }
    }

    fn config(diff_ids: &[Digest]) -> RootFs {
        let text = serde_json::json!({"os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string();
        RootFs::parse(text.as_bytes()).unwrap()
    }

    /// Computed once with sha256sum: `printf '%s %s' CHAIN DIFF | sha256sum`.
    #[test]
    fn a_chain_id_depends_on_every_layer_beneath() {
        let diff_ids = ["a", "b", "c"].map(|name| Digest::of(name.as_bytes()));
        let stacked = config(&diff_ids).stack(&[layer("1"), layer("2"), layer("3")]).unwrap();
        let names: Vec<_> = stacked.iter().map(|layer| layer.chain_id.to_string()).collect();
        assert_eq!(
            names,
            [
                "sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
                "sha256:51c0c8ace48498d6f5fee6b0592cc06f2da0f3cbe09c5a34a97dce85c3889676",
                "sha256:2fce7f8ce91bcf0a1428b36e1024639fdbd9469eea762dba98aa749631885106",
            ]
        );
        let parents: Vec<_> = stacked.iter().map(|layer| layer.parent).collect();
        assert_eq!(parents, [None, Some(stacked[0].chain_id), Some(stacked[1].chain_id)]);
        assert_eq!(stacked[2].blob, layer("3"));
        assert_eq!((config(&diff_ids).top_chain_id(), config(&[]).top_chain_id()), (Some(stacked[2].chain_id), None));
        assert_eq!(stacked[2].diff_id, diff_ids[2]);
    }

    #[test]
    fn a_layer_has_different_chain_ids_at_different_positions() {
        let diff_id = Digest::of(b"a");
        let stacked = config(&[diff_id, diff_id]).stack(&[layer("1"), layer("1")]).unwrap();
        assert_ne!(stacked[0].chain_id, stacked[1].chain_id);
    }

    #[test]
    fn a_layer_count_mismatch_is_rejected() {
        let one = config(&[Digest::of(b"a")]);
        assert!(matches!(one.stack(&[]), Err(RootFsError::Count { diff_ids: 1, layers: 0 })));
        assert!(config(&[]).stack(&[]).unwrap().is_empty());
        assert_eq!(RootFs::parse(br#"{"rootfs":{"type":"layers","diff_ids":null}}"#).unwrap(), config(&[]));
    }

    #[test]
    fn malformed_configurations_are_rejected() {
        for text in ["", "{}", r#"{"rootfs":{"diff_ids":["sha512:00"]}}"#, r#"{"rootfs":{"diff_ids":"x"}}"#] {
            assert!(matches!(RootFs::parse(text.as_bytes()), Err(RootFsError::Malformed(_))), "{text}");
        }
    }
}
