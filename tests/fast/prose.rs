//! The limits of the project's prose: comments, documents, and texts that a program prints.
//!
//! A sentence names a thing and says what the thing does. The count knows five ways in which a
//! sentence avoids that, and each has a limit here. CONTRIBUTING.md gives the rules with examples.
//! `make prose` prints the figures and every sentence that counts.

mod passages;
mod sentences;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use passages::Passage;
use sentences::Fault;

/// The widest comment, in columns. Two such columns fit beside each other on a screen.
const WIDTH: usize = 100;

/// Limits in percent of all sentences. quinn-proto, iroh-blobs and linkerd2-proxy have 0 to 0.1,
/// 1 to 2, and 0 by the same count.
const LIMITS: [(Fault, f64); 3] = [(Fault::Clause, 0.5), (Fault::Pronoun, 3.0), (Fault::Person, 0.3)];

/// Uses of *it* and *its* per 1000 words. The same three projects have 8 to 10.
const IT_PER_1000: f64 = 14.0;

/// Folders and files that are read, below the root of the project.
const READ: [&str; 13] = [
    "src",
    "tests",
    "benches",
    "fuzz",
    "docs",
    "charts",
    "scripts",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
    "Cargo.toml",
    ".ci",
];

/// What a set of passages came to.
#[derive(Default)]
struct Count {
    sentences: usize,
    words: usize,
    its: usize,
    faults: Vec<(Fault, String)>,
    wide_lines: Vec<String>,
}

impl Count {
    fn read(files: &[PathBuf]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut count = Self::default();
        for file in files {
            let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            let name = file.strip_prefix(root).unwrap_or(file).display().to_string();
            for passage in passages::of(file, &text) {
                count.add(&name, &passage);
            }
        }
        count
    }

    fn add(&mut self, file: &str, passage: &Passage) {
        let Passage { line, ref text, ref wide_lines } = *passage;
        self.wide_lines.extend(wide_lines.iter().map(|line| format!("{file}:{line}")));
        for sentence in sentences::of(text) {
            self.sentences += 1;
            self.words += sentence.split_whitespace().count();
            self.its += sentences::its(&sentence);
            let faults = sentences::faults(&sentence);
            self.faults.extend(faults.into_iter().map(|fault| (fault, format!("{file}:{line}: {sentence}"))));
        }
    }

    fn percent(&self, fault: Fault) -> f64 {
        let found = self.faults.iter().filter(|(found, _)| *found == fault).count();
        100.0 * found as f64 / self.sentences.max(1) as f64
    }

    fn it_per_1000(&self) -> f64 {
        1000.0 * self.its as f64 / self.words.max(1) as f64
    }

    /// The limits that are exceeded.
    fn exceeded(&self) -> Vec<String> {
        let mut exceeded: Vec<_> = LIMITS
            .into_iter()
            .filter(|(fault, limit)| self.percent(*fault) > *limit)
            .map(|(fault, limit)| format!("{fault:?}: {:.2} %, at most {limit} %", self.percent(fault)))
            .collect();
        if self.it_per_1000() > IT_PER_1000 {
            exceeded.push(format!("it: {:.1} per 1000 words, at most {IT_PER_1000}", self.it_per_1000()));
        }
        if !self.wide_lines.is_empty() {
            exceeded.push(format!("{} comment lines are wider than {WIDTH} columns", self.wide_lines.len()));
        }
        exceeded
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "figure prose_clause_pct {:.2}", self.percent(Fault::Clause))?;
        writeln!(f, "figure prose_pronoun_pct {:.2}", self.percent(Fault::Pronoun))?;
        writeln!(f, "figure prose_persons_pct {:.2}", self.percent(Fault::Person))?;
        writeln!(f, "figure prose_it_per_1000 {:.1}", self.it_per_1000())?;
        writeln!(f, "figure comment_lines_over_{WIDTH} {}", self.wide_lines.len())?;
        write!(f, "of {} sentences and {} words", self.sentences, self.words)
    }
}

fn files() -> Vec<PathBuf> {
    fn walk(path: PathBuf, files: &mut Vec<PathBuf>) {
        if path.is_dir() {
            let entries = fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let mut entries: Vec<_> = entries.map(|entry| entry.expect("a folder's entry").path()).collect();
            entries.sort();
            // Build results, and inputs of fuzz targets, are no prose.
            let is_read = |path: &PathBuf| !path.ends_with("target") && !path.ends_with("corpus");
            entries.into_iter().filter(is_read).for_each(|entry| walk(entry, files));
        } else if passages::is_read(&path) {
            files.push(path);
        }
    }
    let mut files = Vec::new();
    let paths = READ.map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join(name));
    paths.into_iter().filter(|path| path.exists()).for_each(|path| walk(path, &mut files));
    assert!(files.len() > 400, "the tree has its files where they are expected");
    files
}

#[test]
fn prose_names_its_things() {
    let count = Count::read(&files());
    println!("{count}");
    // Every sentence that counts, for `make prose`; a test that passes prints nothing.
    count.faults.iter().for_each(|(fault, sentence)| println!("  {fault:?} {sentence}"));
    count.wide_lines.iter().for_each(|line| println!("  wide {line}"));
    let exceeded = count.exceeded();
    assert!(exceeded.is_empty(), "{exceeded:#?}");
}

#[test]
fn a_count_over_any_limit_is_reported() {
    let count = |text: &str, wide_lines: Vec<usize>| {
        let mut count = Count::default();
        count.add("a.rs", &Passage { line: 1, text: text.into(), wide_lines });
        count.exceeded()
    };
    assert!(count("A peer sends the piece. The agent verifies the piece.", Vec::new()).is_empty());
    for text in [
        "Who has the piece sends it to the agent.",
        "They are sent to the agent.",
        "A peer asks somebody for the piece.",
        "The peer sends it when its turn comes.",
    ] {
        assert!(!count(text, Vec::new()).is_empty(), "{text}");
    }
    assert!(!count("", vec![7]).is_empty(), "a wide line counts");
}
