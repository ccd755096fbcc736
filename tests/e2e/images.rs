//! Makes images of every shape that registries serve, as OCI layouts for `ctr images import`.
//!
//! All images share a first layer with a shell. Each image has a small layer of its own, so that a
//! recovery has a layer to fetch. `tests/testbed/mkimage.sh` makes the large images.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use lighterman::oci::Digest;
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

use crate::test_bed::TestError;

/// The properties of an image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    /// Docker's media types instead of OCI's.
    pub(crate) docker: bool,
    /// Compression of the image's own layer.
    pub(crate) packing: Packing,
    /// Peculiarity of the image's own layer.
    pub(crate) layer: LayerVariant,
    /// The object that the image's name points to.
    pub(crate) target_kind: TargetKind,
}

/// An OCI image of two layers.
pub(crate) const PLAIN: Recipe =
    Recipe { docker: false, packing: Packing::Gzip, layer: LayerVariant::Ordinary, target_kind: TargetKind::Manifest };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Tar,
    Gzip,
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerVariant {
    Ordinary,
    /// The manifest names the layer twice.
    Twice,
    /// The layer must not be distributed, and is missing.
    Foreign,
    /// The layer is missing, as after unpacking with `discard_unpacked_layers`.
    Discarded,
    /// The layer is half of a gzip file. The digest is that of the half.
    CutShort,
    /// The image has no layers, and lacks the first layer too.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TargetKind {
    Manifest,
    /// An index with a second platform whose content is missing, and an attestation for each
    /// platform.
    Index,
    /// An index with a second platform and that platform's content.
    CompleteIndex,
    /// An index of another platform only, with that platform's content.
    OtherPlatform,
    /// An index whose only entry is an index, as in the images of goauthentik and gitlab-runner.
    Nested,
    /// An index whose only entry has no platform: containerd reads the platform from the config.
    Unnamed,
}

/// An image that was built.
#[derive(Debug)]
pub(crate) struct Image {
    /// The digest that the image's name resolves to.
    pub(crate) digest: String,
    /// Digest of the image's own layer, if the image has layers.
    pub(crate) own_layer: Option<String>,
    pub(crate) config: String,
    /// Descriptor of the image's manifest or index.
    target: Value,
    /// The existing blobs, by digest.
    blobs: BTreeMap<String, Vec<u8>>,
    /// Whether the content of every platform in the index exists.
    every_platform: bool,
}

impl Image {
    /// The image's blobs, by digest.
    pub(crate) fn blobs(&self) -> &BTreeMap<String, Vec<u8>> {
        &self.blobs
    }
}

/// Builds images around one shell.
pub(crate) struct ImageBuilder {
    shell: Vec<u8>,
}

impl ImageBuilder {
    /// Uses this program as `/bin/busybox`.
    pub(crate) fn new(busybox: &Path) -> Result<Self, TestError> {
        let program = std::fs::read(busybox).map_err(|error| format!("{}: {error}", busybox.display()))?;
        Ok(Self { shell: archive("bin/busybox", &program) })
    }

    /// Builds an image. The same seed and recipe give the same image.
    pub(crate) fn build(&self, recipe: Recipe, seed: &str) -> Image {
        let mut making = ImageContent { recipe, blobs: BTreeMap::new() };
        let Manifest { descriptor, own_layer, config } = making.manifest(&self.shell, seed, "amd64", true);
        let target = match recipe.target_kind {
            TargetKind::Manifest => descriptor,
            TargetKind::Index => {
                let other = making.manifest(&self.shell, seed, "arm64", false).descriptor;
                let notes = [&descriptor, &other].map(|about| making.attestation(about));
                making.index(&[&[descriptor, other][..], &notes].concat())
            }
            TargetKind::CompleteIndex => {
                let other = making.manifest(&self.shell, seed, "arm64", true).descriptor;
                making.index(&[descriptor, other])
            }
            TargetKind::OtherPlatform => {
                making.blobs.clear();
                let other = making.manifest(&self.shell, seed, "arm64", true).descriptor;
                making.index(&[other])
            }
            TargetKind::Nested => {
                let inner = making.index(&[descriptor]);
                making.index(&[inner])
            }
            TargetKind::Unnamed => {
                let mut unnamed = descriptor;
                unnamed.as_object_mut().map(|entry| entry.remove("platform"));
                making.index(&[unnamed])
            }
        };
        let digest = text(&target["digest"]);
        let every_platform = !matches!(recipe.target_kind, TargetKind::Manifest | TargetKind::Index);
        Image { digest, own_layer, config, target, blobs: making.blobs, every_platform }
    }
}

