//! Scripted registries: each script is a function from a request to the response. Each fault has a
//! port of its own, so that rows with different faults run in parallel.

mod server;
mod tls;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

use crate::images::Image;
use crate::test_bed::TestError;
use server::{Delivery, Reply, Request, Response};
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

const JSON: &str = "application/json";
const BLOB: &str = "application/octet-stream";
const PAGE: &str = "<!DOCTYPE html><html><body>Please sign in to use this network.</body></html>";

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

    /// The script: the reply to a request.
    fn reply(self, request: &Request, content: &Content) -> Reply {
        let response = match self {
            // No server of this kind listens there.
            Self::Refuses | Self::Tls(_) | Self::TlsForPlain | Self::ProxyDown => return Reply::Raw(b""),
            // The proxy receives this request: `CONNECT`.
            Self::ProxyDemands => Response::new("407 Proxy Authentication Required", "text/plain", "")
                .with_header("Proxy-Authenticate: Basic realm=\"proxy\"".into()),
            Self::ProxyForbids => Response::new("403 Forbidden", "text/plain", "blocked by policy"),
            Self::Stalls => return stalling_reply(request, content.serve(request)),
            Self::Malformed => return Reply::Raw(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x04\x03"),
            Self::Unauthorized => error("401 Unauthorized", "UNAUTHORIZED", "authentication required")
                .with_header("WWW-Authenticate: Basic realm=\"test\"".into()),
            Self::Forbids => error("403 Forbidden", "DENIED", "requested access is denied"),
            Self::NotFound => error("404 Not Found", "MANIFEST_UNKNOWN", "manifest unknown"),
            Self::RateLimits => {
                error("429 Too Many Requests", "TOOMANYREQUESTS", "You have reached your pull rate limit.")
            }
            Self::Fails => Response::new("500 Internal Server Error", "text/plain", "out of order"),
            Self::Answers(status) => {
                let phrase = STATUSES.iter().find(|(listed, _)| *listed == status).map_or("", |(_, phrase)| phrase);
                Response::new(&format!("{status} {phrase}"), "text/plain", "scripted")
            }
            Self::Html => Response::new("200 OK", "text/html", PAGE),
            Self::WrongBytes => wrong_bytes(content.serve(request)),
            Self::CutsLayers => {
                let response = content.serve(request);
                let half = response.body.len() / 2;
                with_layers(response, Delivery::Cut(half))
            }
            Self::PlainHttp | Self::Mirror => content.serve(request),
            Self::TokenPage => self.with_token(request, content, Response::new("200 OK", "text/html", PAGE)),
            Self::TokenRefuses => {
                self.with_token(request, content, Response::new("400 Bad Request", "text/plain", "bad scope"))
            }
            Self::TokenFails => {
                let response = Response::new("500 Internal Server Error", "text/plain", "out of order");
                self.with_token(request, content, response)
            }
            Self::StorageForbids => {
                let token = Response::new("200 OK", JSON, r#"{"token":"t","access_token":"t","expires_in":300}"#);
                self.with_token(request, content, token)
            }
            Self::Serves if request.path.starts_with("/v2/stalls/") => {
                let response = content.serve(request);
                let half = response.body.len() / 2;
                let delivery = if request.count == 1 { Delivery::Stall(half) } else { Delivery::Trickle(10_000) };
                with_layers(response, delivery)
            }
            Self::Serves => content.serve(request),
        };
        Reply::Response(response)
    }

    /// A registry with a token server that answers `token`. Requests for blobs are redirected to a
    /// storage that answers 403.
    fn with_token(self, request: &Request, content: &Content, token: Response) -> Response {
        let host = self.host();
        if request.path == "/token" {
            return token;
        }
        if request.path.starts_with("/storage/") {
            return Response::new("403 Forbidden", "application/xml", "<Error><Code>AccessDenied</Code></Error>");
        }
        if !request.has_token() {
            let realm = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"test\"");
            return error("401 Unauthorized", "UNAUTHORIZED", "authentication required").with_header(realm);
        }
        match request.path.split_once("/blobs/") {
            Some((_, digest)) => Response::new("307 Temporary Redirect", "text/plain", "")
                .with_header(format!("Location: http://{host}/storage/{digest}?signature=expired")),
            None => content.serve(request),
        }
    }
}

fn error(status: &str, code: &str, message: &str) -> Response {
    Response::new(status, JSON, serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string())
}

/// Whether the response carries a layer. All other content of an image is JSON.
fn is_layer(response: &Response) -> bool {
    response.status.starts_with("200") && !response.body.starts_with(b"{")
}

fn with_layers(response: Response, delivery: Delivery) -> Response {
    if is_layer(&response) { Response { delivery, ..response } } else { response }
}

fn stalling_reply(request: &Request, response: Response) -> Reply {
    let length = response.body.len();
    let path = request.path.as_str();
    let is_manifest = request.method == "GET" && path.contains("/manifests/");
    if path.starts_with("/v2/manifest/") && is_manifest {
        return Reply::Silence;
    }
    let delivery = match path {
        // The stall comes after the first MiB of the first layer: containerd 2 ends no pull that
        // stalls earlier.
        _ if path.starts_with("/v2/layer/") => Delivery::Stall(length / 4 * 3),
        _ if path.starts_with("/v2/crawl/") => Delivery::Trickle(length / server::chunks_in(CRAWL)),
        _ if path.starts_with("/v2/late/") && request.count == 1 => Delivery::Late(LATE),
        _ => Delivery::Whole,
    };
    Reply::Response(with_layers(response, delivery))
}

fn wrong_bytes(mut response: Response) -> Response {
    if is_layer(&response)
        && let Some(last) = response.body.last_mut()
    {
        *last ^= 0xff;
    }
    response
}

/// The published images, and the number of requests.
#[derive(Debug, Default)]
struct Content {
    /// From `REPOSITORY:TAG` to the digest.
    tags: BTreeMap<String, String>,
    /// By digest.
    blobs: BTreeMap<String, Vec<u8>>,
    /// Number of requests, by port, method and path.
    counts: BTreeMap<(u16, String, String), usize>,
}

impl Content {
    /// The response of a healthy registry.
    fn serve(&self, request: &Request) -> Response {
        let unknown = || error("404 Not Found", "MANIFEST_UNKNOWN", "manifest unknown");
        let Some(path) = request.path.strip_prefix("/v2/") else { return unknown() };
        if path.is_empty() {
            return Response::new("200 OK", JSON, "{}");
        }
        if let Some((_, digest)) = path.split_once("/blobs/") {
            return self.blobs.get(digest).map_or_else(unknown, |blob| Response::new("200 OK", BLOB, blob.clone()));
        }
        let Some((repository, reference)) = path.split_once("/manifests/") else { return unknown() };
        let tagged = self.tags.get(&format!("{repository}:{reference}")).map_or(reference, String::as_str);
        let Some(manifest) = self.blobs.get(tagged) else { return unknown() };
        let document: Value = serde_json::from_slice(manifest).unwrap_or_default();
        let media_type = document["mediaType"].as_str().unwrap_or(JSON);
        Response::new("200 OK", media_type, manifest.clone()).with_header(format!("Docker-Content-Digest: {tagged}"))
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
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
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
