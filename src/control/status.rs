//! `Status` holds the state of the agent and of its parts. `lighterman status --json` prints the
//! names of the fields, so users may rely on the names.

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::model::MeshStatus;

/// Returns the agent's status from cached state.
#[async_trait]
pub trait StatusSource: Send + Sync + 'static {
    /// Current status. Takes a second at most.
    async fn status(&self) -> Status;
}

/// Status of an agent. Unknown values are absent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// Node name.
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
    /// Peers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mesh: Option<MeshStatus>,
    /// Whether peers answer over UDP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp: Option<UdpStatus>,
    /// This node's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock: Option<ClockStatus>,
    /// Images that this node announces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<ImagesStatus>,
    /// Retained layers; absent where retention is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retained: Option<RetentionStatus>,
    /// Images of the agent's own DaemonSet; absent where their protection is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub own_image: Option<OwnImageStatus>,
    /// Registries with an outage; an empty list without outages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registries_down: Option<Vec<OutageStatus>>,
    /// Recoveries under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recoveries: Option<Vec<RecoveryStatus>>,
    /// The policy file, if one is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_file: Option<PolicyFileStatus>,
}

/// Whether peers answer over UDP, which carries blobs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UdpStatus {
    /// Begin of the block in seconds since 1970; absent where UDP is not blocked. UDP is blocked
    /// when no probed peer answers over UDP while some answer over TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_since: Option<u64>,
    /// The UDP port, where blocked; zero otherwise.
    pub port: u16,
    /// Nodes that answer over TCP and not over UDP.
    pub nodes: usize,
}

/// This node's clock, compared with the API server's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClockStatus {
    /// Seconds that this node's clock is ahead for certain; below zero the clock is behind.
    pub ahead_seconds: i64,
    /// The difference is so large that peers may reject each other's credentials.
    pub too_far: bool,
    /// Time of the comparison, in seconds since 1970, by this node's clock.
    pub measured: u64,
}

/// Status of containerd.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerdStatus {
    /// containerd's version; absent while containerd does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Root of the content store, from containerd or from the setting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_root: Option<String>,
    /// Access to blobs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blobs_read: Option<BlobAccess>,
    /// Ingest mode of staged blobs: `linked`, or the slower `copied: ` with the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingest: Option<String>,
    /// Whether containerd discards layers after unpacking. containerd 2 does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discards_unpacked_layers: Option<bool>,
    /// Snapshotter that layers are unpacked into on arrival, or `left to containerd: ` with the
    /// reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unpacking: Option<String>,
    /// Image of pod sandboxes, without which no pod starts; absent without a sandbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_image: Option<String>,
    /// containerd's image verifiers; an empty list without verifiers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_verifiers: Option<Vec<String>>,
}

/// Access to containerd's blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum BlobAccess {
    /// Files of the content store.
    Files,
    /// containerd's content API, which is slower.
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

/// Images of this node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ImagesStatus {
    /// Images that this node announces.
    pub announced: usize,
    /// Images with a record but incomplete content, which this node does not announce.
    pub incomplete: usize,
    /// Incomplete images by reason, at most [`super::MAX_NAMES`] reasons.
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
    /// Images of this node that should have all their layers.
    pub wanted: usize,
    /// Wanted images that lack a layer, so that no other node can run them from here.
    pub lacking: usize,
    /// Lacking images by the reason of the missing layer.
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
    /// The API server returned the template at least once.
    pub is_template_known: bool,
}

/// Image that the next agent pod of this node will need.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NextImageStatus {
    /// Image.
    pub image: String,
    /// Reason of an image that is not on this node; absent once the image is here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
}

/// Outage of a registry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutageStatus {
    /// Registry.
    pub registry: String,
    /// Kind of the failure, in words.
    pub how: String,
    /// Begin of the outage, in seconds since 1970.
    pub since: u64,
    /// Nodes that report the outage, at most [`super::MAX_NAMES`].
    pub said_by: Vec<String>,
}

/// A recovery under way.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryStatus {
    /// Image.
    pub image: String,
    /// Fetched bytes.
    pub done: u64,
    /// Bytes to fetch; 0 until the manifest is read.
    pub total: u64,
    /// The layer that is being unpacked, or was unpacked last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unpacking: Option<LayerStatus>,
    /// Nodes that send bytes.
    pub from: Vec<String>,
}

/// A layer of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LayerStatus {
    /// Number of the layer, from 1.
    pub layer: usize,
    /// Number of layers.
    pub of: usize,
}

/// The policy file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyFileStatus {
    /// Path of the file.
    pub path: String,
    /// Error of the file's present content; the earlier content stays in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Time of the read that is in force, in seconds since 1970; absent while only flags are in
    /// force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_force_since: Option<u64>,
    /// Settings of the file, as `name: value`.
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
}
