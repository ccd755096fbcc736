//! What a person on the node asks of its agent: how it is, and an image by hand.
//!
//! The names of the fields are what `--json` prints, so they are part of what users may rely on. Not here: how the questions travel
//! (`crate::control`) and who answers them (`crate::agent`).

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::model::MeshStatus;
use crate::oci::Reference;

/// Node names in one message; more would not be read. At 253 bytes each, 8 KiB.
pub const MAX_NAMES: usize = 32;

/// Members of the mesh that a status names: as many nodes as Kubernetes is built for. At some 300 bytes each that is 1.5 MiB, and 3 MiB
/// with names of the longest kind.
pub const MAX_STATUS_MEMBERS: usize = 5000;

/// An image that somebody asks for by hand.
#[derive(Debug)]
pub struct PullRequest {
    /// Which image.
    pub reference: Reference,
    /// Only say what is known of it; nothing moves.
    pub dry_run: bool,
    /// Where its progress goes; the last message is [`PullProgress::Done`] or [`PullProgress::Failed`]. Closed when nobody listens any
    /// more, which abandons the pull.
    pub progress: mpsc::Sender<PullProgress>,
}

/// How far a pull is. A dry run ends with [`PullProgress::Resolved`] or [`PullProgress::Failed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum PullProgress {
    /// Which content the reference means, and who holds it.
    Resolved {
        /// The index or manifest.
        digest: String,
        /// The nodes that hold it under this repository, at most [`MAX_NAMES`] of them.
        providers: Vec<String>,
        /// Providers that are not named.
        more_providers: usize,
    },
    /// What has to come is known. Not sent when nothing has to.
    Planned {
        /// Bytes of config and layers to fetch.
        missing_bytes: u64,
        /// Blobs to fetch.
        missing_blobs: usize,
    },
    /// Bytes of config and layers that have come. Falls back when a provider fails in the middle of a blob.
    Bytes {
        /// So far.
        done: u64,
        /// Of so many.
        total: u64,
    },
    /// A layer is being unpacked, while others may still be coming. Not sent where that is left to the runtime.
    Unpacking {
        /// Which one, counted from 1.
        layer: usize,
        /// Of so many.
        of: usize,
    },
    /// The image is here.
    Done {
        /// The index or manifest.
        digest: String,
        /// Bytes that came, documents included.
        bytes: u64,
        /// Blobs that came.
        fetched: usize,
        /// Blobs that were here.
        there: usize,
        /// How long it took.
        milliseconds: u64,
        /// The nodes that it came from, at most [`MAX_NAMES`] of them.
        from: Vec<String>,
    },
    /// The image is not here.
    Failed {
        /// What went wrong, for machines.
        kind: PullFailure,
        /// What went wrong, for people: which image, which nodes.
        message: String,
        /// Whether the same may work a little later.
        retryable: bool,
    },
    /// Something that this release does not know.
    #[serde(other)]
    Other,
}

impl PullProgress {
    /// Whether this ends the pull.
    pub fn is_last(&self, dry_run: bool) -> bool {
        match self {
            Self::Done { .. } | Self::Failed { .. } => true,
            Self::Resolved { .. } => dry_run,
            Self::Planned { .. } | Self::Bytes { .. } | Self::Unpacking { .. } | Self::Other => false,
        }
    }
}

/// Why a pull by hand failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PullFailure {
    /// No peer holds it under this registry and repository.
    NoProvider,
    /// Peers know the tag with different contents.
    Disagreement,
    /// A manifest that cannot be used, or none for this platform.
    Unusable,
    /// A limit forbids it.
    OverLimit,
    /// Nothing may be imported on this node.
    Closed,
    /// Every provider failed.
    FetchFailed,
    /// This node's content store failed.
    StoreFailed,
    /// The agent stops.
    Abandoned,
    /// As many are pulled by hand as may be at the same time.
    Busy,
    /// One that this release does not know.
    #[serde(other)]
    Other,
}

/// Says how the agent is, from what is known.
#[async_trait]
pub trait StatusSource: Send + Sync + 'static {
    /// How it is now. Takes a second at most.
    async fn status(&self) -> Status;
}

/// Says how the mesh looks.
#[async_trait]
pub trait MeshSource: Send + Sync + 'static {
    /// How it looks now, with at most [`MAX_MEMBERS`] members, by node; `None` where it does not answer within a second.
    async fn mesh(&self) -> Option<MeshStatus>;
}

/// How an agent is. What it does not know is absent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// The node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The agent's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_id: Option<String>,
    /// The agent's release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// This node's containerd.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containerd: Option<ContainerdStatus>,
    /// The other agents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mesh: Option<MeshStatus>,
    /// Whether other agents answer over UDP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp: Option<UdpStatus>,
    /// This node's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock: Option<ClockStatus>,
    /// What this node tells the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<ImagesStatus>,
    /// Layers that are retained; absent where none are to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retained: Option<RetentionStatus>,
    /// Images of the agent's own DaemonSet; absent where the agent does not look after them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub own_image: Option<OwnImageStatus>,
    /// Registries that are known to be down; an empty list when none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registries_down: Option<Vec<OutageStatus>>,
    /// Recoveries under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recoveries: Option<Vec<RecoveryStatus>>,
    /// The watched file, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_file: Option<PolicyFileStatus>,
}

