//! Image references, normalized as by CRI, because the kubelet looks an image up by that exact
//! string.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Digest, DigestError};

/// The origin of an image: a registry and a repository in the registry.
///
/// A permission to use an image is tied to the repository, not to the digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Repository {
    /// Host and, if given, port: `docker.io`, `10.0.0.1:5000`.
    pub registry: String,
    /// The path in the registry: `library/nginx`.
    pub path: String,
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.path)
    }
}

/// A complete reference: a repository with a tag or a digest.
///
/// A reference with both keeps the digest only: CRI drops the tag too, and looks the image up
/// without the tag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reference {
    /// `repository:tag`; no tag at all means `latest`.
    Tag(Repository, String),
    /// `repository@digest`.
    Digest(Repository, Digest),
}

/// A text that is no image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The part after `@` is no supported digest.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// Another part is invalid; the reason names the part.
    #[error("{text:?} is not an image reference: {reason}")]
    Malformed {
        /// The text, shortened.
        text: String,
        /// The invalid part.
        reason: &'static str,
    },
}

/// Limits of the reference grammar (distribution project, `reference.go`: NameTotalLengthMax, tag).
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;
/// Longest text that is parsed: name, tag, `@sha512:` and 128 digits, with separators.
const MAX_TEXT: usize = MAX_NAME + MAX_TAG + 140;

impl Reference {
    /// The repository.
    pub fn repository(&self) -> &Repository {
        match self {
            Self::Tag(repository, _) | Self::Digest(repository, _) => repository,
        }
    }

    /// The names under which CRI looks for this image once the image is resolved to `target`: this
    /// reference, and `repository@digest`. A pull writes the same two, and CRI adds the image-ID
    /// record itself.
    pub fn record_names(&self, target: Digest) -> Vec<String> {
        let by_digest = Self::Digest(self.repository().clone(), target);
        match self {
            Self::Tag(..) => vec![self.to_string(), by_digest.to_string()],
            Self::Digest(..) => vec![by_digest.to_string()],
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(repository, tag) => write!(f, "{repository}:{tag}"),
            Self::Digest(repository, digest) => write!(f, "{repository}@{digest}"),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let malformed = |reason| ReferenceError::Malformed { text: text.chars().take(80).collect(), reason };
        if text.is_empty() || text.len() > MAX_TEXT {
            return Err(malformed("empty or too long"));
        }
        let (name_and_tag, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        // A colon after the last slash starts a tag; before it, a port.
        let path_start = name_and_tag.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match name_and_tag[path_start..].split_once(':') {
            Some((last, tag)) => (&name_and_tag[..path_start + last.len()], Some(tag)),
            None => (name_and_tag, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(malformed("the tag"));
        }
        let repository = Repository::normalized(name).map_err(malformed)?;
        Ok(match digest {
            Some(digest) => Self::Digest(repository, digest),
            None => Self::Tag(repository, tag.unwrap_or("latest").to_owned()),
        })
    }
}

impl Repository {
    /// Whether the text may be a [`Repository::registry`].
    pub fn is_registry(text: &str) -> bool {
        text.len() <= MAX_NAME && is_host(text)
    }

    /// The repository with exactly this registry and path; `None` where normalization changes them.
    pub fn exact(registry: &str, path: &str) -> Option<Self> {
        let repository = Self::normalized(&format!("{registry}/{path}")).ok()?;
        (repository.registry == registry && repository.path == path).then_some(repository)
    }

    /// `nginx` -> `docker.io/library/nginx`, as Docker and CRI do; the error names the invalid
    /// part.
    fn normalized(name: &str) -> Result<Self, &'static str> {
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if looks_like_host(first) => (first, rest),
            _ => ("docker.io", name),
        };
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        let path = match registry {
            "docker.io" if !path.contains('/') => format!("library/{path}"),
            _ => path.to_owned(),
        };
        if !is_host(registry) {
            return Err("the registry's host");
        }
        if !path.split('/').all(is_path_component) {
            return Err("the repository (lower case, digits, and . _ - between them)");
        }
        if registry.len() + 1 + path.len() > MAX_NAME {
            return Err("the name is longer than 255 characters");
        }
        Ok(Self { registry: registry.to_owned(), path })
    }
}

/// Docker's rule for the first component: a host has a dot, a port, capitals, or is `localhost`.
fn looks_like_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let port_fits = port.is_none_or(|port| port.parse::<u16>().is_ok() && port.bytes().all(|b| b.is_ascii_digit()));
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let host_fits = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(label),
    };
    port_fits && host_fits
}

/// `[a-z0-9]+` joined by `.`, `_`, `__` or any number of `-`.
fn is_path_component(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let edges = bytes.first().is_some_and(|&b| is_word(b)) && bytes.last().is_some_and(|&b| is_word(b));
    let separators = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    edges && separators.into_iter().all(|sep| matches!(sep, "" | "." | "_" | "__") || sep.bytes().all(|b| b == b'-'))
}

