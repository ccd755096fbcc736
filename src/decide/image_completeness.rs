//! Completeness of an image on this node: only complete images are announced to peers.
//!
//! An image is complete when one platform's manifest is here with its config and every
//! distributable layer. A peer recognizes the platform by the manifest's digest, which is announced
//! like any blob. Not here: reading the documents, and the choice of a peer with another platform.

use std::collections::BTreeSet;
use std::fmt;

use crate::oci::{Digest, Document, MAX_INDEX_DEPTH};

/// The blobs that a document needs. Digests only, because this is kept for every document of a
/// node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DocumentNeeds {
    /// At least one of these manifests or indexes, with its needs.
    AnyManifest(Vec<Digest>),
    /// All of these blobs.
    Blobs {
        /// The config.
        config: Digest,
        /// The distributable layers, each once.
        layers: Vec<Digest>,
    },
    /// The document is not an image.
    NoImage,
}

/// Why an image is not complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MissingContent {
    /// Everything is here except for layers. [`missing_layers_cause`] tells the cause.
    Layers {
        /// Missing layers.
        missing: usize,
        /// All layers.
        of: usize,
        /// The config, which names the chain of unpacked layers.
        config: Digest,
    },
    /// The manifest is here without its config.
    Config,
    /// The index is here without any of its manifests.
    Manifest,
    /// The index or manifest itself is missing, or its bytes do not match its digest.
    Root,
    /// An artifact, or an unreadable document.
    NoImage,
}

impl fmt::Display for MissingContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layers { missing, of, config: _ } => write!(f, "{missing} of {of} layers missing"),
            Self::Config => f.write_str("config missing"),
            Self::Manifest => f.write_str("every manifest of the index missing"),
            Self::Root => f.write_str("index or manifest missing or damaged"),
            Self::NoImage => f.write_str("not a runnable image"),
        }
    }
}

/// Why a node has an image without its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MissingLayersCause {
    /// The runtime discards layers after unpacking (containerd's `discard_unpacked_layers`).
    Discarded,
    /// The snapshotter of this name fetches only what a container reads, and keeps no layers in the
    /// content store.
    Lazy(String),
    /// No known cause: removed by a tool or an incomplete collection, or never fetched.
    Lost,
}

impl fmt::Display for MissingLayersCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Discarded => f.write_str("discarded after unpacking"),
            Self::Lazy(snapshotter) => write!(f, "pulled lazily by the snapshotter {snapshotter}"),
            Self::Lost => f.write_str("lost"),
        }
    }
}

/// Parts of the names of lazy snapshotters: SOCI, eStargz, Nydus, OverlayBD and GKE's image
/// streaming. An operator chooses the name of a proxy plugin; the manuals use these names.
const LAZY: &[&str] = &["soci", "stargz", "nydus", "overlaybd", "gcfs"];

/// Why `missing` of the `of` layers of an image are absent. `snapshotters` have the image unpacked;
/// `discards_layers` is the runtime's setting, if the runtime reports the setting.
pub fn missing_layers_cause(
    missing: usize,
    of: usize,
    snapshotters: &[String],
    discards_layers: Option<bool>,
) -> MissingLayersCause {
    let is_lazy = |name: &&String| LAZY.iter().any(|kind| name.contains(kind));
    match (snapshotters.iter().find(is_lazy), discards_layers) {
        (Some(lazy), _) => MissingLayersCause::Lazy(lazy.clone()),
        // No runtime discards a layer that is not unpacked.
        _ if snapshotters.is_empty() => MissingLayersCause::Lost,
        (None, Some(true)) => MissingLayersCause::Discarded,
        // containerd 2 does not report the setting, and discards all layers of an image together.
        (None, None) if missing == of => MissingLayersCause::Discarded,
        (None, Some(false) | None) => MissingLayersCause::Lost,
    }
}