/// Whether other agents answer over UDP, which carries blobs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UdpStatus {
    /// Since when none of those that were asked did while some answered over TCP, in seconds since 1970; absent
    /// where UDP is not blocked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_since: Option<u64>,
    /// The UDP port, where it is blocked; zero otherwise.
    pub port: u16,
    /// Nodes that answer over TCP and not over UDP.
    pub nodes: usize,
}

/// This node's clock, compared with the API server's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClockStatus {
    /// Seconds that this node's clock is ahead for certain; below zero it is behind.
    pub ahead_seconds: i64,
    /// So far that peers may refuse each other's credentials.
    pub too_far: bool,
    /// The time of the comparison, in seconds since 1970, by this node's clock.
    pub measured: u64,
}

/// What is known of containerd.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerdStatus {
    /// Its version; absent while it does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The root of its content store, as containerd or the setting names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_root: Option<String>,
    /// How blobs are read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blobs_read: Option<BlobAccess>,
    /// How staged blobs come into it: `linked`, or `copied: ` and why, which is slower.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingest: Option<String>,
    /// Whether it discards layers once they are unpacked. containerd 2 does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discards_unpacked_layers: Option<bool>,
    /// The snapshotter that layers are unpacked into as they come, or `left to containerd: ` and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unpacking: Option<String>,
    /// The image of pods' sandboxes, without which no pod starts; absent where no sandbox tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_image: Option<String>,
    /// Its image verifiers; an empty list when it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_verifiers: Option<Vec<String>>,
}

/// How blobs are read from containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum BlobAccess {
    /// From the files of its content store.
    Files,
    /// Through its content API, which is slower.
    ContentApi,
}

impl fmt::Display for BlobAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Files => "from its files",
            Self::ContentApi => "through the content API",
        })
    }
}

/// What this node holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ImagesStatus {
    /// Images that peers are told of.
    pub announced: usize,
    /// Images with a record here but not all of their content, so that peers are not told of them.
    pub incomplete: usize,
    /// How many of those for which reason, at most [`MAX_NAMES`] reasons.
    pub reasons: BTreeMap<String, usize>,
}

/// Layers that outlive their unpacking because the agent has leases on them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetentionStatus {
    /// Bytes of these layers.
    pub bytes: u64,
    /// Limit of these bytes.
    pub budget: u64,
    /// Images with such layers.
    pub images: usize,
    /// Images here that are to have all their layers.
    pub wanted: usize,
    /// How many of those lack a layer, so that other nodes cannot run them from here.
    pub lacking: usize,
    /// Why they lack a layer now: images by reason.
    pub lacking_reasons: BTreeMap<String, usize>,
}

/// Images of the agent's own DaemonSet on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OwnImageStatus {
    /// Images of the agent's pod.
    pub current: Vec<String>,
    /// Images of the DaemonSet's template that the pod does not name.
    pub next: Vec<NextImageStatus>,
    /// The API server named the template at least once.
    pub is_template_known: bool,
}

/// An image that the next pod of this node will need.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NextImageStatus {
    /// The image.
    pub image: String,
    /// Why the image is not on this node yet; absent once it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
}

/// A registry that is known to be down.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutageStatus {
    /// Which one.
    pub registry: String,
    /// How it fails, in words.
    pub how: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// The nodes that say so, at most [`MAX_NAMES`] of them.
    pub said_by: Vec<String>,
}

/// A recovery under way.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryStatus {
    /// The image.
    pub image: String,
    /// Bytes that have come.
    pub done: u64,
    /// Of so many; 0 until the manifest is there.
    pub total: u64,
    /// The layer that is being unpacked, or was last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unpacking: Option<LayerStatus>,
    /// The nodes that it comes from.
    pub from: Vec<String>,
}

/// A layer of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LayerStatus {
    /// Which one, counted from 1.
    pub layer: usize,
    /// Of so many.
    pub of: usize,
}

/// The watched file of rules.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyFileStatus {
    /// Where it is.
    pub path: String,
    /// Why it is not in force as it is now; then what was read before stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When what is in force was read, in seconds since 1970; absent while the flags alone are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_force_since: Option<u64>,
    /// What it sets, as `name: value`.
    pub sets: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_status_fields_are_omitted_and_read_back_as_unknown() {
        let status = Status { node: Some("n1".into()), registries_down: Some(Vec::new()), ..Status::default() };
        let text = serde_json::to_string(&status).unwrap();
        assert_eq!(text, r#"{"node":"n1","registriesDown":[]}"#);
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status);
    }

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
