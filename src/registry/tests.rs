//! Registries and token servers of the tests are on loopback. A test of registries that are not
//! insecure does not treat loopback as insecure.

mod blobs;
mod trust;

use std::io::Write;

use serde_json::json;

use super::*;
use crate::http::tests::server::{HttpTestServer, ReceivedRequest, Reply, reply};

/// For servers that answer; a slow machine must not fail a test.
const LONG_TIMEOUT: Duration = Duration::from_secs(60);
/// For servers that never answer.
const SHORT_TIMEOUT: Duration = Duration::from_millis(100);

fn client() -> RegistryClient {
    RegistryClient::new(Config { ping_limit: LONG_TIMEOUT, resolve_limit: LONG_TIMEOUT, ..Config::default() }).unwrap()
}

fn client_with_short_timeouts() -> RegistryClient {
    RegistryClient { ping_limit: SHORT_TIMEOUT, resolve_limit: SHORT_TIMEOUT, stall_limit: SHORT_TIMEOUT, ..client() }
}

/// A client that treats loopback as any other host, and trusts these certificates.
fn client_trusting(certificates: &[&str], insecure: &[&str]) -> RegistryClient {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(certificates.concat().as_bytes()).unwrap();
    let ca_file = (!certificates.is_empty()).then(|| file.path().to_owned());
    let insecure = insecure.iter().map(|&name| name.to_owned()).collect();
    let config =
        Config { insecure, ca_file, ping_limit: LONG_TIMEOUT, resolve_limit: LONG_TIMEOUT, ..Config::default() };
    RegistryClient { loopback_is_insecure: false, ..RegistryClient::new(config).unwrap() }
}

fn app(server: &HttpTestServer) -> Repository {
    Repository { registry: server.host_port(), path: "team/app".into() }
}

fn secret(key: &str, user: &str) -> PullSecret {
    PullSecret(json!({ "auths": { key: { "username": user, "password": "p" } } }).to_string().into_bytes())
}

/// Basic authentication as this user with the password `p`.
fn basic(user: &str) -> String {
    use base64::Engine;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:p")))
}

fn manifest() -> Vec<u8> {
    let config = json!({ "mediaType": "m", "digest": Digest::of(b"config").to_string(), "size": 6 });
    json!({ "schemaVersion": 2, "config": config, "layers": [] }).to_string().into_bytes()
}

fn digest() -> Digest {
    Digest::of(&manifest())
}

/// The reply to a HEAD that names the manifest.
fn digest_reply() -> Reply {
    reply(200, &[("Docker-Content-Digest", &digest().to_string())], b"")
}

fn down<T>(server: &HttpTestServer, kind: OutageKind) -> Result<T, RegistryError> {
    Err(RegistryError::Down { registry: server.host_port(), kind })
}

/// The reason of an invalid response.
fn invalid_response_reason(answer: Result<Digest, RegistryError>) -> String {
    match answer {
        Err(RegistryError::InvalidResponse { reason, .. }) => reason,
        other => panic!("{other:?} is no invalid response"),
    }
}

async fn resolve(
    client: &RegistryClient,
    server: &HttpTestServer,
    secrets: &[PullSecret],
) -> Result<Digest, RegistryError> {
    client.resolve(&app(server), "v1", secrets).await
}

#[tokio::test]
async fn a_registry_is_up_unless_its_status_is_a_server_error() {
    let client = client();
    for (status, is_up) in
        [(200, true), (301, true), (401, true), (403, true), (404, true), (429, true), (500, false), (503, false)]
    {
        let server = HttpTestServer::start(move |_| reply(status, &[("Content-Type", "text/html")], b"<html>")).await;
        let expected = if is_up { Ok(()) } else { down(&server, OutageKind::ServerError) };
        assert_eq!(client.ping(&server.host_port()).await, expected, "{status}");
        assert_eq!(server.request_lines(), ["GET /v2/"], "one request, no redirect followed");
    }
}

#[tokio::test]
async fn a_ping_reports_the_outage_kind_of_a_registry() {
    let silent = HttpTestServer::start(|_| Reply::Silence).await;
    assert_eq!(client_with_short_timeouts().ping(&silent.host_port()).await, down(&silent, OutageKind::TimedOut));
    let strange = HttpTestServer::start(|_| Reply::Bytes(b"SSH-2.0-x\r\n".to_vec())).await;
    assert_eq!(client().ping(&strange.host_port()).await, down(&strange, OutageKind::ServerError));
    let hangs_up = HttpTestServer::start(|_| Reply::Bytes(Vec::new())).await;
    assert_eq!(client().ping(&hangs_up.host_port()).await, down(&hangs_up, OutageKind::Refused));
    for name in ["registry.invalid", "", "a b", "user@host", "host/path", "host:99999"] {
        let expected = RegistryError::Down { registry: name.into(), kind: OutageKind::NoSuchHost };
        assert_eq!(client().ping(name).await, Err(expected), "{name:?}");
    }
}

