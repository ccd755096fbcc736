//! What people may change while an agent runs: whom it helps, and what that may cost.
//!
//! Not here: reading it from flags or a file (`crate::config`), and deciding by it ([`super::opt_in`], [`super::pull_failure`], [`super::plan`]).

use std::time::Duration;

use super::disk::DiskFloors;
use super::opt_in::{OptInPolicy, Trigger};
use super::tag::TagPolicy;

/// Everything that is in force now. Flags give the first; a watched file may replace parts of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Who is helped.
    pub opt_in: OptInPolicy,
    /// What it may cost.
    pub budgets: Budgets,
}

impl Default for Policy {
    /// What is in force when no flag and no file says otherwise.
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
                // The kubelet's own defaults: imageGCHighThresholdPercent, and imagefs.available of
                // evictionHard.
                image_gc_percent: 85,
                eviction_percent: 15,
                max_download_rate: 0,
                max_upload_rate: 0,
            },
        }
    }
}

/// What recoveries may cost this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budgets {
    /// Images recovered at the same time; at least 1.
    pub concurrent_recoveries: usize,
    /// Blobs of one image fetched at the same time; at least 1.
    pub concurrent_blobs: usize,
    /// Most bytes that one image may bring; 0 is no limit.
    pub max_image_bytes: u64,
    /// Bytes that stay free on the file systems of the content store and the snapshotter, whatever
    /// the percentages say.
    pub min_free_bytes: u64,
    /// Percent in use from which the kubelet collects images. A download does not cross it;
    /// unpacked layers may.
    pub image_gc_percent: u8,
    /// Percent free below which the kubelet evicts pods. Nothing crosses it.
    pub eviction_percent: u8,
    /// Most bytes per second from peers, all together; 0 is no limit.
    pub max_download_rate: u64,
    /// Most bytes per second to peers, all together; 0 is no limit.
    pub max_upload_rate: u64,
}

impl Budgets {
    /// What a file system must keep free.
    pub fn disk_floors(&self) -> DiskFloors {
        DiskFloors {
            min_free_bytes: self.min_free_bytes,
            image_gc_percent: self.image_gc_percent,
            eviction_percent: self.eviction_percent,
        }
    }
}

/// How references are read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolveOptions {
    /// What counts when peers disagree on a tag.
    pub tag_policy: TagPolicy,
    /// Whether the source registry is asked what a tag means before peers are.
    pub ask_registry: bool,
    /// Whether a peer that holds the digest is good for any repository. A digest is then a permission.
    pub any_repository: bool,
    /// Kubernetes namespaces whose pull secrets may be read.
    pub pull_secret_namespaces: Vec<String>,
}

/// How recoveries are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryOptions {
    /// Only decide and report.
    pub dry_run: bool,
    /// Delete a pod that still waits although its image is here, if something will make it again.
    pub delete_pods: bool,
    /// How long a pull may take before it counts as stalled; `None` for ever.
    pub stalled_after: Option<Duration>,
    /// End containerd's connections that are silent for as long while a pod waits.
    pub end_stalled_pulls: bool,
}

impl Default for RecoveryOptions {
    fn default() -> Self {
        Self { dry_run: false, delete_pods: false, stalled_after: Some(STALLED_AFTER), end_stalled_pulls: false }
    }
}

/// Longer than all but the largest images take, and less than half of the 5 min after which containerd ends a pull that receives nothing.
pub const STALLED_AFTER: Duration = Duration::from_secs(120);
