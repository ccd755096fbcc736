//! The content of a blob: requested like any other query, and read with bounds on the size and on
//! every wait.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::header::{CONTENT_LENGTH, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Method, StatusCode};
use tokio::time::{Instant, timeout};

use super::resolve::{self, QueryReply, RegistryQuery, RegistryRequest};
use crate::http::HttpResponse;
use crate::model::OutageKind;
use crate::oci::{BlobProof, Digest, Hasher};
use crate::ports::{BlobSink, PullSecret, RegistryError, RegistryFetchError};

/// Bytes per second below which a registry counts as stalled, as between peers. The waits for a
/// blob add up to at most the time for its size at this rate, plus one stall limit.
const MIN_BLOB_RATE: u64 = 64 << 10;

/// Bytes that are buffered before a write. hyper yields 32 KiB at most.
const WRITE_BATCH: usize = 256 << 10;

/// The query for a blob, answered by the registry or by the storage behind the registry.
struct BlobQuery;

enum BlobResponse {
    Content(HttpResponse),
    RateLimited(Option<Duration>),
}

impl RegistryQuery for BlobQuery {
    type Output = BlobResponse;

    async fn execute(
        request: &RegistryRequest<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<QueryReply<BlobResponse>, RegistryError> {
        let (answer, redirected) = request.send_following_redirects(Method::GET, "*/*", authorization).await?;
        match answer.status {
            StatusCode::OK => Ok(QueryReply::Success(BlobResponse::Content(answer))),
            StatusCode::TOO_MANY_REQUESTS => {
                Ok(QueryReply::Success(BlobResponse::RateLimited(retry_after(&answer.headers))))
            }
            StatusCode::GONE => Err(RegistryError::NotFound(request.registry())),
            // The registry authorized the request. The storage rejects the URL's signature or the
            // node's address, so no other credential helps.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if redirected => {
                Err(RegistryError::Down { registry: request.registry(), kind: OutageKind::ServerError })
            }
            _ => request.unsuccessful_reply(&answer, redirected),
        }
    }
}

impl RegistryRequest<'_> {
    /// Requests the blob and returns the response with its content.
    ///
    /// # Errors
    /// [`RegistryFetchError`] except [`RegistryFetchError::Sink`].
    pub(super) async fn open_blob(&self, secrets: &[PullSecret]) -> Result<HttpResponse, RegistryFetchError> {
        match self.send_with_credentials::<BlobQuery>(secrets).await {
            Ok(BlobResponse::Content(answer)) => Ok(answer),
            Ok(BlobResponse::RateLimited(retry_after)) => {
                Err(RegistryFetchError::RateLimited { registry: self.registry(), retry_after })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The reader of one blob.
pub(super) struct BlobReceiver<'a> {
    registry: &'a str,
    digest: Digest,
    size: u64,
    /// Longest wait for the next bytes.
    stall_limit: Duration,
    /// The rest of the time for waits. Time in the sink does not count, because the sink may limit
    /// the rate.
    remaining_wait: Duration,
}

impl<'a> BlobReceiver<'a> {
    pub(super) fn new(registry: &'a str, digest: Digest, size: u64, stall_limit: Duration) -> Self {
        let remaining_wait = stall_limit + Duration::from_secs(size / MIN_BLOB_RATE);
        Self { registry, digest, size, stall_limit, remaining_wait }
    }

    /// Writes the body into the sink, and verifies the digest.
    ///
    /// # Errors
    /// [`RegistryFetchError::Down`], [`RegistryFetchError::WrongBytes`] and
    /// [`RegistryFetchError::Sink`].
    pub(super) async fn receive(
        mut self,
        answer: HttpResponse,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, RegistryFetchError> {
        if let Some(length) = content_length(&answer.headers).filter(|length| *length != self.size) {
            return Err(self.wrong_bytes(format!("{length} bytes instead of {}", self.size)));
        }
        let (mut answer, mut hasher) = (answer, Hasher::default());
        let mut batch: Vec<Bytes> = Vec::new();
        let mut batch_bytes = 0;
        while let Some(chunk) = self.next(&mut answer).await? {
            if chunk.len() as u64 > self.size - hasher.size() {
                return Err(self.wrong_bytes(format!("more than {} bytes", self.size)));
            }
            hasher.update(&chunk);
            batch_bytes += chunk.len();
            batch.push(chunk);
            if batch_bytes >= WRITE_BATCH {
                sink.append(&batch).await?;
                batch.clear();
                batch_bytes = 0;
            }
        }
        if !batch.is_empty() {
            sink.append(&batch).await?;
        }
        hasher.verify(self.digest, self.size).map_err(|error| self.wrong_bytes(error.to_string()))
    }

    async fn next(&mut self, answer: &mut HttpResponse) -> Result<Option<Bytes>, RegistryFetchError> {
        let began = Instant::now();
        let chunk = timeout(self.remaining_wait.min(self.stall_limit), answer.chunk()).await;
        self.remaining_wait = self.remaining_wait.saturating_sub(began.elapsed());
        match chunk {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(failure)) => Err(resolve::registry_error(self.registry, failure).into()),
            Err(_) => Err(RegistryFetchError::Down { registry: self.registry.to_owned(), kind: OutageKind::TimedOut }),
        }
    }

    fn wrong_bytes(&self, reason: String) -> RegistryFetchError {
        RegistryFetchError::WrongBytes { registry: self.registry.to_owned(), reason }
    }
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Seconds or a date (RFC 9110, section 10.2.3); `None` for a date in the past.
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

    fn parsed(text: &str) -> Option<Duration> {
        retry_after(&HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_str(text).unwrap())]))
    }

    #[test]
    fn a_retry_after_header_holds_seconds_or_a_date() {
        assert_eq!(parsed("120"), Some(Duration::from_secs(120)));
        let later = jiff::Timestamp::now() + Duration::from_secs(3600);
        let pause = parsed(&later.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()).unwrap();
        assert!(pause > Duration::from_secs(3500) && pause <= Duration::from_secs(3600), "{pause:?}");
        for none in ["Sun, 06 Nov 1994 08:49:37 GMT", "-1", "soon", "", "99999999999999999999999"] {
            assert_eq!(parsed(none), None, "{none}");
        }
    }
}
