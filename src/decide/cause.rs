//! The cause of a missing image, read from the kubelet's messages, and the image that is missing.
//!
//! `kubelet_message` has the grammar of the messages.

mod kubelet_message;

use crate::model::{ContainerView, OutageKind, PodView, PullPolicy, WaitingState};
use crate::oci::Reference;

/// Why the kubelet has no image, as far as its messages say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The registry is unreachable, or reports an error of its own.
    Unavailable(OutageKind),
    /// The registry's token server fails. The registry itself may be healthy.
    TokenServer,
    /// A proxy between this node and the registry refuses or fails.
    Proxy,
    /// The registry answers 429.
    RateLimited,
    /// The registry does not have the image, or no longer has the image: 404, 410, 451.
    NotFound,
    /// The registry denies the image to these credentials: 401, 403. Never bypassed.
    Denied,
    /// The registry served the manifest, and its storage denies a blob: 403.
    StorageDenied,
    /// The registry sent too few bytes, or bytes that do not match the digest.
    BadBytes,
    /// Content of this node is missing or damaged.
    MissingContent,
    /// The pod has `imagePullPolicy: Never`; an import cures this cause.
    NeverPull,
    /// The kubelet's own limit of pulls.
    KubeletLimit,
    /// Another fault of this node, such as its disk or its runtime. No registry is at fault.
    Local,
    /// No pull has failed yet, the registry is known to be down, and the image is not here.
    KnownOutage,
    /// The kubelet's pull has lasted so long that the pull counts as stalled.
    Stalled,
    /// The message has a cause, and no rule here matches the message.
    NotUnderstood,
}

/// Whether the container waits for an image, for any cause.
///
/// The list has the kubelet's reasons (kubelet `images` package). Deliberately not in the list:
/// `InvalidImageName`, `SignatureValidationFailed`, `CrashLoopBackOff`,
/// `CreateContainerConfigError`.
pub fn waits_for_image(container: &ContainerView) -> bool {
    container.waiting.as_ref().is_some_and(|waiting| match waiting.reason.as_str() {
        "ErrImagePull" | "ImagePullBackOff" | "RegistryUnavailable" | "ErrImageNeverPull" => true,
        "CreateContainerError" => is_missing_content(&waiting.message),
        _ => false,
    })
}

/// Whether the status shows no work of the kubelet on the container yet. The image may wait in the
/// pull queue, or may be pulled now.
pub fn is_pending(container: &ContainerView) -> bool {
    let reasons = ["", "ContainerCreating", "PodInitializing"];
    container.waiting.as_ref().is_some_and(|waiting| reasons.contains(&waiting.reason.as_str()))
}

/// The image that a container waits for, with its pull policy: the container's image, or the image
/// of a volume that the message names.
pub fn failing_image<'a>(pod: &'a PodView, container: &'a ContainerView) -> (&'a str, PullPolicy) {
    let message = container.waiting.as_ref().map_or("", |waiting| waiting.message.as_str());
    let is_about = |image: &str| names_image(message, image);
    let volume = pod.image_volumes.iter().find(|volume| is_about(&volume.image));
    match volume.filter(|volume| volume.image != container.image && !is_about(&container.image)) {
        Some(volume) => (&volume.image, volume.pull_policy),
        None => (&container.image, container.pull_policy),
    }
}

/// Whether a message has the image as a whole word, as written in the pod or in full.
pub fn names_image(message: &str, image: &str) -> bool {
    let in_full = image.parse::<Reference>().map(|reference| reference.to_string());
    let mut words = message.split(|c: char| c.is_whitespace() || matches!(c, '"' | '\\' | ',' | ';'));
    words.any(|word| {
        let word = word.trim_end_matches(':');
        !word.is_empty() && (word == image || in_full.as_ref().is_ok_and(|full| word == full))
    })
}

/// The cause in the kubelet's message; `None` while the message has none.
pub fn classify(waiting: &WaitingState) -> Option<Cause> {
    match waiting.reason.as_str() {
        "ErrImageNeverPull" => Some(Cause::NeverPull),
        "CreateContainerError" => is_missing_content(&waiting.message).then_some(Cause::MissingContent),
        // The runtime itself reports this reason; its message has the details.
        "RegistryUnavailable" => match kubelet_message::classify(&waiting.message) {
            None | Some(Cause::NotUnderstood) => Some(Cause::Unavailable(OutageKind::Refused)),
            cause => cause,
        },
        _ => kubelet_message::classify(&waiting.message),
    }
}

/// The cause in a kubelet Event about a failed pull; `None` for other Events.
pub fn classify_event(message: &str) -> Option<Cause> {
    message.starts_with("Failed to pull image").then(|| kubelet_message::classify(message)).flatten()
}

/// Whether a kubelet Event says that a pull of the image begins or is queued: the kubelet writes
/// this Event before the pull joins the queue.
pub fn is_pulling(message: &str, image: &str) -> bool {
    message.starts_with("Pulling image") && names_image(message, image)
}

