//! What the kubelet's words say about a missing image: why it is missing, and which image that is.

use crate::model::{ContainerView, OutageKind, PodView, PullPolicy, Waiting};
use crate::oci::Reference;

/// Why the kubelet has no image, as far as its words tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// No registry there.
    Unavailable(OutageKind),
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
    /// Nothing has failed yet, but the registry is known to be down and the image is not here.
    KnownOutage,
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

/// Whether the kubelet has not come to the container yet, as far as its status shows. The image may be queued for, or being pulled.
pub fn is_pending(container: &ContainerView) -> bool {
    let reasons = ["", "ContainerCreating", "PodInitializing"];
    container.waiting.as_ref().is_some_and(|waiting| reasons.contains(&waiting.reason.as_str()))
}

/// The image that a waiting container waits for, and when the kubelet pulls it: its own, or that of a volume, when the message is about that.
pub fn image_in_question<'a>(pod: &'a PodView, container: &'a ContainerView) -> (&'a str, PullPolicy) {
    let message = container.waiting.as_ref().map_or("", |waiting| waiting.message.as_str());
    let is_about = |image: &str| names_image(message, image);
    let volume = pod.image_volumes.iter().find(|volume| is_about(&volume.image));
    match volume.filter(|volume| volume.image != container.image && !is_about(&container.image)) {
        Some(volume) => (&volume.image, volume.pull_policy),
        None => (&container.image, container.pull_policy),
    }
}

/// Whether a message has the image in it, as it was written or in full, as a whole word.
pub fn names_image(message: &str, image: &str) -> bool {
    let in_full = image.parse::<Reference>().map(|reference| reference.to_string());
    let mut words = message.split(|c: char| c.is_whitespace() || matches!(c, '"' | '\\' | ',' | ';'));
    words.any(|word| {
        let word = word.trim_end_matches(':');
        !word.is_empty() && (word == image || in_full.as_ref().is_ok_and(|full| word == full))
    })
}

/// Reads the cause out of the kubelet's words; `None` while they do not name one.
pub fn cause(waiting: &Waiting) -> Option<Cause> {
    match waiting.reason.as_str() {
        "ErrImageNeverPull" => Some(Cause::NeverPull),
        "CreateContainerError" => is_missing_content(&waiting.message).then_some(Cause::MissingContent),
        "RegistryUnavailable" => cause_in(&waiting.message).or(Some(Cause::Unavailable(OutageKind::Refused))),
        _ => cause_in(&waiting.message),
    }
}

/// Reads the cause out of any sentence about a failed pull.
///
/// "Denied" wins over everything else in the same message: containerd joins the errors of several hosts.
pub fn cause_in(message: &str) -> Option<Cause> {
    let message = without_names(message);
    let has_word = |wanted: &str| message.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == wanted);
    let told = |clues: &Clues| {
        clues.words.iter().any(|word| has_word(word)) || clues.text.iter().any(|text| message.contains(text))
    };
    CLUES.iter().find(|clues| told(clues)).map(|clues| clues.cause)
}

/// The image that a sandbox could not be made for want of, and why. The pod shows nothing but an Event of reason
/// `FailedCreatePodSandBox`; its message says `failed to get sandbox image "IMAGE": ...` on containerd 1.6 to 2.1.
pub fn missing_sandbox_image(message: &str) -> Option<(Reference, Cause)> {
    let (_, rest) = message.split_once("sandbox image \"")?;
    let (image, rest) = rest.split_once('"')?;
    Some((image.parse().ok()?, cause_in(rest)?))
}

