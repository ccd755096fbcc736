//! What a pod's status says about its images, and whether anything is ours to do about it.
//!
//! Not here: remembering what was said already ([`super::ledger`]) and who runs when ([`super::queue`]).

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{ContainerView, PodView, PullPolicy, Waiting};
use crate::oci::{Reference, ReferenceError};

/// Why the kubelet has no image, as far as its words tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// No registry there: names that do not resolve, refused connections, time-outs, 5xx.
    Unavailable,
    /// The registry is there and says "not so often".
    RateLimited,
    /// The registry does not have it, or no longer.
    NotFound,
    /// The registry says "not you". Not ours to get around.
    Denied,
    /// The image is recorded here but parts of its content are gone.
    MissingContent,
    /// The kubelet was told never to pull; an import cures it.
    NeverPull,
}

/// Which namespaces and pods are helped.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Nothing is recovered at all.
    pub kill_switch: bool,
    /// What stands before `/allow` and `/auto-salvage`.
    pub annotation_prefix: String,
    /// Namespaces that are left alone whatever their annotations say.
    pub denied_k8s_namespaces: BTreeSet<String>,
}

/// The decision on one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Bring this image.
    Recover(Reference, Cause),
    /// Nothing to do, and nothing to say: not ours.
    Leave(Leave),
    /// Its owner wants our help, and we cannot give it. Worth an Event, once.
    Tell(NotActionable),
}

/// Why a failing container is none of our business.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// The kill switch is on.
    KillSwitch,
    /// Its namespace is denied.
    DeniedNamespace,
    /// Namespace or pod did not opt in.
    NotOptedIn,
    /// The kubelet has not named the cause yet; its next attempt will.
    CauseUnknown,
}

/// Why we cannot help a pod that asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotActionable {
    /// 401 or 403 from the registry.
    Denied,
    /// `imagePullPolicy: Always`.
    PullsAlways,
    /// The image's name.
    Unreadable(ReferenceError),
}

impl NotActionable {
    /// What to tell the pod's owner: what is wrong, and what would help.
    pub fn note(&self, image: &str) -> String {
        match self {
            Self::Denied => format!(
                "The registry denies {image} (401 or 403). Peers may hold it, but a denial is not bypassed: check the pull secret."
            ),
            Self::PullsAlways => format!(
                "{image} has imagePullPolicy Always, so the kubelet asks the registry even when the image is here. \
                 Set IfNotPresent, or name the image by its digest."
            ),
            Self::Unreadable(error) => format!("Cannot look for {image}: {error}."),
        }
    }

    /// For the metric.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::PullsAlways => "pulls_always",
            Self::Unreadable(_) => "unreadable",
        }
    }
}

impl Leave {
    /// For the metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::KillSwitch => "kill_switch",
            Self::DeniedNamespace => "denied_namespace",
            Self::NotOptedIn => "not_opted_in",
            Self::CauseUnknown => "cause_unknown",
        }
    }
}

/// Whether the container waits for an image at all, whatever the cause.
///
/// The kubelet's reasons (kubelet `images` package). Not in the list on purpose: `InvalidImageName`,
/// `SignatureValidationFailed`, `CrashLoopBackOff`, `CreateContainerConfigError`.
pub fn waits_for_image(container: &ContainerView) -> bool {
    container.waiting.as_ref().is_some_and(|waiting| match waiting.reason.as_str() {
        "ErrImagePull" | "ImagePullBackOff" | "RegistryUnavailable" | "ErrImageNeverPull" => true,
        "CreateContainerError" => is_missing_content(&waiting.message),
        _ => false,
    })
}