/// Whether a message about a failed pull names a host other than the registry's own, such as a
/// mirror in containerd's `hosts.toml`.
///
/// containerd adds `ns=REGISTRY` to every request to another host than the reference's own.
pub fn names_another_host(message: &str, registry: &str) -> bool {
    // The host name of Docker Hub's registry differs from the registry in the names of its images.
    let own_host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let after_scheme = message.split("://").skip(1);
    let mut manifests =
        after_scheme.filter_map(|rest| rest.split(['"', ' ']).next()).filter(|url| url.contains("/v2/"));
    manifests.any(|url| url.contains("?ns=") || url.split('/').next().is_some_and(|host| host != own_host))
}

/// The image that the kubelet needs for a sandbox and cannot pull, with the cause. The pod shows
/// only an Event of reason `FailedCreatePodSandbox`. containerd up to 2.2 writes `failed to get
/// sandbox image "IMAGE"` before the failed pull, containerd from 2.3 on only the failed pull.
pub fn missing_sandbox_image(message: &str) -> Option<(Reference, Cause)> {
    let text = message.strip_prefix("Failed to create pod sandbox")?;
    let frames = ["failed to get sandbox image \"", "failed to pull image \""];
    let (_, rest) = frames.iter().find_map(|frame| text.split_once(frame))?;
    let (image, rest) = rest.split_once('"')?;
    Some((image.parse().ok()?, kubelet_message::classify(rest)?))
}

