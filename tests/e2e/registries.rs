//! Registries that are scripted: a function from a request to the response. Each fault has a port
//! of its own, so that rows which need different faults run side by side.

mod server;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::bed::Failure;
use crate::images::Image;
use server::{Delivery, Reply, Request, Response};

/// The fault of the registry that an image names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum World {
    /// Connections are refused.
    Refuses,
    /// 401 for every client.
    Unauthorized,
    /// 403 for every client.
    Forbids,
    /// 404: every image is lost.
    Lost,
    /// 429, always.
    Limits,
    /// 500.
    Fails,
    /// This status, to every request. The status is one of [`STATUSES`].
    Answers(u16),
    /// 200 and a page for people, as gateways and captive portals do.
    Html,
    /// Layers have the right length and other bytes.
    WrongBytes,
    /// The connection ends in the middle of each layer.
    CutsLayers,
    /// Plain HTTP, where containerd is not told so and speaks TLS.
    PlainHttp,
    /// A frame of HTTP/2 in place of an HTTP/1 response.
    Malformed,
    /// The token server answers with a page for people.
    TokenPage,
    /// The token server answers 400.
    TokenRefuses,
    /// The token server answers 500.
    TokenFails,
    /// The manifest needs a token and is served; the storage of blobs answers 403.
    StorageForbids,
    /// Nothing is wrong: every published image is served. A layer of a repository below `stalls/`
    /// stops half-way at the first request, and comes slowly at later ones.
    Serves,
    /// As `Serves`, for registries that containerd reaches through this mirror only.
    Mirror,
}

/// The statuses of [`World::Answers`] with their reason phrases.
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

impl World {
    fn all() -> impl Iterator<Item = Self> {
        const OTHERS: [World; 17] = [
            World::Refuses,
            World::Unauthorized,
            World::Forbids,
            World::Lost,
            World::Limits,
            World::Fails,
            World::Html,
            World::WrongBytes,
            World::CutsLayers,
            World::PlainHttp,
            World::Malformed,
            World::TokenPage,
            World::TokenRefuses,
            World::TokenFails,
            World::StorageForbids,
            World::Serves,
            World::Mirror,
        ];
        OTHERS.into_iter().chain(STATUSES.map(|(status, _)| Self::Answers(status)))
    }

    /// The registry's name in images.
    pub(crate) fn registry(self) -> String {
        format!("{ADDRESS}:{}", self.port())
    }

    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Refuses => 5001,
            Self::Unauthorized => 5401,
            Self::Forbids => 5403,
            Self::Lost => 5404,
            Self::Limits => 5429,
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
        }
    }

    /// The script: the reply to a request.
    fn reply(self, request: &Request, content: &Content) -> Reply {
        let response = match self {
            // No server listens there.
            Self::Refuses => return Reply::Raw(b""),
            Self::Malformed => return Reply::Raw(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x04\x03"),
            Self::Unauthorized => error("401 Unauthorized", "UNAUTHORIZED", "authentication required")
                .with_header("WWW-Authenticate: Basic realm=\"test\"".into()),
            Self::Forbids => error("403 Forbidden", "DENIED", "requested access is denied"),
            Self::Lost => error("404 Not Found", "MANIFEST_UNKNOWN", "manifest unknown"),
            Self::Limits => error("429 Too Many Requests", "TOOMANYREQUESTS", "You have reached your pull rate limit."),
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

    /// A registry with a token server of its own, which answers `token`. Requests for blobs are
    /// redirected to a storage that refuses them.
    fn with_token(self, request: &Request, content: &Content, token: Response) -> Response {
        let host = self.registry();
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

/// Whether the response carries a layer: everything else of an image is JSON.
fn is_layer(response: &Response) -> bool {
    response.status.starts_with("200") && !response.body.starts_with(b"{")
}

fn with_layers(response: Response, delivery: Delivery) -> Response {
    if is_layer(&response) { Response { delivery, ..response } } else { response }
}

fn wrong_bytes(mut response: Response) -> Response {
    if is_layer(&response)
        && let Some(last) = response.body.last_mut()
    {
        *last ^= 0xff;
    }
    response
}

/// The images that the registries serve, and the requests that came.
#[derive(Debug, Default)]
struct Content {
    /// `REPOSITORY:TAG` to the digest.
    tags: BTreeMap<String, String>,
    /// By digest.
    blobs: BTreeMap<String, Vec<u8>>,
    /// Requests by port, method and path.
    counts: BTreeMap<(u16, String, String), usize>,
}

impl Content {
    /// The response of a registry in order.
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
    /// Starts all of them. The caller is in the hub's network namespace.
    pub(crate) fn serve() -> Result<Self, Failure> {
        let registries = Self::default();
        for world in World::all().filter(|world| *world != World::Refuses) {
            let shared = registries.clone();
            server::serve(&world.registry(), move |mut request| {
                let mut content = shared.content();
                let key = (world.port(), request.method.clone(), request.path.clone());
                let count = content.counts.entry(key).or_default();
                *count += 1;
                request.count = *count;
                world.reply(&request, &content)
            })?;
        }
        Ok(registries)
    }

    /// Publishes an image under `REPOSITORY:TAG` in every registry that serves images. A tag that
    /// exists moves.
    pub(crate) fn publish(&self, name: &str, image: &Image) {
        let mut content = self.content();
        content.tags.insert(name.to_owned(), image.root.clone());
        content.blobs.extend(image.blobs().iter().map(|(digest, blob)| (digest.clone(), blob.clone())));
    }

    /// GET requests to this registry for a path with this part.
    pub(crate) fn fetches(&self, world: World, part: &str) -> usize {
        let content = self.content();
        let counts = content
            .counts
            .iter()
            .filter(|((port, method, path), _)| *port == world.port() && method == "GET" && path.contains(part));
        counts.map(|(_, count)| count).sum()
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        // A panic of another thread leaves whole entries behind.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The hub's address.
const ADDRESS: &str = "10.77.0.1";

/// Another port of the same host, where connections are refused as well. A registry
/// there shares nothing but the address.
pub(crate) const INVENTED_PORT: u16 = 5099;

/// The registries with which containerd and the agents are told to speak plain HTTP.
pub(crate) fn names() -> Vec<String> {
    let spoken = World::all().filter(|world| *world != World::PlainHttp);
    spoken.map(World::registry).chain([format!("{ADDRESS}:{INVENTED_PORT}")]).collect()
}