/// Reads the cause out of the kubelet's words; `None` while they do not name one.
///
/// "Denied" wins over everything else in the same message: containerd joins the errors of several hosts.
pub fn cause(waiting: &Waiting) -> Option<Cause> {
    match waiting.reason.as_str() {
        "ErrImageNeverPull" => return Some(Cause::NeverPull),
        "RegistryUnavailable" => return Some(Cause::Unavailable),
        "CreateContainerError" => return is_missing_content(&waiting.message).then_some(Cause::MissingContent),
        _ => {}
    }
    let message = without_names(&waiting.message);
    let has_word = |wanted: &str| message.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == wanted);
    let says = |phrases: &Phrases| {
        phrases.words.iter().any(|word| has_word(word)) || phrases.text.iter().any(|text| message.contains(text))
    };
    if says(&DENIED) {
        Some(Cause::Denied)
    } else if says(&RATE_LIMITED) {
        Some(Cause::RateLimited)
    } else if says(&UNAVAILABLE) {
        Some(Cause::Unavailable)
    } else if says(&NOT_FOUND) {
        Some(Cause::NotFound)
    } else {
        None
    }
}

/// The message in lower case without URLs and image names: a repository may be called `denied`, and a digest may contain `403`.
/// A single word in quotes is a name as well: `Back-off pulling image "app:403"`.
fn without_names(message: &str) -> String {
    let is_quoted = |token: &str| {
        let token = token.trim_end_matches([':', ',', ';', '.']);
        token.len() > 1 && token.starts_with(['"', '\\']) && token.ends_with('"')
    };
    let is_name =
        |token: &str| (token.contains('/') && !token.contains("i/o")) || token.contains('@') || is_quoted(token);
    let kept: Vec<_> = message.split_whitespace().filter(|token| !is_name(token)).collect();
    kept.join(" ").to_ascii_lowercase()
}

/// What gives a cause away: whole words (status codes above all), or pieces of text.
struct Phrases {
    words: &'static [&'static str],
    text: &'static [&'static str],
}

const DENIED: Phrases = Phrases {
    words: &["401", "403", "denied", "unauthorized", "forbidden"],
    text: &["authorization failed", "authentication required", "no basic auth"],
};
const RATE_LIMITED: Phrases =
    Phrases { words: &["429", "toomanyrequests"], text: &["too many requests", "rate limit"] };
const UNAVAILABLE: Phrases = Phrases {
    words: &["eof", "500", "502", "503", "504", "tls", "x509"],
    text: &[
        "no such host",
        "connection refused",
        "connection reset",
        "connection timed out",
        "i/o timeout",
        "deadline exceeded",
        "no route to host",
        "network is unreachable",
        "temporary failure in name resolution",
        "server misbehaving",
        "bad gateway",
        "service unavailable",
    ],
};
const NOT_FOUND: Phrases =
    Phrases { words: &["404"], text: &["not found", "manifest unknown", "name unknown", "does not exist"] };

fn is_missing_content(message: &str) -> bool {
    message.contains("content digest") && message.contains("not found")
        || message.contains("failed to resolve rootfs")
        || message.contains("failed to get image") && message.contains("not found")
}