/// `[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}`.
fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=MAX_TAG).contains(&text.len())
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|b| is_word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    const HEX_DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_are_normalized_as_cri_does() {
        let by_digest = format!("ghcr.io/a/b@sha256:{HEX}");
        for (text, normalized) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("grafana/grafana", "docker.io/grafana/grafana:latest"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("10.77.0.1:5000/team/app:v1", "10.77.0.1:5000/team/app:v1"),
            ("[fd00::1]:5000/a:b", "[fd00::1]:5000/a:b"),
            ("[fd00::1]/a:b", "[fd00::1]/a:b"),
            ("Registry/a", "Registry/a:latest"),
            ("a.b/c__d/e--f:_x", "a.b/c__d/e--f:_x"),
            (&format!("ghcr.io/a/b:v1@sha256:{HEX}"), &by_digest),
            (&by_digest, &by_digest),
        ] {
            assert_eq!(text.parse::<Reference>().map(|r| r.to_string()), Ok(normalized.to_owned()), "{text}");
        }
    }

    #[test]
    fn malformed_references_are_rejected_with_a_reason() {
        let long = format!("a.b/{}", "c".repeat(252));
        let tag = format!("a:{}", "t".repeat(129));
        for text in [
            "",
            " ",
            "UPPER",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:-x",
            "a.b:99999/c",
            "a.b:x/c",
            "-a.b/c",
            "a_",
            "a___b",
            "a.-b",
            "a@",
            "a@sha256:00",
            "a b",
            "a\n",
            "é",
            "[::zz]/a",
            &long,
            &tag,
            &"a/".repeat(500),
        ] {
            let error = text.parse::<Reference>().expect_err(text);
            assert!(!error.to_string().is_empty());
        }
        let sha512 = format!("a@sha512:{HEX}{HEX}").parse::<Reference>();
        assert_eq!(sha512, Err(DigestError::UnsupportedAlgorithm("sha512".into()).into()));
    }

    #[test]
    fn length_limits_are_exact() {
        let name = |length: usize| format!("a.b/{}", "c".repeat(length - 4));
        // The omitted part counts as well: `docker.io/library/` precedes a short name.
        let short = |length: usize| "c".repeat(length - "docker.io/library/".len());
        let tag = |length: usize| format!("a.b/c:{}", "t".repeat(length));
        let port = |port: &str| format!("a.b:{port}/c");
        for (what, text, fits) in [
            ("the longest name", name(255), true),
            ("one more", name(256), false),
            ("the longest short name", short(255), true),
            ("one more", short(256), false),
            ("the longest tag", tag(128), true),
            ("one more", tag(129), false),
            ("the longest of all", format!("{}:{}@sha256:{HEX}", name(255), "t".repeat(128)), true),
            ("the highest port", port("65535"), true),
            ("one more", port("65536"), false),
            ("no port after a colon", port(""), false),
            ("a signed port", port("+80"), false),
        ] {
            assert_eq!(text.parse::<Reference>().is_ok(), fits, "{what}: {text}");
        }
    }

    #[test]
    fn unsupported_digest_algorithms_are_named_in_the_error() {
        for algorithm in ["sha512", "sha384", "blake3", "md5"] {
            let error = format!("a.b/c:1@{algorithm}:{HEX}{HEX}").parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(&format!("{algorithm:?} is not supported")), "{error}");
        }
    }

    #[test]
    fn a_repository_is_exact_or_none() {
        let exact = |registry, path| Repository::exact(registry, path).map(|repository| repository.to_string());
        assert_eq!(exact("docker.io", "library/nginx").as_deref(), Some("docker.io/library/nginx"));
        assert_eq!(exact("[fd00::1]:5000", "a/b").as_deref(), Some("[fd00::1]:5000/a/b"));
        for (registry, path) in [
            ("docker.io", "nginx"),
            ("index.docker.io", "a/b"),
            ("registry", "a"),
            ("a.b", ""),
            ("a.b", "A"),
            ("", "a"),
        ] {
            assert_eq!(exact(registry, path), None, "{registry} {path}");
        }
    }

    #[test]
    fn records_carry_the_names_that_cri_looks_up() {
        let digest = Digest::of(b"");
        let tagged: Reference = "nginx:1".parse().unwrap();
        let by_digest = format!("docker.io/library/nginx@sha256:{HEX}");
        assert_eq!(tagged.record_names(digest), ["docker.io/library/nginx:1".to_owned(), by_digest.clone()]);
        assert_eq!(by_digest.parse::<Reference>().unwrap().record_names(digest), [by_digest]);
    }

    proptest::proptest! {
        #[test]
        fn a_parsed_reference_prints_and_parses_to_itself(text in ".{0,64}|([a-z0-9.:_-]{1,8}/){0,3}[a-z0-9._-]{1,8}(:[a-z0-9._-]{1,8})?") {
            if let Ok(reference) = text.parse::<Reference>() {
                proptest::prop_assert_eq!(reference.to_string().parse(), Ok(reference));
            }
        }

        #[test]
        fn every_reference_of_the_grammar_is_parsed_and_printed(
            host in "(localhost|[a-z0-9]{1,8}(-[a-z0-9]{1,8})?\\.[A-Za-z]{2,5}|\\[fd00::[1-9a-f]{1,4}\\])",
            port in proptest::option::of(0..=u16::MAX),
            path in "[a-z0-9]{1,6}((\\.|_|__|-{1,3})[a-z0-9]{1,6}){0,2}(/[a-z0-9]{1,6}){0,3}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"),
            by_digest in proptest::bool::ANY,
        ) {
            let registry = port.map_or(host.clone(), |port| format!("{host}:{port}"));
            let tag_part = tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
            let digest_part = if by_digest { format!("@sha256:{HEX}") } else { String::new() };
            let reference: Reference = format!("{registry}/{path}{tag_part}{digest_part}").parse().unwrap();
            let repository = Repository { registry, path };
            let expected = match by_digest {
                true => Reference::Digest(repository.clone(), HEX_DIGEST.parse().unwrap()),
                false => Reference::Tag(repository.clone(), tag.unwrap_or("latest".into())),
            };
            proptest::prop_assert_eq!(&reference, &expected);
            proptest::prop_assert_eq!(reference.to_string().parse(), Ok(expected));
            proptest::prop_assert_eq!(Repository::exact(&repository.registry, &repository.path), Some(repository));
        }
    }
}
