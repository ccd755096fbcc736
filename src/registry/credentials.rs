//! The credentials of pull secrets for a repository, by the kubelet's rules ("Images", section
//! "Interpretation of config.json", of the Kubernetes documentation).
//!
//! A key of `auths` is a host, with the registry's port if any, and may have a path that the
//! repository's path must begin with. A leading `https://` and `/v1/` or `/v2/` after the host are
//! ignored. `*` in a host stands for a part of one label. Unlike the kubelet, the client matches a
//! path by whole components (`host/team` does not match `host/team-b/app`), and a malformed entry
//! does not hide the other entries.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::header::HeaderValue;
use serde::Deserialize;

use crate::oci::Repository;
use crate::ports::PullSecret;

/// Kubernetes stores no larger Secret.
const MAX_SECRET: usize = 1 << 20;

/// Credentials that are tried for one query at most. Each costs two requests and, when wrong, a
/// failed login; pods have one or two pull secrets.
const MAX_CREDENTIALS: usize = 8;

/// A credential for a registry. There is no `Debug`, so no log can show a secret.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum RegistryCredential {
    Password {
        user: String,
        password: String,
    },
    /// A token that a token server exchanges for an access token (a refresh token in OAuth 2).
    IdentityToken(String),
}

impl RegistryCredential {
    /// The header of basic authentication; `None` for an identity token.
    pub(super) fn basic_header(&self) -> Option<HeaderValue> {
        let Self::Password { user, password } = self else { return None };
        let mut value =
            HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

/// Names of Docker's own registry in secrets.
pub(super) fn is_docker_hub(host: &str) -> bool {
    ["docker.io", "index.docker.io", "registry-1.docker.io"].iter().any(|name| host.eq_ignore_ascii_case(name))
}

/// The credentials for a repository: the secrets in their order, and within a secret the longest
/// path first. Each credential appears once, and there are at most [`MAX_CREDENTIALS`].
pub(super) fn for_repository(secrets: &[PullSecret], repository: &Repository) -> Vec<RegistryCredential> {
    let mut found = Vec::new();
    for credential in secrets.iter().flat_map(|secret| matching(secret, repository)) {
        if found.len() < MAX_CREDENTIALS && !found.contains(&credential) {
            found.push(credential);
        }
    }
    found
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

fn matching(PullSecret(bytes): &PullSecret, repository: &Repository) -> Vec<RegistryCredential> {
    if bytes.len() > MAX_SECRET {
        return Vec::new();
    }
    let Ok(DockerConfig { auths }) = serde_json::from_slice(bytes) else { return Vec::new() };
    let mut fitting: Vec<_> = auths
        .into_iter()
        .filter_map(|(key, entry)| {
            let key = AuthKey::read(&key);
            let credential = serde_json::from_value::<AuthEntry>(entry).ok()?.credential()?;
            key.is_for(repository).then(|| (Reverse(key.precision()), credential))
        })
        .collect();
    fitting.sort_by_key(|(precision, _)| *precision);
    fitting.into_iter().map(|(_, credential)| credential).collect()
}

impl AuthEntry {
    fn credential(self) -> Option<RegistryCredential> {
        let Self { auth, username, password, identitytoken } = self;
        let non_empty = |text: Option<String>| text.filter(|text| !text.is_empty());
        if let Some(token) = non_empty(identitytoken) {
            return Some(RegistryCredential::IdentityToken(token));
        }
        // `kubectl create secret` writes both forms; the kubelet, too, prefers `auth`.
        if let Some(auth) = non_empty(auth) {
            return decode_auth(&auth);
        }
        Some(RegistryCredential::Password { user: non_empty(username)?, password: non_empty(password)? })
    }
}

/// Decodes base64 of `user:password`, with or without padding, and with the line end that `base64`
/// adds.
fn decode_auth(auth: &str) -> Option<RegistryCredential> {
    let auth = auth.trim().trim_end_matches('=');
    let engine = base64::engine::general_purpose::STANDARD_NO_PAD;
    let text = String::from_utf8(engine.decode(auth).ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    let password = password.trim_end_matches(['\0', '\r', '\n']);
    (!user.is_empty()).then(|| RegistryCredential::Password { user: user.to_owned(), password: password.to_owned() })
}

/// A key of `auths`.
struct AuthKey<'a> {
    host: &'a str,
    port: Option<&'a str>,
    path: Vec<&'a str>,
}

impl<'a> AuthKey<'a> {
    fn read(text: &'a str) -> Self {
        let text = text.trim();
        let text = ["https://", "http://"].iter().find_map(|scheme| text.strip_prefix(scheme)).unwrap_or(text);
        let (authority, path) = text.split_once('/').unwrap_or((text, ""));
        let mut path: Vec<_> = path.split('/').filter(|component| !component.is_empty()).collect();
        if matches!(path.first(), Some(&("v1" | "v2"))) {
            path.remove(0);
        }
        let (host, port) = split_port(authority);
        Self { host, port, path }
    }

    fn is_for(&self, repository: &Repository) -> bool {
        let components = repository.path.split('/');
        let (host, port) = split_port(&repository.registry);
        let hub = is_docker_hub(self.host) && is_docker_hub(host);
        self.port == port
            && (hub || is_host_match(self.host, host))
            && self.path.len() <= components.clone().count()
            && self.path.iter().zip(components).all(|(key, component)| *key == component)
    }

    /// A longer path and a host without a star match fewer repositories.
    fn precision(&self) -> (usize, bool) {
        (self.path.len(), !self.host.contains('*'))
    }
}

/// The colons of an IPv6 address are within brackets.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

/// Matches label by label, so `*.example.com` matches neither `example.com` nor `a.b.example.com`.
fn is_host_match(pattern: &str, host: &str) -> bool {
    let (pattern, host) = (pattern.to_ascii_lowercase(), host.to_ascii_lowercase());
    if !pattern.contains('*') {
        return pattern == host;
    }
    let (patterns, labels): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), host.split('.').collect());
    patterns.len() == labels.len() && patterns.iter().zip(labels).all(|(pattern, label)| is_label_match(pattern, label))
}

fn is_label_match(pattern: &str, label: &str) -> bool {
    let Some((begin, rest)) = pattern.split_once('*') else { return pattern == label };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    let inner = label.strip_prefix(begin).and_then(|label| label.strip_suffix(end));
    let Some(mut inner) = inner else { return false };
    // The leftmost match of each part leaves the longest rest for the following parts.
    middle.split('*').all(|part| match inner.find(part) {
        Some(at) => {
            inner = &inner[at + part.len()..];
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests;
