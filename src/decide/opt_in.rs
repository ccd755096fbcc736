//! Who wants to be helped: what namespaces, pods and the pods' owners say by annotation, and what the rules allow.
//!
//! Both have to agree: whoever runs the namespace (`PREFIX/allow`) and whoever runs the workload (`PREFIX/recover`, on the pod or on
//! an owner). Exactly `true` is a permission; a value that is neither `true` nor `false` is a mistake that must not turn into one.

use std::collections::{BTreeMap, BTreeSet};

use super::repositories::RepositoryList;
use super::selector::Selector;
use crate::model::PodView;

/// Which namespaces and pods are helped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptInPolicy {
    /// Nothing is recovered at all.
    pub kill_switch: bool,
    /// What stands before `/allow` and `/recover`; several for people who come from elsewhere. The first that is set counts.
    pub annotation_prefixes: Vec<String>,
    /// Namespaces that are left alone whatever their annotations say.
    pub denied_k8s_namespaces: BTreeSet<String>,
    /// Further ones, by their labels.
    pub denied_selector: Option<Selector>,
    /// Namespaces that may opt in although they are denied, by their labels: an outage may include the CNI's own image.
    pub allowed_selector: Option<Selector>,
    /// Causes that are acted on.
    pub recover_on: BTreeSet<Trigger>,
    /// Pods of a namespace without a list of repositories get nothing.
    pub require_repositories: bool,
}

/// A cause that can be chosen to act on, or not to. Missing content is always acted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trigger {
    /// The registry cannot be reached.
    Unavailable,
    /// It limits our rate.
    RateLimited,
    /// It does not have the image.
    NotFound,
    /// It denies it.
    Denied,
    /// It sends bytes that are not those of the digest.
    BadBytes,
    /// Its storage refuses a blob of an image whose manifest it gave.
    StorageDenied,
    /// A proxy between the node and the registry refuses or fails.
    Proxy,
    /// The pod says `imagePullPolicy: Never`. No registry is ever asked for its images, so none can deny them.
    Never,
}

/// Names of the annotations, after the prefix.
const ALLOW: &str = "allow";
/// `auto-salvage` is tote's name for `recover`.
const RECOVER: [&str; 2] = ["recover", "auto-salvage"];
const IGNORE: &str = "ignore";
const RECOVER_ON_DENIED: &str = "recover-on-denied";
const PRIORITY: &str = "priority";
const REPOSITORIES: &str = "repositories";

/// A set of annotations.
type Annotations = BTreeMap<String, String>;

/// What the annotations and rules come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptIn {
    /// The pod is helped.
    Yes {
        /// Also where the registry denies the image.
        on_denied: bool,
        /// What it may have.
        repositories: RepositoryList,
    },
    /// It is not.
    No(OptOutReason),
    /// The pod itself says nothing; its owners may.
    NeedsOwners,
}

/// Why a pod is not helped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptOutReason {
    /// The kill switch is on.
    KillSwitch,
    /// Its namespace is denied.
    DeniedNamespace,
    /// Namespace or workload did not opt in.
    NotOptedIn,
    /// The pod says that it is to be left alone.
    Ignored,
}

/// An annotation of ours whose value means nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InvalidAnnotation {
    /// The whole key.
    pub key: String,
    /// The value, shortened.
    pub value: String,
}

impl OptInPolicy {
    /// Why the pod is not helped, as far as that can be told without knowing its namespace.
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

    /// By any of the prefixes. Whoever writes `ignore: yes` means it: here it is the mistake that must not turn into an action.
    fn is_ignored(&self, pod: &PodView) -> bool {
        let mut values =
            self.annotation_prefixes.iter().filter_map(|prefix| pod.annotations.get(&format!("{prefix}/{IGNORE}")));
        values.any(|value| value != "false")
    }

