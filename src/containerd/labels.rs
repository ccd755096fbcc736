//! Metadata of a blob as containerd labels.

use std::collections::{BTreeSet, HashMap};

use crate::oci::Repository;
use crate::ports::{BlobMetadata, ChildKind, Origin};

/// Prefix of labels that containerd's collector follows (`gc.ref.content`, then nothing, `.` or
/// `/`).
const GC_REF_CONTENT: &str = "containerd.io/gc.ref.content";
/// Prefix, followed by the registry. The value lists repositories, sorted and separated by commas
/// (containerd: `appendDistributionSourceLabel`). containerd's own pull drops the registry's port,
/// so the label is a hint and no permission: content of `10.0.0.1:6401` is no content of
/// `10.0.0.1`.
const SOURCE: &str = "containerd.io/distribution.source.";
/// The same, written only by this program, with the registry as in the reference.
const OWN_SOURCE: &str = "lighterman.dev/source.";
/// Limit of a label's key and value together, in bytes (containerd: `labels.Validate`).
const MAX_LABEL: usize = 4096;

/// Prefix, followed by the snapshotter and perhaps `/` and more. The value is the name of a
/// snapshot that the collector keeps.
pub(super) const GC_REF_SNAPSHOT: &str = "containerd.io/gc.ref.snapshot.";

