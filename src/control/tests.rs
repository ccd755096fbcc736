//! The socket's file, and clients of every behavior.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use super::*;
use crate::control::Status;

struct FixedStatus(Status);

#[async_trait]
impl StatusSource for FixedStatus {
    async fn status(&self) -> Status {
        self.0.clone()
    }
}

/// A running server with its socket in a temporary folder.
struct TestControlServer {
    folder: TempDir,
    pulls: mpsc::Receiver<PullRequest>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

fn socket(folder: &TempDir) -> PathBuf {
    folder.path().join("agent.sock")
}

fn status() -> Status {
    Status { node: Some("n1".into()), ..Status::default() }
}

async fn bind(path: &Path) -> (Result<ControlServer, BindError>, mpsc::Receiver<PullRequest>) {
    let (pulls_in, pulls) = mpsc::channel(4);
    (ControlServer::bind(Config { socket: path.to_owned() }, Arc::new(FixedStatus(status())), pulls_in).await, pulls)
}

impl TestControlServer {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (control, pulls) = bind(&socket(&folder)).await;
        let stop = CancellationToken::new();
        let running = tokio::spawn(control.unwrap().run(stop.clone()));
        Self { folder, pulls, stop, running }
    }

    fn client(&self) -> Client {
        Client::new(&socket(&self.folder))
    }

    /// The complete response to raw bytes of a request.
    async fn raw(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(socket(&self.folder)).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // The server resets a connection whose request it does not read to the end.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    async fn post(&self, body: &str) -> String {
        let length = body.len();
        self.raw(&format!("POST /v1/pull HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}")).await
    }
}

fn bytes(done: u64) -> PullProgress {
    PullProgress::Bytes { done, total: 10 }
}

fn failed() -> PullProgress {
    PullProgress::Failed { kind: crate::control::PullFailure::Busy, message: "m".into(), retryable: true }
}

#[tokio::test]
async fn the_socket_is_private_to_its_owner_and_removed_with_the_agent() {
    let server = TestControlServer::start().await;
    let file = std::fs::metadata(socket(&server.folder)).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    server.stop.cancel();
    server.running.await.unwrap();
    assert!(!socket(&server.folder).exists());
}