struct Manifest {
    descriptor: Value,
    own_layer: Option<String>,
    config: String,
}

struct ImageContent {
    recipe: Recipe,
    blobs: BTreeMap<String, Vec<u8>>,
}

impl ImageContent {
    /// Makes a manifest for this architecture. Without `keep`, the content is dropped again.
    fn manifest(&mut self, shell: &[u8], seed: &str, architecture: &str, keep: bool) -> Manifest {
        let before = self.blobs.clone();
        let mut diffs = Vec::new();
        let mut layers = Vec::new();
        let own = archive(&format!("data/{architecture}"), &random_bytes(&format!("{seed}/{architecture}")));
        let repeats = match self.recipe.layer {
            LayerVariant::None => 0,
            LayerVariant::Twice => 2,
            LayerVariant::Ordinary | LayerVariant::Foreign | LayerVariant::Discarded | LayerVariant::CutShort => 1,
        };
        if repeats > 0 {
            diffs.push(Digest::of(shell).to_string());
            layers.push(self.blob(&self.layer_type(Packing::Gzip, false), gzip(shell)));
        }
        for _ in 0..repeats {
            diffs.push(Digest::of(&own).to_string());
            let packing = self.recipe.packing;
            let mut packed = match packing {
                Packing::Tar => own.clone(),
                Packing::Gzip => gzip(&own),
                Packing::Zstd => zstd(&own),
            };
            if self.recipe.layer == LayerVariant::CutShort {
                packed.truncate(packed.len() / 2);
            }
            layers.push(self.blob(&self.layer_type(packing, self.recipe.layer == LayerVariant::Foreign), packed));
        }
        let own_layer = (repeats > 0).then(|| layers.last().map(|layer| text(&layer["digest"]))).flatten();
        if matches!(self.recipe.layer, LayerVariant::Foreign | LayerVariant::Discarded) {
            self.blobs.remove(own_layer.as_deref().unwrap_or_default());
        }
        let config = json!({
            "architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diffs},
            "config": {"Entrypoint": ["/bin/busybox", "sleep", "99999"], "Labels": {"test": seed}},
        });
        let config = self.json(&self.kind("config.v1+json", "container.image.v1+json"), &config);
        let kind = self.kind("manifest.v1+json", "distribution.manifest.v2+json");
        let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers});
        let mut descriptor = self.json(&kind, &manifest);
        descriptor["platform"] = json!({"architecture": architecture, "os": "linux"});
        if !keep {
            self.blobs = before;
        }
        Manifest { descriptor, own_layer, config: text(&config["digest"]) }
    }

    /// Descriptor of BuildKit's attestation for an image. The index names the attestation, and no
    /// node has the content.
    fn attestation(&self, about: &Value) -> Value {
        let statement = format!("how {} was built", about["digest"]);
        json!({
            "mediaType": self.kind("manifest.v1+json", "distribution.manifest.v2+json"), "size": statement.len(),
            "digest": Digest::of(statement.as_bytes()).to_string(),
            "platform": {"architecture": "unknown", "os": "unknown"},
            "annotations": {
                "vnd.docker.reference.digest": about["digest"], "vnd.docker.reference.type": "attestation-manifest",
            },
        })
    }

    fn index(&mut self, manifests: &[Value]) -> Value {
        let kind = self.kind("index.v1+json", "distribution.manifest.list.v2+json");
        self.json(&kind, &json!({"schemaVersion": 2, "mediaType": kind, "manifests": manifests}))
    }

    fn kind(&self, oci: &str, docker: &str) -> String {
        if self.recipe.docker {
            format!("application/vnd.docker.{docker}")
        } else {
            format!("application/vnd.oci.image.{oci}")
        }
    }

    fn layer_type(&self, packing: Packing, foreign: bool) -> String {
        let (docker, oci) = match packing {
            Packing::Tar => ("", ""),
            Packing::Gzip => (".gzip", "+gzip"),
            // Docker defines no media type for zstd.
            Packing::Zstd => (".zstd", "+zstd"),
        };
        match foreign {
            false => self.kind(&format!("layer.v1.tar{oci}"), &format!("image.rootfs.diff.tar{docker}")),
            true => self.kind(
                &format!("layer.nondistributable.v1.tar{oci}"),
                &format!("image.rootfs.foreign.diff.tar{docker}"),
            ),
        }
    }

    fn json(&mut self, kind: &str, document: &Value) -> Value {
        self.blob(kind, document.to_string().into_bytes())
    }

    fn blob(&mut self, kind: &str, bytes: Vec<u8>) -> Value {
        let digest = Digest::of(&bytes).to_string();
        let descriptor = json!({"mediaType": kind, "digest": digest, "size": bytes.len()});
        self.blobs.insert(digest, bytes);
        descriptor
    }
}