#[test]
fn docker_io_is_reached_at_registry_1_docker_io() {
    let url = |registry| base_url("https", registry).map(String::from);
    assert_eq!(url("docker.io").as_deref(), Some("https://registry-1.docker.io/"));
    assert_eq!(url("reg.test:5000").as_deref(), Some("https://reg.test:5000/"));
    assert_eq!(url("[::1]:5000").as_deref(), Some("https://[::1]:5000/"));
}

#[tokio::test]
async fn a_tag_is_resolved_without_its_manifest_where_the_registry_names_the_digest() {
    let server = HttpTestServer::start(|_| digest_reply()).await;
    assert_eq!(resolve(&client(), &server, &[secret(&server.host_port(), "user")]).await, Ok(digest()));
    let requests = server.requests();
    assert_eq!(server.request_lines(), ["HEAD /v2/team/app/manifests/v1"]);
    assert!(requests[0].header("accept").unwrap().starts_with("application/vnd.oci.image.index.v1+json"));
    assert_eq!(requests[0].header("authorization"), None, "the registry sent no challenge");
}

#[tokio::test]
async fn the_manifest_is_hashed_when_no_header_names_its_digest() {
    for status in [200, 405] {
        let answer = move |request: &ReceivedRequest| match request.request_line.starts_with("HEAD") {
            true => reply(status, &[], b""),
            false => reply(200, &[("Content-Type", "application/json")], &manifest()),
        };
        let server = HttpTestServer::start(answer).await;
        assert_eq!(resolve(&client(), &server, &[]).await, Ok(digest()));
        assert_eq!(server.request_lines().len(), 2);
    }
}

#[tokio::test]
async fn each_status_of_a_tag_maps_to_its_error() {
    for status in [401, 403, 404, 429, 503] {
        let server = HttpTestServer::start(move |_| reply(status, &[], b"")).await;
        let registry = server.host_port();
        let expected = match status {
            404 => RegistryError::NotFound(registry),
            429 => RegistryError::RateLimited(registry),
            503 => RegistryError::Down { registry, kind: OutageKind::ServerError },
            _ => RegistryError::Denied(registry),
        };
        assert_eq!(resolve(&client(), &server, &[secret(&server.host_port(), "user")]).await, Err(expected));
        assert_eq!(server.request_lines().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn responses_that_no_registry_sends_are_invalid() {
    let long = format!("{}0", digest());
    let sha512 = format!("sha512:{}", "0".repeat(128));
    let another = Digest::of(b"another").to_string();
    let with = |name: &'static str, value: &str| vec![(name, value.to_owned())];
    let page = with("Content-Type", "Text/HTML; charset=utf-8");
    let header = "Docker-Content-Digest";
    let large = [manifest(), vec![b' '; crate::oci::MAX_DOCUMENT_BYTES as usize]].concat();
    for (what, status, headers, body) in [
        ("an HTML page", 200, page.clone(), manifest()),
        ("an HTML page", 404, page, Vec::new()),
        ("not a digest", 200, with(header, &long), Vec::new()),
        ("not a digest", 200, with(header, "sha256:"), Vec::new()),
        ("\"sha512\" is not supported", 200, with(header, &sha512), Vec::new()),
        ("status 418", 418, Vec::new(), Vec::new()),
        ("that is no manifest", 200, Vec::new(), b"<html>".to_vec()),
        ("that is no manifest", 200, Vec::new(), Vec::new()),
        ("more than", 200, Vec::new(), large),
        ("the digest of another", 405, with(header, &another), manifest()),
        ("a redirect without an HTTP URL", 301, Vec::new(), Vec::new()),
        ("a redirect without an HTTP URL", 301, with("Location", "file:///etc/passwd"), Vec::new()),
        ("more than 4 redirects", 307, with("Location", "?again"), Vec::new()),
    ] {
        let server = HttpTestServer::start(move |request| {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            // A HEAD with status 405 makes the client send a GET.
            let get = request.request_line.starts_with("GET");
            reply(if get && status == 405 { 200 } else { status }, &headers, &body)
        });
        let server = server.await;
        let reason = invalid_response_reason(resolve(&client(), &server, &[]).await);
        assert!(reason.contains(what), "{what}: {reason}");
        assert!(server.request_lines().len() <= 5, "{what}");
    }
}

#[tokio::test]
async fn a_silent_registry_times_out() {
    let silent = HttpTestServer::start(|_| Reply::Silence).await;
    assert_eq!(resolve(&client_with_short_timeouts(), &silent, &[]).await, down(&silent, OutageKind::TimedOut));
}

#[tokio::test]
async fn names_that_would_change_the_url_are_not_sent() {
    let server = HttpTestServer::start(|_| digest_reply()).await;
    let registry = server.host_port();
    for (path, tag) in [("team/app", "v1?x"), ("team/app", ""), ("team/app", "../v1"), ("../app", "v1"), ("a?b", "v1")]
    {
        let repository = Repository { registry: registry.clone(), path: path.into() };
        invalid_response_reason(client().resolve(&repository, tag, &[]).await);
    }
    assert_eq!(server.request_lines().len(), 0);
}
