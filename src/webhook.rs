//! Messages to people's own systems: one JSON document, POSTed to one URL.
//!
//! With a secret, the message is signed, so that a receiver knows who sent it and that it is not an old one sent again:
//!
//! ```text
//! X-Lighterman-Id: 7f3a...              the same for the same message sent again
//! X-Lighterman-Timestamp: 1789000000    seconds since 1970 when it was sent; refuse what is some minutes old
//! X-Lighterman-Signature: sha256=<hex>  HMAC-SHA256, by the secret, of the timestamp, a dot and the body
//! ```
//!
//! Not here: trying again, and seeing to it that one node of many sends (the caller's). The answer's body is not read, redirects are
//! not followed: what was signed for one receiver is not for another. The URL may contain a secret, so it is in no error and no log.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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

/// Receivers are told to answer first and work later; the caller's queue must not stand behind one that hangs.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Half of what HMAC-SHA256 can use, and more than anybody guesses.
const MIN_SECRET: usize = 16;

/// A secret is a line, not a document; the wrong file is noticed.
const MAX_SECRET: u64 = 4096;

/// What the webhook is told.
#[derive(Clone)]
pub struct Config {
    /// Where messages go, `https` or `http`.
    pub url: String,
    /// Holds the secret that signs them: 16 to 4096 bytes, a line end after it does not count. Without one, nothing is signed.
    pub secret_file: Option<PathBuf>,
    /// A PEM file with authorities to trust besides the well-known ones.
    pub ca_file: Option<PathBuf>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url: _, secret_file, ca_file } = self;
        f.debug_struct("Config").field("secret_file", secret_file).field("ca_file", ca_file).finish_non_exhaustive()
    }
}

/// The webhook cannot be made as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a URL for this; it is not shown.
    #[error("the webhook's URL has to be http:// or https://, with a host and without a password")]
    Url,
    /// The file of authorities.
    #[error(transparent)]
    Trust(#[from] http::TrustError),
    /// The file with the secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
}

/// The secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Its file cannot be read.
    #[error("the webhook's secret {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Too short to be one, or too long.
    #[error("the webhook's secret {0} has to have {MIN_SECRET} to {MAX_SECRET} bytes")]
    Length(PathBuf),
}

/// Sends messages to one receiver.
pub struct Webhook {
    http: http::Client,
    url: Url,
    secret_file: Option<PathBuf>,
    deadline: Duration,
}

impl Webhook {
    /// Reads both files, so that wrong ones are noticed before anything happens.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub async fn new(config: Config) -> Result<Self, ConfigError> {
        let Config { url, secret_file, ca_file } = config;
        let url = Url::parse(&url).map_err(|_| ConfigError::Url)?;
        let bare = url.username().is_empty() && url.password().is_none();
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() || !bare {
            return Err(ConfigError::Url);
        }
        if let Some(path) = &secret_file {
            read_secret(path).await?;
        }
        Ok(Self { http: http::Client::new(ca_file.as_deref())?, url, secret_file, deadline: TIMEOUT })
    }

    async fn send(&self, notification: &Notification) -> Result<(), NotifyError> {
        let refused = |error: &dyn std::error::Error| NotifyError::Refused(format!("the message: {error}"));
        let unavailable = |error: &dyn std::error::Error| NotifyError::Unavailable(error.to_string());
        let body = serde_json::to_vec(notification).map_err(|error| refused(&error))?;
        let id = HeaderValue::from_str(&notification.id).map_err(|error| refused(&error))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();

        let mut request = Request::new(Method::POST, &self.url, Certificates::Verified);
        request.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        request.headers.insert("x-lighterman-id", id);
        request.headers.insert("x-lighterman-timestamp", HeaderValue::from(now));
        if let Some(path) = &self.secret_file {
            // A file that is being replaced may be whole a moment later; unsigned is never sent instead.
            let secret = read_secret(path).await.map_err(|error| unavailable(&error))?;
            let signature = HeaderValue::from_str(&signature(&secret, now, &body)).map_err(|error| refused(&error))?;
            request.headers.insert("x-lighterman-signature", signature);
        }
        request.body = Bytes::from(body);
        let status = self.http.send(request).await.map_err(|failure| unavailable(&failure))?.status;
        match status.as_u16() {
            200..=299 => Ok(()),
            code @ (408 | 429 | 500..=599) => Err(NotifyError::Unavailable(format!("it answers {code}"))),
            code @ 300..=399 => Err(NotifyError::Refused(format!("it answers {code}, and redirects are not followed"))),
            code => Err(NotifyError::Refused(format!("it answers {code}"))),
        }
    }
}

#[async_trait]
impl Notifier for Webhook {
    async fn notify(&self, notification: &Notification) -> Result<(), NotifyError> {
        let late = |_| Err(NotifyError::Unavailable(format!("no answer within {} s", self.deadline.as_secs())));
        timeout(self.deadline, self.send(notification)).await.unwrap_or_else(late)
    }
}

/// Reads the secret. Every message does: there are few, and a file that was replaced counts at once.
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
