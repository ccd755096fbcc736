//! Opt-in: annotations on namespaces, pods and the pods' owners, and the limits of the policy.
//!
//! Namespace and workload must both opt in: `PREFIX/allow` on the namespace, and `PREFIX/recover`
//! on the pod or on an owner. Only the exact value `true` permits a recovery, so a mistyped value
//! never does.

use std::collections::{BTreeMap, BTreeSet};

use super::allowed_repositories::RepositoryList;
use super::selector::Selector;
use crate::model::PodView;

/// The namespaces and pods that are recovered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptInPolicy {
    /// Stops all recoveries.
    pub kill_switch: bool,
    /// Annotation prefixes before `/allow` and `/recover`; several during a move from another tool.
    /// The first prefix that is set wins.
    pub annotation_prefixes: Vec<String>,
    /// Namespaces without recovery, whatever their annotations say.
    pub denied_k8s_namespaces: BTreeSet<String>,
    /// Further denied namespaces, by their labels.
    pub denied_selector: Option<Selector>,
    /// Denied namespaces that may opt in, by their labels: an outage may include the CNI's own
    /// image.
    pub allowed_selector: Option<Selector>,
    /// Causes that start a recovery.
    pub recover_on: BTreeSet<Trigger>,
    /// Whether pods of a namespace without a list of repositories get nothing.
    pub require_repositories: bool,
}

/// A cause that the policy includes or excludes. Missing content always starts a recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trigger {
    /// The registry is unreachable.
    Unavailable,
    /// The registry limits the rate.
    RateLimited,
    /// The registry does not have the image.
    NotFound,
    /// The registry denies the image.
    Denied,
    /// The registry sends bytes that do not match the digest.
    BadBytes,
    /// The registry's storage denies a blob of an image whose manifest was served.
    StorageDenied,
    /// A proxy between the node and the registry refuses or fails.
    Proxy,
    /// The pod has `imagePullPolicy: Never`. The kubelet contacts no registry for such images, so
    /// no registry can deny them.
    Never,
}

/// Annotation names, after the prefix.
const ALLOW: &str = "allow";
/// `auto-salvage` is tote's name for `recover`.
const RECOVER: [&str; 2] = ["recover", "auto-salvage"];
const IGNORE: &str = "ignore";
const RECOVER_ON_DENIED: &str = "recover-on-denied";
const PRIORITY: &str = "priority";
const REPOSITORIES: &str = "repositories";

/// Whether an annotation of this name, the part after the prefix, decides about recoveries.
pub fn affects_opt_in(name: &str) -> bool {
    RECOVER.contains(&name) || [ALLOW, IGNORE, RECOVER_ON_DENIED, PRIORITY, REPOSITORIES].contains(&name)
}

type Annotations = BTreeMap<String, String>;

/// The result of annotations and policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptIn {
    /// The pod is recovered.
    Yes {
        /// Also when the registry denies the image.
        on_denied: bool,
        /// Repositories that pods of the namespace may use.
        repositories: RepositoryList,
    },
    /// The pod is not recovered.
    No(OptOutReason),
    /// The pod has no annotation; its owners may have one.
    NeedsOwners,
}

/// Why a pod is not recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OptOutReason {
    /// The kill switch is on.
    KillSwitch,
    /// The policy denies the pod's namespace.
    DeniedNamespace,
    /// Namespace or workload did not opt in.
    NotOptedIn,
    /// The pod has the annotation `ignore`.
    Ignored,
}

/// An annotation of ours with an invalid value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InvalidAnnotation {
    /// The key, with its prefix.
    pub key: String,
    /// The value, truncated.
    pub value: String,
}

impl OptInPolicy {
    /// The reason against a recovery, as far as the pod alone and the policy decide.
    pub fn opt_out_reason(&self, pod: &PodView) -> Option<OptOutReason> {
        if self.kill_switch {
            Some(OptOutReason::KillSwitch)
        } else if self.allowed_selector.is_none() && self.denied_k8s_namespaces.contains(&pod.pod.k8s_namespace) {
            Some(OptOutReason::DeniedNamespace)
        } else if self.is_ignored(pod) {
            Some(OptOutReason::Ignored)
        } else {
            None
        }
    }

    /// Under any prefix. A value such as `ignore: yes` counts: a mistyped `ignore` must not permit
    /// a recovery.
    fn is_ignored(&self, pod: &PodView) -> bool {
        let mut values =
            self.annotation_prefixes.iter().filter_map(|prefix| pod.annotations.get(&format!("{prefix}/{IGNORE}")));
        values.any(|value| value != "false")
    }

