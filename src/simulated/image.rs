//! Images in any content store: layers (tar files with random content), a configuration, a
//! manifest.

mod compression;

use std::time::Duration;

use bytes::Bytes;
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use serde_json::json;

pub use self::compression::Compression;
use crate::oci::{Descriptor, Digest, Hasher, MAX_DOCUMENT_BYTES, Platform, RootFs, StackedLayer};
use crate::ports::{BlobMetadata, Blobs, Child, ChildKind, ContentStore, ImageRecord, Pin, StoreError};

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

/// Shape of an image: by default OCI's media types, a single manifest, no layers.
#[derive(Debug, Clone, Default)]
pub struct Recipe {
    /// Docker's media types instead of OCI's.
    pub docker: bool,
    /// Compression of the layers.
    pub compression: Compression,
    /// Approximate sizes of the layers in bytes.
    pub layers: Vec<u64>,
    /// The manifest lists the first layer twice.
    pub duplicate_layer: bool,
    /// The manifest lists one more layer, which must not be distributed and is not in the store.
    pub foreign: bool,
    /// Architecture in the configuration, if not this machine's.
    pub architecture: Option<String>,
    /// Build time in the configuration.
    pub created: Option<String>,
    /// An index lists the manifest, and a manifest for another platform that is not in the store.
    pub index: bool,
    /// Another index lists the index, as in the published images of goauthentik and gitlab-runner.
    pub nested: bool,
    /// The index names no platform for the manifest, so a runtime reads the configuration's. The
    /// other platform's manifest is then in the store, without its blobs.
    pub without_platforms: bool,
    /// The index lists an attestation, whose manifest is in the store without its blobs.
    pub attested: bool,
}

impl Recipe {
    /// Number of indexes above the manifest, and the position of the configuration in
    /// [`MadeImage::blobs`].
    pub fn indexes(&self) -> usize {
        usize::from(self.index || self.nested) + usize::from(self.nested)
    }
}

/// An image in the store.
#[derive(Debug, Clone)]
pub struct MadeImage {
    /// Index or manifest.
    pub target: Descriptor,
    /// Other blobs for this platform: the inner index, the manifest below an index, the
    /// configuration, each layer once.
    pub blobs: Vec<Descriptor>,
    /// Layers in the manifest's order, with their parents.
    pub layers: Vec<StackedLayer>,
}

impl MadeImage {
    /// Bytes of all blobs.
    pub fn bytes(&self) -> u64 {
        self.target.size + self.blobs.iter().map(|blob| blob.size).sum::<u64>()
    }
}

/// Puts an image with layers of these approximate sizes (in bytes) into the store under these
/// names. The same seed makes the same image.
///
/// # Errors
/// Errors of the store.
pub async fn put_image(
    store: &dyn ContentStore,
    names: &[String],
    layer_sizes: &[u64],
    seed: u64,
) -> Result<MadeImage, StoreError> {
    make_image(store, names, &Recipe { layers: layer_sizes.to_vec(), ..Recipe::default() }, seed).await
}

/// Puts an image of any shape into the store under these names. The same recipe and seed make the
/// same image.
///
/// # Errors
/// Errors of the store.
pub async fn make_image(
    store: &dyn ContentStore,
    names: &[String],
    recipe: &Recipe,
    seed: u64,
) -> Result<MadeImage, StoreError> {
    let pin = store.pin(Duration::from_secs(600)).await?;
    let (manifest, mut blobs, layers) = put_manifest(store, &pin, recipe, seed).await?;
    let mut target = manifest;
    for _ in 0..recipe.indexes() {
        let (index, bare_manifest) = put_index(store, &pin, recipe, &target).await?;
        blobs.insert(0, std::mem::replace(&mut target, index));
        blobs
            .extend(bare_manifest.filter(|bare_manifest| blobs.iter().all(|blob| blob.digest != bare_manifest.digest)));
    }
    for name in names {
        store.put_image(&ImageRecord { name: name.clone(), target: target.clone() }).await?;
    }
    store.release(pin).await?;
    Ok(MadeImage { target, blobs, layers })
}

