//! Messages to an operator's own system: one JSON document, POSTed to one URL.
//!
//! With a secret, the agent signs each message, so that a receiver can verify the sender and detect
//! a replay:
//!
//! ```text
//! X-Lighterman-Id: 7f3a...              equal for a message and its retries
//! X-Lighterman-Timestamp: 1789000000    seconds since 1970 at the send; reject old messages
//! X-Lighterman-Signature: sha256=<hex>  HMAC-SHA256 of the timestamp, a dot and the body
//! ```
//!
//! The key of the HMAC is the secret. A receiver should reject a message that is some minutes old.
//!
//! Not here: retries, and the choice of one node that sends (the caller's). The response's body is
//! not read. Redirects are not followed, because a signature for one receiver is not for another.
//! The URL may contain a secret, so no error and no log shows the URL.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use aws_lc_rs::hmac;
use bytes::Bytes;
use hyper::Method;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;
use url::Url;

use crate::http::{self, Certificates, Request};
use crate::ports::{Notification, Notifier, NotifyError};
use crate::util::clock;

/// Deadline of a message. Receivers should answer first and work later; a receiver that hangs must
/// not block the caller's queue.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of the secret at least: half of the 32 bytes beyond which HMAC-SHA256 gains no strength
/// (RFC 2104, section 3), and beyond any guess.
const MIN_SECRET: usize = 16;

/// Bytes of the secret at most. A longer file is a wrong file.
const MAX_SECRET: u64 = 4096;

/// The options of the webhook.
#[derive(Clone)]
pub struct Config {
    /// The receiver, `https` or `http`.
    pub url: String,
    /// File with the secret that signs messages: 16 to 4096 bytes, without the line end. Without a
    /// file, messages are not signed.
    pub secret_file: Option<PathBuf>,
    /// A PEM file with authorities to trust besides the well-known authorities.
    pub ca_file: Option<PathBuf>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url: _, secret_file, ca_file } = self;
        f.debug_struct("Config").field("secret_file", secret_file).field("ca_file", ca_file).finish_non_exhaustive()
    }
}

/// The webhook's options cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The URL has another scheme, no host, or credentials. The error does not show the URL.
    #[error("the webhook's URL has to be http:// or https://, with a host and without a password")]
    Url,
    /// The file of authorities cannot be used.
    #[error(transparent)]
    Trust(#[from] http::TrustError),
    /// The secret cannot be used.
    #[error(transparent)]
    Secret(#[from] SecretError),
}

/// The secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("the webhook's secret {path}: {source}")]
    Io {
        /// The file with the secret.
        path: PathBuf,
        /// The error of the read.
        source: io::Error,
    },
    /// The secret is too short or too long.
    #[error("the webhook's secret {0} has to have {MIN_SECRET} to {MAX_SECRET} bytes")]
    Length(PathBuf),
}

/// A webhook with one receiver.
pub struct Webhook {
    http: http::Client,
    url: Url,
    secret_file: Option<PathBuf>,
    deadline: Duration,
}

impl Webhook {
    /// Reads both files, so that a wrong file is an error at start.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub async fn new(config: Config) -> Result<Self, ConfigError> {
        let Config { url, secret_file, ca_file } = config;
        let url = Url::parse(&url).map_err(|_| ConfigError::Url)?;
        let has_no_credentials = url.username().is_empty() && url.password().is_none();
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() || !has_no_credentials {
            return Err(ConfigError::Url);
        }
        if let Some(path) = &secret_file {
            read_secret(path).await?;
        }
        Ok(Self { http: http::Client::new(ca_file.as_deref())?, url, secret_file, deadline: TIMEOUT })
    }

    async fn send(&self, notification: &Notification) -> Result<(), NotifyError> {
        let rejected = |error: &dyn std::error::Error| NotifyError::Refused(format!("the message: {error}"));
        let unavailable = |error: &dyn std::error::Error| NotifyError::Unavailable(error.to_string());
        let body = serde_json::to_vec(notification).map_err(|error| rejected(&error))?;
        let id = HeaderValue::from_str(&notification.id).map_err(|error| rejected(&error))?;
        let now = clock::unix_time().as_secs();

        let mut request = Request::new(Method::POST, &self.url, Certificates::Verified);
        request.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        request.headers.insert("x-lighterman-id", id);
        request.headers.insert("x-lighterman-timestamp", HeaderValue::from(now));
        if let Some(path) = &self.secret_file {
            // A file that is being replaced may be complete a moment later. The agent never sends
            // the message unsigned instead.
            let secret = read_secret(path).await.map_err(|error| unavailable(&error))?;
            let signature = HeaderValue::from_str(&signature(&secret, now, &body)).map_err(|error| rejected(&error))?;
            request.headers.insert("x-lighterman-signature", signature);
        }
        request.body = Bytes::from(body);
        let status = self.http.send(request).await.map_err(|failure| unavailable(&failure))?.status;
        match status.as_u16() {
            200..=299 => Ok(()),
            code @ (408 | 429 | 500..=599) => Err(NotifyError::Unavailable(format!("the receiver answers {code}"))),
            code @ 300..=399 => {
                Err(NotifyError::Refused(format!("the receiver answers {code}, and redirects are not followed")))
            }
            code => Err(NotifyError::Refused(format!("the receiver answers {code}"))),
        }
    }
}

#[async_trait]
impl Notifier for Webhook {
    async fn notify(&self, notification: &Notification) -> Result<(), NotifyError> {
        let on_timeout = |_| {
            Err(NotifyError::Unavailable(format!("the receiver does not answer within {} s", self.deadline.as_secs())))
        };
        timeout(self.deadline, self.send(notification)).await.unwrap_or_else(on_timeout)
    }
}

/// Reads the secret, for every message: messages are few, and a replaced file counts at once.
async fn read_secret(path: &Path) -> Result<Vec<u8>, SecretError> {
    let unreadable = |source| SecretError::Io { path: path.to_owned(), source };
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(MAX_SECRET + 3).read_to_end(&mut bytes).await.map_err(unreadable)?;
    if bytes.ends_with(b"\n") {
        bytes.truncate(bytes.len() - if bytes.ends_with(b"\r\n") { 2 } else { 1 });
    }
    match bytes.len() {
        MIN_SECRET.. if bytes.len() as u64 <= MAX_SECRET => Ok(bytes),
        _ => Err(SecretError::Length(path.to_owned())),
    }
}

fn signature(secret: &[u8], timestamp: u64, body: &[u8]) -> String {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret));
    context.update(format!("{timestamp}.").as_bytes());
    context.update(body);
    let hex: String = context.sign().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256={hex}")
}

#[cfg(test)]
mod tests;
