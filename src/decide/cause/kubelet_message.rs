//! The grammar of a failed pull: frames of containerd and the kubelet, and the error inside the
//! frames.
//!
//! Both write Go's wrapped errors, `frame: frame: error`. The frames tell the step that failed, and
//! so the faulty side. The same words have other meanings in other steps: `not found` of a registry
//! or of the content store, `EOF` of a connection or of a layer. So a word counts only inside its
//! frame. The texts were seen on containerd 1.6 to 2.4 and kubelet 1.35 to 1.37, or are in their
//! sources; `messages.tsv` has the texts with the expected readings.

use super::Cause;
use crate::model::OutageKind;

/// Bytes of a message that are parsed. The kubelet truncates termination messages at 4096 bytes and
/// passes pull errors on in full; the longest one seen has 800.
const MAX_MESSAGE: usize = 8192;

/// The cause in one message; `None` without a cause, as in the kubelet's `Back-off pulling image
/// "..."` alone.
pub(super) fn classify(message: &str) -> Option<Cause> {
    let mut end = message.len().min(MAX_MESSAGE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    // The kubelet lists the errors of several credentials as `[one, two]`; containerd joins those
    // of several hosts by line breaks.
    let text = message[..end].replace("\\\"", "\"");
    let text = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(&text);
    let causes = text.lines().flat_map(|line| line.split(", rpc error: ")).filter_map(classify_line);
    causes.min_by_key(|cause| precedence(*cause))
}

/// Precedence among several errors. A denial wins, because the failure of another host must not
/// bypass a denial. An unreadable line comes last, because a registry may send a body with its
/// status.
fn precedence(cause: Cause) -> u8 {
    match cause {
        Cause::Denied => 0,
        Cause::NotUnderstood => 2,
        _ => 1,
    }
}

/// The step of a pull that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PullStep {
    /// No frame has named a step yet.
    Unknown,
    /// Resolving a tag or digest at the registry, or fetching its manifest.
    Resolve,
    /// Requesting a token from the registry's token server.
    Authorize,
    /// Fetching a blob, perhaps from a storage after a redirect of the registry.
    FetchBlob,
    /// Comparing received bytes with the digest.
    Commit,
    /// Unpacking a layer into a snapshot, or reading the content for this.
    Unpack,
}

fn classify_line(line: &str) -> Option<Cause> {
    let segments = segments(line);
    let mut step = PullStep::Unknown;
    let mut named_url = false;
    for (position, segment) in segments.iter().enumerate() {
        if let Some(next) = step_of_frame(segment, step) {
            step = next;
            continue;
        }
        if is_neutral_frame(segment) {
            continue;
        }
        if segment.starts_with("rpc error") || segment.starts_with("desc = ") || segment.starts_with("code = ") {
            continue;
        }
        if let Some(url) = request_url(segment) {
            named_url = true;
            step = step_of_url(url, step);
            continue;
        }
        let rest = segments[position..].join(": ");
        return Some(cause_of_error(&rest, step, named_url));
    }
    // Frames of a step without an error: the message was truncated. A lone back-off has no cause
    // yet.
    (step != PullStep::Unknown).then_some(Cause::NotUnderstood)
}

/// Splits at `: ` outside of double quotes: a URL has no space after its colon, and a quoted name
/// may have one.
fn segments(line: &str) -> Vec<&str> {
    let bytes = line.as_bytes();
    let (mut parts, mut start, mut quoted) = (Vec::new(), 0, false);
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b':' if !quoted && bytes.get(at + 1) == Some(&b' ') => {
                parts.push(line[start..at].trim());
                start = at + 2;
            }
            _ => {}
        }
    }
    parts.push(line[start..].trim());
    // `code = Unknown desc = failed to pull ...` is one part with the next frame behind it.
    parts.into_iter().map(|part| part.split_once(" desc = ").map_or(part, |(_, inner)| inner)).collect()
}

/// The step that a frame begins, if any.
fn step_of_frame(segment: &str, step: PullStep) -> Option<PullStep> {
    const FRAMES: [(&str, PullStep); 15] = [
        ("failed to resolve reference", PullStep::Resolve),
        ("failed to resolve image", PullStep::Resolve),
        ("failed to fetch manifest", PullStep::Resolve),
        ("failed to authorize", PullStep::Authorize),
        ("failed to fetch anonymous token", PullStep::Authorize),
        ("failed to fetch oauth token", PullStep::Authorize),
        ("failed to copy", PullStep::FetchBlob),
        ("could not fetch content descriptor", PullStep::FetchBlob),
        ("httpReadSeeker", PullStep::FetchBlob),
        ("failed commit on ref", PullStep::Commit),
        ("failed to read expected number of bytes", PullStep::Commit),
        ("failed to extract layer", PullStep::Unpack),
        ("failed to unpack", PullStep::Unpack),
        ("error unpacking image", PullStep::Unpack),
        ("apply layer error", PullStep::Unpack),
    ];
    let (_, next) = FRAMES.iter().find(|(beginning, _)| segment.starts_with(beginning))?;
    // The frame of a token request is inside the frame of the request that needs the token.
    Some(if step == PullStep::Authorize { step } else { *next })
}

