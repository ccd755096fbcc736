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
    let json = format!(r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#, descriptor("c", ""), descriptor("l", ""));
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
fn an_index_selects_the_manifest_of_this_platform() {
    let select = |entries: &[(&str, &str)]| index(entries).select(&linux_amd64()).map(|found| found.digest);
    assert_eq!(select(&[("arm", ARM), ("amd", AMD), ("note", ATTESTATION)]), Some(Digest::of(b"amd")));
    assert_eq!(select(&[("arm", ARM), ("note", ATTESTATION)]), None, "only other platforms");
    assert_eq!(select(&[("only", "")]), Some(Digest::of(b"only")), "no platform named at all");
    let digest = |name: &str| Some(Digest::of(name.as_bytes()));
    assert_eq!(select(&[("arm", ARM), ("plain", ""), ("other", "")]), digest("plain"), "the first without a platform");
    assert_eq!(select(&[("plain", ""), ("amd", AMD)]), digest("amd"), "an entry with a platform comes first");
    let unnamed = r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#;
    assert_eq!(select(&[("note", unnamed), ("plain", "")]), digest("note"), "containerd reads no annotation");
    assert_eq!(select(&[]), None);
}

#[test]
fn cri_computes_an_image_size_from_an_entry_with_a_platform() {
    let sized = |entries: &[(&str, &str)]| index(entries).select_for_size(&linux_amd64()).map(|found| found.digest);
    let digest = |name: &str| Some(Digest::of(name.as_bytes()));
    assert_eq!(sized(&[("arm", ARM), ("amd", AMD), ("plain", "")]), digest("amd"));
    assert_eq!(sized(&[("plain", ""), ("arm", ARM), ("note", ATTESTATION)]), digest("arm"), "of another platform");
    assert_eq!(sized(&[("plain", ""), ("other", "")]), digest("plain"));
    assert_eq!(sized(&[]), None);
}

#[test]
fn malformed_documents_are_rejected() {
    let (c, l) = (descriptor("c", ""), descriptor("l", ""));
    for (what, json) in [
        ("not JSON", "<html>".to_owned()),
        ("empty", String::new()),
        ("nothing in it", r#"{"schemaVersion":2}"#.into()),
        ("both", format!(r#"{{"schemaVersion":2,"manifests":[],"config":{c},"layers":[{l}]}}"#)),
        ("schema 3", format!(r#"{{"schemaVersion":3,"config":{c},"layers":[]}}"#)),
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

#[test]
fn a_parse_error_names_the_defect() {
    let config = descriptor("c", "");
    let manifest = |config: &str| format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#);
    for (json, reason) in [
        (manifest(&config.replace("sha256", "sha512")), "algorithm \"sha512\" is not supported"),
        (manifest(&config.replace("sha256", "blake3")), "algorithm \"blake3\" is not supported"),
        (manifest(&config.replace(":7", ":-7")), "size -7 of sha256:"),
        (manifest(&config.replace(":7", ":9223372036854775808")), "9223372036854775808"),
        (manifest(&config.replace(":7", ":7.5")), "floating point"),
        (manifest(&config.replace(":7", ":1e3")), "floating point"),
        (manifest(&config.replace(":7", ":\"7\"")), "string \"7\""),
        (r#"{"schemaVersion":1,"name":"a","tag":"b","fsLayers":[],"history":[],"signatures":[]}"#.into(), "schema 1"),
        (
            format!(r#"{{"schemaVersion":2,"mediaType":"{}","config":{config},"layers":[]}}"#, INDEXES[0]),
            "an image manifest is called \"application/vnd.oci.image.index.v1+json\"",
        ),
        (
            format!(r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[]}}"#, MANIFESTS[1]),
            "an image index is called \"application/vnd.docker.distribution.manifest.v2+json\"",
        ),
        (r#"{"schemaVersion":2,"mediaType":"text/html","manifests":[]}"#.into(), "called \"text/html\""),
    ] {
        let message = Document::parse(json.as_bytes()).expect_err(&json).to_string();
        assert!(message.contains(reason), "{message:?} does not say {reason:?}");
    }
}

#[test]
fn a_descriptor_s_media_type_must_match_the_document() {
    let index = Document::parse(br#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
    assert!(index.check_media_type(INDEXES[0]).is_ok() && index.check_media_type(INDEXES[1]).is_ok());
    assert!(index.check_media_type(MANIFESTS[0]).is_err() && index.check_media_type("").is_err());
}

#[test]
fn an_artifact_is_not_runnable_and_the_error_names_the_type() {
    let runs = |config_type: &str, artifact_type: &str| {
        let config = descriptor("c", "").replace(r#""m""#, &format!("{config_type:?}"));
        let json = format!(r#"{{"schemaVersion":2{artifact_type},"config":{config},"layers":[]}}"#);
        Document::parse(json.as_bytes()).unwrap().check_runnable().map_err(|error| error.to_string())
    };
    assert_eq!(runs(CONFIGS[0], ""), Ok(()));
    assert_eq!(runs(CONFIGS[1], ""), Ok(()));
    let signature = runs("application/vnd.oci.empty.v1+json", r#","artifactType":"application/vnd.example.sig""#);
    assert_eq!(
        signature.unwrap_err(),
        "an artifact of type \"application/vnd.example.sig\", not an image that can run"
    );
    assert!(runs("application/vnd.cncf.helm.config.v1+json", "").unwrap_err().contains("helm"));
    assert_eq!(runs(CONFIGS[0], r#","artifactType":"application/x""#), Ok(()), "the configuration is an image's");
}

#[test]
fn a_manifest_may_list_a_layer_twice() {
    let layer = descriptor("l", "");
    let json = format!(r#"{{"schemaVersion":2,"config":{},"layers":[{layer},{layer}]}}"#, descriptor("c", ""));
    let Document::Manifest(manifest) = Document::parse(json.as_bytes()).unwrap() else { panic!("a manifest") };
    assert_eq!(manifest.layers.len(), 2);
    assert_eq!(manifest.layers[0], manifest.layers[1]);
}

proptest::proptest! {
    #[test]
    fn a_serialized_manifest_parses_to_itself(
        names in proptest::collection::vec("[a-z]{0,3}", 0..8),
        sizes in proptest::collection::vec(0..=i64::MAX.cast_unsigned(), 8),
        foreign in proptest::bool::ANY,
    ) {
        let layers: Vec<_> = names.iter().zip(&sizes).map(|(name, &size)| Descriptor {
            media_type: if foreign { "application/vnd.oci.image.layer.nondistributable.v1.tar".into() } else { name.clone() },
            digest: Digest::of(name.as_bytes()),
            size,
            platform: None,
            attestation: false,
        }).collect();
        let json = serde_json::json!({"schemaVersion": 2, "config": layers.first(), "layers": layers}).to_string();
        let read = Document::parse(json.as_bytes());
        match layers.first() {
            None => proptest::prop_assert!(read.is_err(), "a manifest has a configuration"),
            Some(config) => {
                let expected = Manifest {
                    media_type: MANIFESTS[0].into(), artifact_type: None, config: config.clone(), layers,
                };
                proptest::prop_assert_eq!(read.unwrap(), Document::Manifest(expected));
            }
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = Document::parse(&bytes);
    }

    #[test]
    fn a_truncated_document_never_gains_children(cut in 0..400_usize, length in 1..40_usize) {
        let json = format!(r#"{{"schemaVersion":2,"manifests":[{},{}]}}"#, descriptor("a", AMD), descriptor("b", ATTESTATION));
        let (begin, end) = (cut.min(json.len()), (cut + length).min(json.len()));
        let bytes = [&json.as_bytes()[..begin], &json.as_bytes()[end..]].concat();
        if let Ok(document) = Document::parse(&bytes) {
            proptest::prop_assert!(document.children().count() <= 2);
        }
    }
}
