//! Registries and token servers of the tests are on loopback. Where a test is about registries that are not insecure, loopback is
//! not treated as such.

mod blobs;
mod trust;

use std::io::Write;

use serde_json::json;

use super::*;
use crate::http::server::{Reply, Seen, Server, reply};

/// For whatever is to be answered; a slow machine must not fail a test.
const PATIENCE: Duration = Duration::from_secs(60);
/// For what will never be.
const IMPATIENCE: Duration = Duration::from_millis(100);

fn client() -> RegistryClient {
    RegistryClient::new(Config { ping_limit: PATIENCE, resolve_limit: PATIENCE, ..Config::default() }).unwrap()
}

fn impatient() -> RegistryClient {
    RegistryClient { ping_limit: IMPATIENCE, resolve_limit: IMPATIENCE, stall_limit: IMPATIENCE, ..client() }
}

/// Treats loopback as any other host, and trusts these certificates.
fn strict(certificates: &[&str], insecure: &[&str]) -> RegistryClient {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(certificates.concat().as_bytes()).unwrap();
    let ca_file = (!certificates.is_empty()).then(|| file.path().to_owned());
    let insecure = insecure.iter().map(|&name| name.to_owned()).collect();
    let config = Config { insecure, ca_file, ping_limit: PATIENCE, resolve_limit: PATIENCE, ..Config::default() };
    RegistryClient { loopback_is_insecure: false, ..RegistryClient::new(config).unwrap() }
}

