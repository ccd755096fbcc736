//! Rules that no compiler checks: the floors of `src/lib.rs`, and calls that only one module may
//! make.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn source_files() -> Vec<PathBuf> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").as_path(), &mut files);
    assert!(files.len() > 20, "the folder src has its files in the expected place");
    files
}

/// Module -> floor, 0 at the top, from the table in `src/lib.rs`.
fn floors() -> BTreeMap<String, usize> {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/lib.rs")).unwrap();
    let table = text.split("//! ```text\n").nth(1).expect("a table").split("//! ```").next().unwrap();
    let rows = table.lines().map(|line| line.trim_start_matches("//!").trim()).enumerate();
    let floors: BTreeMap<_, _> =
        rows.flat_map(|(floor, line)| line.split(' ').map(move |module| (module.to_owned(), floor))).collect();
    let declared = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    for module in declared {
        assert!(floors.contains_key(module), "{module} is on no floor of the table in src/lib.rs");
    }
    floors
}

/// Name of the top-level module of a source file.
fn module_of(path: &Path) -> String {
    let relative = path.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap();
    let first = relative.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// The code without tests and comments. Tests may use higher floors, for fakes.
fn production(path: &Path) -> String {
    let in_tests = path.file_name().is_some_and(|name| name == "tests.rs") || path.iter().any(|part| part == "tests");
    if in_tests {
        return String::new();
    }
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Names after `crate::` anywhere, also in groups such as `use crate::{a, b::c}`.
fn used_modules(code: &str) -> Vec<String> {
    let name = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    code.split("crate::")
        .skip(1)
        .flat_map(|rest| match rest.strip_prefix('{') {
            None => vec![name(rest)],
            Some(group) => {
                let mut depth = 0;
                let inner: String = group
                    .chars()
                    .take_while(|c| {
                        depth += i32::from(*c == '{') - i32::from(*c == '}');
                        depth >= 0
                    })
                    .collect();
                let mut depth = 0;
                let parts = inner.split(|c: char| {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    c == ',' && depth == 0
                });
                parts.map(|part| name(part.trim())).filter(|part| !part.is_empty()).collect()
            }
        })
        .collect()
}

#[test]
fn modules_use_only_the_floors_beneath_their_own() {
    let floors = floors();
    let mut wrong = Vec::new();
    for path in source_files() {
        let module = module_of(&path);
        let Some(&floor) = floors.get(&module) else { continue };
        for used in used_modules(&production(&path)) {
            let beneath = floors.get(&used).is_some_and(|&other| other > floor);
            if used != module && !beneath {
                wrong.push(format!("{} uses {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_parser_of_use_lines_reads_groups() {
    assert_eq!(
        used_modules("use crate::{mesh, transfer::{a, b}, oci};\nlet x = crate::wire::encode();"),
        ["mesh", "transfer", "oci", "wire"]
    );
}

#[test]
fn only_wire_encodes_messages_and_only_config_reads_the_environment() {
    for path in source_files() {
        let code = production(&path);
        let module = module_of(&path);
        assert!(module == "wire" || !code.contains("bincode::"), "{} encodes a message", path.display());
        assert!(!code.contains("env::var"), "{} reads the environment", path.display());
    }
}

#[test]
fn decisions_use_no_clock_and_no_runtime() {
    for path in source_files().iter().filter(|path| ["decide", "model", "oci"].contains(&module_of(path).as_str())) {
        let code = production(path);
        for forbidden in
            ["Instant::now", "SystemTime::now", "util::clock", "tokio::", "async fn", "std::fs", "std::net::Tcp"]
        {
            assert!(!code.contains(forbidden), "{} has {forbidden}", path.display());
        }
    }
}

#[test]
fn source_files_stay_below_the_line_limit() {
    let too_long: Vec<_> = source_files()
        .into_iter()
        .map(|path| (fs::read_to_string(&path).unwrap().lines().count(), path))
        .filter(|(lines, _)| *lines > 400)
        .collect();
    assert!(too_long.is_empty(), "files over 400 lines; split each along the noun that has appeared: {too_long:#?}");
}
