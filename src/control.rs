//! The control socket: status and manual pulls for an operator on the node. HTTP/1 over a Unix
//! socket with mode 0600, reachable on the node and by `kubectl exec` into the agent's pod, and
//! nowhere else.
//!
//! `GET /v1/status` returns one JSON object. `POST /v1/pull` with `{"reference": "...", "dryRun":
//! false}` returns JSON objects, one a line, until the pull ends; a client cancels the pull by
//! closing the connection. There are no other verbs. Not here: the work behind the requests.

mod client;
mod pull;
mod socket;
mod status;
#[cfg(test)]
mod tests;
mod write_timeout;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::StreamExt;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::oci::Reference;

pub use client::{Client, ClientError, PullStream};
pub use pull::{MAX_NAMES, PullFailure, PullProgress, PullRequest};
pub use socket::BindError;
use socket::ControlSocket;
pub use status::{
    BlobAccess, ClockStatus, ContainerdStatus, ImagesStatus, LayerStatus, NextImageStatus, OutageStatus,
    OwnImageStatus, PolicyFileStatus, RecoveryStatus, RetentionStatus, Status, StatusSource, UdpStatus,
};
use write_timeout::WriteTimeoutStream;

/// Two operators with a few shells each, and as many again; each connection costs some 20 KiB.
const MAX_CONNECTIONS: usize = 16;

/// A reference has at most 523 bytes.
const MAX_BODY: usize = 4 << 10;

/// Bytes of a request's headers at most. The client's headers have some 100 bytes; hyper accepts no
/// lower limit than this.
const MAX_HEADERS: usize = 8 << 10;

/// Deadline for the headers, and again for the body. A client sends both at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Progress messages that wait for a client: three seconds of them. A message that does not fit is
/// dropped.
const PROGRESS_QUEUED: usize = 16;

/// Time for the last responses when the agent stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after `accept` failed, for example when the process has no descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

/// The options of the control socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Path of the socket, at most 107 bytes (the kernel's limit). The folder must exist.
    pub socket: PathBuf,
}

/// The server, bound but not serving yet.
pub struct ControlServer {
    socket: ControlSocket,
    router: Router,
}

#[derive(Clone)]
struct ControlState {
    status: Arc<dyn StatusSource>,
    pulls: mpsc::Sender<PullRequest>,
}

/// The body of `POST /v1/pull`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PullBody {
    reference: String,
    #[serde(default)]
    dry_run: bool,
}

/// The body of an error response.
#[derive(Debug, Serialize, Deserialize)]
struct ErrorBody {
    error: String,
}

impl ControlServer {
    /// Creates the socket, and replaces the socket of a dead agent.
    ///
    /// # Errors
    /// [`BindError`], with the path.
    pub async fn bind(
        config: Config,
        status: Arc<dyn StatusSource>,
        pulls: mpsc::Sender<PullRequest>,
    ) -> Result<Self, BindError> {
        let Config { socket } = config;
        let router = Router::new()
            .route("/v1/status", get(serve_status))
            .route("/v1/pull", post(serve_pull))
            .with_state(ControlState { status, pulls });
        Ok(Self { socket: ControlSocket::bind(socket).await?, router })
    }

    /// Serves until `stop`, then removes the socket. The caller stops the pulls first, so that
    /// clients receive the outcome.
    pub async fn run(self, stop: CancellationToken) {
        let Self { socket, router } = self;
        let mut serving = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = serving.join_next() => {}
                accepted = socket.listener.accept(), if serving.len() < MAX_CONNECTIONS => match accepted {
                    Ok((stream, _)) => drop(serving.spawn(serve(stream, router.clone()))),
                    Err(error) => {
                        tracing::warn!(%error, "the control socket cannot accept a connection");
                        stop.run_until_cancelled(tokio::time::sleep(ACCEPT_BACKOFF)).await;
                    }
                },
            }
        }
        drop(socket);
        let drained = async { while serving.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
        serving.shutdown().await;
    }
}

/// Serves one request.
async fn serve(stream: UnixStream, router: Router) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(MAX_HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(WriteTimeoutStream::new(stream)), TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection of the control socket ended early");
    }
}

async fn serve_status(State(shared): State<ControlState>) -> Response {
    json_response(StatusCode::OK, &shared.status.status().await)
}

async fn serve_pull(State(shared): State<ControlState>, body: Body) -> Response {
    let body = match tokio::time::timeout(REQUEST_TIMEOUT, to_bytes(body, MAX_BODY)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            return error_response(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body exceeds {MAX_BODY} bytes or cannot be read"),
            );
        }
        Err(_) => {
            return error_response(
                StatusCode::REQUEST_TIMEOUT,
                format!("no complete body within {} s", REQUEST_TIMEOUT.as_secs()),
            );
        }
    };
    let PullBody { reference, dry_run } = match serde_json::from_slice(&body) {
        Ok(pull_body) => pull_body,
        Err(error) => return error_response(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let reference: Reference = match reference.parse() {
        Ok(reference) => reference,
        Err(error) => return error_response(StatusCode::BAD_REQUEST, format!("{error}")),
    };
    let (progress, updates) = mpsc::channel(PROGRESS_QUEUED);
    if shared.pulls.try_send(PullRequest { reference, dry_run, progress }).is_err() {
        return error_response(
            StatusCode::SERVICE_UNAVAILABLE,
            "the agent accepts no requests now; retry later".into(),
        );
    }
    let lines = ReceiverStream::new(updates).map(|progress| Ok::<_, Infallible>(json_line(&progress)));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn error_response(status: StatusCode, error: String) -> Response {
    json_response(status, &ErrorBody { error })
}

fn json_response(status: StatusCode, value: &impl Serialize) -> Response {
    let text = serde_json::to_vec(value).expect("names and numbers are JSON");
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}

fn json_line(progress: &PullProgress) -> Bytes {
    let mut line = serde_json::to_vec(progress).expect("names and numbers are JSON");
    line.push(b'\n');
    line.into()
}
