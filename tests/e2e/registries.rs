//! Scripted registries: each script is a function from a request to the response. Each fault has a
//! port of its own, so that rows with different faults run in parallel.

mod content;
mod script;
mod server;
mod tls;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use crate::images::Image;
use crate::test_bed::TestError;
use content::Content;
use server::Reply;
pub(crate) use tls::{TlsFault, authority_pem};

/// Fault of the registry that an image names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScriptedRegistry {
    /// Connections are refused.
    Refuses,
    /// 401 for every client.
    Unauthorized,
    /// 403 for every client.
    Forbids,
    /// 404 for every image, as if the images were deleted.
    NotFound,
    /// 429 for every request.
    RateLimits,
    /// 500 for every request.
    Fails,
    /// This status for every request. The status is in [`STATUSES`].
    Answers(u16),
    /// 200 and an HTML page, as gateways and captive portals answer.
    Html,
    /// Layers of the right length with other bytes.
    WrongBytes,
    /// The connection ends in the middle of each layer.
    CutsLayers,
    /// A server of plain HTTP, where containerd is not configured for plain HTTP and uses TLS.
    PlainHttp,
    /// A frame of HTTP/2 in place of an HTTP/1 response.
    Malformed,
    /// The token server answers with an HTML page.
    TokenPage,
    /// The token server answers 400.
    TokenRefuses,
    /// The token server answers 500.
    TokenFails,
    /// The manifest requires a token and is served. The storage of blobs answers 403.
    StorageForbids,
    /// A healthy registry that serves every published image. A layer of a repository below
    /// `stalls/` stops half-way at the first request, and arrives slowly at later requests.
    Serves,
    /// As `Serves`, for registries that containerd reaches only through this mirror.
    Mirror,
    /// Stalls by the first part of the repository's path. `layer` stalls late in each layer,
    /// `manifest` before the response to a GET of the manifest. `crawl` sends each layer within
    /// [`CRAWL`], and never pauses as long as a stalled pull. `late` sends the first byte of a
    /// layer after [`LATE`], and immediately at later requests.
    Stalls,
    /// A TLS server that containerd rejects.
    Tls(TlsFault),
    /// A TLS server, where containerd is configured for plain HTTP.
    TlsForPlain,
    /// Behind a proxy that answers 407.
    ProxyDemands,
    /// Behind a proxy that answers 403.
    ProxyForbids,
    /// Behind a proxy that refuses connections.
    ProxyDown,
}

/// Duration of a crawling layer. Longer than the agents' default of two minutes plus the ten
/// seconds between two checks of an agent.
const CRAWL: Duration = Duration::from_secs(160);

/// Silence of a late layer. Longer than two minutes and ten seconds too.
const LATE: Duration = Duration::from_secs(180);

/// containerd's proxy for TLS.
pub(crate) const PROXY: &str = "10.77.0.1:3128";

/// containerd's proxy for plain HTTP, which does not run.
pub(crate) const DEAD_PROXY: &str = "10.77.0.1:3129";

/// A host name that only the proxy resolves.
const PROXIED: &str = "proxied.test";

/// The statuses of [`ScriptedRegistry::Answers`] with their reason phrases.
const STATUSES: [(u16, &str); 12] = [
    (400, "Bad Request"),
    (402, "Payment Required"),
    (407, "Proxy Authentication Required"),
    (408, "Request Timeout"),
    (410, "Gone"),
    (451, "Unavailable For Legal Reasons"),
    (502, "Bad Gateway"),
    (503, "Service Unavailable"),
    (504, "Gateway Timeout"),
    (507, "Insufficient Storage"),
    (520, "Web Server Returned an Unknown Error"),
    (522, "Origin Connection Time-out"),
];

impl ScriptedRegistry {
    fn all() -> impl Iterator<Item = Self> {
        const WITHOUT_PARAMETER: [ScriptedRegistry; 22] = [
            ScriptedRegistry::Refuses,
            ScriptedRegistry::Unauthorized,
            ScriptedRegistry::Forbids,
            ScriptedRegistry::NotFound,
            ScriptedRegistry::RateLimits,
            ScriptedRegistry::Fails,
            ScriptedRegistry::Html,
            ScriptedRegistry::WrongBytes,
            ScriptedRegistry::CutsLayers,
            ScriptedRegistry::PlainHttp,
            ScriptedRegistry::Malformed,
            ScriptedRegistry::TokenPage,
            ScriptedRegistry::TokenRefuses,
            ScriptedRegistry::TokenFails,
            ScriptedRegistry::StorageForbids,
            ScriptedRegistry::Serves,
            ScriptedRegistry::Mirror,
            ScriptedRegistry::Stalls,
            ScriptedRegistry::TlsForPlain,
            ScriptedRegistry::ProxyDemands,
            ScriptedRegistry::ProxyForbids,
            ScriptedRegistry::ProxyDown,
        ];
        let statuses = STATUSES.map(|(status, _)| Self::Answers(status));
        WITHOUT_PARAMETER.into_iter().chain(statuses).chain(TlsFault::ALL.map(Self::Tls))
    }