/// Whether the kubelet cannot create a container because content of its image is missing or
/// damaged. The reason `CreateContainerError` covers all other obstacles too.
fn is_missing_content(text: &str) -> bool {
    let is_about_content =
        ["unpack", "content", "rootfs", "failed to get image"].iter().any(|word| text.contains(word));
    is_about_content && kubelet_message::classify(text) == Some(Cause::MissingContent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerKind, ImageVolume, PodRef};

    fn waiting(reason: &str, message: &str) -> WaitingState {
        WaitingState { reason: reason.into(), message: message.into() }
    }

    fn container(image: &str, waiting: WaitingState) -> ContainerView {
        let (name, kind) = ("c".to_owned(), ContainerKind::Ordinary);
        ContainerView { name, kind, image: image.into(), pull_policy: PullPolicy::Always, waiting: Some(waiting) }
    }

    #[test]
    fn real_kubelet_messages_are_classified() {
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
            ("connection refused\n403 Forbidden", Some(Cause::Denied)),
            (
                "[rpc error: code = Unknown desc = 403 Forbidden, rpc error: code = Unknown desc = EOF]",
                Some(Cause::Denied),
            ),
            ("failed to pull image \"r.test/denied/a@sha256:403\": connection refused", down(OutageKind::Refused)),
            ("failed to resolve r.test/unauthorized:401: not found", Some(Cause::NotFound)),
            ("dial tcp: lookup eof.test: no such host", down(OutageKind::NoSuchHost)),
            ("Back-off pulling image \"r/a:1\"", None),
            ("Back-off pulling image \"app:403\"", None),
            (
                "Back-off pulling image \"app:500\": ErrImagePull: rpc error: code = Unknown desc = 429 Too Many",
                Some(Cause::RateLimited),
            ),
            ("failed to pull \\\"denied:1\\\": connection refused", down(OutageKind::Refused)),
            ("dial tcp [2001:db8::403]:443: connect: connection refused", down(OutageKind::Refused)),
            ("read tcp 10.0.0.5:40100->10.0.0.1:401: read: connection reset by peer", down(OutageKind::Refused)),
            ("dial tcp 10.0.0.1:443: connect: permission denied", Some(Cause::Local)),
            ("the moon is in the wrong house", Some(Cause::NotUnderstood)),
            ("", None),
        ] {
            assert_eq!(classify(&waiting("ErrImagePull", message)), expected, "{message}");
        }
    }

    /// Whether the reading in a row of `messages.tsv` covers the cause.
    fn matches_column(reading: &str, cause: Option<Cause>) -> bool {
        match cause {
            Some(Cause::Unavailable(_)) => reading == "unavailable",
            Some(Cause::TokenServer) => reading == "token-server",
            Some(Cause::Proxy) => reading == "proxy",
            Some(Cause::RateLimited) => reading == "rate-limited",
            Some(Cause::NotFound) => reading == "gone",
            Some(Cause::Denied) => reading == "denied",
            Some(Cause::StorageDenied) => reading == "storage-denied",
            Some(Cause::BadBytes) => reading == "bad-bytes",
            Some(Cause::MissingContent) => reading == "missing-content",
            Some(Cause::KubeletLimit | Cause::Local) => reading == "local",
            Some(Cause::NotUnderstood) => reading == "unknown",
            Some(Cause::NeverPull | Cause::KnownOutage | Cause::Stalled) | None => false,
        }
    }

    #[test]
    fn every_message_of_the_table_is_classified() {
        let rows = include_str!("cause/messages.tsv").lines().filter(|line| !line.starts_with('#'));
        let (mut read, mut wrong) = (0, Vec::new());
        for row in rows {
            let columns: Vec<_> = row.splitn(5, '\t').collect();
            let [reading, version, reason, _, message] = columns[..] else { panic!("a row has five columns: {row}") };
            let waiting = waiting(reason, message);
            match classify(&waiting) {
                cause if matches_column(reading, cause) => read += 1,
                cause => wrong.push(format!("{version} {reading}, read as {cause:?}: {message}")),
            }
            let backing_off = WaitingState {
                reason: "ImagePullBackOff".into(),
                message: format!("Back-off pulling image \"a:1\": {reason}: {message}"),
            };
            let is_pull = reason == "ErrImagePull";
            assert!(!is_pull || classify(&backing_off) == classify(&waiting), "the same while backing off: {message}");
        }
        println!("figure messages_read_of_table {read}/{}", read + wrong.len());
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn a_mirror_is_recognized_by_its_host_or_by_the_namespace_in_the_request() {
        for (registry, url, expected) in [
            ("r.test:5000", "https://r.test:5000/v2/a/manifests/1", false),
            ("r.test:5000", "http://mirror:80/v2/a/manifests/1?ns=r.test%3A5000", true),
            ("r.test:5000", "http://r.test:5000/v2/a/manifests/1?ns=r.test%3A5000", true),
            ("r.test", "https://mirror.test/v2/a/manifests/1", true),
            ("docker.io", "https://registry-1.docker.io/v2/library/nginx/manifests/1", false),
            ("r.test", "https://auth.test/token?service=r.test", false),
            ("[fd77::1]:5000", "http://[fd77::1]:5000/v2/a/manifests/1", false),
            ("[fd77::1]:5000", "http://[fd77::2]:5000/v2/a/manifests/1", true),
        ] {
            let message = format!("failed to do request: Head \"{url}\": EOF");
            assert_eq!(names_another_host(&message, registry), expected, "{url}");
        }
        assert!(!names_another_host("dial tcp 10.0.0.1:443: connect: connection refused", "r.test"));
    }

    #[test]
    fn an_event_of_the_kubelet_that_is_about_no_failed_pull_names_no_cause() {
        for (message, expected) in [
            ("Failed to pull image \"r/a:1\": manifest unknown", Some(Cause::NotFound)),
            ("Pulling image \"r/a:1\"", None),
            ("Successfully pulled image \"r/a:1\" in 12ms", None),
            ("Container image \"r/a:1\" already present on machine", None),
            ("Error: ErrImagePull", None),
        ] {
            assert_eq!(classify_event(message), expected, "{message}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_message_makes_the_classification_panic(message in ".{0,300}", reason in "[A-Za-z]{0,20}") {
            let _ = classify(&waiting(&reason, &message));
        }

        #[test]
        fn the_name_of_an_image_never_changes_the_cause(host in "r\\.test|\\[2001:db8::403\\]:5000", name in "[a-z]{1,8}(/(denied|unauthorized|eof|timeout|403|429|toomanyrequests)){1,3}") {
            let message = format!("failed to pull and unpack image \"{host}/{name}:1\": failed to resolve image: {host}/{name}:1: not found");
            proptest::prop_assert_eq!(classify(&waiting("ErrImagePull", &message)), Some(Cause::NotFound));
        }
    }

    #[test]
    fn only_image_failures_count_as_waiting_for_an_image() {
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
    fn a_failing_image_volume_is_distinguished_from_the_image_of_the_container() {
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
            is_ending: false,
        };
        for (image, message, expected) in [
            ("r.test/app:1", "failed to pull and unpack image \"r.test/model:1\": refused", "r.test/model:1"),
            ("r.test/app:1", "Back-off pulling image \"r.test/app:1\"", "r.test/app:1"),
            ("r.test/app:1", "Back-off pulling image \"r.test/model:12\"", "r.test/app:1"),
            ("r.test/app:1", "", "r.test/app:1"),
            ("r.test/model:1", "Back-off pulling image \"r.test/model:1\"", "r.test/model:1"),
        ] {
            let container = container(image, waiting("ErrImagePull", message));
            assert_eq!(failing_image(&pod, &container).0, expected, "{message}");
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
        assert_eq!(missing_sandbox_image(&message), Some(expected.clone()));
        let since_2_3 = format!(
            "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to pull image \"r.test/pause:3.8\": failed to pull and \
             unpack image \"r.test/pause:3.8\": {refused}"
        );
        assert_eq!(missing_sandbox_image(&since_2_3), Some(expected));
        let of_a_container =
            format!("Failed to pull image \"r.test/app:1\": failed to pull image \"r.test/app:1\": {refused}");
        assert_eq!(missing_sandbox_image(&of_a_container), None);
        let other =
            "Failed to create pod sandbox: plugin type=\"bridge\" failed (add): no IP addresses: connection refused";
        assert_eq!(missing_sandbox_image(other), None);
    }
}