#[tokio::test]
async fn the_socket_of_a_dead_agent_is_replaced_and_that_of_a_running_agent_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = socket(&folder);
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a killed process leaves its socket");
    let (first, _pulls) = bind(&path).await;
    let first = first.unwrap();
    let (second, _) = bind(&path).await;
    assert!(matches!(second.err(), Some(BindError::InUse(taken)) if taken == path));
    drop(first);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_file_that_is_no_socket_is_rejected_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = socket(&folder);
    std::fs::write(&path, "precious").unwrap();
    let (result, _) = bind(&path).await;
    assert!(matches!(result.err(), Some(BindError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[tokio::test]
async fn a_socket_of_a_later_agent_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = socket(&folder);
    let (first, _pulls) = bind(&path).await;
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
}

#[tokio::test]
async fn a_path_over_the_length_limit_of_the_kernel_is_named_in_the_error() {
    let long = Path::new("/tmp").join("x".repeat(120));
    let (result, _) = bind(&long).await;
    assert!(result.err().unwrap().to_string().contains("xxx"));
}

#[tokio::test]
async fn a_client_is_served_while_another_client_pulls() {
    let mut server = TestControlServer::start().await;
    let reference: Reference = "r.test/a:1".parse().unwrap();
    let mut first = server.client().pull(&reference, true).await.unwrap();
    let mut second = server.client().pull(&reference, false).await.unwrap();
    let (one, two) = (server.pulls.recv().await.unwrap(), server.pulls.recv().await.unwrap());
    assert_eq!((one.reference, one.dry_run, two.dry_run), (reference, true, false));
    one.progress.send(bytes(1)).await.unwrap();
    two.progress.send(failed()).await.unwrap();
    assert_eq!(server.client().status().await.unwrap(), status());
    assert_eq!(second.next().await.unwrap(), failed());
    assert_eq!(first.next().await.unwrap(), bytes(1));
}

#[tokio::test]
async fn a_client_that_disconnects_closes_its_pull() {
    let mut server = TestControlServer::start().await;
    let pull = server.client().pull(&"r.test/a:1".parse().unwrap(), false).await.unwrap();
    let request = server.pulls.recv().await.unwrap();
    drop(pull);
    request.progress.closed().await;
}

#[tokio::test]
async fn a_client_reports_an_agent_that_ends_without_an_outcome() {
    let mut server = TestControlServer::start().await;
    let mut pull = server.client().pull(&"r.test/a:1".parse().unwrap(), false).await.unwrap();
    drop(server.pulls.recv().await.unwrap());
    assert!(matches!(pull.next().await, Err(ClientError::Broken(_))));
}

#[tokio::test]
async fn a_malformed_request_is_rejected_with_a_reason() {
    let server = TestControlServer::start().await;
    let large = format!(r#"{{"reference": "{}"}}"#, "a".repeat(MAX_BODY));
    for (answer, status, expected) in [
        (server.post("{").await, "400", "EOF"),
        (server.post(r#"{"reference": "r.test/a:1", "force": true}"#).await, "400", "force"),
        (server.post(r#"{"reference": "A//b"}"#).await, "400", "not an image reference"),
        (server.post(&large).await, "413", "4096"),
        (server.raw("GET /v1/pull HTTP/1.1\r\nhost: x\r\n\r\n").await, "405", ""),
        (server.raw("DELETE /v1/status HTTP/1.1\r\nhost: x\r\n\r\n").await, "405", ""),
        (server.raw("POST /v1/delete HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await, "404", ""),
    ] {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(expected), "{status}: {answer}");
    }
    let endless = server.raw(&format!("GET /v1/status HTTP/1.1\r\nx: {}", "a".repeat(MAX_HEADERS))).await;
    assert!(
        endless.is_empty() || endless.starts_with("HTTP/1.1 4"),
        "the server waits for the end of the headers: {endless}"
    );
}

#[tokio::test]
async fn an_agent_that_accepts_no_pulls_answers_with_an_error() {
    let TestControlServer { folder, pulls, .. } = TestControlServer::start().await;
    drop(pulls);
    let error = Client::new(&socket(&folder)).pull(&"r.test/a:1".parse().unwrap(), false).await.err().unwrap();
    assert!(matches!(&error, ClientError::Rejected(message) if message.contains("accepts no requests")), "{error}");
}

#[tokio::test]
async fn a_client_without_an_agent_names_the_path_of_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = socket(&folder);
    for _ in ["no file", "left by a dead agent"] {
        let error = Client::new(&path).status().await.unwrap_err();
        assert!(matches!(&error, ClientError::NoAgent(named) if *named == path), "{error}");
        drop(UnixListener::bind(&path));
    }
}

#[tokio::test(start_paused = true)]
async fn silent_clients_and_half_requests_make_room_for_other_clients() {
    for half in ["", "GET /v1/sta", "POST /v1/pull HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"] {
        let server = TestControlServer::start().await;
        let mut slow = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let mut stream = UnixStream::connect(socket(&server.folder)).await.unwrap();
            stream.write_all(half.as_bytes()).await.unwrap();
            slow.push(stream);
        }
        assert_eq!(server.client().status().await.unwrap(), status(), "behind {half:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_reading_is_disconnected() {
    let mut server = TestControlServer::start().await;
    let mut silent = UnixStream::connect(socket(&server.folder)).await.unwrap();
    let body = r#"{"reference":"a"}"#;
    let request = format!("POST /v1/pull HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    silent.write_all(request.as_bytes()).await.unwrap();
    let progress = server.pulls.recv().await.unwrap().progress;
    // The loop sends more than the buffers between agent and client hold, until the receiver is
    // closed.
    let flood = async { while progress.send(bytes(1)).await.is_ok() {} };
    tokio::time::timeout(2 * write_timeout::WRITE_TIMEOUT, flood).await.expect("the pull ends at the write timeout");
    drop(silent);
}

#[tokio::test]
async fn a_client_receives_the_outcome_when_the_agent_stops() {
    let mut server = TestControlServer::start().await;
    let mut pull = server.client().pull(&"r.test/a:1".parse().unwrap(), false).await.unwrap();
    let request = server.pulls.recv().await.unwrap();
    server.stop.cancel();
    request.progress.send(failed()).await.unwrap();
    drop(request);
    assert_eq!(pull.next().await.unwrap(), failed());
    server.running.await.unwrap();
}
