//! Kubernetes label selectors, as in `kubectl -l`.
//!
//! The grammar is that of `k8s.io/apimachinery/pkg/labels`: `key`, `!key`, `key=value`,
//! `key==value`, `key!=value`, `key in (a,b)`, `key notin (a,b)`, joined by commas, all of which
//! must hold. Not here: `>` and `<`, which select no namespaces in practice.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Selects objects by their labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: LabelOperator,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum LabelOperator {
    Exists,
    Absent,
    In(Vec<String>),
    /// Also true where the label is absent, as everywhere in Kubernetes.
    NotIn(Vec<String>),
}

/// The text is not a label selector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{part:?} is no requirement on a label (as in: team=web,!legacy,tier in (a,b))")]
pub struct SelectorError {
    part: String,
}

impl Selector {
    /// Whether every requirement holds. A selector has at least one requirement, so an empty text
    /// never selects all objects by mistake.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| requirement.matches(labels))
    }
}

impl Requirement {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            LabelOperator::Exists => value.is_some(),
            LabelOperator::Absent => value.is_none(),
            LabelOperator::In(values) => value.is_some_and(|value| values.contains(value)),
            LabelOperator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
        }
    }

    fn parse(part: &str) -> Option<Self> {
        let part = part.trim();
        let requirement = |key: &str, operator| {
            let key = key.trim();
            is_key(key).then(|| Self { key: key.to_owned(), operator })
        };
        if let Some(key) = part.strip_prefix('!') {
            return requirement(key, LabelOperator::Absent);
        }
        if let Some((head, list)) = part.strip_suffix(')').and_then(|part| part.split_once('(')) {
            let values: Vec<_> = list.split(',').map(|value| value.trim().to_owned()).collect();
            if !values.iter().all(|value| is_value(value)) {
                return None;
            }
            let (key, operator) = head.trim().rsplit_once(char::is_whitespace)?;
            return match operator {
                "in" => requirement(key, LabelOperator::In(values)),
                "notin" => requirement(key, LabelOperator::NotIn(values)),
                _ => None,
            };
        }
        let Some(at) = part.find('=') else { return requirement(part, LabelOperator::Exists) };
        let (key, value) = (&part[..at], part[at + 1..].trim_start_matches('=').trim());
        let values = vec![value.to_owned()];
        match key.strip_suffix('!') {
            _ if !is_value(value) => None,
            Some(key) => requirement(key, LabelOperator::NotIn(values)),
            None => requirement(key, LabelOperator::In(values)),
        }
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let parts = split_outside_parentheses(text);
        let parsed =
            parts.into_iter().map(|part| Requirement::parse(part).ok_or_else(|| SelectorError { part: part.into() }));
        parsed.collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, Requirement { key, operator }) in self.0.iter().enumerate() {
            f.write_str(if position > 0 { "," } else { "" })?;
            match operator {
                LabelOperator::Exists => write!(f, "{key}")?,
                LabelOperator::Absent => write!(f, "!{key}")?,
                LabelOperator::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                LabelOperator::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
            }
        }
        Ok(())
    }
}

/// Splits at the commas between requirements, not at those inside a list of values.
fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    text.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
    .collect()
}

/// `[prefix/]name`, checked loosely: a key that the API server would reject matches no object.
fn is_key(text: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
    !text.is_empty() && text.len() <= 253 + 1 + 63 && text.bytes().all(fits)
}

/// At most 63 letters, digits, `-`, `_` and `.`; may be empty.
fn is_value(text: &str) -> bool {
    text.len() <= 63 && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn selectors_choose_as_kubectl_does() {
        let web = labels(&[("team", "web"), ("kubernetes.io/metadata.name", "cni")]);
        for (text, expected) in [
            ("team", true),
            ("!team", false),
            ("!legacy", true),
            ("team=web", true),
            ("team==web", true),
            ("team!=web", false),
            ("legacy!=yes", true),
            ("team in (web, shop)", true),
            ("team notin (shop)", true),
            ("legacy notin (yes)", true),
            ("team = web , !legacy", true),
            ("team in (web,shop),kubernetes.io/metadata.name=cni", true),
            ("team=web,team=shop", false),
            ("team=", false),
        ] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.matches(&web), expected, "{text}");
            assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector, "{text}");
        }
    }

    #[test]
    fn an_invalid_selector_is_rejected_with_its_wrong_part() {
        for (text, part) in [
            ("", ""),
            ("a,,b", ""),
            ("a=b,c d", "c d"),
            ("a within (b)", "a within (b)"),
            ("a=b=c", "a=b=c"),
            ("a>1", "a>1"),
        ] {
            assert_eq!(text.parse::<Selector>(), Err(SelectorError { part: part.into() }), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_parsed_selector_round_trips_through_its_text(text in "[a-c!=, ()in]{0,24}") {
            if let Ok(selector) = text.parse::<Selector>() {
                prop_assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector);
            }
        }
    }
}