/// Puts an image of existing gzip layers into the store under a name. Each layer comes with the
/// digest of its unpacked archive.
///
/// # Errors
/// Errors of the store.
pub async fn put_gzip_layers(
    store: &dyn ContentStore,
    name: &str,
    packed: Vec<(Bytes, Digest)>,
) -> Result<MadeImage, StoreError> {
    let pin = store.pin(Duration::from_secs(600)).await?;
    let recipe = Recipe { compression: Compression::Gzip, ..Recipe::default() };
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for (packed, diff_id) in packed {
        layers.push(put_blob(store, &pin, recipe.compression.layer_type(recipe.docker), packed, Vec::new()).await?);
        diff_ids.push(diff_id);
    }
    let (target, blobs, layers) = put_manifest_of(store, &pin, &recipe, (layers, diff_ids), 0).await?;
    store.put_image(&ImageRecord { name: name.into(), target: target.clone() }).await?;
    store.release(pin).await?;
    Ok(MadeImage { target, blobs, layers })
}

async fn put_manifest(
    store: &dyn Blobs,
    pin: &Pin,
    recipe: &Recipe,
    seed: u64,
) -> Result<(Descriptor, Vec<Descriptor>, Vec<StackedLayer>), StoreError> {
    let layer_type = recipe.compression.layer_type(recipe.docker);
    let mut random = SmallRng::seed_from_u64(seed);
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for (position, size) in recipe.layers.iter().enumerate() {
        let archive = layer(position, *size, &mut random);
        diff_ids.push(Digest::of(&archive));
        layers.push(put_blob(store, pin, layer_type, recipe.compression.compress(archive), Vec::new()).await?);
    }
    put_manifest_of(store, pin, recipe, (layers, diff_ids), seed).await
}