/// The message in lower case without URLs and image names: a repository may be called `denied`, and a digest may contain `403`.
/// A single word in quotes is a name as well: `Back-off pulling image "app:403"`.
fn without_names(message: &str) -> String {
    let is_quoted = |token: &str| {
        let token = token.trim_end_matches([':', ',', ';', '.']);
        token.len() > 1 && token.starts_with(['"', '\\']) && token.ends_with('"')
    };
    // An address and a port, or two of them with an arrow between: `[2001:db8::403]:443:`.
    let is_address = |token: &str| {
        let token = token.trim_end_matches([':', ',', ';', '.']);
        token.contains(':') && token.starts_with(|c: char| c == '[' || c.is_ascii_digit())
    };
    let is_name = |token: &str| {
        (token.contains('/') && !token.contains("i/o")) || token.contains('@') || is_quoted(token) || is_address(token)
    };
    let kept: Vec<_> = message.split_whitespace().filter(|token| !is_name(token)).collect();
    // What the kernel or the file system denies is not the registry's doing.
    kept.join(" ").to_ascii_lowercase().replace("permission denied", "")
}

/// What gives a cause away: whole words (status codes above all), or pieces of text.
struct Clues {
    cause: Cause,
    words: &'static [&'static str],
    text: &'static [&'static str],
}

/// The first that applies counts.
const CLUES: [Clues; 8] = [
    Clues {
        cause: Cause::Denied,
        words: &["401", "403", "denied", "unauthorized", "forbidden"],
        text: &["authorization failed", "authentication required", "no basic auth"],
    },
    Clues { cause: Cause::RateLimited, words: &["429", "toomanyrequests"], text: &["too many requests", "rate limit"] },
    Clues {
        cause: Cause::Unavailable(OutageKind::NoSuchHost),
        words: &[],
        text: &["no such host", "temporary failure in name resolution", "server misbehaving"],
    },
    // Before what is refused: a handshake that times out is a TLS failure, and its message says both.
    Clues { cause: Cause::Unavailable(OutageKind::Tls), words: &["tls", "x509"], text: &[] },
    Clues {
        cause: Cause::Unavailable(OutageKind::Refused),
        words: &["eof"],
        text: &["connection refused", "connection reset", "no route to host", "network is unreachable"],
    },
    Clues {
        cause: Cause::Unavailable(OutageKind::TimedOut),
        words: &[],
        text: &["connection timed out", "i/o timeout", "deadline exceeded"],
    },
    Clues {
        cause: Cause::Unavailable(OutageKind::ServerError),
        words: &["500", "502", "503", "504"],
        text: &["bad gateway", "service unavailable", "internal server error"],
    },
    Clues {
        cause: Cause::NotFound,
        words: &["404"],
        text: &["not found", "manifest unknown", "name unknown", "does not exist"],
    },
];

