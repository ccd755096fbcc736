//! The policy file: policy and budgets that change while agents run, as YAML in a key of a
//! ConfigMap.
//!
//! Each field of the file replaces the value of the flag of the same name. The file is checked as a
//! whole, so that a file with an error changes nothing.
//!
//! Not here: the watch of the file (`crate::agent::operator::policy_watch`).

pub(super) mod quantity;
#[cfg(test)]
mod tests;
mod yaml_node;

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_saphyr::Spanned;
use serde_saphyr::options::{DuplicateKeyPolicy, MergeKeyPolicy};

use crate::decide::opt_in::Trigger;
use crate::decide::policy::Policy;
use crate::decide::selector::Selector;
use yaml_node::YamlNode;

/// Most bytes of the file. Kubernetes refuses a ConfigMap over 1 MiB.
pub const MAX_BYTES: usize = 1 << 20;

/// Most values in the file. Kubernetes is tested with 10 000 namespaces, and a list may name each.
const MAX_NODES: usize = 10_200;

/// Most recoveries, and most blobs of an image, at the same time. Each costs memory and
/// connections. A kubelet runs 110 pods by default.
const MAX_CONCURRENT: u64 = 256;

/// Most bytes of a selector: room for ten pairs of the longest labels. A label's key has at most
/// 253 + 1 + 63 characters, and the value has at most 63.
const MAX_SELECTOR: usize = 4096;

/// The fields of a policy file. For an absent field the flag stays in force.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PolicyOverrides {
    /// Whether all recoveries are off.
    pub kill_switch: Option<bool>,
    /// Namespaces without recovery.
    pub denied_namespaces: Option<BTreeSet<String>>,
    /// Further namespaces without recovery, by their labels.
    pub denied_namespace_selector: Option<Selector>,
    /// Denied namespaces that may opt in, by their labels.
    pub allowed_namespace_selector: Option<Selector>,
    /// The causes that start a recovery; at least one.
    pub recover_on: Option<BTreeSet<Trigger>>,
    /// Whether nothing is recovered for namespaces without a list of repositories.
    pub require_repositories: Option<bool>,
    /// Images recovered at the same time; at least 1.
    pub concurrent_recoveries: Option<usize>,
    /// Blobs of one image fetched at the same time; at least 1.
    pub concurrent_blobs: Option<usize>,
    /// Most bytes that one image may bring; 0 is no limit.
    pub max_image_bytes: Option<u64>,
    /// Bytes that stay free on the file systems of the content store and the snapshotter.
    pub min_free_bytes: Option<u64>,
    /// Percent in use from which the kubelet collects images.
    pub image_gc_percent: Option<u8>,
    /// Percent free below which the kubelet evicts pods.
    pub eviction_percent: Option<u8>,
    /// Most bytes per second from peers; 0 is no limit.
    pub max_download_rate: Option<u64>,
    /// Most bytes per second to peers; 0 is no limit.
    pub max_upload_rate: Option<u64>,
}

/// The first error in a policy file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {reason}")]
pub struct PolicyFileError {
    /// The line, from 1.
    pub line: u64,
    /// The character in this line, from 1.
    pub column: u64,
    /// The value at this position, and the allowed values.
    pub reason: String,
}

/// The fields of the file as YAML values, before their types are checked.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawPolicyFile {
    kill_switch: Option<Spanned<YamlNode>>,
    denied_namespaces: Option<Spanned<YamlNode>>,
    denied_namespace_selector: Option<Spanned<YamlNode>>,
    allowed_namespace_selector: Option<Spanned<YamlNode>>,
    recover_on: Option<Spanned<YamlNode>>,
    require_repositories: Option<Spanned<YamlNode>>,
    concurrent_recoveries: Option<Spanned<YamlNode>>,
    concurrent_blobs: Option<Spanned<YamlNode>>,
    max_image_bytes: Option<Spanned<YamlNode>>,
    min_free_bytes: Option<Spanned<YamlNode>>,
    image_gc_percent: Option<Spanned<YamlNode>>,
    eviction_percent: Option<Spanned<YamlNode>>,
    max_download_rate: Option<Spanned<YamlNode>>,
    max_upload_rate: Option<Spanned<YamlNode>>,
}

