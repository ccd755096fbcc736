//! Each script returns the reply of one registry to a request.

use super::content::{Content, JSON, error};
use super::server::{Delivery, Reply, Request, Response, chunks_in};
use super::{CRAWL, LATE, STATUSES, ScriptedRegistry};

const PAGE: &str = "<!DOCTYPE html><html><body>Please sign in to use this network.</body></html>";

impl ScriptedRegistry {
    /// The script: the reply to a request.
    pub(super) fn reply(self, request: &Request, content: &Content) -> Reply {
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
        _ if path.starts_with("/v2/crawl/") => Delivery::Trickle(length / chunks_in(CRAWL)),
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
