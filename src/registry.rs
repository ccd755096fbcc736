//! Registries over HTTPS: whether one is there, what a tag means in it now, and blobs that a node discarded.
//!
//! Not for the content of recoveries, which comes from peers, and not containerd's own view of a registry: mirrors, certificates and host names of
//! `hosts.toml` are not read, names resolve as this process resolves them, and proxies of the environment are not used. Where nodes
//! reach a registry only through those, its ping fails.
//!
//! `docker.io` is asked at `registry-1.docker.io`, as containerd does.
//!
//! # Trust
//! A ping sends no secret and believes no answer, so it takes any certificate: the node's containerd may trust authorities that we
//! do not know. A tag's meaning decides what runs, and secrets are sent for it, so there the certificate has to be right. So it has for a
//! blob: its bytes are checked, but secrets are sent for it too.
//!
//! Registries that the configuration calls insecure are spoken to as Docker and containerd speak to theirs: TLS with any certificate
//! where there is TLS, else plain HTTP. So are registries on loopback, with whom nobody can interfere who is not on the machine
//! already, and which have no certificates as a rule. (It is this process's loopback; with a network namespace of its own the
//! agent does not see the node's.)
//!
//! # Secrets
//! A secret goes to the registry that it is kept for, or to the token server that this registry names, and there only over TLS with
//! a right certificate, unless the registry itself is insecure. No secret follows a redirect.

mod blob;
mod challenge;
mod credentials;
mod resolve;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use hyper::Method;
use tokio::time::timeout;
use url::{Host, Url};

use crate::http::{self, Certificates, HttpError, Request};
use crate::model::OutageKind;
use crate::oci::{BlobProof, Digest, Reference, Repository};
use crate::ports::{BlobSink, PullSecret, Registry, RegistryError, RegistryFetchError};
use resolve::RegistryRequest;

/// What the client is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Registries, as references name them (`host` or `host:port`), whose certificate need not be right and that may have none.
    pub insecure: Vec<String>,
    /// A PEM file with authorities to trust besides the well-known ones.
    pub ca_file: Option<PathBuf>,
    /// How long a ping may take in all.
    pub ping_limit: Duration,
    /// How long resolving a tag may take in all, tokens included. The same holds until the first
    /// byte of a blob.
    pub resolve_limit: Duration,
    /// Longest wait for the next bytes of a blob.
    pub stall_limit: Duration,
}

impl Default for Config {
    /// A ping tells a dead registry from a slow one before the kubelet's own pull would (containerd dials for 30 s). Resolving may
    /// take several requests to two servers.
    fn default() -> Self {
        let (ping_limit, resolve_limit) = (Duration::from_secs(5), Duration::from_secs(15));
        // A storage that fetches the blob from a colder one pauses for seconds.
        let stall_limit = Duration::from_secs(30);
        Self { insecure: Vec::new(), ca_file: None, ping_limit, resolve_limit, stall_limit }
    }
}

/// The client cannot be made as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file of authorities.
    #[error(transparent)]
    Trust(#[from] http::TrustError),
    /// A name that no reference can have.
    #[error("{0:?} is not a registry: it is a host, or host:port")]
    NotARegistry(String),
}

/// Asks registries.
pub struct RegistryClient {
    http: http::Client,
    insecure: Vec<String>,
    /// As the module's introduction says; tests of what holds for other registries turn it off, since they have only loopback.
    loopback_is_insecure: bool,
    ping_limit: Duration,
    resolve_limit: Duration,
    stall_limit: Duration,
}

/// Where a registry is, and how far it is trusted.
struct RegistryEndpoint {
    /// `https://host:port/`, or `http` where that is all there is.
    base: Url,
    insecure: bool,
}

