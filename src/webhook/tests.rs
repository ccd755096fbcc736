use std::fs;

use sha2::{Digest as _, Sha256};

use super::*;
use crate::http::tests::server::{HttpTestServer, Reply, reply};

const SECRET: &[u8] = b"0123456789abcdef";

fn notification() -> Notification {
    Notification {
        id: "id-1".into(),
        reason: "ImageRecovered",
        node: "n1".into(),
        image: "reg.test/app:1".into(),
        digest: None,
        pods: vec!["default/web".into()],
        from: vec!["n2".into()],
        bytes: 7,
        milliseconds: 8,
        note: "The image is on this node.".into(),
        at: 9,
    }
}

/// A webhook with a deadline, short for silent receivers and long for others.
async fn webhook(url: String, secret_file: Option<&Path>, deadline: Duration) -> Webhook {
    let config = Config { url, secret_file: secret_file.map(Path::to_owned), ca_file: None };
    Webhook { deadline, ..Webhook::new(config).await.unwrap() }
}

async fn webhook_to(server: &HttpTestServer, secret_file: Option<&Path>) -> Webhook {
    webhook(format!("http://{}/hook?key=k", server.host_port()), secret_file, Duration::from_secs(60)).await
}

fn secret_file(content: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), content).unwrap();
    file
}

