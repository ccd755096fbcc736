//! The passages of a file that a person reads: comments, texts in string literals, and paragraphs.

use std::path::Path;

use super::WIDTH;

/// A paragraph, a block of comment lines, or one string literal.
pub(super) struct Passage {
    /// The line on which the passage begins.
    pub(super) line: usize,
    pub(super) text: String,
    /// Comment lines that are too wide.
    pub(super) wide_lines: Vec<usize>,
}

/// A literal of fewer words is a name, a path or a label.
const FEWEST_WORDS_OF_A_LITERAL: usize = 4;

/// Whether the check reads files of this name.
pub(super) fn is_read(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let ends = [".rs", ".md", ".sh", ".py", ".yaml", ".yml", ".toml", ".tpl", "Makefile", "NOTES.txt"];
    ends.iter().any(|end| name.ends_with(end))
        || path.parent().is_some_and(|folder| folder.file_name().is_some_and(|name| name == ".ci"))
}

/// The passages of a file.
pub(super) fn of(path: &Path, text: &str) -> Vec<Passage> {
    let name = path.to_string_lossy();
    if name.ends_with(".rs") {
        let mut passages = comments(text, rust_comment);
        passages.extend(literals(text));
        passages
    } else if name.ends_with(".md") || name.ends_with("NOTES.txt") {
        paragraphs(text)
    } else {
        comments(text, hash_comment)
    }
}

/// The text of a line that is a Rust comment.
fn rust_comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    Some(text.trim_start_matches(['/', '!']))
}

/// The text of a line that is a comment in YAML, TOML, a script or a Makefile.
fn hash_comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix('#')?;
    (!text.starts_with('!')).then_some(text)
}

/// Blocks of lines that are comments, without code in fences, tables and headings.
fn comments(text: &str, comment: impl Fn(&str) -> Option<&str>) -> Vec<Passage> {
    let mut blocks = Blocks::default();
    let mut is_fenced = false;
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line)) {
        let Some(content) = comment(line).map(str::trim) else {
            is_fenced = false;
            blocks.end();
            continue;
        };
        if line.chars().count() > WIDTH {
            blocks.wide(number);
        }
        if content.starts_with("```") {
            is_fenced = !is_fenced;
        }
        let is_text =
            !is_fenced && !content.is_empty() && !content.starts_with(['|', '#']) && !content.starts_with("```");
        match is_text {
            true => blocks.line(number, content),
            false => blocks.end(),
        }
    }
    blocks.finish()
}

/// Paragraphs and list items of a document, without code in fences, tables and headings.
fn paragraphs(text: &str) -> Vec<Passage> {
    let mut blocks = Blocks::default();
    let mut is_fenced = false;
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line)) {
        let content = line.trim();
        if content.starts_with("```") {
            is_fenced = !is_fenced;
        }
        if is_fenced || content.is_empty() || content.starts_with(['|', '#']) || content.starts_with("```") {
            blocks.end();
            continue;
        }
        let item = content.strip_prefix("- ").or_else(|| content.strip_prefix("* ")).or_else(|| numbered_item(content));
        if item.is_some() {
            blocks.end();
        }
        blocks.line(number, item.unwrap_or(content));
    }
    blocks.finish()
}

fn numbered_item(line: &str) -> Option<&str> {
    let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
    (rest.len() < line.len()).then(|| rest.strip_prefix(". "))?
}

/// String literals of some words.
fn literals(code: &str) -> Vec<Passage> {
    let mut literals = Vec::new();
    let (mut at, mut line) = (0, 1);
    let bytes = code.as_bytes();
    while at < bytes.len() {
        let rest = &code[at..];
        let (length, literal) = match bytes[at] {
            b'/' if rest.starts_with("//") => (rest.find('\n').unwrap_or(rest.len()), None),
            b'\'' => (character(rest), None),
            b'r' if is_raw_string(code, at) => raw_string(rest),
            b'"' => string(rest),
            _ => (rest.chars().next().map_or(1, char::len_utf8), None),
        };
        if let Some(text) = literal.filter(|text| text.split_whitespace().count() >= FEWEST_WORDS_OF_A_LITERAL) {
            literals.push(Passage { line, text, wide_lines: Vec::new() });
        }
        line += rest[..length].matches('\n').count();
        at += length;
    }
    literals
}

