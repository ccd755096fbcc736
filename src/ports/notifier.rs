//! Messages to systems outside the cluster.

use async_trait::async_trait;
use serde::Serialize;

/// Sends messages to people's own systems.
#[async_trait]
pub trait Notifier: Send + Sync + 'static {
    /// Sends one message, once. The caller retries where [`NotifyError::is_retryable`] permits.
    ///
    /// # Errors
    /// [`NotifyError`].
    async fn notify(&self, notification: &Notification) -> Result<(), NotifyError>;
}

/// One message. Users may rely on the names of the fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Notification {
    /// Equal for every copy of one message, so that a receiver can drop duplicates.
    pub id: String,
    /// Reason of the corresponding Kubernetes Event: `ImageRecovered`, ...
    pub reason: &'static str,
    /// Node that recovered the image.
    pub node: String,
    /// Image reference of the recovery.
    pub image: String,
    /// Digest of the index or manifest, if resolved.
    pub digest: Option<String>,
    /// Pods that waited, as `namespace/name`; at most [`MAX_PODS`].
    pub pods: Vec<String>,
    /// Nodes that sent bytes.
    pub from: Vec<String>,
    /// Fetched bytes.
    pub bytes: u64,
    /// Duration.
    pub milliseconds: u64,
    /// The Event's note: result and remedy.
    pub note: String,
    /// Time of the message, in seconds since 1970.
    pub at: u64,
}

/// Most pods in one message: the kubelet's default limit of pods per node.
pub const MAX_PODS: usize = 110;

/// Reason of an undelivered message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotifyError {
    /// No answer, or an answer that permits a retry (5xx, 429).
    #[error("the webhook cannot be reached: {0}")]
    Unavailable(String),
    /// The webhook refuses the message; a retry would not help.
    #[error("the webhook refuses: {0}")]
    Refused(String),
}

impl NotifyError {
    /// Whether the webhook may accept the same message a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}