/// Decides on one container that [`waits_for_image`]. `known_cause` is what was understood of an earlier message, for kubelets that
/// do not repeat it while they back off; a denial among the two wins.
pub fn decide(
    pod: &PodView,
    container: &ContainerView,
    known_cause: Option<Cause>,
    namespace_annotations: &BTreeMap<String, String>,
    policy: &Policy,
) -> Verdict {
    if policy.kill_switch {
        return Verdict::Leave(Leave::KillSwitch);
    }
    if policy.denied_k8s_namespaces.contains(&pod.pod.k8s_namespace) {
        return Verdict::Leave(Leave::DeniedNamespace);
    }
    // Exactly "true": anything else is a mistake that must not turn into a permission.
    let is_set = |annotations: &BTreeMap<String, String>, name: &str| {
        annotations.get(&format!("{}/{name}", policy.annotation_prefix)).is_some_and(|value| value == "true")
    };
    if !is_set(namespace_annotations, "allow") || !is_set(&pod.annotations, "auto-salvage") {
        return Verdict::Leave(Leave::NotOptedIn);
    }
    let reference = match container.image.parse::<Reference>() {
        Ok(reference) => reference,
        Err(error) => return Verdict::Tell(NotActionable::Unreadable(error)),
    };
    let said = container.waiting.as_ref().and_then(cause);
    match said.filter(|_| known_cause != Some(Cause::Denied)).or(known_cause) {
        Some(Cause::Denied) => Verdict::Tell(NotActionable::Denied),
        None => Verdict::Leave(Leave::CauseUnknown),
        Some(_) if container.pull_policy == PullPolicy::Always => Verdict::Tell(NotActionable::PullsAlways),
        Some(cause) => Verdict::Recover(reference, cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerKind, PodRef};

    fn waiting(reason: &str, message: &str) -> Waiting {
        Waiting { reason: reason.into(), message: message.into() }
    }

    fn container(image: &str, pull_policy: PullPolicy, reason: &str, message: &str) -> ContainerView {
        let waiting = Some(waiting(reason, message));
        ContainerView { name: "c".into(), kind: ContainerKind::Ordinary, image: image.into(), pull_policy, waiting }
    }

    fn pod(k8s_namespace: &str, annotations: &[(&str, &str)]) -> PodView {
        let pod = PodRef { k8s_namespace: k8s_namespace.into(), name: "p".into(), uid: "u".into() };
        PodView { pod, annotations: map(annotations), containers: Vec::new(), ending: false }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn policy() -> Policy {
        Policy {
            kill_switch: false,
            annotation_prefix: "lighterman.dev".into(),
            denied_k8s_namespaces: ["kube-system".to_owned()].into(),
        }
    }

    const ALLOW: (&str, &str) = ("lighterman.dev/allow", "true");
    const SALVAGE: (&str, &str) = ("lighterman.dev/auto-salvage", "true");
    const REFUSED: &str = "dial tcp 10.77.0.1:5000: connect: connection refused";

    #[test]
    fn the_cause_is_read_from_what_kubelets_really_say() {
        for (message, expected) in [
            (
                "failed to do request: Head \"https://r.test/v2/a\": dial tcp: lookup r.test: no such host",
                Some(Cause::Unavailable),
            ),
            (REFUSED, Some(Cause::Unavailable)),
            ("net/http: TLS handshake timeout", Some(Cause::Unavailable)),
            ("dial tcp 10.0.0.1:443: i/o timeout", Some(Cause::Unavailable)),
            ("unexpected status from HEAD request to http://r/v2/a: 503 Service Unavailable", Some(Cause::Unavailable)),
            ("httpReadSeeker: failed open: unexpected EOF", Some(Cause::Unavailable)),
            (
                "429 Too Many Requests - toomanyrequests: You have reached your pull rate limit",
                Some(Cause::RateLimited),
            ),
            ("failed to resolve reference \"r/a:1\": r/a:1: not found", Some(Cause::NotFound)),
            ("manifest unknown", Some(Cause::NotFound)),
            ("pull access denied, repository does not exist or may require authorization", Some(Cause::Denied)),
            ("unexpected status code: 401 Unauthorized", Some(Cause::Denied)),
            ("connection refused; then 403 Forbidden", Some(Cause::Denied)),
            ("failed to pull image \"r.test/denied/a@sha256:403\": connection refused", Some(Cause::Unavailable)),
            ("failed to resolve r.test/forbidden:401: not found", Some(Cause::NotFound)),
            ("Back-off pulling image \"r/a:1\"", None),
            ("Back-off pulling image \"app:403\"", None),
            ("Back-off pulling image \"app:500\": rpc error", None),
            ("failed to pull \\\"denied:1\\\": connection refused", Some(Cause::Unavailable)),
            ("", None),
        ] {
            assert_eq!(cause(&waiting("ErrImagePull", message)), expected, "{message}");
        }
    }

    #[test]
    fn only_image_failures_are_looked_at() {
        for (reason, message, expected) in [
            ("ErrImagePull", "", true),
            ("ImagePullBackOff", "", true),
            ("RegistryUnavailable", "", true),
            ("ErrImageNeverPull", "", true),
            ("CreateContainerError", "content digest sha256:00: not found", true),
            ("CreateContainerError", "exec: \"nope\": executable file not found in $PATH", false),
            ("InvalidImageName", "", false),
            ("SignatureValidationFailed", "", false),
            ("CrashLoopBackOff", "", false),
            ("CreateContainerConfigError", "secret \"x\" not found", false),
            ("ContainerCreating", "", false),
        ] {
            let container = container("a", PullPolicy::IfNotPresent, reason, message);
            assert_eq!(waits_for_image(&container), expected, "{reason}: {message}");
        }
    }

    #[test]
    fn both_the_namespace_and_the_pod_must_opt_in_with_exactly_true() {
        let failing = container("a", PullPolicy::IfNotPresent, "ErrImagePull", REFUSED);
        let verdict = |namespace: &[(&str, &str)], annotations: &[(&str, &str)]| {
            decide(&pod("default", annotations), &failing, None, &map(namespace), &policy())
        };
        assert!(matches!(verdict(&[ALLOW], &[SALVAGE]), Verdict::Recover(_, Cause::Unavailable)));
        let left = Verdict::Leave(Leave::NotOptedIn);
        assert_eq!(verdict(&[], &[SALVAGE]), left);
        assert_eq!(verdict(&[ALLOW], &[]), left);
        for wrong in ["True", "yes", "1", "", " true"] {
            assert_eq!(verdict(&[("lighterman.dev/allow", wrong)], &[SALVAGE]), left, "{wrong:?}");
            assert_eq!(verdict(&[ALLOW], &[("lighterman.dev/auto-salvage", wrong)]), left, "{wrong:?}");
        }
    }

    #[test]
    fn denied_namespaces_and_the_kill_switch_come_first() {
        let failing = container("a", PullPolicy::IfNotPresent, "ErrImagePull", REFUSED);
        let system = pod("kube-system", &[SALVAGE]);
        assert_eq!(decide(&system, &failing, None, &map(&[ALLOW]), &policy()), Verdict::Leave(Leave::DeniedNamespace));
        let off = Policy { kill_switch: true, ..policy() };
        let ours = pod("default", &[SALVAGE]);
        assert_eq!(decide(&ours, &failing, None, &map(&[ALLOW]), &off), Verdict::Leave(Leave::KillSwitch));
    }

    #[test]
    fn what_cannot_be_helped_is_told_with_a_way_out() {
        let ours = pod("default", &[SALVAGE]);
        let verdict = |container: &ContainerView, known| decide(&ours, container, known, &map(&[ALLOW]), &policy());
        let denied = container("r.test/a", PullPolicy::IfNotPresent, "ErrImagePull", "403 Forbidden");
        assert_eq!(verdict(&denied, None), Verdict::Tell(NotActionable::Denied));
        let always = container("r.test/a", PullPolicy::Always, "ErrImagePull", REFUSED);
        assert_eq!(verdict(&always, None), Verdict::Tell(NotActionable::PullsAlways));
        let unreadable = container("r.test/A", PullPolicy::IfNotPresent, "ErrImagePull", REFUSED);
        let Verdict::Tell(told) = verdict(&unreadable, None) else { panic!("an unreadable name was accepted") };
        assert!(told.note("r.test/A").contains("the repository"), "{}", told.note("r.test/A"));
    }

    #[test]
    fn a_cause_that_was_understood_once_holds_while_the_kubelet_backs_off() {
        let ours = pod("default", &[SALVAGE]);
        let silent = container("a", PullPolicy::IfNotPresent, "ImagePullBackOff", "Back-off pulling image \"a\"");
        let verdict = |container: &ContainerView, known| decide(&ours, container, known, &map(&[ALLOW]), &policy());
        assert_eq!(verdict(&silent, None), Verdict::Leave(Leave::CauseUnknown));
        assert!(matches!(verdict(&silent, Some(Cause::NotFound)), Verdict::Recover(_, Cause::NotFound)));
        let refused = container("a", PullPolicy::IfNotPresent, "ErrImagePull", REFUSED);
        assert_eq!(verdict(&refused, Some(Cause::Denied)), Verdict::Tell(NotActionable::Denied), "a denial stays");
    }
}
