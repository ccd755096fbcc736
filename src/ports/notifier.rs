//! Telling the world outside the cluster what happened.

use async_trait::async_trait;
use serde::Serialize;

/// Sends messages to people's own systems.
#[async_trait]
pub trait Notifier: Send + Sync + 'static {
    /// Sends one message, once. The caller tries again where that makes sense.
    ///
    /// # Errors
    /// [`NotifyError`].
    async fn notify(&self, notification: &Notification) -> Result<(), NotifyError>;
}

/// What happened, as it is sent. Its field names are part of what users may rely on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Notification {
    /// The same for the same message sent again, so that a receiver can drop it.
    pub id: String,
    /// The reason of the Kubernetes Event that says the same: `ImageRecovered`, ...
    pub reason: &'static str,
    /// Where it happened.
    pub node: String,
    /// The image as recovered.
    pub image: String,
    /// Its index or manifest, when that was known.
    pub digest: Option<String>,
    /// The pods that waited, as `namespace/name`; at most [`MAX_PODS`] of them.
    pub pods: Vec<String>,
    /// The nodes that it came from.
    pub from: Vec<String>,
    /// Bytes that came.
    pub bytes: u64,
    /// How long it took.
    pub milliseconds: u64,
    /// The Event's sentence: what happened and what to do.
    pub note: String,
    /// When, in seconds since 1970.
    pub at: u64,
}

/// Pods that one message names: a node's worth by default settings.
pub const MAX_PODS: usize = 110;

/// Why a message did not get there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotifyError {
    /// No answer, or one that asks to come back (5xx, 429).
    #[error("the webhook cannot be reached: {0}")]
    Unavailable(String),
    /// It does not want the message; sending it again would not change that.
    #[error("the webhook refuses: {0}")]
    Refused(String),
}

impl NotifyError {
    /// Whether the same message may be taken a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}