impl PolicyOverrides {
    /// Parses a file. An empty file, or a file of comments alone, has no field.
    ///
    /// # Errors
    /// [`PolicyFileError`] for the first error in the file.
    pub fn parse(text: &str) -> Result<Self, PolicyFileError> {
        if text.len() > MAX_BYTES {
            return Err(PolicyFileError { line: 1, column: 1, reason: format!("the file is over {MAX_BYTES} bytes") });
        }
        let raw: Option<RawPolicyFile> = serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
            let location = error.location().map_or((1, 1), |location| (location.line(), location.column()));
            PolicyFileError { line: location.0, column: location.1, reason: yaml_node::plain_message(&error) }
        })?;
        let RawPolicyFile {
            kill_switch,
            denied_namespaces,
            denied_namespace_selector,
            allowed_namespace_selector,
            recover_on,
            require_repositories,
            concurrent_recoveries,
            concurrent_blobs,
            max_image_bytes,
            min_free_bytes,
            image_gc_percent,
            eviction_percent,
            max_download_rate,
            max_upload_rate,
        } = raw.unwrap_or_default();
        Ok(Self {
            kill_switch: read_field(kill_switch, yaml_node::boolean)?,
            denied_namespaces: read_field(denied_namespaces, yaml_node::namespaces)?,
            denied_namespace_selector: read_field(denied_namespace_selector, yaml_node::selector)?,
            allowed_namespace_selector: read_field(allowed_namespace_selector, yaml_node::selector)?,
            recover_on: read_field(recover_on, yaml_node::causes)?,
            require_repositories: read_field(require_repositories, yaml_node::boolean)?,
            concurrent_recoveries: read_field(concurrent_recoveries, yaml_node::count)?,
            concurrent_blobs: read_field(concurrent_blobs, yaml_node::count)?,
            max_image_bytes: read_field(max_image_bytes, yaml_node::bytes)?,
            min_free_bytes: read_field(min_free_bytes, yaml_node::bytes)?,
            image_gc_percent: read_field(image_gc_percent, |node| yaml_node::percent(node, 100))?,
            eviction_percent: read_field(eviction_percent, |node| yaml_node::percent(node, 90))?,
            max_download_rate: read_field(max_download_rate, yaml_node::rate)?,
            max_upload_rate: read_field(max_upload_rate, yaml_node::rate)?,
        })
    }

    /// Parses a file of arbitrary bytes.
    ///
    /// # Errors
    /// As [`PolicyOverrides::parse`]; also for bytes that are not UTF-8.
    pub fn parse_bytes(bytes: &[u8]) -> Result<Self, PolicyFileError> {
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let before = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            PolicyFileError { line: line as u64, column: column as u64, reason: "not UTF-8".into() }
        })?;
        Self::parse(text)
    }

    /// The policy in force: `base` with the fields of this file.
    pub fn apply(&self, base: &Policy) -> Policy {
        let mut policy = base.clone();
        let (opt_in, budgets) = (&mut policy.opt_in, &mut policy.budgets);
        override_with(&mut opt_in.kill_switch, &self.kill_switch);
        override_with(&mut opt_in.denied_k8s_namespaces, &self.denied_namespaces);
        override_with(&mut opt_in.recover_on, &self.recover_on);
        override_with(&mut opt_in.require_repositories, &self.require_repositories);
        for (selector, override_value) in [
            (&mut opt_in.denied_selector, &self.denied_namespace_selector),
            (&mut opt_in.allowed_selector, &self.allowed_namespace_selector),
        ] {
            if override_value.is_some() {
                selector.clone_from(override_value);
            }
        }
        override_with(&mut budgets.concurrent_recoveries, &self.concurrent_recoveries);
        override_with(&mut budgets.concurrent_blobs, &self.concurrent_blobs);
        override_with(&mut budgets.max_image_bytes, &self.max_image_bytes);
        override_with(&mut budgets.min_free_bytes, &self.min_free_bytes);
        override_with(&mut budgets.image_gc_percent, &self.image_gc_percent);
        override_with(&mut budgets.eviction_percent, &self.eviction_percent);
        override_with(&mut budgets.max_download_rate, &self.max_download_rate);
        override_with(&mut budgets.max_upload_rate, &self.max_upload_rate);
        policy
    }

    /// The fields of the file with their values, for log and status. A list shows its first eight
    /// items.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let causes = self.recover_on.as_ref().map(|causes| format_list(causes.iter().map(|cause| cause.name())));
        let all = [
            ("killSwitch", self.kill_switch.map(|on| on.to_string())),
            (
                "deniedNamespaces",
                self.denied_namespaces.as_ref().map(|names| format_list(names.iter().map(String::as_str))),
            ),
            ("deniedNamespaceSelector", self.denied_namespace_selector.as_ref().map(Selector::to_string)),
            ("allowedNamespaceSelector", self.allowed_namespace_selector.as_ref().map(Selector::to_string)),
            ("recoverOn", causes),
            ("requireRepositories", self.require_repositories.map(|on| on.to_string())),
            ("concurrentRecoveries", self.concurrent_recoveries.map(|number| number.to_string())),
            ("concurrentBlobs", self.concurrent_blobs.map(|number| number.to_string())),
            ("maxImageBytes", self.max_image_bytes.map(quantity::show)),
            ("minFreeBytes", self.min_free_bytes.map(quantity::show)),
            ("imageGcPercent", self.image_gc_percent.map(|percent| percent.to_string())),
            ("evictionPercent", self.eviction_percent.map(|percent| percent.to_string())),
            ("maxDownloadRate", self.max_download_rate.map(quantity::show)),
            ("maxUploadRate", self.max_upload_rate.map(quantity::show)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

/// A flat list of settings needs no anchors, aliases or merges; YAML bombs consist of them.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_aliases: 0,
            max_anchors: 0,
            max_depth: 8,
            max_documents: 1,
            max_nodes: MAX_NODES,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        merge_keys: MergeKeyPolicy::Error,
        strict_booleans: true,
    }
}

/// The value of a field; `None` where the field is absent or empty.
fn read_field<T>(
    field: Option<Spanned<YamlNode>>,
    parse: impl FnOnce(&Spanned<YamlNode>) -> Result<T, PolicyFileError>,
) -> Result<Option<T>, PolicyFileError> {
    field.as_ref().map(parse).transpose()
}

fn override_with<T: Clone>(value: &mut T, override_value: &Option<T>) {
    if let Some(override_value) = override_value {
        value.clone_from(override_value);
    }
}

const MAX_SHOWN: usize = 8;

fn format_list<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = names.len().saturating_sub(MAX_SHOWN);
    let shown: Vec<_> = names.take(MAX_SHOWN).collect();
    let more = if more > 0 { format!(", and {more} more") } else { String::new() };
    format!("[{}{more}]", shown.join(", "))
}