/// Frames without information about the step.
fn is_neutral_frame(segment: &str) -> bool {
    const FRAMES: [&str; 14] = [
        "Back-off pulling image",
        "ErrImagePull",
        "ImagePullBackOff",
        "RegistryUnavailable",
        "Error",
        "Failed to pull image",
        "failed to pull image",
        "failed to pull and unpack image",
        "image pull failed for",
        "failed to do request",
        "failed to create containerd container",
        "Failed to create pod sandbox",
        "failed open",
        "Failed to inspect image",
    ];
    segment.is_empty() || FRAMES.iter().any(|frame| segment.starts_with(frame))
}

/// The URL of `Head "https://..."`, and of the frames that only name the origin of the status.
fn request_url(segment: &str) -> Option<&str> {
    let methods = ["Head ", "Get ", "Post ", "HEAD ", "GET ", "POST "];
    if let Some(rest) = methods.iter().find_map(|method| segment.strip_prefix(method)) {
        return rest.contains("://").then_some(rest);
    }
    let statuses = ["unexpected status from ", "unexpected status code ", "pulling from host ", "unexpected status"];
    statuses.iter().find_map(|frame| segment.strip_prefix(frame))
}

/// The step that follows from a registry's URL. A storage's URL has no step.
fn step_of_url(url: &str, step: PullStep) -> PullStep {
    match step {
        PullStep::Authorize => step,
        _ if url.contains("/manifests/") => PullStep::Resolve,
        _ if url.contains("/blobs/") => PullStep::FetchBlob,
        PullStep::Unknown => PullStep::Resolve,
        _ => step,
    }
}

/// The cause that the innermost error stands for.
fn cause_of_error(text: &str, step: PullStep, named_url: bool) -> Cause {
    if let Some(status) = status(text) {
        return cause_of_status(status, step);
    }
    let lower = without_names(text);
    let has = |phrases: &[&str]| contains_any(&lower, phrases);
    // Faults of this node in any step: its disk, the runtime's socket, the kubelet's own limits.
    if has(&["pull qps exceeded"]) {
        return Cause::KubeletLimit;
    }
    if has(&["no space left on device", "read-only file system", "input/output error", "too many open files"])
        || has(&["error reading from server", "transport is closing", "dial unix", "error while dialing"])
        || has(&["permission denied"])
    {
        return Cause::Local;
    }
    if is_missing_content(&lower, step) {
        return Cause::MissingContent;
    }
    if has(&["unexpected commit", "short read", "digest mismatch"])
        || step == PullStep::Commit && has_word(&lower, "eof")
    {
        return Cause::BadBytes;
    }
    // The registry sent a page in place of the manifest. containerd 1.7 notices the wrong type only
    // while unpacking.
    if has(&["unexpected media type"]) {
        return Cause::NotFound;
    }
    if step == PullStep::Unpack {
        return Cause::Local;
    }
    let of_connect = if named_url { cause_of_connect_reply(&lower) } else { None };
    if let Some(cause) = of_connect.or_else(|| cause_of_registry_text(&lower, step)) {
        return cause;
    }
    if has(&["proxyconnect"]) {
        return Cause::Proxy;
    }
    match transport_failure(&lower) {
        _ if step == PullStep::Authorize => Cause::TokenServer,
        Some(kind) => Cause::Unavailable(kind),
        None => Cause::NotUnderstood,
    }
}

/// The status code at the beginning of the text.
fn status(text: &str) -> Option<u16> {
    let digits = text.get(..3)?.parse().ok()?;
    let ends = text[3..].chars().next().is_none_or(|after| !after.is_ascii_alphanumeric());
    ((100..=599).contains(&digits) && ends).then_some(digits)
}

fn cause_of_status(status: u16, step: PullStep) -> Cause {
    match (status, step) {
        (429, _) => Cause::RateLimited,
        // A registry that served the manifest has authorized the image. Its storage may deny the
        // blob for another reason, such as an expired signature of the URL or a bucket's policy.
        (403, PullStep::FetchBlob) => Cause::StorageDenied,
        (401 | 403, _) => Cause::Denied,
        (407, _) => Cause::Proxy,
        (_, PullStep::Authorize) => Cause::TokenServer,
        (404 | 410 | 451, _) => Cause::NotFound,
        (408, _) => Cause::Unavailable(OutageKind::TimedOut),
        (500..=599, _) => Cause::Unavailable(OutageKind::ServerError),
        _ => Cause::NotUnderstood,
    }
}

