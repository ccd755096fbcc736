//! The API server as admission asks it, and whether it could be reached when it was asked last.

use std::sync::Mutex;
use std::time::Duration;

use hyper::Request;
use kube::Client;
use tokio::time::Instant;

use super::call::{Failure, call};

/// An answer says for so long that the API server can be reached.
pub(super) const FRESH: Duration = Duration::from_secs(10);

pub(super) struct Server {
    client: Client,
    last: Mutex<Option<(Instant, bool)>>,
}

/// What the last request told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// It answered a moment ago.
    Answers,
    /// It did not answer, and has not since.
    Away,
    /// The last answer is old, or nothing was asked yet.
    Unknown,
}

impl Server {
    pub(super) fn new(client: Client) -> Self {
        Self { client, last: Mutex::default() }
    }

    /// The body of the answer. `kube`'s own calls are not used for what holds tokens: they log an answer that they cannot read.
    pub(super) async fn ask(
        &self,
        limit: Duration,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<String, Failure> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        let answer = call(limit, self.client.request_text(request)).await;
        let answers = !matches!(answer, Err(Failure::Unavailable(_)));
        *self.last.lock().expect("nothing panics while holding it") = Some((Instant::now(), answers));
        answer
    }

    pub(super) fn reach(&self) -> Reach {
        match *self.last.lock().expect("nothing panics while holding it") {
            Some((_, false)) => Reach::Away,
            Some((at, true)) if at.elapsed() < FRESH => Reach::Answers,
            _ => Reach::Unknown,
        }
    }
}