/// Writes images under their names into two layouts. The first has images with content of every
/// platform in the index; `ctr` imports this layout with `--all-platforms`. The second has all
/// other images. Without the option, `ctr` skips the content of other platforms, which these images
/// lack.
pub(crate) fn write_layouts(
    images: &[(String, &Image)],
    folder: &Path,
    stem: &str,
) -> Result<[Option<String>; 2], TestError> {
    let write = |every_platform: bool| -> Result<Option<String>, TestError> {
        let chosen: Vec<_> = images.iter().filter(|(_, image)| image.every_platform == every_platform).collect();
        if chosen.is_empty() {
            return Ok(None);
        }
        let path = folder.join(format!("{stem}-{every_platform}.tar"));
        let manifests: Vec<_> = chosen
            .iter()
            .map(|(name, image)| {
                let mut entry = image.target.clone();
                entry["annotations"] = json!({"io.containerd.image.name": name});
                entry
            })
            .collect();
        let kind = "application/vnd.oci.image.index.v1+json";
        let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": manifests});
        let blobs: BTreeMap<_, _> = chosen.iter().flat_map(|(_, image)| &image.blobs).collect();
        let written = (|| {
            let mut tar = tar::Builder::new(File::create(&path)?);
            append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
            append(&mut tar, "index.json", index.to_string().as_bytes())?;
            for (digest, bytes) in blobs {
                append(&mut tar, &format!("blobs/{}", digest.replace(':', "/")), bytes)?;
            }
            tar.into_inner().map(drop)
        })();
        written.map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Some(path.to_string_lossy().into_owned()))
    };
    Ok([write(true)?, write(false)?])
}

fn append<W: std::io::Write>(tar: &mut tar::Builder<W>, path: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o755);
    tar.append_data(&mut header, path, bytes)
}

/// A layer with one file.
fn archive(path: &str, content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, path, content).expect("memory can be written");
    tar.into_inner().expect("memory can be written")
}

/// Bytes that do not compress.
fn random_bytes(seed: &str) -> Vec<u8> {
    let mut bytes = vec![0; 100_000];
    let mut start = [0; 32];
    start.copy_from_slice(Digest::of(seed.as_bytes()).as_bytes());
    SmallRng::from_seed(start).fill_bytes(&mut bytes);
    bytes
}

/// A gzip file (RFC 1952) of stored blocks (RFC 1951, 3.2.4), so no compressor is needed.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
    let mut chunks = bytes.chunks(0xffff).peekable();
    while let Some(chunk) = chunks.next() {
        let length = chunk.len() as u16;
        out.push(u8::from(chunks.peek().is_none()));
        out.extend(length.to_le_bytes());
        out.extend((!length).to_le_bytes());
        out.extend(chunk);
    }
    out.extend(crc32(bytes).to_le_bytes());
    out.extend((bytes.len() as u32).to_le_bytes());
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// A zstd frame (RFC 8878) of raw blocks, with a window as large as the content.
fn zstd(bytes: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 1 << 17;
    // Frame header: a single segment whose size has four bytes, no checksum.
    let mut out = vec![0x28, 0xb5, 0x2f, 0xfd, 0b1010_0000];
    out.extend((bytes.len() as u32).to_le_bytes());
    let mut chunks = bytes.chunks(BLOCK).peekable();
    while let Some(chunk) = chunks.next() {
        let last = u32::from(chunks.peek().is_none());
        out.extend(&((chunk.len() as u32) << 3 | last).to_le_bytes()[..3]);
        out.extend(chunk);
    }
    out
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