/// The layers are in the store already. Each layer has its diff ID.
async fn put_manifest_of(
    store: &dyn Blobs,
    pin: &Pin,
    recipe: &Recipe,
    (layers, mut diff_ids): (Vec<Descriptor>, Vec<Digest>),
    seed: u64,
) -> Result<(Descriptor, Vec<Descriptor>, Vec<StackedLayer>), StoreError> {
    let (config_type, manifest_type) =
        if recipe.docker { (DOCKER_CONFIG, DOCKER_MANIFEST) } else { (CONFIG, MANIFEST) };
    let mut listed_layers = layers.clone();
    if recipe.duplicate_layer {
        listed_layers.extend(layers.first().cloned());
        diff_ids.extend(diff_ids.first().copied());
    }
    if recipe.foreign {
        let digest = Digest::of(&seed.to_le_bytes());
        listed_layers.push(Descriptor {
            media_type: FOREIGN.into(),
            digest,
            size: 1,
            platform: None,
            attestation: false,
        });
        diff_ids.push(digest);
    }
    let Platform { architecture, os, variant: _ } = Platform::of_this_node();
    let architecture = recipe.architecture.as_ref().unwrap_or(&architecture);
    let mut config = json!({
        "architecture": architecture, "os": os, "author": format!("seed {seed}"), "config": {"Entrypoint": ["/data/0.bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    if let Some(created) = &recipe.created {
        config["created"] = json!(created);
    }
    let config = config.to_string();
    let stacked = RootFs::parse(config.as_bytes()).and_then(|rootfs| rootfs.stack(&listed_layers));
    let stacked = stacked.map_err(|error| StoreError::Other(error.to_string()))?;
    let config = put_blob(store, pin, config_type, config.into(), Vec::new()).await?;
    let manifest = json!({"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": listed_layers});
    let mut children = vec![child(&config, ChildKind::Config)];
    children.extend(listed_layers.iter().map(|layer| child(layer, ChildKind::Layer)));
    let manifest = put_blob(store, pin, manifest_type, manifest.to_string().into(), children).await?;
    Ok((manifest, std::iter::once(config).chain(layers).collect(), stacked))
}

async fn put_index(
    store: &dyn Blobs,
    pin: &Pin,
    recipe: &Recipe,
    manifest: &Descriptor,
) -> Result<(Descriptor, Option<Descriptor>), StoreError> {
    let other_platform = Platform { architecture: "s390x".into(), os: "linux".into(), variant: None };
    let bare_manifest =
        if recipe.without_platforms { Some(put_bare_manifest(store, pin, b"elsewhere").await?) } else { None };
    let other =
        bare_manifest.clone().unwrap_or_else(|| Descriptor { digest: Digest::of(b"elsewhere"), ..manifest.clone() });
    let mut entries = vec![
        Descriptor { platform: Some(other_platform), ..other },
        Descriptor { platform: (!recipe.without_platforms).then(Platform::of_this_node), ..manifest.clone() },
    ];
    if recipe.attested {
        let document = put_bare_manifest(store, pin, b"materials").await?;
        let unknown = Platform { architecture: "unknown".into(), os: "unknown".into(), variant: None };
        entries.push(Descriptor { platform: Some(unknown), attestation: true, ..document });
    }
    let index_type = if recipe.docker { DOCKER_INDEX } else { INDEX };
    let index = json!({"schemaVersion": 2, "mediaType": index_type, "manifests": entries});
    let children = entries.iter().map(|entry| child(entry, ChildKind::Manifest)).collect();
    Ok((put_blob(store, pin, index_type, index.to_string().into(), children).await?, bare_manifest))
}

/// Puts a manifest whose configuration and layer are in no store.
async fn put_bare_manifest(store: &dyn Blobs, pin: &Pin, seed: &[u8]) -> Result<Descriptor, StoreError> {
    let blob = json!({"mediaType": CONFIG, "digest": Digest::of(seed), "size": 9});
    let document = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": blob, "layers": [blob]});
    put_blob(store, pin, MANIFEST, document.to_string().into(), Vec::new()).await
}

fn child(blob: &Descriptor, kind: ChildKind) -> Child {
    Child { digest: blob.digest, kind }
}

/// Puts any document, a manifest or not, under a name. The store keeps no child of the document.
///
/// # Errors
/// Errors of the store.
pub async fn put_document(store: &dyn ContentStore, name: &str, document: String) -> Result<Descriptor, StoreError> {
    let pin = store.pin(Duration::from_secs(600)).await?;
    let target = put_blob(store, &pin, INDEX, document.into(), Vec::new()).await?;
    store.put_image(&ImageRecord { name: name.into(), target: target.clone() }).await?;
    store.release(pin).await?;
    Ok(target)
}

async fn put_blob(
    store: &dyn Blobs,
    pin: &Pin,
    media_type: &str,
    bytes: Bytes,
    children: Vec<Child>,
) -> Result<Descriptor, StoreError> {
    let (size, metadata) = (bytes.len() as u64, BlobMetadata { source: None, children });
    let digest = write_blob(store, bytes, &metadata, pin).await?;
    Ok(Descriptor { media_type: media_type.into(), digest, size, platform: None, attestation: false })
}

/// Hashes a blob of any size and puts it into the store, unless the store has the blob.
///
/// # Errors
/// Errors of the store.
pub async fn write_blob(
    store: &dyn Blobs,
    bytes: Bytes,
    metadata: &BlobMetadata,
    pin: &Pin,
) -> Result<Digest, StoreError> {
    let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
    let mut hasher = Hasher::default();
    hasher.update(&bytes);
    let proof = hasher.verify(digest, size).map_err(|error| StoreError::Other(error.to_string()))?;
    if size <= MAX_DOCUMENT_BYTES {
        store.put(bytes, proof, metadata, pin).await?;
        return Ok(digest);
    }
    match store.stage(digest, size, pin).await {
        Ok(staged) => {
            staged.write_at(0, &[bytes]).await?;
            staged.commit(proof, metadata).await?;
        }
        Err(StoreError::AlreadyExists(_)) => store.add_metadata(digest, metadata).await?,
        Err(error) => return Err(error),
    }
    Ok(digest)
}

/// A layer: a tar archive with one file of random bytes, which no compressor can shrink.
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
