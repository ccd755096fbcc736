//! A value of the policy file: its YAML type, and the checks of each field's type.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Error, Spanned};

use super::quantity;
use crate::decide::byte_bucket::MIN_RATE;
use crate::decide::opt_in::Trigger;
use crate::decide::selector::Selector;

use super::{MAX_CONCURRENT, MAX_NODES, MAX_SELECTOR, PolicyFileError};

pub(super) enum YamlNode {
    Boolean(bool),
    Number(u64),
    Text(String),
    List(Vec<Spanned<YamlNode>>),
    /// A value that no field accepts, and its description for the message.
    Other(&'static str),
}

impl<'de> Deserialize<'de> for YamlNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(YamlNodeVisitor)
    }
}

struct YamlNodeVisitor;

impl<'de> Visitor<'de> for YamlNodeVisitor {
    type Value = YamlNode;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, on: bool) -> Result<YamlNode, E> {
        Ok(YamlNode::Boolean(on))
    }

    fn visit_u64<E>(self, number: u64) -> Result<YamlNode, E> {
        Ok(YamlNode::Number(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<YamlNode, E> {
        Ok(u64::try_from(number).map_or(YamlNode::Other("a negative number"), YamlNode::Number))
    }

    fn visit_f64<E>(self, _: f64) -> Result<YamlNode, E> {
        Ok(YamlNode::Other("a fraction, or a number of more than 64 bits,"))
    }

    fn visit_str<E>(self, text: &str) -> Result<YamlNode, E> {
        Ok(YamlNode::Text(text.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<YamlNode, E> {
        Ok(YamlNode::Other("nothing"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<YamlNode, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(YamlNode::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<YamlNode, A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(YamlNode::Other("a mapping"))
    }
}

impl YamlNode {
    fn describe(&self) -> String {
        match self {
            Self::Boolean(on) => on.to_string(),
            Self::Number(number) => number.to_string(),
            // A text can be a whole file that was pasted into the wrong place.
            Self::Text(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
            Self::List(items) if items.is_empty() => "an empty list".into(),
            Self::List(_) => "a list".into(),
            Self::Other(what) => (*what).into(),
        }
    }
}

/// The error for a value that is not `allowed` at its position.
fn reject<T>(node: &Spanned<YamlNode>, allowed: &str) -> Result<T, PolicyFileError> {
    let location = &node.referenced;
    let reason = format!("{} is given; {allowed} is allowed", node.value.describe());
    Err(PolicyFileError { line: location.line(), column: location.column(), reason })
}

pub(super) fn boolean(node: &Spanned<YamlNode>) -> Result<bool, PolicyFileError> {
    match node.value {
        YamlNode::Boolean(on) => Ok(on),
        _ => reject(node, "true or false"),
    }
}

pub(super) fn count(node: &Spanned<YamlNode>) -> Result<usize, PolicyFileError> {
    match node.value {
        YamlNode::Number(number @ 1..=MAX_CONCURRENT) => Ok(number as usize),
        _ => reject(node, &format!("a whole number from 1 to {MAX_CONCURRENT}")),
    }
}

pub(super) fn bytes(node: &Spanned<YamlNode>) -> Result<u64, PolicyFileError> {
    let bytes = match &node.value {
        YamlNode::Number(number) => Some(*number),
        YamlNode::Text(text) => quantity::parse(text),
        _ => None,
    };
    bytes.map_or_else(|| reject(node, quantity::ALLOWED), Ok)
}

/// A percentage up to `most`.
pub(super) fn percent(node: &Spanned<YamlNode>, limit: u8) -> Result<u8, PolicyFileError> {
    match &node.value {
        YamlNode::Number(percent) if *percent <= u64::from(limit) => Ok(*percent as u8),
        _ => reject(node, &format!("a percentage from 0 to {limit}")),
    }
}

/// As [`bytes`]; 0 is no limit, and the lower bound [`MIN_RATE`] is that of the flags.
pub(super) fn rate(node: &Spanned<YamlNode>) -> Result<u64, PolicyFileError> {
    match bytes(node)? {
        rate if rate == 0 || rate >= MIN_RATE => Ok(rate),
        _ => reject(node, &format!("0 for no limit, or at least {MIN_RATE} bytes per second")),
    }
}

pub(super) fn selector(node: &Spanned<YamlNode>) -> Result<Selector, PolicyFileError> {
    match &node.value {
        YamlNode::Text(text) if text.len() <= MAX_SELECTOR => match text.trim().parse() {
            Ok(selector) => Ok(selector),
            Err(error) => reject(node, &format!("a label selector: {error}")),
        },
        _ => reject(node, &format!("a label selector such as \"team in (a, b), !test\" of 1 to {MAX_SELECTOR} bytes")),
    }
}

pub(super) fn namespaces(node: &Spanned<YamlNode>) -> Result<BTreeSet<String>, PolicyFileError> {
    let YamlNode::List(items) = &node.value else { return reject(node, "a list of namespaces") };
    let namespace = |item: &Spanned<YamlNode>| match &item.value {
        YamlNode::Text(name) if is_namespace(name) => Ok(name.clone()),
        _ => reject(item, "a namespace (1 to 63 of a-z 0-9 - ; in quotes where YAML reads a number or a boolean)"),
    };
    items.iter().map(namespace).collect()
}

pub(super) fn causes(node: &Spanned<YamlNode>) -> Result<BTreeSet<Trigger>, PolicyFileError> {
    let allowed = format!("a list of one or more of {}", Trigger::ALL.map(Trigger::name).join(", "));
    let YamlNode::List(items) = &node.value else { return reject(node, &allowed) };
    if items.is_empty() {
        return reject(node, &allowed);
    }
    let cause = |item: &Spanned<YamlNode>| match &item.value {
        YamlNode::Text(name) => name.parse().or_else(|_| reject(item, &allowed)),
        _ => reject(item, &allowed),
    };
    items.iter().map(cause).collect()
}

/// Whether the name is an RFC 1123 label, the form of Kubernetes' namespaces.
fn is_namespace(name: &str) -> bool {
    let is_alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let has_valid_ends =
        name.bytes().next().is_some_and(is_alphanumeric) && name.bytes().last().is_some_and(is_alphanumeric);
    has_valid_ends && name.len() <= 63 && name.bytes().all(|byte| is_alphanumeric(byte) || byte == b'-')
}

/// The parser's error in one line, with the terms of this file.
pub(super) fn plain_message(error: &serde_saphyr::Error) -> String {
    match error.without_snippet() {
        Error::DuplicateMappingKey { key: Some(key), .. } => format!("{key} is set a second time"),
        Error::Budget { .. } => {
            format!(
                "a policy file is one document of at most {MAX_NODES} values, with no anchors, aliases or deep nesting"
            )
        }
        Error::Unexpected { .. } => "fields such as `killSwitch: true` are expected".into(),
        error => {
            let text = error.to_string();
            // The parser's text ends with the position, which `PolicyFileError` has in fields.
            let text = text.split(" at line ").next().unwrap_or_default();
            text.lines().next().unwrap_or_default().chars().take(400).collect()
        }
    }
}