    /// The registry's name in images.
    pub(crate) fn host(self) -> String {
        format!("{}:{}", if self.is_proxied() { PROXIED } else { ADDRESS }, self.port())
    }

    /// Whether containerd reaches the registry through a proxy.
    fn is_proxied(self) -> bool {
        matches!(self, Self::ProxyDemands | Self::ProxyForbids | Self::ProxyDown)
    }

    /// Whether containerd is configured for plain HTTP.
    fn is_plain(self) -> bool {
        !matches!(self, Self::PlainHttp | Self::Tls(_) | Self::ProxyDemands | Self::ProxyForbids)
    }

    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Refuses => 5001,
            Self::Unauthorized => 5401,
            Self::Forbids => 5403,
            Self::NotFound => 5404,
            Self::RateLimits => 5429,
            Self::Fails => 5500,
            Self::Answers(status) => 5000 + status,
            Self::Html => 5200,
            Self::WrongBytes => 5301,
            Self::CutsLayers => 5302,
            Self::PlainHttp => 5303,
            Self::Malformed => 5304,
            Self::TokenPage => 5305,
            Self::TokenRefuses => 5306,
            Self::TokenFails => 5307,
            Self::StorageForbids => 5308,
            Self::Serves => 5310,
            Self::Mirror => 5311,
            Self::Stalls => 5312,
            Self::Tls(fault) => fault.port(),
            Self::TlsForPlain => 5605,
            Self::ProxyDemands => 5607,
            Self::ProxyForbids => 5608,
            Self::ProxyDown => 5609,
        }
    }
}

/// The registries of the test bed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registries {
    content: Arc<Mutex<Content>>,
}

impl Registries {
    /// Starts all registries. The caller is in the hub's network namespace.
    pub(crate) fn serve() -> Result<Self, TestError> {
        let registries = Self::default();
        tls::serve(ADDRESS, ScriptedRegistry::TlsForPlain.port())?;
        let not_served = [ScriptedRegistry::Refuses, ScriptedRegistry::TlsForPlain];
        let has_listener = |registry: &ScriptedRegistry| {
            !(registry.is_proxied() || matches!(registry, ScriptedRegistry::Tls(_)) || not_served.contains(registry))
        };
        server::serve(PROXY, move |request| {
            let target =
                ScriptedRegistry::all().find(|registry| request.method == "CONNECT" && request.path == registry.host());
            target.map_or(Reply::Raw(b""), |registry| registry.reply(&request, &Content::default()))
        })?;
        for registry in ScriptedRegistry::all().filter(has_listener) {
            let shared = registries.clone();
            server::serve(&registry.host(), move |mut request| {
                let mut content = shared.content();
                let key = (registry.port(), request.method.clone(), request.path.clone());
                let count = content.counts.entry(key).or_default();
                *count += 1;
                request.count = *count;
                registry.reply(&request, &content)
            })?;
        }
        Ok(registries)
    }

    /// Publishes an image under `REPOSITORY:TAG` in every registry that serves images. An existing
    /// tag moves to the new image.
    pub(crate) fn publish(&self, name: &str, image: &Image) {
        let mut content = self.content();
        content.tags.insert(name.to_owned(), image.digest.clone());
        content.blobs.extend(image.blobs().iter().map(|(digest, blob)| (digest.clone(), blob.clone())));
    }

    /// Number of GET requests to this registry for paths with this part.
    pub(crate) fn fetches(&self, registry: ScriptedRegistry, part: &str) -> usize {
        let content = self.content();
        let counts = content
            .counts
            .iter()
            .filter(|((port, method, path), _)| *port == registry.port() && method == "GET" && path.contains(part));
        counts.map(|(_, count)| count).sum()
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        // A panic of another thread under the lock leaves complete entries behind.
        self.content.lock()
    }
}

/// The hub's address.
const ADDRESS: &str = "10.77.0.1";

/// Another port of the same host, where connections are refused too. A registry there shares only
/// the address.
pub(crate) const INVENTED_PORT: u16 = 5099;

/// The registries for which containerd and the agents are configured for plain HTTP.
pub(crate) fn names() -> Vec<String> {
    let plain = ScriptedRegistry::all().filter(|registry| registry.is_plain());
    plain.map(ScriptedRegistry::host).chain([format!("{ADDRESS}:{INVENTED_PORT}")]).collect()
}

/// The TLS registries for which containerd trusts the test authority.
pub(crate) fn trusted() -> Vec<String> {
    TlsFault::ALL
        .into_iter()
        .filter(|fault| fault.is_trusted())
        .map(|fault| ScriptedRegistry::Tls(fault).host())
        .collect()
}

/// The environment of containerd: proxies for all names except the names of other rows.
pub(crate) fn proxies() -> String {
    let direct = "10.0.0.0/8,127.0.0.0/8,::/0,localhost,docker.io,nowhere.test,registry.test";
    format!("HTTPS_PROXY=http://{PROXY} HTTP_PROXY=http://{DEAD_PROXY} NO_PROXY={direct}")
}