/// Content of this node that is missing or damaged, as after a power loss.
fn is_missing_content(lower: &str, step: PullStep) -> bool {
    let has = |phrases: &[&str]| contains_any(lower, phrases);
    let is_json = has(&["unexpected end of json input", "invalid character"]);
    has(&["wrong diff id calculated on extraction", "failed to get reader from content store"])
        || has(&["failed to resolve rootfs"])
        || has(&["unmarshal image config", "children: invalid desc", "unmarshal manifest"])
        || has(&["content digest", "failed to get image", "blob not found"]) && has(&["not found"])
        || is_json && matches!(step, PullStep::Unknown | PullStep::Unpack)
}

/// The cause in a registry's own text, where containerd shows no status.
fn cause_of_registry_text(lower: &str, step: PullStep) -> Option<Cause> {
    let has = |phrases: &[&str]| contains_any(lower, phrases);
    if has(&["access denied", "insufficient_scope", "authorization failed", "authentication required", "no basic auth"])
        || has(&["unauthorized", "requested access to the resource is denied"])
    {
        return Some(Cause::Denied);
    }
    if has(&["toomanyrequests", "too many requests", "rate limit"]) {
        return Some(Cause::RateLimited);
    }
    let is_gone = lower.ends_with("not found") || has(&["manifest unknown", "name unknown"]);
    (is_gone && step != PullStep::Authorize).then_some(Cause::NotFound)
}

/// The cause in a proxy's reply to CONNECT, of which Go shows only the reason phrase. A 5xx of a
/// proxy stands for the server behind the proxy.
fn cause_of_connect_reply(lower: &str) -> Option<Cause> {
    match lower.trim_end_matches('.') {
        "proxy authentication required" | "forbidden" | "method not allowed" | "bad request" | "not found" => {
            Some(Cause::Proxy)
        }
        "service unavailable" | "bad gateway" | "gateway timeout" | "internal server error" => {
            Some(Cause::Unavailable(OutageKind::ServerError))
        }
        _ => None,
    }
}

/// The kind of a connection failure, in the messages of Go's `net`, `crypto/tls` and `net/http`.
fn transport_failure(lower: &str) -> Option<OutageKind> {
    const KINDS: [(OutageKind, &[&str]); 4] = [
        (OutageKind::NoSuchHost, &["no such host", "temporary failure in name resolution", "server misbehaving"]),
        // Before the timeouts: a handshake that times out is a TLS failure, and its message has
        // both words.
        (
            OutageKind::Tls,
            &["tls:", "x509:", "tls handshake", "http response to https client", "malformed http", "remote error: tls"],
        ),
        (
            OutageKind::TimedOut,
            &[
                "timed out",
                "timeout",
                "deadline exceeded",
                "context canceled",
                "client connection lost",
                // ECONNABORTED: the agent closed a silent connection (SOCK_DESTROY).
                "software caused connection abort",
            ],
        ),
        (
            OutageKind::Refused,
            &[
                "connection refused",
                "connection reset",
                "no route to host",
                "network is unreachable",
                "host is down",
                "operation not permitted",
                "broken pipe",
                "server closed",
                "use of closed network connection",
                "stream error",
                "goaway",
            ],
        ),
    ];
    let failure = KINDS.iter().find(|(_, phrases)| contains_any(lower, phrases)).map(|(kind, _)| *kind);
    failure.or_else(|| has_word(lower, "eof").then_some(OutageKind::Refused))
}

fn contains_any(text: &str, phrases: &[&str]) -> bool {
    phrases.iter().any(|phrase| text.contains(phrase))
}

fn has_word(text: &str, wanted: &str) -> bool {
    text.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == wanted)
}

/// The text in lower case without URLs, paths, image names and addresses: a repository may be named
/// `unauthorized`. A single word in quotes is a name too.
fn without_names(text: &str) -> String {
    let end_of_name: &[char] = &[':', ',', ';', '.'];
    let is_quoted = |token: &str| {
        let token = token.trim_end_matches(end_of_name);
        token.len() > 1 && token.starts_with('"') && token.ends_with('"')
    };
    // An address and a port, or two of them with an arrow between: `[2001:db8::403]:443:`.
    let is_address = |token: &str| {
        let token = token.trim_end_matches(end_of_name);
        token.contains(':') && token.starts_with(|c: char| c == '[' || c.is_ascii_digit())
    };
    let is_path = |token: &str| token.contains('/') && !token.contains("i/o") && !token.contains("input/output");
    let is_name = |token: &str| is_path(token) || token.contains('@') || is_quoted(token) || is_address(token);
    let words: Vec<_> = text.split_whitespace().filter(|token| !is_name(token)).collect();
    words.join(" ").to_ascii_lowercase()
}