impl DocumentNeeds {
    /// Attestations are not images, and foreign layers come from elsewhere.
    pub fn of(document: &Document) -> Self {
        match document {
            Document::Index(index) => {
                let manifests = index.manifests.iter().filter(|entry| !entry.attestation);
                Self::AnyManifest(manifests.map(|entry| entry.digest).collect())
            }
            Document::Manifest(manifest) if manifest.is_artifact() => Self::NoImage,
            Document::Manifest(manifest) => {
                let layers = manifest.layers.iter().filter(|layer| !layer.is_foreign());
                let layers: BTreeSet<_> = layers.map(|layer| layer.digest).collect();
                Self::Blobs { config: manifest.config.digest, layers: layers.into_iter().collect() }
            }
        }
    }
}

/// The missing part of an image; `None` for a complete image. `needs` returns the documents that
/// are here and were read.
///
/// containerd follows an index inside an index; the depth here is [`MAX_INDEX_DEPTH`]. Each level
/// is a set of digests, so the known documents times the depth bound the work, even where an index
/// names another one many times.
pub fn missing_content<'a>(
    image: Digest,
    needs: impl Fn(Digest) -> Option<&'a DocumentNeeds>,
    is_present: impl Fn(Digest) -> bool,
) -> Option<MissingContent> {
    if needs(image).is_none() {
        return Some(MissingContent::Root);
    }
    let mut missing_of = Vec::new();
    let mut level = BTreeSet::from([image]);
    for depth in 0..=MAX_INDEX_DEPTH {
        let mut nested = BTreeSet::new();
        for needs in level.iter().filter_map(|document| needs(*document)) {
            match needs {
                DocumentNeeds::AnyManifest(_) if depth == MAX_INDEX_DEPTH => {
                    missing_of.push(Some(MissingContent::NoImage))
                }
                DocumentNeeds::AnyManifest(children) => nested.extend(children.iter().copied()),
                DocumentNeeds::NoImage => missing_of.push(Some(MissingContent::NoImage)),
                DocumentNeeds::Blobs { config, layers } => missing_of.push(missing_blobs(*config, layers, &is_present)),
            }
        }
        level = nested;
    }
    // `None` sorts first, then the least missing part.
    missing_of.into_iter().min().unwrap_or(Some(MissingContent::Manifest))
}