    /// Whether the pod is helped. `owners` are the annotations of its owners, the nearest first, once they were asked for.
    ///
    /// Values that mean nothing are added to `odd`.
    pub fn evaluate(
        &self,
        pod: &PodView,
        namespace_labels: &BTreeMap<String, String>,
        namespace: &Annotations,
        owners: Option<&[&Annotations]>,
        odd: &mut Vec<InvalidAnnotation>,
    ) -> OptIn {
        if let Some(reason) = self.opt_out_reason(pod) {
            return OptIn::No(reason);
        }
        if self.denies(&pod.pod.k8s_namespace, namespace_labels) {
            return OptIn::No(OptOutReason::DeniedNamespace);
        }
        if self.value(namespace, &[ALLOW], odd) != Some(Some(true)) {
            return OptIn::No(OptOutReason::NotOptedIn);
        }
        let mut said = self.value(&pod.annotations, &RECOVER, odd);
        if said.is_none() && pod.owner.is_some() {
            let Some(owners) = owners else { return OptIn::NeedsOwners };
            said = owners.iter().find_map(|annotations| self.value(annotations, &RECOVER, odd));
        }
        if said != Some(Some(true)) {
            return OptIn::No(OptOutReason::NotOptedIn);
        }
        let on_denied = self.recover_on.contains(&Trigger::Denied)
            || self.value(namespace, &[RECOVER_ON_DENIED], odd) == Some(Some(true));
        OptIn::Yes { on_denied, repositories: self.repositories(namespace, odd) }
    }

    /// What the namespace's list says. One that cannot be read permits nothing.
    fn repositories(&self, namespace: &Annotations, odd: &mut Vec<InvalidAnnotation>) -> RepositoryList {
        match self.first_set(namespace, &[REPOSITORIES]) {
            None if self.require_repositories => RepositoryList::none(),
            None => RepositoryList::Any,
            Some((key, value)) => RepositoryList::parse(value).unwrap_or_else(|bad| {
                odd.push(InvalidAnnotation::new(key, &bad.part));
                RepositoryList::none()
            }),
        }
    }

    /// Whether the namespace itself opted in: what it says, without its workloads.
    pub fn is_namespace_opted_in(
        &self,
        name: &str,
        labels: &BTreeMap<String, String>,
        annotations: &BTreeMap<String, String>,
    ) -> bool {
        !self.denies(name, labels) && self.value(annotations, &[ALLOW], &mut Vec::new()) == Some(Some(true))
    }

    /// How urgent the pod is: what it says itself, else its PriorityClass.
    pub fn priority(&self, pod: &PodView, odd: &mut Vec<InvalidAnnotation>) -> i64 {
        let Some((key, value)) = self.first_set(&pod.annotations, &[PRIORITY]) else { return pod.priority.into() };
        value.parse::<i32>().map(Into::into).unwrap_or_else(|_| {
            odd.push(InvalidAnnotation::new(key, value));
            pod.priority.into()
        })
    }

    fn denies(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        let chosen = |selector: &Option<Selector>| selector.as_ref().is_some_and(|selector| selector.matches(labels));
        let denied = self.denied_k8s_namespaces.contains(name) || chosen(&self.denied_selector);
        denied && !chosen(&self.allowed_selector)
    }

    /// `None` without such an annotation, `Some(None)` for a value that is neither `true` nor `false`.
    fn value(
        &self,
        annotations: &Annotations,
        names: &[&str],
        odd: &mut Vec<InvalidAnnotation>,
    ) -> Option<Option<bool>> {
        let (key, value) = self.first_set(annotations, names)?;
        Some(match value {
            "true" => Some(true),
            "false" => Some(false),
            _ => {
                odd.push(InvalidAnnotation::new(key, value));
                None
            }
        })
    }

    /// The first annotation that is set. The order of the prefixes comes before the order of the names.
    fn first_set<'a>(&self, annotations: &'a Annotations, names: &[&str]) -> Option<(String, &'a str)> {
        let keys = self.annotation_prefixes.iter().flat_map(|prefix| names.iter().map(move |name| (prefix, name)));
        let mut keys = keys.map(|(prefix, name)| format!("{prefix}/{name}"));
        keys.find_map(|key| annotations.get(&key).map(|value| (key, value.as_str())))
    }
}

impl InvalidAnnotation {
    fn new(key: String, value: &str) -> Self {
        // Enough to recognise it by, in a line of the log.
        Self { key, value: value.chars().take(40).collect() }
    }
}

impl OptOutReason {
    /// For the metric.
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
    /// All of them.
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

    /// Those that are acted on when no setting says otherwise: all but the two for which a registry's word would be bypassed.
    pub const DEFAULT: [Self; 6] =
        [Self::Unavailable, Self::RateLimited, Self::NotFound, Self::BadBytes, Self::StorageDenied, Self::Proxy];

    /// Its name in settings.
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