fn app(server: &Server) -> Repository {
    Repository { registry: server.name(), path: "team/app".into() }
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

/// A HEAD's answer that names the manifest.
fn named() -> Reply {
    reply(200, &[("Docker-Content-Digest", &digest().to_string())], b"")
}

fn down<T>(server: &Server, kind: OutageKind) -> Result<T, RegistryError> {
    Err(RegistryError::Down { registry: server.name(), kind })
}

/// The reason for which an answer is nonsense.
fn nonsense(answer: Result<Digest, RegistryError>) -> String {
    match answer {
        Err(RegistryError::Nonsense { reason, .. }) => reason,
        other => panic!("{other:?} is not nonsense"),
    }
}

async fn resolve(client: &RegistryClient, server: &Server, secrets: &[PullSecret]) -> Result<Digest, RegistryError> {
    client.resolve(&app(server), "v1", secrets).await
}

#[tokio::test]
async fn a_registry_is_there_when_anything_answers_that_is_not_broken() {
    let client = client();
    for (status, there) in
        [(200, true), (301, true), (401, true), (403, true), (404, true), (429, true), (500, false), (503, false)]
    {
        let server = Server::start(move |_| reply(status, &[("Content-Type", "text/html")], b"<html>")).await;
        let expected = if there { Ok(()) } else { down(&server, OutageKind::ServerError) };
        assert_eq!(client.ping(&server.name()).await, expected, "{status}");
        assert_eq!(server.asked(), ["GET /v2/"], "one request, no redirect followed");
    }
}

#[tokio::test]
async fn a_ping_says_how_a_registry_is_away() {
    let silent = Server::start(|_| Reply::Silence).await;
    assert_eq!(impatient().ping(&silent.name()).await, down(&silent, OutageKind::TimedOut));
    let strange = Server::start(|_| Reply::Bytes(b"SSH-2.0-x\r\n".to_vec())).await;
    assert_eq!(client().ping(&strange.name()).await, down(&strange, OutageKind::ServerError));
    let hangs_up = Server::start(|_| Reply::Bytes(Vec::new())).await;
    assert_eq!(client().ping(&hangs_up.name()).await, down(&hangs_up, OutageKind::Refused));
    for name in ["registry.invalid", "", "a b", "user@host", "host/path", "host:99999"] {
        let expected = RegistryError::Down { registry: name.into(), kind: OutageKind::NoSuchHost };
        assert_eq!(client().ping(name).await, Err(expected), "{name:?}");
    }
}

#[test]
fn dockers_own_registry_is_elsewhere_than_its_name_says() {
    let url = |registry| base_url("https", registry).map(String::from);
    assert_eq!(url("docker.io").as_deref(), Some("https://registry-1.docker.io/"));
    assert_eq!(url("reg.test:5000").as_deref(), Some("https://reg.test:5000/"));
    assert_eq!(url("[::1]:5000").as_deref(), Some("https://[::1]:5000/"));
}

#[tokio::test]
async fn a_tag_is_resolved_without_its_manifest_where_the_registry_names_the_digest() {
    let server = Server::start(|_| named()).await;
    assert_eq!(resolve(&client(), &server, &[secret(&server.name(), "user")]).await, Ok(digest()));
    let seen = server.seen();
    assert_eq!(server.asked(), ["HEAD /v2/team/app/manifests/v1"]);
    assert!(seen[0].header("accept").unwrap().starts_with("application/vnd.oci.image.index.v1+json"));
    assert_eq!(seen[0].header("authorization"), None, "nobody asked who we are");
}

#[tokio::test]
async fn without_a_named_digest_the_manifest_itself_is_hashed() {
    for status in [200, 405] {
        let answer = move |seen: &Seen| match seen.asked.starts_with("HEAD") {
            true => reply(status, &[], b""),
            false => reply(200, &[("Content-Type", "application/json")], &manifest()),
        };
        let server = Server::start(answer).await;
        assert_eq!(resolve(&client(), &server, &[]).await, Ok(digest()));
        assert_eq!(server.asked().len(), 2);
    }
}

#[tokio::test]
async fn statuses_have_their_meaning() {
    for status in [401, 403, 404, 429, 503] {
        let server = Server::start(move |_| reply(status, &[], b"")).await;
        let registry = server.name();
        let expected = match status {
            404 => RegistryError::NotFound(registry),
            429 => RegistryError::RateLimited(registry),
            503 => RegistryError::Down { registry, kind: OutageKind::ServerError },
            _ => RegistryError::Denied(registry),
        };
        assert_eq!(resolve(&client(), &server, &[secret(&server.name(), "user")]).await, Err(expected));
        assert_eq!(server.asked().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn answers_that_no_registry_gives_are_nonsense() {
    let long = format!("{}0", digest());
    let sha512 = format!("sha512:{}", "0".repeat(128));
    let another = Digest::of(b"another").to_string();
    let with = |name: &'static str, value: &str| vec![(name, value.to_owned())];
    let page = with("Content-Type", "Text/HTML; charset=utf-8");
    let header = "Docker-Content-Digest";
    let large = [manifest(), vec![b' '; crate::oci::MAX_DOCUMENT_BYTES as usize]].concat();
    for (what, status, headers, body) in [
        ("a page", 200, page.clone(), manifest()),
        ("a page", 404, page, Vec::new()),
        ("not a digest", 200, with(header, &long), Vec::new()),
        ("not a digest", 200, with(header, "sha256:"), Vec::new()),
        ("\"sha512\" is not supported", 200, with(header, &sha512), Vec::new()),
        ("status 418", 418, Vec::new(), Vec::new()),
        ("no manifest", 200, Vec::new(), b"<html>".to_vec()),
        ("no manifest", 200, Vec::new(), Vec::new()),
        ("more than", 200, Vec::new(), large),
        ("another's digest", 405, with(header, &another), manifest()),
        ("a redirect that is nowhere", 301, Vec::new(), Vec::new()),
        ("a redirect that is nowhere", 301, with("Location", "file:///etc/passwd"), Vec::new()),
        ("redirects without end", 307, with("Location", "?again"), Vec::new()),
    ] {
        let server = Server::start(move |seen| {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            // 405 is how a HEAD is sent on to GET.
            let get = seen.asked.starts_with("GET");
            reply(if get && status == 405 { 200 } else { status }, &headers, &body)
        });
        let server = server.await;
        let reason = nonsense(resolve(&client(), &server, &[]).await);
        assert!(reason.contains(what), "{what}: {reason}");
        assert!(server.asked().len() <= 5, "{what}");
    }
}

#[tokio::test]
async fn a_registry_that_says_nothing_is_given_up() {
    let silent = Server::start(|_| Reply::Silence).await;
    assert_eq!(resolve(&impatient(), &silent, &[]).await, down(&silent, OutageKind::TimedOut));
}

#[tokio::test]
async fn names_that_would_change_the_question_are_not_asked() {
    let server = Server::start(|_| named()).await;
    let registry = server.name();
    for (path, tag) in [("team/app", "v1?x"), ("team/app", ""), ("team/app", "../v1"), ("../app", "v1"), ("a?b", "v1")]
    {
        let repository = Repository { registry: registry.clone(), path: path.into() };
        nonsense(client().resolve(&repository, tag, &[]).await);
    }
    assert_eq!(server.asked().len(), 0);
}
