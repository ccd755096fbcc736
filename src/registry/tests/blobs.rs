//! Blobs that a node discarded, from registries with correct, wrong, slow and denied responses.

use super::*;
use crate::ports::StoreError;

const BLOB: &[u8] = b"a layer";

#[derive(Default)]
struct BufferSink(Vec<u8>);

#[async_trait]
impl BlobSink for BufferSink {
    async fn append(&mut self, chunks: &[bytes::Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.0.extend_from_slice(chunk));
        Ok(())
    }
}

/// The result of a fetch as a short text, and the bytes that were written.
async fn fetch(client: &RegistryClient, server: &HttpTestServer, secrets: &[PullSecret]) -> (String, Vec<u8>) {
    fetch_of(client, server, BLOB.len() as u64, secrets).await
}

async fn fetch_of(
    client: &RegistryClient,
    server: &HttpTestServer,
    size: u64,
    secrets: &[PullSecret],
) -> (String, Vec<u8>) {
    let mut sink = BufferSink::default();
    let result = client.fetch_blob(&app(server), Digest::of(BLOB), size, secrets, &mut sink).await;
    let outcome = match result {
        Ok(proof) => format!("{} bytes", proof.size()),
        Err(RegistryFetchError::Denied(_)) => "denied".into(),
        Err(RegistryFetchError::Gone(_)) => "gone".into(),
        Err(RegistryFetchError::RateLimited { retry_after, .. }) => format!("limited {retry_after:?}"),
        Err(RegistryFetchError::Down { kind, .. }) => format!("down {}", kind.label()),
        Err(RegistryFetchError::WrongBytes { reason, .. }) => format!("wrong: {reason}"),
        Err(RegistryFetchError::Sink(error)) => panic!("{error}"),
    };
    (outcome, sink.0)
}

fn blob_reply() -> Reply {
    reply(200, &[], BLOB)
}

fn fetched_blob() -> (String, Vec<u8>) {
    ("7 bytes".into(), BLOB.to_vec())
}

#[tokio::test]
async fn a_public_blob_is_fetched_without_a_secret() {
    let server = HttpTestServer::start(|_| blob_reply()).await;
    assert_eq!(fetch(&client(), &server, &[secret(&server.host_port(), "user")]).await, fetched_blob());
    assert_eq!(server.request_lines(), [format!("GET /v2/team/app/blobs/{}", Digest::of(BLOB))]);
    assert_eq!(server.requests()[0].header("authorization"), None);
}

#[tokio::test]
async fn a_private_blob_is_fetched_with_the_right_secret() {
    let server = HttpTestServer::start(|request| match request.header("authorization") == Some(&basic("b")) {
        true => blob_reply(),
        false => reply(401, &[("WWW-Authenticate", "Basic")], b""),
    });
    let server = server.await;
    let secrets = ["a", "b"].map(|user| secret(&server.host_port(), user));
    assert_eq!(fetch(&client(), &server, &secrets).await, fetched_blob());
    assert_eq!(fetch(&client(), &server, &secrets[..1]).await, ("denied".into(), Vec::new()));
    assert_eq!(fetch(&client(), &server, &[]).await, ("denied".into(), Vec::new()));
}

#[tokio::test]
async fn no_credential_is_sent_to_the_storage_behind_a_registry() {
    let storage = HttpTestServer::start(|_| blob_reply()).await;
    let location = format!("http://{}/bucket?signature=s", storage.host_port());
    let server = HttpTestServer::start(move |request| match request.header("authorization") {
        Some(_) => reply(307, &[("Location", &location)], b""),
        None => reply(401, &[("WWW-Authenticate", "Basic")], b""),
    });
    let server = server.await;
    assert_eq!(fetch(&client(), &server, &[secret(&server.host_port(), "user")]).await, fetched_blob());
    assert_eq!(storage.request_lines(), ["GET /bucket?signature=s"]);
    assert_eq!(storage.requests()[0].header("authorization"), None);
}

#[tokio::test]
async fn a_denial_by_the_storage_is_no_denial_by_the_registry() {
    for (status, expected) in
        [(403, "down server_error"), (401, "down server_error"), (404, "gone"), (503, "down server_error")]
    {
        let storage = HttpTestServer::start(move |_| reply(status, &[("WWW-Authenticate", "Basic")], b"")).await;
        let location = format!("http://{}/bucket", storage.host_port());
        let server = HttpTestServer::start(move |_| reply(302, &[("Location", &location)], b"")).await;
        let answer = fetch(&client(), &server, &[secret(&server.host_port(), "user")]).await;
        assert_eq!(answer, (expected.into(), Vec::new()), "{status}");
    }
}

