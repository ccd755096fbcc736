//! Lines of production code by capability. Every module belongs to one capability, so that the
//! growth of a capability shows. `make code-lines` prints the figures.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Capabilities with the modules of each, below `src`. The longest matching path decides.
const CAPABILITIES: [(&str, &[&str]); 12] = [
    (
        "mesh",
        &[
            "mesh",
            "wire",
            "addresses",
            "model/gossip",
            "model/inventory",
            "model/mesh_status",
            "model/peer",
            "decide/gossip",
            "decide/inventory",
            "decide/peer_faults",
            "decide/dns_schedule",
            "decide/subnet",
            "decide/udp_path",
            "decide/clock_skew",
            "decide/shared_key",
            "agent/membership",
            "agent/peers",
        ],
    ),
    (
        "swarm",
        &[
            "transfer",
            "oci/hash_chain",
            "oci/piece",
            "model/bits",
            "model/pieces",
            "ports/pieces",
            "ports/fetcher",
            "decide/piece_picker",
            "decide/upload_slots",
            "decide/connection_limit",
            "decide/byte_bucket",
            "decide/transport_choice",
            "agent/recovery/swarm",
            "agent/recovery/downloads",
            "agent/recovery/blob_fetcher",
            "agent/recovery/mesh_range_fetcher",
            "agent/recovery/peer_fetcher",
        ],
    ),
    (
        "containerd",
        &[
            "containerd",
            "files",
            "ports/content_store",
            "ports/unpacker",
            "ports/layer_leases",
            "ports/connections",
            "ports/own_image",
            "decide/layer_stack",
            "decide/image_completeness",
            "decide/disk",
            "decide/pin_term",
            "decide/retain",
            "decide/fill",
            "decide/layer_notice",
            "decide/own_image",
            "decide/stalled_connections",
            "agent/recovery/layer_unpacker",
            "agent/recovery/disk_space",
            "agent/retention",
        ],
    ),
    (
        "pods",
        &[
            "cluster",
            "api_server",
            "webhook",
            "decide",
            "model/pod",
            "model/lease",
            "model/outage",
            "ports/cluster",
            "ports/claims",
            "ports/notifier",
            "agent/pods",
            "agent/recovery",
        ],
    ),
    (
        "admission",
        &["admission", "credential", "identity", "ports/admission", "decide/review_budget", "decide/pod_keys"],
    ),
    ("registry", &["registry", "http", "ports/registry"]),
    ("operator", &["cli", "admin", "control", "config", "metrics", "main", "ports/control", "agent/operator"]),
    ("demo", &["cli/demo", "layout", "simulated"]),
    ("testing", &["testing"]),
    ("agent", &["agent", "lib"]),
    ("oci", &["oci", "model", "ports"]),
    ("util", &["util"]),
];

/// The capability of a source file, by its path below `src` without `.rs`.
fn capability(module: &str) -> Option<&'static str> {
    let paths = CAPABILITIES.iter().flat_map(|(name, paths)| paths.iter().map(move |path| (*name, *path)));
    let matching = paths.filter(|(_, path)| module.starts_with(path));
    matching.max_by_key(|(_, path)| path.len()).map(|(name, _)| name)
}

/// Lines of production code: no tests, comments and blank lines.
fn code_lines(text: &str) -> usize {
    let production = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    production.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")).count()
}

fn add_folder(folder: &Path, root: &Path, lines: &mut BTreeMap<&'static str, usize>) {
    for entry in fs::read_dir(folder).expect("a folder of source files") {
        let path = entry.expect("a folder's entry").path();
        if path.file_stem().is_some_and(|name| name == "tests") {
            continue;
        }
        if path.is_dir() {
            add_folder(&path, root, lines);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let module = path.strip_prefix(root).expect("below the root").with_extension("");
            let module = module.to_string_lossy();
            let capability = capability(&module).unwrap_or_else(|| panic!("{module} belongs to no capability"));
            let text = fs::read_to_string(&path).expect("a source file");
            *lines.entry(capability).or_default() += code_lines(&text);
        }
    }
}

#[test]
fn every_module_belongs_to_a_capability() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let mut lines = BTreeMap::new();
    add_folder(root, root, &mut lines);
    for (capability, lines) in &lines {
        println!("figure code_lines_{capability} {lines}");
    }
    assert_eq!(lines.len(), CAPABILITIES.len(), "every capability has code");
}

#[test]
fn the_longest_path_decides_and_comments_do_not_count() {
    assert_eq!(capability("admission/token/published_keys"), Some("admission"));
    assert_eq!(capability("cluster/events"), Some("pods"));
    assert_eq!(capability("unknown"), None);
    assert_eq!(code_lines("//! a\n\nfn a() {\n    // b\n    b(); // c\n}\n#[cfg(test)]\nmod tests {\n}\n"), 3);
}
