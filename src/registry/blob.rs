//! The content of a blob: opened as any question to a registry, then read with bounds on its size
//! and on every wait.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::header::{CONTENT_LENGTH, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Method, StatusCode};
use tokio::time::{Instant, timeout};

use super::resolve::{self, Ask, Question, Said};
use crate::http::Answer;
use crate::model::OutageKind;
use crate::oci::{Digest, Hasher, Verified};
use crate::ports::{BlobError, BlobSink, PullSecret, RegistryError};

/// Bytes per second below which a registry counts as stalled, as between peers: the waits for a
/// blob add up to no more than its size at this rate, and one longest wait.
const SLOWEST: u64 = 64 << 10;

/// Bytes that are gathered before they are written. hyper yields 32 KiB at most.
const BATCH: usize = 256 << 10;

/// The blob as its registry, or the storage behind the registry, sends it.
struct Content;

enum Opened {
    Content(Answer),
    RateLimited(Option<Duration>),
}

impl Ask for Content {
    type Given = Opened;

    async fn ask(question: &Question<'_>, authorization: Option<&HeaderValue>) -> Result<Said<Opened>, RegistryError> {
        let (answer, redirected) = question.follow(Method::GET, "*/*", authorization).await?;
        match answer.status {
            StatusCode::OK => Ok(Said::Given(Opened::Content(answer))),
            StatusCode::TOO_MANY_REQUESTS => Ok(Said::Given(Opened::RateLimited(retry_after(&answer.headers)))),
            StatusCode::GONE => Err(RegistryError::NotFound(question.registry())),
            // The registry authorised the request. The storage refuses the signature of the URL, or
            // the node's address: no other credential helps.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if redirected => {
                Err(RegistryError::Down { registry: question.registry(), kind: OutageKind::ServerError })
            }
            _ => question.not_given(&answer, redirected),
        }
    }
}

impl Question<'_> {
    /// The answer that carries the blob.
    ///
    /// # Errors
    /// [`BlobError`] but for the sink's.
    pub(super) async fn open(&self, secrets: &[PullSecret]) -> Result<Answer, BlobError> {
        match self.answer::<Content>(secrets).await {
            Ok(Opened::Content(answer)) => Ok(answer),
            Ok(Opened::RateLimited(retry_after)) => {
                Err(BlobError::RateLimited { registry: self.registry(), retry_after })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Receives one blob.
pub(super) struct Incoming<'a> {
    registry: &'a str,
    digest: Digest,
    size: u64,
    /// Longest wait for the next bytes.
    stall_limit: Duration,
    /// Time that may still be waited. Time in the sink does not count: the sink may keep a rate.
    patience: Duration,
}

impl<'a> Incoming<'a> {
    pub(super) fn new(registry: &'a str, digest: Digest, size: u64, stall_limit: Duration) -> Self {
        let patience = stall_limit + Duration::from_secs(size / SLOWEST);
        Self { registry, digest, size, stall_limit, patience }
    }

    /// Writes the body into the sink, and proves its digest.
    ///
    /// # Errors
    /// [`BlobError::Down`], [`BlobError::WrongBytes`] and [`BlobError::Sink`].
    pub(super) async fn receive(mut self, answer: Answer, sink: &mut dyn BlobSink) -> Result<Verified, BlobError> {
        if let Some(length) = declared(&answer.headers).filter(|length| *length != self.size) {
            return Err(self.wrong(format!("{length} bytes instead of {}", self.size)));
        }
        let (mut answer, mut hasher) = (answer, Hasher::default());
        let mut batch: Vec<Bytes> = Vec::new();
        let mut gathered = 0;
        while let Some(chunk) = self.next(&mut answer).await? {
            if chunk.len() as u64 > self.size - hasher.size() {
                return Err(self.wrong(format!("more than {} bytes", self.size)));
            }
            hasher.update(&chunk);
            gathered += chunk.len();
            batch.push(chunk);
            if gathered >= BATCH {
                sink.append(&batch).await?;
                batch.clear();
                gathered = 0;
            }
        }
        if !batch.is_empty() {
            sink.append(&batch).await?;
        }
        hasher.verify(self.digest, self.size).map_err(|error| self.wrong(error.to_string()))
    }

    async fn next(&mut self, answer: &mut Answer) -> Result<Option<Bytes>, BlobError> {
        let began = Instant::now();
        let chunk = timeout(self.patience.min(self.stall_limit), answer.chunk()).await;
        self.patience = self.patience.saturating_sub(began.elapsed());
        match chunk {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(failure)) => Err(resolve::error(self.registry, failure).into()),
            Err(_) => Err(BlobError::Down { registry: self.registry.to_owned(), kind: OutageKind::TimedOut }),
        }
    }

    fn wrong(&self, reason: String) -> BlobError {
        BlobError::WrongBytes { registry: self.registry.to_owned(), reason }
    }
}

fn declared(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Seconds or a date (RFC 9110, section 10.2.3); a date that has passed is no pause.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    SystemTime::from(date).duration_since(SystemTime::now()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Option<Duration> {
        retry_after(&HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_str(text).unwrap())]))
    }

    #[test]
    fn a_pause_is_seconds_or_a_date() {
        assert_eq!(said("120"), Some(Duration::from_secs(120)));
        let later = jiff::Timestamp::now() + Duration::from_secs(3600);
        let pause = said(&later.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()).unwrap();
        assert!(pause > Duration::from_secs(3500) && pause <= Duration::from_secs(3600), "{pause:?}");
        for none in ["Sun, 06 Nov 1994 08:49:37 GMT", "-1", "soon", "", "99999999999999999999999"] {
            assert_eq!(said(none), None, "{none}");
        }
    }
}
