//! The API server as admission asks it, and whether it could be reached when it was asked last.

use std::sync::Mutex;
use std::time::Duration;

use hyper::Request;
use kube::Client;
use tokio::time::Instant;

use super::api_error::{ApiError, call};

/// An answer says for so long that the API server can be reached.
pub(super) const REACHABLE_FOR: Duration = Duration::from_secs(10);

pub(super) struct ApiServerClient {
    client: Client,
    last_result: Mutex<Option<(Instant, bool)>>,
}

/// What the last request told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reachability {
    /// It answered a moment ago.
    Reachable,
    /// It did not answer, and has not since.
    Unreachable,
    /// The last answer is old, or nothing was asked yet.
    Unknown,
}

impl ApiServerClient {
    pub(super) fn new(client: Client) -> Self {
        Self { client, last_result: Mutex::default() }
    }

    /// The body of the answer. `kube`'s own calls are not used for what holds tokens: they log an answer that they cannot read.
    pub(super) async fn send(
        &self,
        limit: Duration,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<String, ApiError> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        let answer = call(limit, self.client.request_text(request)).await;
        let answers = !matches!(answer, Err(ApiError::Unavailable(_)));
        *self.last_result.lock().expect("nothing panics while holding it") = Some((Instant::now(), answers));
        answer
    }

    pub(super) fn reachability(&self) -> Reachability {
        match *self.last_result.lock().expect("nothing panics while holding it") {
            Some((_, false)) => Reachability::Unreachable,
            Some((at, true)) if at.elapsed() < REACHABLE_FOR => Reachability::Reachable,
            _ => Reachability::Unknown,
        }
    }
}
