//! A pull by hand: the request, the progress and the kinds of failure. `lighterman pull --json`
//! prints the names of the fields, so users may rely on the names.

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::oci::Reference;

/// Most node names in one message; people would not read more. At 253 bytes each, 8 KiB.
pub const MAX_NAMES: usize = 32;

/// A pull that a person starts by hand.
#[derive(Debug)]
pub struct PullRequest {
    /// Image to pull.
    pub reference: Reference,
    /// Only resolve the reference; fetch nothing.
    pub dry_run: bool,
    /// Receives the progress; the last message is [`PullProgress::Done`] or
    /// [`PullProgress::Failed`]. The client closes the channel at its end, which abandons the pull.
    pub progress: mpsc::Sender<PullProgress>,
}

/// Progress of a pull. A dry run ends with [`PullProgress::Resolved`] or [`PullProgress::Failed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum PullProgress {
    /// The reference is resolved, and providers are found.
    Resolved {
        /// Digest of the index or manifest.
        digest: String,
        /// Nodes that have the image under this repository, at most [`MAX_NAMES`].
        providers: Vec<String>,
        /// Number of further providers.
        more_providers: usize,
    },
    /// The missing blobs are determined. Not sent when no blob is missing.
    Planned {
        /// Bytes of config and layers to fetch.
        missing_bytes: u64,
        /// Blobs to fetch.
        missing_blobs: usize,
    },
    /// Fetched bytes of config and layers. Falls when a provider fails in the middle of a blob.
    Bytes {
        /// Fetched bytes.
        done: u64,
        /// Bytes to fetch.
        total: u64,
    },
    /// A layer is being unpacked while other layers may still arrive. Not sent where the runtime
    /// unpacks.
    Unpacking {
        /// Number of the layer, from 1.
        layer: usize,
        /// Number of layers.
        of: usize,
    },
    /// The image is on the node.
    Done {
        /// Digest of the index or manifest.
        digest: String,
        /// Fetched bytes, documents included.
        bytes: u64,
        /// Fetched blobs.
        fetched: usize,
        /// Blobs that were present before.
        there: usize,
        /// Duration.
        milliseconds: u64,
        /// Nodes that sent bytes, at most [`MAX_NAMES`].
        from: Vec<String>,
    },
    /// The pull failed.
    Failed {
        /// Kind of the failure, for programs.
        kind: PullFailure,
        /// Error text for people: image and nodes.
        message: String,
        /// Whether a retry may succeed a little later.
        retryable: bool,
    },
    /// Event of a later release.
    #[serde(other)]
    Other,
}

impl PullProgress {
    /// The failure of this kind.
    pub fn failed(kind: PullFailure, message: String) -> Self {
        Self::Failed { kind, message, retryable: kind.is_retryable() }
    }

    /// Whether this message ends the pull.
    pub fn is_last(&self, dry_run: bool) -> bool {
        match self {
            Self::Done { .. } | Self::Failed { .. } => true,
            Self::Resolved { .. } => dry_run,
            Self::Planned { .. } | Self::Bytes { .. } | Self::Unpacking { .. } | Self::Other => false,
        }
    }
}

/// Kind of a failed pull by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PullFailure {
    /// No peer has the image under this registry and repository.
    NoProvider,
    /// Peers have different contents for the tag.
    Disagreement,
    /// The manifest cannot be used, or has no entry for this platform.
    Unusable,
    /// A limit forbids the pull.
    OverLimit,
    /// Nothing may be imported on this node.
    Closed,
    /// Every provider failed.
    FetchFailed,
    /// This node's content store failed.
    StoreFailed,
    /// The agent stops.
    Abandoned,
    /// The limit of concurrent pulls by hand is reached.
    Busy,
    /// Kind of a later release.
    #[serde(other)]
    Other,
}

impl PullFailure {
    /// Whether a retry may succeed a little later, without a change by an operator.
    pub fn is_retryable(self) -> bool {
        match self {
            Self::NoProvider | Self::FetchFailed | Self::StoreFailed | Self::Abandoned | Self::Busy => true,
            Self::Disagreement | Self::Unusable | Self::OverLimit | Self::Closed | Self::Other => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_a_later_release_can_still_be_read() {
        let line = r#"{"event":"sings","song":"a shanty"}"#;
        assert_eq!(serde_json::from_str::<PullProgress>(line).unwrap(), PullProgress::Other);
    }

    #[test]
    fn a_failure_of_a_later_release_can_still_be_read() {
        let line = r#"{"event":"failed","kind":"metTheKraken","message":"m","retryable":false}"#;
        let failed = PullProgress::Failed { kind: PullFailure::Other, message: "m".into(), retryable: false };
        assert_eq!(serde_json::from_str::<PullProgress>(line).unwrap(), failed);
    }
}
