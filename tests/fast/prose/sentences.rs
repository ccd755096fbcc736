//! The sentences of a passage, and what a sentence may not be.

/// What is wrong with a sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A clause stands where the subject belongs: *Who has the piece sends ...*.
    Clause,
    /// A pronoun stands where the thing belongs: *They are sent ...*.
    Pronoun,
    /// A program is spoken of as a person: *somebody*, *nobody*.
    Person,
}

const CLAUSE: [&str; 6] = ["what", "who", "whoever", "whom", "whose", "whatever"];
const PRONOUN: [&str; 9] = ["it", "they", "those", "ones", "nobody", "somebody", "everybody", "something", "others"];
const PERSON: [&str; 6] = ["somebody", "nobody", "whoever", "whom", "everybody", "anybody"];
const IT: [&str; 3] = ["it", "its", "itself"];

/// Words after *one* that make *one* a pronoun. Before a noun, *one* is a number.
const AFTER_ONE: [&str; 8] = ["of", "that", "who", "which", "is", "was", "has", "can"];

/// A shorter run of words is a heading or a label.
const FEWEST_WORDS: usize = 3;

/// The sentences of a passage. Code between backticks counts as one word, and so does a
/// placeholder between braces.
pub(super) fn of(text: &str) -> Vec<String> {
    let text = without_links(&without_code(text));
    let mut sentences = Vec::new();
    let mut sentence = String::new();
    let mut words = text.split_whitespace().peekable();
    while let Some(word) = words.next() {
        if !sentence.is_empty() {
            sentence.push(' ');
        }
        sentence.push_str(word);
        let ends = word.ends_with(['.', '!', '?', ';', ':']);
        let begins = |next: &&str| next.starts_with(|c: char| c.is_ascii_uppercase() || c == '[' || c == '(');
        if ends && words.peek().is_some_and(begins) {
            sentences.push(std::mem::take(&mut sentence));
        }
    }
    sentences.push(sentence);
    let trimmed = sentences.iter().map(|sentence| sentence.trim_matches([' ', '-', '#', '>', '*', '_']).to_owned());
    trimmed.filter(|sentence| sentence.split_whitespace().count() >= FEWEST_WORDS).collect()
}

pub(super) fn faults(sentence: &str) -> Vec<Fault> {
    let words: Vec<_> = words(sentence).collect();
    let is = |list: &[&str], word: Option<&String>| word.is_some_and(|word| list.contains(&word.as_str()));
    let mut faults = Vec::new();
    if is(&CLAUSE, words.first()) {
        faults.push(Fault::Clause);
    } else if is(&PRONOUN, words.first()) || (is(&["one"], words.first()) && is(&AFTER_ONE, words.get(1))) {
        faults.push(Fault::Pronoun);
    }
    if words.iter().any(|word| PERSON.contains(&word.as_str())) {
        faults.push(Fault::Person);
    }
    faults
}

/// How often a sentence says *it*, *its* or *itself*.
pub(super) fn its(sentence: &str) -> usize {
    words(sentence).filter(|word| IT.contains(&word.as_str())).count()
}

/// The words in lower case, without punctuation.
fn words(sentence: &str) -> impl Iterator<Item = String> {
    sentence.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase)
}

/// `code` and {placeholder} become the word CODE.
fn without_code(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['`', '{']) {
        let close = if rest[at..].starts_with('`') { '`' } else { '}' };
        let Some(end) = rest[at + 1..].find(close) else { break };
        plain.push_str(&rest[..at]);
        plain.push_str("CODE");
        rest = &rest[at + 1 + end + 1..];
    }
    plain + rest
}

/// `[text](address)` becomes `text`.
fn without_links(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("](") {
        let Some(end) = rest[at..].find(')') else { break };
        plain.push_str(&rest[..at].replace('[', ""));
        rest = &rest[at + end + 1..];
    }
    plain + rest
}

#[test]
fn a_sentence_ends_before_a_capital_letter() {
    let found = of("The agent reads e.g. this file. It has `a. B` links. no: The end is near");
    assert_eq!(found, ["The agent reads e.g. this file.", "It has CODE links. no:", "The end is near"]);
    assert!(of("Two words.").is_empty(), "a label is no sentence");
}

#[test]
fn each_fault_has_its_sentences() {
    for (sentence, expected) in [
        ("Who has the piece sends the piece.", vec![Fault::Clause]),
        ("Nobody has the piece.", vec![Fault::Pronoun, Fault::Person]),
        ("One of the peers sends the piece.", vec![Fault::Pronoun]),
        ("One peer sends the piece.", vec![]),
        ("One hour later the agent retries.", vec![]),
        ("A peer sends whatever the agent requests.", vec![]),
    ] {
        assert_eq!(faults(sentence), expected, "{sentence}");
    }
    assert_eq!(its("It sends its piece; `it` is bit."), 3);
}
