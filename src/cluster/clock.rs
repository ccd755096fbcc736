//! The API server's clock: the `Date` header of an answer (RFC 9110, section 6.6.1). Go's HTTP
//! server sets the header in each answer.

use std::time::Duration;

use hyper::Request;
use hyper::header::{DATE, HeaderValue};
use k8s_openapi::jiff::fmt::rfc2822;
use kube::Client;
use kube::client::Body;
use tokio::time::{Instant, timeout};

use crate::api_server::error::{ApiError, REQUEST_TIMEOUT};
use crate::decide::clock_skew::ClockSample;
use crate::ports::ClusterError;
use crate::util::clock::unix_time;

/// The smallest answer that every authenticated client may request. A cluster that forbids the
/// request answers 403, with a date too.
const VERSION_PATH: &str = "/version";

pub(super) async fn sample_clock(client: &Client) -> Result<ClockSample, ClusterError> {
    let to_cluster_error = |failure: ApiError| failure.into_cluster_error("the API server's version");
    let request = Request::get(VERSION_PATH).body(Body::empty());
    let request = request.map_err(|error| ClusterError::Other(error.to_string()))?;
    let (sent, began) = (unix_time(), Instant::now());
    let answer = timeout(REQUEST_TIMEOUT, client.send(request)).await;
    let (took, received) = (began.elapsed(), unix_time());
    let timed_out = |_| ApiError::Unavailable(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()));
    let answer =
        answer.map_err(timed_out).and_then(|answer| answer.map_err(ApiError::from)).map_err(to_cluster_error)?;
    let date = answer.headers().get(DATE).and_then(parse_date);
    let date = date.ok_or_else(|| ClusterError::Other("the API server's answer has no date".to_owned()))?;
    Ok(ClockSample { sent, took, received, date })
}

/// The time since 1970.
fn parse_date(header: &HeaderValue) -> Option<Duration> {
    let time = rfc2822::DateTimeParser::new().parse_timestamp(header.to_str().ok()?).ok()?;
    Some(Duration::from_secs(time.as_second().try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_header_is_parsed_and_invalid_dates_are_ignored() {
        let parsed = |text: &str| parse_date(&HeaderValue::from_str(text).unwrap());
        assert_eq!(parsed("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::from_secs(784_111_777)));
        for text in ["", "now", "Sun, 06 Nov 1894 08:49:37 GMT", "784111777"] {
            assert_eq!(parsed(text), None, "{text}");
        }
    }
}