/// Repositories that this program recorded, in ascending order. Skips paths that no reference can
/// name: no request names them either. An image that containerd pulled has a record with its full
/// name.
pub(super) fn sources(labels: &HashMap<String, String>) -> Vec<Repository> {
    let of_registry = labels.iter().filter_map(|(key, paths)| Some((key.strip_prefix(OWN_SOURCE)?, paths)));
    let named = of_registry
        .flat_map(|(registry, paths)| paths.split(',').filter_map(move |path| Repository::exact(registry, path)));
    named.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Whether the labels name content that the collector keeps.
pub(super) fn has_children(labels: &HashMap<String, String>) -> bool {
    labels.keys().any(|key| key.starts_with(GC_REF_CONTENT))
}

/// Repositories that containerd's own pull recorded, without the registry's port.
pub(super) fn origins(labels: &HashMap<String, String>) -> Vec<Origin> {
    let of_registry = labels.iter().filter_map(|(key, paths)| Some((key.strip_prefix(SOURCE)?, paths)));
    of_registry.flat_map(|(registry, paths)| paths.split(',').map(move |path| Origin::new(registry, path))).collect()
}

/// Whether a manifest's labels name layers: as `l.N`, or as a number above the configuration's 0,
/// which containerd wrote before 1.3.
pub(super) fn has_layers(labels: &HashMap<String, String>) -> bool {
    let is_layer = |name: &str| name.starts_with("l.") || name.parse::<u32>().is_ok_and(|number| number > 0);
    labels
        .keys()
        .any(|key| key.strip_prefix(GC_REF_CONTENT).and_then(|rest| rest.strip_prefix('.')).is_some_and(is_layer))
}

/// Resources that the labels keep alive: containerd's resource type, and the ID.
pub(super) fn gc_references(labels: &HashMap<String, String>) -> Vec<(String, String)> {
    let references = labels.iter().filter_map(|(key, id)| {
        if key.starts_with(GC_REF_CONTENT) {
            return Some(("content".to_owned(), id.clone()));
        }
        let snapshotter = key.strip_prefix(GC_REF_SNAPSHOT)?.split('/').next()?;
        Some((format!("snapshots/{snapshotter}"), id.clone()))
    });
    references.collect()
}

/// Labels to add to `existing` for this metadata. An existing reference is never overwritten, and a
/// source label only gains repositories.
pub(super) fn missing_labels(existing: &HashMap<String, String>, metadata: &BlobMetadata) -> HashMap<String, String> {
    let mut added = HashMap::new();
    let mut referenced: BTreeSet<String> =
        existing.iter().filter(|(key, _)| key.starts_with(GC_REF_CONTENT)).map(|(_, digest)| digest.clone()).collect();
    let mut ordinals: HashMap<&str, usize> = HashMap::new();
    for child in &metadata.children {
        let prefix = match child.kind {
            ChildKind::Manifest => "m.",
            ChildKind::Layer => "l.",
            ChildKind::Config => "config",
        };
        // The number from containerd's own pull: the child's place among its kind. A taken number
        // names another child.
        let ordinal = ordinals.entry(prefix).or_insert(0);
        let digest = child.digest.to_string();
        if referenced.insert(digest.clone()) {
            let is_taken = |key: &String| existing.contains_key(key) || added.contains_key(key);
            let key = (*ordinal..).map(|number| gc_ref_key(prefix, number)).find(|key| !is_taken(key));
            added.extend(key.map(|key| (key, digest)));
        }
        *ordinal += 1;
    }
    if let Some(source) = &metadata.source {
        added.extend([SOURCE, OWN_SOURCE].into_iter().filter_map(|prefix| source_label(prefix, existing, source)));
    }
    added
}

fn gc_ref_key(prefix: &str, number: usize) -> String {
    match (prefix, number) {
        ("config", 0) => format!("{GC_REF_CONTENT}.config"),
        ("config", _) => format!("{GC_REF_CONTENT}.config.{number}"),
        _ => format!("{GC_REF_CONTENT}.{prefix}{number}"),
    }
}

/// `None` when nothing changes, or when the label would become too long: the older paths then stay.
fn source_label(prefix: &str, existing: &HashMap<String, String>, source: &Repository) -> Option<(String, String)> {
    let key = format!("{prefix}{}", source.registry);
    let before = existing.get(&key).map(String::as_str).unwrap_or_default();
    let mut paths: BTreeSet<&str> = before.split(',').filter(|path| !path.is_empty()).collect();
    if !paths.insert(&source.path) {
        return None;
    }
    let after = paths.into_iter().collect::<Vec<_>>().join(",");
    (key.len() + after.len() <= MAX_LABEL).then_some((key, after))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;
    use crate::ports::Child;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn metadata(children: &[(&str, ChildKind)]) -> BlobMetadata {
        let child = |&(name, kind): &(&str, ChildKind)| Child { digest: digest(name), kind };
        BlobMetadata { source: None, children: children.iter().map(child).collect() }
    }

    fn metadata_from(path: &str) -> BlobMetadata {
        let source = Repository { registry: "10.0.0.1:5000".into(), path: path.into() };
        BlobMetadata { source: Some(source), children: Vec::new() }
    }

    fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// Labels with the collector's prefix, whose values are the digests of these names.
    fn references(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        let pair = |&(key, name): &(&str, &str)| (format!("{GC_REF_CONTENT}.{key}"), digest(name).to_string());
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn children_are_numbered_as_containerd_s_own_pull_numbers_them() {
        use ChildKind::{Config, Layer, Manifest};
        let manifest = metadata(&[("c", Config), ("a", Layer), ("b", Layer)]);
        assert_eq!(missing_labels(&labels(&[]), &manifest), references(&[("config", "c"), ("l.0", "a"), ("l.1", "b")]));
        let index = metadata(&[("x", Manifest), ("y", Manifest)]);
        assert_eq!(missing_labels(&labels(&[]), &index), references(&[("m.0", "x"), ("m.1", "y")]));
    }

    #[test]
    fn existing_labels_are_not_written_again() {
        let twice = metadata(&[("a", ChildKind::Layer), ("a", ChildKind::Layer), ("b", ChildKind::Layer)]);
        assert_eq!(
            missing_labels(&labels(&[]), &twice),
            references(&[("l.0", "a"), ("l.2", "b")]),
            "a manifest lists one layer twice"
        );
        let existing = references(&[("l.7", "a"), ("l.8", "b")]);
        assert_eq!(missing_labels(&existing, &twice), labels(&[]));
    }

    #[test]
    fn an_existing_label_is_never_overwritten() {
        let existing = references(&[("l.0", "theirs"), ("l.1", "too"), ("config", "other")]);
        let ours = metadata(&[("c", ChildKind::Config), ("a", ChildKind::Layer), ("b", ChildKind::Layer)]);
        assert_eq!(missing_labels(&existing, &ours), references(&[("config.1", "c"), ("l.2", "a"), ("l.3", "b")]));
    }

    #[test]
    fn a_source_is_appended_to_the_label_of_its_registry() {
        let (key, own) = ("containerd.io/distribution.source.10.0.0.1:5000", "lighterman.dev/source.10.0.0.1:5000");
        let app = "team/app";
        assert_eq!(missing_labels(&labels(&[]), &metadata_from(app)), labels(&[(key, app), (own, app)]));
        assert_eq!(
            missing_labels(&labels(&[(key, "x,b")]), &metadata_from(app)),
            labels(&[(key, "b,team/app,x"), (own, app)])
        );
        assert_eq!(missing_labels(&labels(&[(key, "b,team/app"), (own, app)]), &metadata_from(app)), labels(&[]));
    }

    #[test]
    fn sources_are_parsed_and_malformed_ones_are_skipped() {
        let labels = labels(&[
            ("lighterman.dev/source.docker.io", "library/nginx,team/app"),
            ("lighterman.dev/source.10.0.0.1:5000", "team/app,,UPPER,team/app"),
            ("lighterman.dev/source.nodomain", "team/app"),
            ("containerd.io/distribution.source.10.0.0.1", "pulled/from-another-port"),
            ("containerd.io/gc.ref.content.l.0", "sha256:00"),
        ]);
        let found: Vec<_> = sources(&labels).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.1:5000/team/app", "docker.io/library/nginx", "docker.io/team/app"]);
    }

    #[test]
    fn gc_references_name_content_and_snapshots() {
        let labels = labels(&[
            ("containerd.io/gc.ref.content.config", "sha256:aa"),
            ("containerd.io/gc.ref.snapshot.overlayfs", "sha256:bb"),
            ("containerd.io/gc.ref.snapshot.native/x", "sha256:cc"),
            ("containerd.io/distribution.source.docker.io", "library/nginx"),
        ]);
        let mut found = gc_references(&labels);
        found.sort();
        let expected =
            [("content", "sha256:aa"), ("snapshots/native", "sha256:cc"), ("snapshots/overlayfs", "sha256:bb")];
        assert_eq!(found, expected.map(|(kind, id)| (kind.to_owned(), id.to_owned())));
    }

    #[test]
    fn labels_left_after_discarding_name_no_layer() {
        let discarded = references(&[("config", "c")]);
        assert!(has_children(&discarded) && !has_layers(&discarded));
        assert!(!has_layers(&references(&[("0", "c"), ("m.0", "m")])));
        assert!(has_layers(&references(&[("config", "c"), ("l.0", "a")])));
        assert!(has_layers(&references(&[("0", "c"), ("1", "a")])));
    }

    #[test]
    fn a_source_beyond_the_label_size_limit_is_dropped() {
        let keys = ["containerd.io/distribution.source.10.0.0.1:5000", "lighterman.dev/source.10.0.0.1:5000"];
        let full: HashMap<_, _> =
            keys.map(|key| (key.to_owned(), "p".repeat(MAX_LABEL - key.len() - 4))).into_iter().collect();
        assert_eq!(missing_labels(&full, &metadata_from("team/app")), labels(&[]));
    }
}
