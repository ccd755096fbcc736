//! Manifests and indexes from peers, registries and content stores, and the decisions about them.
#![no_main]

use std::collections::HashSet;

use libfuzzer_sys::fuzz_target;
use lighterman::decide::image_completeness::{DocumentNeeds, missing_content};
use lighterman::decide::plan::plan;
use lighterman::oci::{Descriptor, Digest, Document, Index, MAX_CHILDREN, Manifest, Platform};

fuzz_target!(|bytes: &[u8]| {
    let Ok(document) = Document::parse(bytes) else { return };
    assert!(document.children().count() <= MAX_CHILDREN);
    let needs = DocumentNeeds::of(&document);
    match &document {
        Document::Index(index) => check_index(index),
        Document::Manifest(manifest) => check_manifest(manifest, Digest::of(bytes), &needs),
    }
});

fn check_index(index: &Index) {
    for (architecture, variant) in [("amd64", None), ("arm64", Some("v8")), ("arm", Some("v7")), ("riscv64", None)] {
        let here = Platform { architecture: architecture.into(), os: "linux".into(), variant: variant.map(Into::into) };
        let Some(chosen) = index.select(&here) else { continue };
        assert!(index.manifests.contains(chosen), "the chosen manifest is an entry of the index");
        let offered = chosen.platform.as_ref();
        assert!(offered.is_none_or(|offered| here.preference(offered).is_some()), "{chosen:?} on {here}");
    }
}

fn check_manifest(manifest: &Manifest, root: Digest, needs: &DocumentNeeds) {
    let named = std::iter::once(&manifest.config).chain(&manifest.layers);
    let wanted: HashSet<_> = named.map(|blob| blob.digest).collect();
    // The node has no blob, all blobs, or every other blob.
    for here in [|_: u8| false, |_| true, |byte| byte % 2 == 0] {
        let is_here = |digest: Digest| here(digest.as_bytes()[31]);
        let plan = plan(manifest, is_here);
        let is_whole = missing_content(root, |digest| (digest == root).then_some(needs), is_here).is_none();
        assert!(!is_whole || plan.missing.is_empty(), "a complete image has no missing blob");
        let lacks_nothing = plan.missing.is_empty() && plan.withheld.is_empty() && !manifest.is_artifact();
        assert!(is_whole || !lacks_nothing, "an image without missing blobs is complete");
        let planned: Vec<_> =
            plan.present.iter().chain(&plan.missing).chain(&plan.withheld).map(|blob| blob.digest).collect();
        assert_eq!(planned.len(), wanted.len(), "the plan has every blob once");
        assert!(planned.iter().all(|digest| wanted.contains(digest)));
        let rank = |blob: &Descriptor| (blob.digest != manifest.config.digest, std::cmp::Reverse(blob.size));
        assert!(plan.missing.is_sorted_by_key(rank), "the configuration comes first, then the largest layers");
        assert!(
            plan.missing.iter().all(|blob| blob.size <= plan.missing_bytes()),
            "the sum of sizes does not overflow"
        );
        let allowed = plan.check_size(1 << 30).is_ok();
        assert_eq!(allowed, plan.missing_bytes() <= 1 << 30, "the size limit holds");
    }
    manifest.layers.iter().chain([&manifest.config]).for_each(check_descriptor);
}

/// Descriptors are written again, into image records and into texts for users.
fn check_descriptor(descriptor: &Descriptor) {
    let text = descriptor.digest.to_string();
    assert_eq!(text.parse().as_ref(), Ok(&descriptor.digest));
    assert!(i64::try_from(descriptor.size).is_ok(), "the size fits into an i64");
}
