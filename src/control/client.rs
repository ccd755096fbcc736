//! The client of the control socket, for the command line.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

use super::{ErrorBody, PullBody, PullProgress, Status};
use crate::oci::Reference;

/// Deadline for the response's head, and again for the status. The agent answers at once, unless
/// the process is stopped or out of processor time.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of a status at most: a status with 512 peers and as many registries, several times over.
const MAX_STATUS: usize = 4 << 20;

/// Bytes of a line at most: progress with 32 names of 253 bytes, twice over.
const MAX_LINE: usize = 64 << 10;

/// A client of this node's agent.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens on the socket.
    #[error("no agent answers at {0}")]
    NoAgent(PathBuf),
    /// Only root may open the socket.
    #[error("this user may not open {0}")]
    NotAllowed(PathBuf),
    /// The agent accepted the connection and does not answer.
    #[error("the agent at {0} does not answer")]
    TimedOut(PathBuf),
    /// The agent rejects the request.
    #[error("the agent refuses: {0}")]
    Rejected(String),
    /// The connection ended early, or the response is malformed.
    #[error("the agent's answer broke off: {0}")]
    Broken(String),
}

impl Client {
    /// A client of the socket at this path.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// The agent's status.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self) -> Result<Status, ClientError> {
        let (answer, _connection) = self.request(Method::GET, "/v1/status", Bytes::new()).await?;
        let body = tokio::time::timeout(RESPONSE_TIMEOUT, Limited::new(answer.into_body(), MAX_STATUS).collect()).await;
        let body = body.map_err(|_| ClientError::TimedOut(self.socket.clone()))?.map_err(broken)?;
        serde_json::from_slice(&body.to_bytes()).map_err(broken)
    }

    /// Starts a pull. A drop of the result cancels the pull.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn pull(&self, reference: &Reference, dry_run: bool) -> Result<PullStream, ClientError> {
        let pull_body = PullBody { reference: reference.to_string(), dry_run };
        let body = serde_json::to_vec(&pull_body).map_err(broken)?;
        let (answer, connection) = self.request(Method::POST, "/v1/pull", body.into()).await?;
        Ok(PullStream { body: answer.into_body(), read: Vec::new(), _connection: connection })
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), ClientError> {
        let response = tokio::time::timeout(RESPONSE_TIMEOUT, self.send_request(method, path, body)).await;
        let (answer, connection) = response.map_err(|_| ClientError::TimedOut(self.socket.clone()))??;
        if answer.status() == StatusCode::OK {
            return Ok((answer, connection));
        }
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_LINE).collect();
        let body = tokio::time::timeout(RESPONSE_TIMEOUT, body).await.ok().and_then(Result::ok);
        let error_body = body.and_then(|body| serde_json::from_slice::<ErrorBody>(&body.to_bytes()).ok());
        Err(ClientError::Rejected(error_body.map_or_else(|| status.to_string(), |body| body.error)))
    }

    async fn send_request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NoAgent(self.socket.clone()),
            io::ErrorKind::PermissionDenied => ClientError::NotAllowed(self.socket.clone()),
            _ => broken(error),
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // An error of the connection is also the error of the request or of the body.
        let connection = AbortOnDropHandle::new(tokio::spawn(async { drop(connection.await) }));
        let request = Request::builder().method(method).uri(path).header("host", "agent").body(Full::new(body));
        let answer = sender.send_request(request.map_err(broken)?).await.map_err(broken)?;
        Ok((answer, connection))
    }
}

fn broken(error: impl std::fmt::Display) -> ClientError {
    ClientError::Broken(error.to_string())
}

/// The progress of a pull.
pub struct PullStream {
    body: Incoming,
    /// Bytes of an incomplete line.
    read: Vec<u8>,
    _connection: AbortOnDropHandle<()>,
}

impl PullStream {
    /// The next message. The caller ends after the last message ([`PullProgress::is_last`]).
    ///
    /// # Errors
    /// [`ClientError::Broken`].
    pub async fn next(&mut self) -> Result<PullProgress, ClientError> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(broken);
            }
            if self.read.len() > MAX_LINE {
                return Err(broken(format_args!("a line of more than {MAX_LINE} bytes")));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.read.extend(frame.into_data().unwrap_or_default()),
                Some(Err(error)) => return Err(broken(error)),
                None => return Err(broken("the response ended without an outcome")),
            }
        }
    }
}
