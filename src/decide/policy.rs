//! Policy and options: the policy may change while an agent runs; options are fixed at start.
//!
//! Not here: reading flags and the policy file (`crate::config`), and the decisions
//! ([`super::opt_in`], [`super::pull_failure`], [`super::plan`]).

use std::time::Duration;

use super::disk_floor::DiskFloors;
use super::opt_in::{OptInPolicy, Trigger};
use super::tag::TagPolicy;

/// The policy in force: values of flags, partly replaced by the watched policy file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Namespaces, pods and causes that are recovered.
    pub opt_in: OptInPolicy,
    /// Limits of recoveries.
    pub budgets: Budgets,
}

impl Default for Policy {
    /// The policy without flags and policy file.
    fn default() -> Self {
        Self {
            opt_in: OptInPolicy {
                kill_switch: false,
                annotation_prefixes: vec!["lighterman.dev".into()],
                denied_k8s_namespaces: ["kube-system", "kube-public", "kube-node-lease"].map(String::from).into(),
                denied_selector: None,
                allowed_selector: None,
                recover_on: Trigger::DEFAULT.into(),
                require_repositories: false,
            },
            budgets: Budgets {
                concurrent_recoveries: 2,
                concurrent_blobs: 16,
                max_image_bytes: 0,
                min_free_bytes: 2 << 30,
                // The kubelet's defaults: imageGCHighThresholdPercent, and imagefs.available of
                // evictionHard.
                image_gc_percent: 85,
                eviction_percent: 15,
                max_download_rate: 0,
                max_upload_rate: 0,
            },
        }
    }
}

/// Limits of recoveries on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budgets {
    /// Images recovered at the same time; at least 1.
    pub concurrent_recoveries: usize,
    /// Blobs of one image fetched at the same time; at least 1.
    pub concurrent_blobs: usize,
    /// Missing bytes that one image may have; 0 is no limit.
    pub max_image_bytes: u64,
    /// Bytes that stay free on the file systems of the content store and the snapshotter, whatever
    /// the percentages say.
    pub min_free_bytes: u64,
    /// Percent in use from which the kubelet collects images. A download stays below this
    /// threshold; unpacked layers may exceed the threshold.
    pub image_gc_percent: u8,
    /// Percent free below which the kubelet evicts pods. Neither downloads nor layers cross this
    /// threshold.
    pub eviction_percent: u8,
    /// Bytes per second from all peers together; 0 is no limit.
    pub max_download_rate: u64,
    /// Bytes per second to all peers together; 0 is no limit.
    pub max_upload_rate: u64,
}

impl Budgets {
    /// Bytes and percentages that file systems keep free.
    pub fn disk_floors(&self) -> DiskFloors {
        DiskFloors {
            min_free_bytes: self.min_free_bytes,
            image_gc_percent: self.image_gc_percent,
            eviction_percent: self.eviction_percent,
        }
    }
}

/// How references are resolved to digests.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolveOptions {
    /// Decides when peers disagree on a tag.
    pub tag_policy: TagPolicy,
    /// Whether to ask the source registry for a tag's digest before peers.
    pub ask_registry: bool,
    /// Whether peers with the digest under another repository count as providers. Knowledge of a
    /// digest is then enough to get the image.
    pub any_repository: bool,
    /// Kubernetes namespaces whose pull secrets may be read.
    pub pull_secret_namespaces: Vec<String>,
}

/// How recoveries act on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryOptions {
    /// Decide and report, and fetch nothing.
    pub dry_run: bool,
    /// Delete a pod that still waits although its image is here, if a controller will recreate the
    /// pod.
    pub delete_pods: bool,
    /// Duration after which a pull counts as stalled; `None` for never.
    pub stalled_after: Option<Duration>,
    /// Close containerd's connections that are silent for as long while a pod waits.
    pub end_stalled_pulls: bool,
}

impl Default for RecoveryOptions {
    fn default() -> Self {
        Self { dry_run: false, delete_pods: false, stalled_after: Some(STALLED_AFTER), end_stalled_pulls: false }
    }
}

/// Longer than all but the largest images take, and less than half of the 5 min after which
/// containerd ends a pull without progress.
pub const STALLED_AFTER: Duration = Duration::from_secs(120);