fn is_missing_content(message: &str) -> bool {
    message.contains("content digest") && message.contains("not found")
        || message.contains("failed to resolve rootfs")
        || message.contains("failed to get image") && message.contains("not found")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerKind, ImageVolume, PodRef};

    fn waiting(reason: &str, message: &str) -> Waiting {
        Waiting { reason: reason.into(), message: message.into() }
    }

    fn container(image: &str, waiting: Waiting) -> ContainerView {
        let (name, kind) = ("c".to_owned(), ContainerKind::Ordinary);
        ContainerView { name, kind, image: image.into(), pull_policy: PullPolicy::Always, waiting: Some(waiting) }
    }

    #[test]
    fn the_cause_is_read_from_what_kubelets_really_say() {
        let down = |kind| Some(Cause::Unavailable(kind));
        for (message, expected) in [
            (
                "failed to do request: Head \"https://r.test/v2/a\": dial tcp: lookup r.test: no such host",
                down(OutageKind::NoSuchHost),
            ),
            ("dial tcp 10.77.0.1:5000: connect: connection refused", down(OutageKind::Refused)),
            ("net/http: TLS handshake timeout", down(OutageKind::Tls)),
            ("tls: failed to verify certificate: x509: certificate has expired", down(OutageKind::Tls)),
            ("dial tcp 10.0.0.1:443: i/o timeout", down(OutageKind::TimedOut)),
            ("rpc error: code = DeadlineExceeded desc = context deadline exceeded", down(OutageKind::TimedOut)),
            (
                "unexpected status from HEAD request to http://r/v2/a: 503 Service Unavailable",
                down(OutageKind::ServerError),
            ),
            ("httpReadSeeker: failed open: unexpected EOF", down(OutageKind::Refused)),
            (
                "429 Too Many Requests - toomanyrequests: You have reached your pull rate limit",
                Some(Cause::RateLimited),
            ),
            ("failed to resolve reference \"r/a:1\": r/a:1: not found", Some(Cause::NotFound)),
            ("manifest unknown", Some(Cause::NotFound)),
            ("pull access denied, repository does not exist or may require authorization", Some(Cause::Denied)),
            ("unexpected status code: 401 Unauthorized", Some(Cause::Denied)),
            ("connection refused; then 403 Forbidden", Some(Cause::Denied)),
            ("failed to pull image \"r.test/denied/a@sha256:403\": connection refused", down(OutageKind::Refused)),
            ("failed to resolve r.test/forbidden:401: not found", Some(Cause::NotFound)),
            ("Back-off pulling image \"r/a:1\"", None),
            ("Back-off pulling image \"app:403\"", None),
            ("Back-off pulling image \"app:500\": rpc error", None),
            ("failed to pull \\\"denied:1\\\": connection refused", down(OutageKind::Refused)),
            ("dial tcp [2001:db8::403]:443: connect: connection refused", down(OutageKind::Refused)),
            ("read tcp 10.0.0.5:40100->10.0.0.1:401: read: connection reset by peer", down(OutageKind::Refused)),
            ("dial tcp 10.0.0.1:443: connect: permission denied", None),
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
            assert_eq!(waits_for_image(&container("a", waiting(reason, message))), expected, "{reason}: {message}");
        }
        for (reason, expected) in
            [("", true), ("ContainerCreating", true), ("PodInitializing", true), ("ErrImagePull", false)]
        {
            assert_eq!(is_pending(&container("a", waiting(reason, ""))), expected, "{reason}");
        }
    }

    #[test]
    fn a_failing_image_volume_is_told_from_the_containers_own_image() {
        let volume =
            ImageVolume { name: "model".into(), image: "r.test/model:1".into(), pull_policy: PullPolicy::IfNotPresent };
        let pod = PodView {
            pod: PodRef { k8s_namespace: "shop".into(), name: "p".into(), uid: "u".into() },
            annotations: Default::default(),
            containers: Vec::new(),
            image_volumes: vec![volume],
            owner: None,
            is_static: false,
            priority: 0,
            pull_secrets: Vec::new(),
            ending: false,
        };
        for (image, message, expected) in [
            ("r.test/app:1", "failed to pull and unpack image \"r.test/model:1\": refused", "r.test/model:1"),
            ("r.test/app:1", "Back-off pulling image \"r.test/app:1\"", "r.test/app:1"),
            ("r.test/app:1", "Back-off pulling image \"r.test/model:12\"", "r.test/app:1"),
            ("r.test/app:1", "", "r.test/app:1"),
            ("r.test/model:1", "Back-off pulling image \"r.test/model:1\"", "r.test/model:1"),
        ] {
            let container = container(image, waiting("ErrImagePull", message));
            assert_eq!(image_in_question(&pod, &container).0, expected, "{message}");
        }
    }

    #[test]
    fn a_missing_sandbox_image_is_read_from_the_event() {
        let refused = "failed to do request: Head \"https://r.test/v2/pause\": dial tcp 10.0.0.1:443: connect: connection refused";
        let message = format!(
            "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to start sandbox \"0123\": failed to get sandbox image \
             \"r.test/pause:3.8\": failed to pull image \"r.test/pause:3.8\": failed to pull and unpack image \"r.test/pause:3.8\": {refused}"
        );
        let expected = ("r.test/pause:3.8".parse().unwrap(), Cause::Unavailable(OutageKind::Refused));
        assert_eq!(missing_sandbox_image(&message), Some(expected));
        let other =
            "Failed to create pod sandbox: plugin type=\"bridge\" failed (add): no IP addresses: connection refused";
        assert_eq!(missing_sandbox_image(other), None);
    }
}
