//! The control socket: how a person on the node asks its agent how it is, and for an image by hand. HTTP/1 over a Unix socket that
//! only root may open, so it is reached on the node and by `kubectl exec` into the agent's pod, and nowhere else.
//!
//! `GET /v1/status` answers one JSON object. `POST /v1/pull` with `{"reference": "...", "dryRun": false}` answers JSON objects, one a
//! line, while it goes on; to hang up is to abandon the pull. There are no other verbs. Not here: what the agent does about it.

mod client;
mod socket;
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
use crate::ports::{PullProgress, PullRequest, StatusSource};

pub use client::{Client, ClientError, PullStream};
pub use socket::BindError;
use socket::ControlSocket;
use write_timeout::WriteTimeoutStream;

/// Two people with a few shells each, and as many again; each connection costs some 20 KiB.
const MAX_CONNECTIONS: usize = 16;

/// A reference is at most 523 bytes long.
const MAX_BODY: usize = 4 << 10;

/// Headers of ours are some 100 bytes; this is the least that hyper takes.
const MAX_HEADERS: usize = 8 << 10;

/// For the headers, and again for the body. Both come at once from anybody who means it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Progress on its way to a client: three seconds of it. What a slow client has no room for is left out.
const PROGRESS_QUEUED: usize = 16;

/// How long the last words to clients may take once the agent stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// A pause after a connection could not be taken, as when there are no descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

/// Where the socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Its path, at most 107 bytes long (the kernel's limit). Its folder must exist.
    pub socket: PathBuf,
}

/// The socket, bound and not yet serving.
pub struct ControlServer {
    socket: ControlSocket,
    router: Router,
}

#[derive(Clone)]
struct ControlState {
    status: Arc<dyn StatusSource>,
    pulls: mpsc::Sender<PullRequest>,
}

/// What `POST /v1/pull` takes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PullBody {
    reference: String,
    #[serde(default)]
    dry_run: bool,
}

/// What is answered instead of an answer.
#[derive(Debug, Serialize, Deserialize)]
struct ErrorBody {
    error: String,
}

impl ControlServer {
    /// Makes the socket. What a dead agent left there is replaced.
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

    /// Serves until stopped, then removes the socket. Whoever works for the clients is stopped before, so that they hear how it ended.
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
                        tracing::warn!(%error, "the control socket cannot take a connection");
                        stop.run_until_cancelled(tokio::time::sleep(ACCEPT_BACKOFF)).await;
                    }
                },
            }
        }
        drop(socket);
        let last_words = async { while serving.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, last_words).await;
        serving.shutdown().await;
    }
}

/// One request of one client.
async fn serve(stream: UnixStream, router: Router) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(MAX_HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(WriteTimeoutStream::new(stream)), TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a client of the control socket went away");
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
                format!("the body is over {MAX_BODY} bytes, or broken"),
            );
        }
        Err(_) => {
            return error_response(
                StatusCode::REQUEST_TIMEOUT,
                format!("no body within {} s", REQUEST_TIMEOUT.as_secs()),
            );
        }
    };
    let PullBody { reference, dry_run } = match serde_json::from_slice(&body) {
        Ok(ask) => ask,
        Err(error) => return error_response(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let reference: Reference = match reference.parse() {
        Ok(reference) => reference,
        Err(error) => return error_response(StatusCode::BAD_REQUEST, format!("{error}")),
    };
    let (progress, updates) = mpsc::channel(PROGRESS_QUEUED);
    if shared.pulls.try_send(PullRequest { reference, dry_run, progress }).is_err() {
        return error_response(StatusCode::SERVICE_UNAVAILABLE, "the agent takes no requests just now".into());
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