#[tokio::test]
async fn each_status_of_a_blob_maps_to_its_error() {
    for (status, expected) in [
        (401, "denied"),
        (403, "denied"),
        (404, "gone"),
        (410, "gone"),
        (429, "limited Some(7s)"),
        (500, "down server_error"),
        (206, "wrong: status 206"),
        (418, "wrong: status 418"),
        (301, "wrong: a redirect without an HTTP URL"),
    ] {
        let server = HttpTestServer::start(move |_| reply(status, &[("Retry-After", "7")], BLOB)).await;
        assert_eq!(fetch(&client(), &server, &[]).await, (expected.into(), Vec::new()), "{status}");
    }
    let circle = HttpTestServer::start(|_| reply(307, &[("Location", "?again")], b"")).await;
    assert_eq!(fetch(&client(), &circle, &[]).await.0, "wrong: more than 4 redirects");
    assert_eq!(circle.request_lines().len(), 5);
}

#[tokio::test]
async fn wrong_bytes_are_rejected_and_at_most_the_blobs_size_is_written() {
    let undeclared = |body: &[u8]| [b"HTTP/1.1 200 OK\r\n\r\n", body].concat();
    let chunked = |body: &[u8]| {
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        [head, format!("{:x}\r\n", body.len()).as_bytes(), body, b"\r\n0\r\n\r\n"].concat()
    };
    let declared = |length: usize, body: &[u8]| {
        [format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").as_bytes(), body].concat()
    };
    for (what, answer, expected) in [
        ("other bytes", declared(7, b"b layer"), "wrong: "),
        ("a page", declared(6, b"<html>"), "wrong: 6 bytes instead of 7"),
        ("too long by its head", declared(1 << 40, BLOB), "wrong: 1099511627776 bytes instead of 7"),
        ("too long", undeclared(&[b'x'; 100_000]), "wrong: more than 7 bytes"),
        ("too long in chunks", chunked(b"a layer and more"), "wrong: more than 7 bytes"),
        ("too short", undeclared(b"a la"), "wrong: "),
        ("empty", undeclared(b""), "wrong: "),
        ("cut", declared(7, b"a la"), "down refused"),
        ("no HTTP", b"SSH-2.0-x\r\n".to_vec(), "wrong: a response that is not HTTP"),
    ] {
        let server = HttpTestServer::start(move |_| Reply::Bytes(answer.clone())).await;
        let (outcome, written) = fetch(&client(), &server, &[]).await;
        assert!(outcome.starts_with(expected), "{what}: {outcome}");
        assert!(written.len() <= BLOB.len(), "{what}");
    }
    let server = HttpTestServer::start(move |_| Reply::Bytes(chunked(BLOB))).await;
    assert_eq!(fetch(&client(), &server, &[]).await, fetched_blob(), "a length need not be declared");
}

#[tokio::test]
async fn a_stalled_or_trickling_registry_times_out() {
    let head = "HTTP/1.1 200 OK\r\n\r\n";
    let silent = HttpTestServer::start(|_| Reply::Silence).await;
    let stalling = HttpTestServer::start(move |_| Reply::Stall([head.as_bytes(), b"a la"].concat())).await;
    assert_eq!(fetch(&client_with_short_timeouts(), &silent, &[]).await.0, "down timed_out");
    assert_eq!(fetch(&client_with_short_timeouts(), &stalling, &[]).await.0, "down timed_out");
    // Each byte arrives in time, but all bytes together would take ten seconds.
    let trickling = HttpTestServer::start(move |_| Reply::Trickle([head.as_bytes(), &[b'x'; 1000]].concat())).await;
    let client = RegistryClient { resolve_limit: LONG_TIMEOUT, ..client_with_short_timeouts() };
    assert_eq!(fetch_of(&client, &trickling, 1000, &[]).await.0, "down timed_out");
}

#[tokio::test]
async fn a_repository_that_would_change_the_url_is_not_sent() {
    let server = HttpTestServer::start(|_| blob_reply()).await;
    for path in ["../app", "a?b", "", "a//b"] {
        let repository = Repository { registry: server.host_port(), path: path.into() };
        let fetched = client().fetch_blob(&repository, Digest::of(BLOB), 7, &[], &mut BufferSink::default()).await;
        assert!(matches!(fetched, Err(RegistryFetchError::WrongBytes { .. })), "{path}");
    }
    assert_eq!(server.request_lines().len(), 0);
}