/// HMAC as RFC 2104 defines it, for secrets up to a block.
fn hmac_sha256(secret: &[u8], message: &[u8]) -> String {
    let padded = |byte: u8| (0..64).map(|i| secret.get(i).unwrap_or(&0) ^ byte).collect::<Vec<u8>>();
    let inner = Sha256::digest([&padded(0x36), message].concat());
    let outer = Sha256::digest([padded(0x5c), inner.to_vec()].concat());
    outer.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_signature_is_what_other_tools_compute() {
    // printf '%s' '1700000000.{"id":"a"}' | openssl dgst -sha256 -hmac 0123456789abcdef
    let known = "7eefd6dab3572ab7b831fd0f3b0189166fd2d48edffb19b3bed33209454c06ad";
    assert_eq!(signature(SECRET, 1_700_000_000, br#"{"id":"a"}"#), format!("sha256={known}"));
    assert_eq!(hmac_sha256(SECRET, br#"1700000000.{"id":"a"}"#), known);
}

#[tokio::test]
async fn a_message_is_posted_with_a_signature_over_its_time_and_body() {
    let server = HttpTestServer::start(|_| reply(204, &[], b"")).await;
    let secret = secret_file(&[SECRET, b"\n"].concat());
    webhook_to(&server, Some(secret.path())).await.notify(&notification()).await.unwrap();
    let request = server.requests().remove(0);
    assert_eq!(request.request_line, "POST /hook?key=k");
    assert_eq!(request.header("content-type"), Some("application/json"));
    assert_eq!(request.header("user-agent"), Some(concat!("lighterman/", env!("CARGO_PKG_VERSION"))));
    assert_eq!(request.header("x-lighterman-id"), Some("id-1"));
    assert_eq!(request.body, serde_json::to_vec(&notification()).unwrap());
    let timestamp = request.header("x-lighterman-timestamp").unwrap();
    assert!(timestamp.parse::<u64>().unwrap() > 1_700_000_000, "seconds since 1970: {timestamp}");
    let expected = hmac_sha256(SECRET, &[timestamp.as_bytes(), b".", &request.body].concat());
    assert_eq!(request.header("x-lighterman-signature"), Some(format!("sha256={expected}").as_str()));
}

#[tokio::test]
async fn a_message_without_a_secret_is_not_signed() {
    let server = HttpTestServer::start(|_| reply(200, &[], b"")).await;
    webhook_to(&server, None).await.notify(&notification()).await.unwrap();
    assert_eq!(server.requests()[0].header("x-lighterman-signature"), None);
}

#[tokio::test]
async fn a_status_code_decides_whether_the_message_is_retried() {
    for (status, retryable) in [
        (200, None),
        (202, None),
        (408, Some(true)),
        (429, Some(true)),
        (500, Some(true)),
        (503, Some(true)),
        (307, Some(false)),
        (400, Some(false)),
        (401, Some(false)),
        (404, Some(false)),
        (410, Some(false)),
    ] {
        let server = HttpTestServer::start(move |_| reply(status, &[("Location", "/elsewhere")], b"")).await;
        let outcome = webhook_to(&server, None).await.notify(&notification()).await;
        assert_eq!(outcome.map_err(|error| error.is_retryable()).err(), retryable, "{status}");
        assert_eq!(server.request_lines(), ["POST /hook?key=k"], "one request, to the configured URL");
    }
}

#[tokio::test]
async fn the_body_of_a_success_response_is_ignored() {
    let endless = b"HTTP/1.1 200 x\r\ncontent-length: 99999999999\r\n\r\n".to_vec();
    for bytes in [endless, b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\nno chunk".to_vec()] {
        let server = HttpTestServer::start(move |_| Reply::Bytes(bytes.clone())).await;
        webhook_to(&server, None).await.notify(&notification()).await.unwrap();
    }
}

#[tokio::test]
async fn a_message_to_a_silent_receiver_is_retryable() {
    let silent = HttpTestServer::start(|_| Reply::Silence).await;
    let url = format!("http://{}/hook?key=k", silent.host_port());
    let hurried = webhook(url, None, Duration::from_millis(100)).await;
    assert!(hurried.notify(&notification()).await.unwrap_err().is_retryable());

    let (untrusted, _) = HttpTestServer::start_tls(|_| reply(200, &[], b"")).await;
    for url in [
        "https://webhook.invalid/key".to_owned(),
        format!("https://{}/key", silent.host_port()),
        format!("https://{}/key", untrusted.host_port()),
    ] {
        let error = webhook(url, None, Duration::from_millis(500)).await.notify(&notification()).await.unwrap_err();
        assert!(error.is_retryable(), "{error}");
        assert!(!error.to_string().contains("key"), "the URL may be a secret: {error}");
    }
    assert_eq!(untrusted.request_lines().len(), 0);
}

#[tokio::test]
async fn a_certificate_of_a_configured_authority_is_accepted() {
    let (server, certificate) = HttpTestServer::start_tls(|_| reply(200, &[], b"")).await;
    let ca_file = secret_file(certificate.as_bytes());
    let url = format!("https://{}/", server.host_port());
    let config = Config { url, secret_file: None, ca_file: Some(ca_file.path().to_owned()) };
    Webhook::new(config).await.unwrap().notify(&notification()).await.unwrap();
    assert_eq!(server.request_lines(), ["POST /"]);
}

#[tokio::test]
async fn a_replaced_secret_signs_the_next_message_and_a_lost_secret_prevents_sending() {
    let server = HttpTestServer::start(|_| reply(200, &[], b"")).await;
    let file = secret_file(SECRET);
    let webhook = webhook_to(&server, Some(file.path())).await;
    webhook.notify(&notification()).await.unwrap();
    let another = b"another secret of more than 16 bytes";
    fs::write(file.path(), another).unwrap();
    webhook.notify(&notification()).await.unwrap();
    for (request, secret) in server.requests().iter().zip([SECRET, another]) {
        let signed = [request.header("x-lighterman-timestamp").unwrap().as_bytes(), b".", &request.body].concat();
        let expected = format!("sha256={}", hmac_sha256(secret, &signed));
        assert_eq!(request.header("x-lighterman-signature"), Some(expected.as_str()));
    }
    fs::remove_file(file.path()).unwrap();
    assert!(webhook.notify(&notification()).await.unwrap_err().is_retryable());
    assert_eq!(server.request_lines().len(), 2);
}

#[tokio::test]
async fn a_secret_outside_the_length_limits_is_rejected() {
    for (content, length) in [
        (b"0123456789abcde".to_vec(), None),
        (b"0123456789abcde\n".to_vec(), None),
        (b"0123456789abcdef\n".to_vec(), Some(16)),
        (b"0123456789abcdef\r\n".to_vec(), Some(16)),
        (b"0123456789abcdef\n\n".to_vec(), Some(17)),
        (vec![b'x'; 4096], Some(4096)),
        ([vec![b'x'; 4096], b"\r\n".to_vec()].concat(), Some(4096)),
        (vec![b'x'; 4097], None),
        (vec![b'x'; 1 << 20], None),
        (Vec::new(), None),
    ] {
        let file = secret_file(&content);
        let read = read_secret(file.path()).await.ok();
        assert_eq!(read.map(|read| read.len()), length, "{} bytes", content.len());
    }
}

#[tokio::test]
async fn an_invalid_url_is_rejected_and_not_shown() {
    for url in ["", "hook", "ftp://host/key", "https://user:key@host/", "https:///", "mailto:key@host"] {
        let config = Config { url: url.into(), secret_file: None, ca_file: None };
        assert!(!format!("{config:?}").contains("key"));
        let error = Webhook::new(config).await.err().unwrap_or_else(|| panic!("{url:?} was accepted"));
        assert!(!error.to_string().contains("key"), "{error}");
    }
}
