//! Makes images: real layers (tar files with random content), a configuration and a manifest, in any content store.

use std::time::Duration;

use bytes::Bytes;
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use serde_json::json;

use crate::oci::{Descriptor, Digest, Hasher, Platform};
use crate::ports::{Child, ChildKind, ContentStore, ImageRecord, Pin, Remembered, StoreError};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What was put into the store.
#[derive(Debug, Clone)]
pub struct MadeImage {
    /// The manifest.
    pub root: Descriptor,
    /// Configuration and layers.
    pub blobs: Vec<Descriptor>,
}

impl MadeImage {
    /// Bytes of all blobs.
    pub fn bytes(&self) -> u64 {
        self.root.size + self.blobs.iter().map(|blob| blob.size).sum::<u64>()
    }
}

/// Puts an image with layers of these sizes (in bytes, roughly) into the store under these names. The same seed makes the same image.
///
/// # Errors
/// As the store says.
pub async fn put_image(
    store: &dyn ContentStore,
    names: &[String],
    layer_sizes: &[u64],
    seed: u64,
) -> Result<MadeImage, StoreError> {
    let pin = store.pin(Duration::from_secs(600)).await?;
    let mut random = SmallRng::seed_from_u64(seed);
    let mut layers = Vec::new();
    for (position, size) in layer_sizes.iter().enumerate() {
        let layer = layer(position, *size, &mut random);
        layers.push(put_blob(store, &pin, LAYER, layer, Vec::new()).await?);
    }
    let Platform { architecture, os, variant: _ } = Platform::of_this_node();
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.digest).collect();
    let config = json!({
        "architecture": architecture, "os": os, "config": {"Entrypoint": ["/data/0.bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = put_blob(store, &pin, CONFIG, config.to_string().into(), Vec::new()).await?;
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    let child = |blob: &Descriptor, kind| Child { digest: blob.digest, kind };
    let mut children = vec![child(&config, ChildKind::Config)];
    children.extend(layers.iter().map(|layer| child(layer, ChildKind::Layer)));
    let root = put_blob(store, &pin, MANIFEST, manifest.to_string().into(), children).await?;
    for name in names {
        store.put_image(&ImageRecord { name: name.clone(), target: root.clone() }).await?;
    }
    store.release(pin).await?;
    let blobs = std::iter::once(config).chain(layers).collect();
    Ok(MadeImage { root, blobs })
}

/// Puts any document, a manifest or not, under a name. What it names is not looked at, and not kept alive by it.
///
/// # Errors
/// As the store says.
pub async fn put_document(store: &dyn ContentStore, name: &str, document: String) -> Result<Descriptor, StoreError> {
    let pin = store.pin(Duration::from_secs(600)).await?;
    let target = put_blob(store, &pin, INDEX, document.into(), Vec::new()).await?;
    store.put_image(&ImageRecord { name: name.into(), target: target.clone() }).await?;
    store.release(pin).await?;
    Ok(target)
}

/// Writes one blob, proved as everything is.
async fn put_blob(
    store: &dyn ContentStore,
    pin: &Pin,
    media_type: &str,
    bytes: Bytes,
    children: Vec<Child>,
) -> Result<Descriptor, StoreError> {
    let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
    let remembered = Remembered { source: None, children };
    match store.create(digest, size, pin).await {
        Ok(mut writer) => {
            let mut hasher = Hasher::default();
            for chunk in bytes.chunks(1 << 20) {
                hasher.update(chunk);
                writer.append(&[bytes.slice_ref(chunk)]).await?;
            }
            let proof = hasher.verify(digest, size).map_err(|error| StoreError::Other(error.to_string()))?;
            writer.commit(proof, &remembered).await?;
        }
        Err(StoreError::AlreadyThere(_)) => store.remember(digest, &remembered).await?,
        Err(error) => return Err(error),
    }
    Ok(Descriptor { media_type: media_type.into(), digest, size, platform: None, attestation: false })
}

/// A layer: a tar archive with one file of random bytes, which no compression would shrink.
fn layer(position: usize, size: u64, random: &mut SmallRng) -> Bytes {
    let mut content = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
    random.fill_bytes(&mut content);
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o755);
    let mut archive = tar::Builder::new(Vec::with_capacity(content.len() + 4096));
    archive
        .append_data(&mut header, format!("data/{position}.bin"), content.as_slice())
        .expect("memory can be written");
    archive.into_inner().expect("memory can be written").into()
}