/// The length of a character literal, or 1 where a lifetime begins.
fn character(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => rest[2..].char_indices().skip(1).find(|(_, c)| *c == '\'').map_or(1, |(at, _)| at + 3),
        Some((_, _)) => match chars.next() {
            Some((at, '\'')) => at + 1,
            _ => 1,
        },
        None => 1,
    }
}

fn is_raw_string(code: &str, at: usize) -> bool {
    let is_word_before = code[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
    let hashes = code[at + 1..].trim_start_matches('#');
    (!is_word_before || code[..at].ends_with('b')) && hashes.starts_with('"')
}

fn raw_string(rest: &str) -> (usize, Option<String>) {
    let hashes = rest[1..].len() - rest[1..].trim_start_matches('#').len();
    let begin = 1 + hashes + 1;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = rest[begin..].find(&end).unwrap_or(rest.len() - begin);
    ((begin + length + end.len()).min(rest.len()), Some(rest[begin..begin + length].to_owned()))
}

/// A literal with its line breaks and escapes as a reader sees them.
fn string(rest: &str) -> (usize, Option<String>) {
    let mut text = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (at + 1, Some(text)),
            '\\' => match chars.next() {
                Some((_, '\n' | 'n' | 't')) => text.push(' '),
                Some((_, escaped)) => text.push(escaped),
                None => break,
            },
            _ => text.push(c),
        }
    }
    (rest.len(), None)
}

/// Lines as they are gathered into passages.
#[derive(Default)]
struct Blocks {
    done: Vec<Passage>,
    open: Option<Passage>,
}

impl Blocks {
    fn line(&mut self, number: usize, text: &str) {
        let open = self.open.get_or_insert(Passage { line: number, text: String::new(), wide_lines: Vec::new() });
        open.text.push(' ');
        open.text.push_str(text);
    }

    fn wide(&mut self, number: usize) {
        self.done.push(Passage { line: number, text: String::new(), wide_lines: vec![number] });
    }

    fn end(&mut self) {
        self.done.extend(self.open.take());
    }

    fn finish(mut self) -> Vec<Passage> {
        self.end();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(name: &str, text: &str) -> Vec<String> {
        of(Path::new(name), text).into_iter().map(|passage| passage.text.trim().to_owned()).collect()
    }

    #[test]
    fn a_rust_file_gives_its_comments_and_its_literals_of_four_words() {
        let code = r##"
//! A module. Its
//! second line.
//!
//! ```text
//! what stands in a fence
//! ```
let a = 'x'; let b: &'static str = "\"three more words\" here"; // no line of its own
let c = "three words only"; let d = r#"a "raw" text here"#; let e = '"'; let f = "who has\
    the piece?";
"##;
        let expected = [
            "A module. Its second line.",
            "\"three more words\" here",
            "a \"raw\" text here",
            "who has     the piece?",
        ];
        assert_eq!(texts("a.rs", code), expected);
    }

    #[test]
    fn a_document_gives_its_paragraphs_and_items() {
        let text =
            "# Heading\nA paragraph\ngoes on.\n- one item\n2. another item\n\n| a | table |\n```\ncode\n```\nThe end";
        assert_eq!(texts("a.md", text), ["A paragraph goes on.", "one item", "another item", "The end"]);
    }

    #[test]
    fn a_script_gives_its_comments() {
        assert_eq!(
            texts("a.sh", "#!/bin/sh\n# The first line\n# goes on.\necho '# no comment'"),
            ["The first line goes on."]
        );
    }

    #[test]
    fn a_wide_comment_is_found_and_wide_code_is_not() {
        let wide =
            |text: &str| of(Path::new("a.rs"), text).iter().flat_map(|p| p.wide_lines.clone()).collect::<Vec<_>>();
        let long = "word ".repeat(30);
        assert_eq!(wide(&format!("let a = 1;\n/// {long}\n")), [2]);
        assert!(wide(&format!("let a = b({});", long.trim().replace(' ', ", "))).is_empty());
    }
}
