//! Admission's client of the API server, which records whether the last request got an answer.

use std::time::Duration;

use hyper::Request;
use kube::Client;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::error::{ApiError, call};

/// The API server counts as reachable for this long after an answer.
pub(crate) const REACHABLE_FOR: Duration = Duration::from_secs(10);

pub(crate) struct ApiServerClient {
    client: Client,
    last_result: Mutex<Option<(Instant, bool)>>,
}

/// The result of the last request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reachability {
    /// The API server answered within [`REACHABLE_FOR`].
    Reachable,
    /// The last request got no answer.
    Unreachable,
    /// The last answer is older than [`REACHABLE_FOR`], or no request was sent yet.
    Unknown,
}

impl ApiServerClient {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, last_result: Mutex::default() }
    }

    /// Sends a request and returns the body of the answer. Requests with tokens do not use `kube`'s
    /// typed calls, which log an answer that they cannot parse.
    pub(crate) async fn send(
        &self,
        limit: Duration,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<String, ApiError> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        let answer = call(limit, self.client.request_text(request)).await;
        let is_reachable = !matches!(answer, Err(ApiError::Unavailable(_)));
        *self.last_result.lock() = Some((Instant::now(), is_reachable));
        answer
    }

    pub(crate) fn reachability(&self) -> Reachability {
        match *self.last_result.lock() {
            Some((_, false)) => Reachability::Unreachable,
            Some((at, true)) if at.elapsed() < REACHABLE_FOR => Reachability::Reachable,
            _ => Reachability::Unknown,
        }
    }
}
