//! No two modules beside each other import each other, directly or through others. A module counts
//! together with its children, so that a folder such as `agent/recovery` is one module of `agent`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The path of a module below the root of its crate.
type Module = Vec<String>;

/// Roots of the crates that are checked.
const ROOTS: [&str; 2] = ["src", "benches/transfer"];

#[test]
fn modules_beside_each_other_import_in_one_direction() {
    for root in ROOTS {
        let mut code = BTreeMap::new();
        read_modules(&Path::new(env!("CARGO_MANIFEST_DIR")).join(root), &mut Vec::new(), &mut code);
        assert!(code.len() > 20, "{root} has its modules where they are expected");
        let cycles = cycles(&imports(&code));
        assert!(cycles.is_empty(), "{root}: {cycles:#?}");
    }
}

/// The production code of every module, without comments.
fn read_modules(folder: &Path, parent: &mut Module, code: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(folder).expect("a folder of source files") {
        let path = entry.expect("a folder's entry").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        if name == "tests" {
            continue;
        }
        parent.push(name);
        if path.is_dir() {
            read_modules(&path, parent, code);
        } else {
            let text = fs::read_to_string(&path).expect("a source file");
            let production = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            let lines = production.lines().filter(|line| !line.trim_start().starts_with("//"));
            code.insert(parent.clone(), lines.collect::<Vec<_>>().join("\n"));
        }
        parent.pop();
    }
}

/// The modules that each module names.
fn imports(code: &BTreeMap<Module, String>) -> BTreeMap<Module, BTreeSet<Module>> {
    // The longest part of a path that is a module: the rest are items.
    let resolve = |path: &Module| (1..=path.len()).rev().map(|n| path[..n].to_vec()).find(|m| code.contains_key(m));
    let of = |module: &Module, text: &str| {
        let named = paths(text, module).into_iter().filter_map(|path| resolve(&path));
        named.filter(|named| named != module).collect()
    };
    code.iter().map(|(module, text)| (module.clone(), of(module, text))).collect()
}

/// Every path in the code that begins with `crate`, `super` or `self`, from the root of the crate.
fn paths(code: &str, module: &Module) -> Vec<Module> {
    let mut paths = Vec::new();
    for (start, base) in
        [("crate::", Vec::new()), ("super::", module[..module.len() - 1].to_vec()), ("self::", module.clone())]
    {
        for (at, _) in code.match_indices(start) {
            let is_inside_path = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            if !is_inside_path {
                expand(&code[at + start.len()..], base.clone(), &mut paths);
            }
        }
    }
    paths
}

/// Reads one path, with the branches of a group such as `a::{b, c::d}`.
fn expand(rest: &str, mut path: Module, paths: &mut Vec<Module>) {
    if let Some(group) = rest.strip_prefix('{') {
        let (mut depth, mut begin) = (0, 0);
        for (at, c) in group.char_indices() {
            match c {
                ',' | '}' if depth == 0 => {
                    expand(group[begin..at].trim_start(), path.clone(), paths);
                    begin = at + 1;
                    if c == '}' {
                        return;
                    }
                }
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
        }
        return;
    }
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    match &rest[..end] {
        "super" => drop(path.pop()),
        "" | "self" => {}
        name => path.push(name.to_owned()),
    }
    match rest[end..].strip_prefix("::") {
        Some(further) => expand(further, path, paths),
        None => paths.push(path),
    }
}

/// Pairs of modules with the same parent that reach each other.
fn cycles(imports: &BTreeMap<Module, BTreeSet<Module>>) -> BTreeSet<String> {
    let parents: BTreeSet<&[String]> = imports.keys().map(|module| &module[..module.len() - 1]).collect();
    let mut cycles = BTreeSet::new();
    for parent in parents {
        let child = |module: &Module| {
            (module.len() > parent.len() && module.starts_with(parent)).then(|| module[parent.len()].clone())
        };
        let mut edges = BTreeMap::<String, BTreeSet<String>>::new();
        for (module, named) in imports {
            let Some(from) = child(module) else { continue };
            let to = named.iter().filter_map(child).filter(|to| *to != from);
            edges.entry(from.clone()).or_default().extend(to);
        }
        for (from, to) in &edges {
            let back = to.iter().filter(|to| reaches(&edges, to, from));
            cycles.extend(back.map(|to| format!("{}: {from} -> {to} -> {from}", parent.join("::"))));
        }
    }
    cycles
}

fn reaches(edges: &BTreeMap<String, BTreeSet<String>>, from: &str, to: &str) -> bool {
    let (mut reached, mut left) = (BTreeSet::from([from]), vec![from]);
    while let Some(module) = left.pop() {
        let next = edges.get(module).into_iter().flatten().map(String::as_str);
        left.extend(next.filter(|next| reached.insert(next)));
    }
    reached.contains(to)
}

#[test]
fn a_cycle_through_three_modules_and_a_cycle_of_folders_are_found() {
    let crate_of = |files: &[(&str, &str)]| {
        let module = |path: &str| path.split('/').map(str::to_owned).collect::<Module>();
        let code = files.iter().map(|(path, code)| (module(path), (*code).to_owned())).collect();
        cycles(&imports(&code)).len()
    };
    assert_eq!(crate_of(&[("a", "use crate::b::B;"), ("b", "use super::{a::A, c};"), ("c", "")]), 2);
    assert_eq!(
        crate_of(&[("a", "use crate::b::B;"), ("b", "use crate::c::{C, D};"), ("c", "self::x(); crate::a::f()")]),
        3
    );
    assert_eq!(
        crate_of(&[
            ("f", ""),
            ("f/a", "use crate::g::b::B;"),
            ("g", ""),
            ("g/b", ""),
            ("g/c", "use super::super::f::a;")
        ]),
        2
    );
    assert_eq!(
        crate_of(&[("f", "use self::a::A;"), ("f/a", "use super::F; use crate::g::G;"), ("g", "")]),
        0,
        "a child uses its parent"
    );
}
