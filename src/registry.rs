//! Registries over HTTPS: pings, digests of tags, and blobs that a node discarded.
//!
//! Not here: the content of recoveries, which comes from peers, and containerd's own view of a
//! registry. The client does not read mirrors, certificates and host names of `hosts.toml`,
//! resolves names as this process does, and uses no proxies of the environment. Where nodes reach a
//! registry only through those, a ping fails.
//!
//! The client contacts `docker.io` at `registry-1.docker.io`, as containerd does.
//!
//! # Trust
//! A ping sends no secret and trusts no response, so any certificate is accepted: the node's
//! containerd may trust authorities that the agent does not have. The digest of a tag decides which
//! image runs, and requests for a digest carry secrets, so the certificate is verified. The
//! certificate is verified for a blob too: the bytes are verified, but the requests carry secrets.
//!
//! The client contacts registries that are configured as insecure as Docker and containerd do: TLS
//! with any certificate where the registry has TLS, else plain HTTP. The same holds for registries
//! on loopback: only processes on the node can intercept such connections, and these registries
//! rarely have certificates. Loopback is the loopback of this process: an agent with its own
//! network namespace does not see the node's.
//!
//! # Secrets
//! The client sends a secret only to the registry that the secret is for, or to the token server
//! that this registry names. The token server must have TLS with a verified certificate, unless the
//! registry is insecure. No secret follows a redirect.

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

/// The options of the client.
#[derive(Debug, Clone)]
pub struct Config {
    /// Registries, as in references (`host` or `host:port`), that may have any certificate or no
    /// TLS.
    pub insecure: Vec<String>,
    /// A PEM file with authorities to trust besides the well-known authorities.
    pub ca_file: Option<PathBuf>,
    /// Deadline of a ping.
    pub ping_limit: Duration,
    /// Deadline for the digest of a tag, token requests included, and for the first byte of a blob.
    pub resolve_limit: Duration,
    /// Longest wait for the next bytes of a blob.
    pub stall_limit: Duration,
}

impl Default for Config {
    /// A ping distinguishes a dead registry from a slow registry before the kubelet's own pull does
    /// (containerd dials for 30 s). A tag may take several requests to two servers.
    fn default() -> Self {
        let (ping_limit, resolve_limit) = (Duration::from_secs(5), Duration::from_secs(15));
        // Storage that fetches a blob from a colder storage pauses for seconds.
        let stall_limit = Duration::from_secs(30);
        Self { insecure: Vec::new(), ca_file: None, ping_limit, resolve_limit, stall_limit }
    }
}

/// The client's options cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file of authorities cannot be used.
    #[error(transparent)]
    Trust(#[from] http::TrustError),
    /// The name cannot be the registry of a reference.
    #[error("{0:?} is not a registry: a registry is a host, or host:port")]
    NotARegistry(String),
}

/// A client of registries.
pub struct RegistryClient {
    http: http::Client,
    insecure: Vec<String>,
    /// True outside tests (see the module's section on trust). The servers of tests are all on
    /// loopback, so tests of other registries set this to false.
    loopback_is_insecure: bool,
    ping_limit: Duration,
    resolve_limit: Duration,
    stall_limit: Duration,
}

/// The address of a registry, and whether any certificate is accepted.
struct RegistryEndpoint {
    /// `https://host:port/`, or `http` for an insecure registry without TLS.
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
        if let Some(invalid) = insecure.iter().find(|name| !Repository::is_registry(name)) {
            return Err(ConfigError::NotARegistry(invalid.clone()));
        }
        let http = http::Client::new(ca_file.as_deref())?;
        Ok(Self { http, insecure, loopback_is_insecure: true, ping_limit, resolve_limit, stall_limit })
    }

    async fn endpoint(&self, registry: &str) -> Result<RegistryEndpoint, HttpError> {
        let no_host =
            || HttpError::Unreachable { kind: OutageKind::NoSuchHost, reason: "not a registry's name".into() };
        let base = base_url("https", registry).ok_or_else(no_host)?;
        let is_listed = self.insecure.iter().any(|name| name.eq_ignore_ascii_case(registry));
        let insecure = is_listed || (self.loopback_is_insecure && is_loopback(&base));
        if insecure {
            let probed = self.http.probe(&base, Certificates::Any).await;
            if let Err(HttpError::Unreachable { kind: OutageKind::Tls | OutageKind::Refused, .. }) = probed {
                return Ok(RegistryEndpoint { base: base_url("http", registry).ok_or_else(no_host)?, insecure });
            }
        }
        Ok(RegistryEndpoint { base, insecure })
    }

    /// A request to this path below the repository. The names in `requested` become part of a URL,
    /// and may have come from a peer.
    async fn request<'a>(
        &'a self,
        requested: Reference,
        repository: &'a Repository,
        path: &str,
    ) -> Result<RegistryRequest<'a>, RegistryError> {
        let registry = &repository.registry;
        if requested.to_string().parse() != Ok(requested) {
            let reason = "the requested name is no image reference".to_owned();
            return Err(RegistryError::InvalidResponse { registry: registry.clone(), reason });
        }
        let endpoint = self.endpoint(registry).await.map_err(|failure| resolve::registry_error(registry, failure))?;
        Ok(RegistryRequest::new(&self.http, endpoint, repository, path))
    }

    async fn within_resolve_limit<T, E: From<RegistryError>>(
        &self,
        registry: &str,
        reply: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let down = RegistryError::Down { registry: registry.to_owned(), kind: OutageKind::TimedOut };
        timeout(self.resolve_limit, reply).await.unwrap_or_else(|_| Err(down.into()))
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
            // containerd may have the client certificate that the agent lacks.
            Ok(Ok(_) | Err(HttpError::ClientCertificateRequired)) => Ok(()),
            Ok(Err(failure)) => {
                tracing::debug!(registry, %failure, "no answer to a ping");
                match failure {
                    HttpError::Unreachable { kind, .. } => down(kind),
                    // The server answers with a response that is no HTTP.
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
        let requested = Reference::Tag(repository.clone(), tag.to_owned());
        let resolved = async {
            let path = format!("manifests/{tag}");
            self.request(requested, repository, &path).await?.resolve(secrets).await
        };
        self.within_resolve_limit(&repository.registry, resolved).await
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
        let opened = async {
            let path = format!("blobs/{digest}");
            self.request(requested, repository, &path).await?.open_blob(secrets).await
        };
        let answer = self.within_resolve_limit(registry, opened).await?;
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