    /// Decides whether the pod is recovered. `owners` are the annotations of the pod's owners, the
    /// nearest first; `None` before they were read.
    ///
    /// Annotations with invalid values are added to `odd`.
    pub fn evaluate(
        &self,
        pod: &PodView,
        namespace_labels: &BTreeMap<String, String>,
        namespace: &Annotations,
        owners: Option<&[&Annotations]>,
        invalid: &mut Vec<InvalidAnnotation>,
    ) -> OptIn {
        if let Some(reason) = self.opt_out_reason(pod) {
            return OptIn::No(reason);
        }
        if self.denies(&pod.pod.k8s_namespace, namespace_labels) {
            return OptIn::No(OptOutReason::DeniedNamespace);
        }
        if self.value(namespace, &[ALLOW], invalid) != Some(Some(true)) {
            return OptIn::No(OptOutReason::NotOptedIn);
        }
        let mut opted_in = self.value(&pod.annotations, &RECOVER, invalid);
        if opted_in.is_none() && pod.owner.is_some() {
            let Some(owners) = owners else { return OptIn::NeedsOwners };
            opted_in = owners.iter().find_map(|annotations| self.value(annotations, &RECOVER, invalid));
        }
        if opted_in != Some(Some(true)) {
            return OptIn::No(OptOutReason::NotOptedIn);
        }
        let on_denied = self.recover_on.contains(&Trigger::Denied)
            || self.value(namespace, &[RECOVER_ON_DENIED], invalid) == Some(Some(true));
        OptIn::Yes { on_denied, repositories: self.repositories(namespace, invalid) }
    }

    /// The namespace's list. An invalid list permits no repository.
    fn repositories(&self, namespace: &Annotations, invalid: &mut Vec<InvalidAnnotation>) -> RepositoryList {
        match self.first_set(namespace, &[REPOSITORIES]) {
            None if self.require_repositories => RepositoryList::none(),
            None => RepositoryList::Any,
            Some((key, value)) => RepositoryList::parse(value).unwrap_or_else(|error| {
                invalid.push(InvalidAnnotation::new(key, &error.part));
                RepositoryList::none()
            }),
        }
    }

    /// Whether the namespace opted in, regardless of its workloads.
    pub fn is_namespace_opted_in(
        &self,
        name: &str,
        labels: &BTreeMap<String, String>,
        annotations: &BTreeMap<String, String>,
    ) -> bool {
        !self.denies(name, labels) && self.value(annotations, &[ALLOW], &mut Vec::new()) == Some(Some(true))
    }

    /// The pod's priority: the annotation, or else the PriorityClass.
    pub fn priority(&self, pod: &PodView, invalid: &mut Vec<InvalidAnnotation>) -> i64 {
        let Some((key, value)) = self.first_set(&pod.annotations, &[PRIORITY]) else { return pod.priority.into() };
        value.parse::<i32>().map(Into::into).unwrap_or_else(|_| {
            invalid.push(InvalidAnnotation::new(key, value));
            pod.priority.into()
        })
    }

    fn denies(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        let is_selected =
            |selector: &Option<Selector>| selector.as_ref().is_some_and(|selector| selector.matches(labels));
        let denied = self.denied_k8s_namespaces.contains(name) || is_selected(&self.denied_selector);
        denied && !is_selected(&self.allowed_selector)
    }

    /// `None` without such an annotation, `Some(None)` for a value that is neither `true` nor
    /// `false`.
    fn value(
        &self,
        annotations: &Annotations,
        names: &[&str],
        invalid: &mut Vec<InvalidAnnotation>,
    ) -> Option<Option<bool>> {
        let (key, value) = self.first_set(annotations, names)?;
        Some(match value {
            "true" => Some(true),
            "false" => Some(false),
            _ => {
                invalid.push(InvalidAnnotation::new(key, value));
                None
            }
        })
    }

    /// The first annotation that is set. The order of prefixes precedes the order of names.
    fn first_set<'a>(&self, annotations: &'a Annotations, names: &[&str]) -> Option<(String, &'a str)> {
        let keys = self.annotation_prefixes.iter().flat_map(|prefix| names.iter().map(move |name| (prefix, name)));
        let mut keys = keys.map(|(prefix, name)| format!("{prefix}/{name}"));
        keys.find_map(|key| annotations.get(&key).map(|value| (key, value.as_str())))
    }
}

impl InvalidAnnotation {
    fn new(key: String, value: &str) -> Self {
        // Enough to identify the value in a log line.
        Self { key, value: value.chars().take(40).collect() }
    }
}

impl OptOutReason {
    /// The metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::KillSwitch => "kill_switch",
            Self::DeniedNamespace => "denied_namespace",
            Self::NotOptedIn => "not_opted_in",
            Self::Ignored => "ignored",
        }
    }
}

impl Trigger {
    /// Every trigger.
    pub const ALL: [Self; 8] = [
        Self::Unavailable,
        Self::RateLimited,
        Self::NotFound,
        Self::BadBytes,
        Self::StorageDenied,
        Self::Proxy,
        Self::Denied,
        Self::Never,
    ];

    /// Triggers in force without a setting: all except the two that would bypass a registry's
    /// denial.
    pub const DEFAULT: [Self; 6] =
        [Self::Unavailable, Self::RateLimited, Self::NotFound, Self::BadBytes, Self::StorageDenied, Self::Proxy];

    /// Name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::RateLimited => "rate-limited",
            Self::NotFound => "not-found",
            Self::Denied => "denied",
            Self::BadBytes => "bad-bytes",
            Self::StorageDenied => "storage-denied",
            Self::Proxy => "proxy",
            Self::Never => "never",
        }
    }
}

impl std::str::FromStr for Trigger {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|trigger| trigger.name() == text);
        found.ok_or_else(|| format!("{text:?} is none of {names}"))
    }
}

#[cfg(test)]
mod tests;