impl RegistryClient {
    /// Reads the file of authorities.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let Config { insecure, ca_file, ping_limit, resolve_limit, stall_limit } = config;
        if let Some(wrong) = insecure.iter().find(|name| !Repository::is_registry(name)) {
            return Err(ConfigError::NotARegistry(wrong.clone()));
        }
        let http = http::Client::new(ca_file.as_deref())?;
        Ok(Self { http, insecure, loopback_is_insecure: true, ping_limit, resolve_limit, stall_limit })
    }

    async fn endpoint(&self, registry: &str) -> Result<RegistryEndpoint, HttpError> {
        let no_host =
            || HttpError::Unreachable { kind: OutageKind::NoSuchHost, reason: "not a registry's name".into() };
        let base = base_url("https", registry).ok_or_else(no_host)?;
        let named = self.insecure.iter().any(|name| name.eq_ignore_ascii_case(registry));
        let insecure = named || (self.loopback_is_insecure && is_loopback(&base));
        if insecure {
            let probed = self.http.probe(&base, Certificates::Any).await;
            if let Err(HttpError::Unreachable { kind: OutageKind::Tls | OutageKind::Refused, .. }) = probed {
                return Ok(RegistryEndpoint { base: base_url("http", registry).ok_or_else(no_host)?, insecure });
            }
        }
        Ok(RegistryEndpoint { base, insecure })
    }

    async fn ping_status(&self, registry: &str) -> Result<hyper::StatusCode, HttpError> {
        let mut url = self.endpoint(registry).await?.base;
        url.set_path("/v2/");
        let answer = self.http.send(Request::new(Method::GET, &url, Certificates::Any)).await?;
        Ok(answer.status)
    }
}

#[async_trait]
impl Registry for RegistryClient {
    async fn ping(&self, registry: &str) -> Result<(), RegistryError> {
        let down = |kind| Err(RegistryError::Down { registry: registry.to_owned(), kind });
        match timeout(self.ping_limit, self.ping_status(registry)).await {
            Err(_) => down(OutageKind::TimedOut),
            Ok(Ok(status)) if status.is_server_error() => down(OutageKind::ServerError),
            // containerd may have the certificate that we lack.
            Ok(Ok(_) | Err(HttpError::ClientCertificateRequired)) => Ok(()),
            Ok(Err(failure)) => {
                tracing::debug!(registry, %failure, "no answer to a ping");
                match failure {
                    HttpError::Unreachable { kind, .. } => down(kind),
                    // There is a server, and it is broken.
                    _ => down(OutageKind::ServerError),
                }
            }
        }
    }

    async fn resolve(
        &self,
        repository: &Repository,
        tag: &str,
        secrets: &[PullSecret],
    ) -> Result<Digest, RegistryError> {
        let registry = &repository.registry;
        // Both become part of a URL, and may have come from a peer.
        let requested = Reference::Tag(repository.clone(), tag.to_owned());
        if requested.to_string().parse() != Ok(requested) {
            let reason = "the name that is asked for is no image's".to_owned();
            return Err(RegistryError::InvalidResponse { registry: registry.clone(), reason });
        }
        let resolved = async {
            let endpoint =
                self.endpoint(registry).await.map_err(|failure| resolve::registry_error(registry, failure))?;
            RegistryRequest::for_tag(&self.http, endpoint, repository, tag).resolve(secrets).await
        };
        let late = |_| Err(RegistryError::Down { registry: registry.clone(), kind: OutageKind::TimedOut });
        timeout(self.resolve_limit, resolved).await.unwrap_or_else(late)
    }

    async fn fetch_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        size: u64,
        secrets: &[PullSecret],
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, RegistryFetchError> {
        let registry = &repository.registry;
        let requested = Reference::Digest(repository.clone(), digest);
        if requested.to_string().parse() != Ok(requested) {
            let reason = "the name that is asked for is no image's".to_owned();
            return Err(RegistryFetchError::WrongBytes { registry: registry.clone(), reason });
        }
        let opened = async {
            let endpoint =
                self.endpoint(registry).await.map_err(|failure| resolve::registry_error(registry, failure))?;
            RegistryRequest::for_blob(&self.http, endpoint, repository, digest).open_blob(secrets).await
        };
        let late = |_| Err(RegistryFetchError::Down { registry: registry.clone(), kind: OutageKind::TimedOut });
        let answer = timeout(self.resolve_limit, opened).await.unwrap_or_else(late)?;
        blob::BlobReceiver::new(registry, digest, size, self.stall_limit).receive(answer, sink).await
    }
}

fn base_url(scheme: &str, registry: &str) -> Option<Url> {
    if !Repository::is_registry(registry) {
        return None;
    }
    let host = if credentials::is_docker_hub(registry) { "registry-1.docker.io" } else { registry };
    Url::parse(&format!("{scheme}://{host}/")).ok()
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests;