fn missing_blobs(config: Digest, layers: &[Digest], is_present: impl Fn(Digest) -> bool) -> Option<MissingContent> {
    if !is_present(config) {
        return Some(MissingContent::Config);
    }
    let missing = layers.iter().filter(|layer| !is_present(**layer)).count();
    (missing > 0).then_some(MissingContent::Layers { missing, of: layers.len(), config })
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use serde_json::{Value, json};

    use super::*;

    const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn blob(name: &str, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": digest(name), "size": 1})
    }

    fn manifest(config: &str, layers: &[(&str, &str)]) -> Value {
        let layers: Vec<_> = layers.iter().map(|(name, media_type)| blob(name, media_type)).collect();
        json!({"schemaVersion": 2, "config": blob("config", config), "layers": layers})
    }

    fn index(manifests: &[&str]) -> Value {
        let mut entries: Vec<_> = manifests.iter().map(|name| blob(name, "m")).collect();
        let mut attestation = blob("attestation", "m");
        attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
        entries.push(attestation);
        json!({"schemaVersion": 2, "manifests": entries})
    }

    /// The missing part of "root" for these documents and blobs.
    fn missing_of(documents: &[(&str, Value)], blobs: &[&str]) -> Option<MissingContent> {
        let parse = |json: &Value| DocumentNeeds::of(&Document::parse(json.to_string().as_bytes()).unwrap());
        let known: HashMap<_, _> = documents.iter().map(|(name, json)| (digest(name), parse(json))).collect();
        let present: HashSet<_> = blobs.iter().map(|name| digest(name)).chain(known.keys().copied()).collect();
        missing_content(digest("root"), |document| known.get(&document), |blob| present.contains(&blob))
    }

    fn layers(missing: usize, of: usize) -> MissingContent {
        MissingContent::Layers { missing, of, config: digest("config") }
    }

    #[test]
    fn the_cause_of_missing_layers_is_read_from_the_runtime() {
        let (lazy, lost) = (|name: &str| MissingLayersCause::Lazy(name.into()), MissingLayersCause::Lost);
        for (what, missing, snapshotters, discards, expected) in [
            ("containerd 1 discards layers", 1, &["overlayfs"][..], Some(true), MissingLayersCause::Discarded),
            ("containerd 1 keeps layers", 3, &["overlayfs"], Some(false), lost.clone()),
            ("containerd 2, all are gone", 3, &["overlayfs"], None, MissingLayersCause::Discarded),
            ("containerd 2, some are gone", 2, &["overlayfs"], None, lost.clone()),
            ("not unpacked", 3, &[], None, lost.clone()),
            ("not unpacked by one that discards", 3, &[], Some(true), lost),
            ("stargz", 3, &["stargz"], Some(false), lazy("stargz")),
            ("SOCI, under a name of its own", 3, &["overlayfs", "soci-v2"], Some(true), lazy("soci-v2")),
            ("Nydus", 3, &["nydus"], None, lazy("nydus")),
        ] {
            let snapshotters: Vec<_> = snapshotters.iter().map(ToString::to_string).collect();
            assert_eq!(missing_layers_cause(missing, 3, &snapshotters, discards), expected, "{what}");
        }
    }

    #[test]
    fn a_manifest_is_complete_with_its_config_and_every_distributable_layer() {
        let of_manifest =
            |layers: &[(&str, &str)], blobs: &[&str]| missing_of(&[("root", manifest(CONFIG, layers))], blobs);
        let (a, b) = (("a", LAYER), ("b", LAYER));
        for (what, layers, blobs, expected) in [
            ("everything", &[a, b][..], &["config", "a", "b"][..], None),
            ("a layer is missing", &[a, b], &["config", "a"], Some(layers(1, 2))),
            ("all layers are missing", &[a, b], &["config"], Some(layers(2, 2))),
            ("the config is missing", &[a], &["a"], Some(MissingContent::Config)),
            ("one layer twice", &[a, a], &["config", "a"], None),
            ("one layer twice, missing", &[a, a], &["config"], Some(layers(1, 1))),
            ("a foreign layer", &[("windows", FOREIGN), a], &["config", "a"], None),
            ("no layers at all", &[], &["config"], None),
        ] {
            assert_eq!(of_manifest(layers, blobs), expected, "{what}");
        }
    }

    #[test]
    fn an_index_is_complete_with_any_complete_manifest() {
        let (arm, amd) = (manifest(CONFIG, &[("a", LAYER)]), manifest(CONFIG, &[("b", LAYER)]));
        let index_document = || ("root", index(&["amd", "arm"]));
        for (what, documents, blobs, expected) in [
            ("one of two", vec![index_document(), ("arm", arm.clone())], &["config", "a"][..], None),
            ("the other", vec![index_document(), ("amd", amd.clone())], &["config", "b"], None),
            (
                "both, one whole",
                vec![index_document(), ("arm", arm.clone()), ("amd", amd.clone())],
                &["config", "b"],
                None,
            ),
            ("the layers are gone", vec![index_document(), ("arm", arm)], &["config"], Some(layers(1, 1))),
            ("no manifest", vec![index_document()], &["config", "a", "b"], Some(MissingContent::Manifest)),
            (
                "only the attestation",
                vec![index_document(), ("attestation", amd)],
                &["config", "b"],
                Some(MissingContent::Manifest),
            ),
            ("an empty index", vec![("root", index(&[]))], &[], Some(MissingContent::Manifest)),
        ] {
            assert_eq!(missing_of(&documents, blobs), expected, "{what}");
        }
    }

    #[test]
    fn an_index_inside_an_index_is_followed_to_its_manifest() {
        let (arm, amd) = (manifest(CONFIG, &[("a", LAYER)]), manifest(CONFIG, &[("b", LAYER)]));
        let documents = || vec![("root", index(&["amds", "arms"])), ("amds", index(&["amd"])), ("amd", amd.clone())];
        assert_eq!(missing_of(&documents(), &["config", "b"]), None);
        assert_eq!(missing_of(&documents(), &["config"]), Some(layers(1, 1)));
        assert_eq!(
            missing_of(&documents()[..2], &["config", "b"]),
            Some(MissingContent::Manifest),
            "the manifest is missing"
        );
        let both = [documents(), vec![("arms", index(&["arm"])), ("arm", arm)]].concat();
        assert_eq!(missing_of(&both, &["config", "a"]), None, "the second index is complete");
    }

    #[test]
    fn indexes_are_followed_as_deep_as_the_bound_and_no_deeper() {
        let names = ["root", "1", "2", "3", "4"];
        let chain = |indexes: usize| {
            let entries = (1..indexes).map(|depth| (names[depth - 1], index(&[names[depth]])));
            let last = [(names[indexes - 1], index(&["image"])), ("image", manifest(CONFIG, &[]))];
            missing_of(&entries.chain(last).collect::<Vec<_>>(), &["config"])
        };
        assert_eq!(chain(MAX_INDEX_DEPTH), None);
        assert_eq!(chain(MAX_INDEX_DEPTH + 1), Some(MissingContent::NoImage));
    }

    /// Each of 5 levels names 30 indexes of the next: 30^4 ways, 150 documents.
    #[test]
    fn an_index_named_many_times_is_read_once_per_level() {
        let names: Vec<Vec<String>> =
            (0..5).map(|level| (0..30).map(|number| format!("{level}-{number}")).collect()).collect();
        let index_of = |level: usize| index(&names[level].iter().map(String::as_str).collect::<Vec<_>>());
        let mut documents = vec![("root", index_of(0))];
        for level in 1..5 {
            documents.extend(names[level - 1].iter().map(|name| (name.as_str(), index_of(level))));
        }
        let known: HashMap<_, _> = documents
            .iter()
            .map(|(name, json)| {
                (digest(name), DocumentNeeds::of(&Document::parse(json.to_string().as_bytes()).unwrap()))
            })
            .collect();
        let reads = std::cell::Cell::new(0);
        let needs = |document| {
            reads.set(reads.get() + 1);
            known.get(&document)
        };
        assert_eq!(missing_content(digest("root"), needs, |_| true), Some(MissingContent::NoImage));
        assert!(reads.get() < 200, "{} reads", reads.get());
    }

    #[test]
    fn an_artifact_is_no_runnable_image() {
        let chart = manifest("application/vnd.cncf.helm.config.v1+json", &[("a", LAYER)]);
        assert_eq!(missing_of(&[("root", chart)], &["config", "a"]), Some(MissingContent::NoImage));
        assert_eq!(
            missing_of(&[], &["root", "config", "a"]),
            Some(MissingContent::Root),
            "the root document was not read"
        );
    }

    proptest::proptest! {
        #[test]
        fn more_blobs_never_make_an_image_less_complete(
            layers in proptest::collection::vec(0..6_u8, 0..6),
            some in proptest::collection::hash_set(0..6_u8, 0..6),
            more in 0..6_u8,
        ) {
            let names: Vec<_> = (0..6).map(|n| n.to_string()).collect();
            let layers: Vec<_> = layers.iter().map(|&n| (names[usize::from(n)].as_str(), LAYER)).collect();
            let whole = |present: &[&str]| missing_of(&[("root", manifest(CONFIG, &layers))], present).is_none();
            let mut present: Vec<_> = some.iter().map(|&n| names[usize::from(n)].as_str()).chain(["config"]).collect();
            let before = whole(&present);
            present.push(&names[usize::from(more)]);
            proptest::prop_assert!(whole(&present) || !before);
            let needed = layers.iter().all(|(name, _)| present.contains(name));
            proptest::prop_assert_eq!(whole(&present), needed);
        }
    }
}
