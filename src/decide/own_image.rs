//! Decisions about the images of the agent's own DaemonSet.
//!
//! An agent cannot recover its own next image when the rollout reaches its node: the old pod is
//! gone by then. So the agent fetches the image earlier. The kubelet must not collect images that
//! no container uses between two pods, so the agent protects the current images and the next ones.
//!
//! A digest may come from any peer. The registry alone decides a tag: if the registry does not
//! answer, the kubelet pulls the tag.
//!
//! Lists of repositories in namespaces do not count here. Such lists restrict the authors of pods;
//! the author of this DaemonSet is root on every node already. Peers provide the image under the
//! repository that the DaemonSet names, as for any recovery.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::oci::Reference;

#[cfg(test)]
mod tests;

/// Images that count, of the template and of the agent's pod each. The chart's pod has one
/// container; init containers and injected sidecars make a handful.
pub const MAX_IMAGES: usize = 16;

/// Reads of the DaemonSet per second in the whole cluster, served by the API server's watch cache:
/// a GET by name, some 20 KB with `managedFields` and `kubectl`'s annotation, so 400 KB/s at most.
/// A watch would cost more: the DaemonSet's status changes with every pod of a rollout, twice for
/// each of 5000 nodes, and each change would go to each of 5000 watches.
const READS_PER_SECOND: u32 = 20;

/// Shortest mean interval between two reads of one agent. Below 600 agents, a rollout of one node
/// at a time takes about as long for each node.
const MIN_READ_INTERVAL: Duration = Duration::from_secs(30);

/// The images of this agent's DaemonSet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnImages {
    /// Images of the agent's own pod; empty before the pod was seen.
    pub current: BTreeSet<Reference>,
    /// Images of the DaemonSet's template, init containers included. `None` if the API server did
    /// not answer, or no DaemonSet owns the pod.
    pub template: Option<BTreeSet<Reference>>,
    /// The pod's pull secrets, by namespace and name.
    pub pull_secrets: Vec<(String, String)>,
}

impl OwnImages {
    /// All images that stay on this node.
    pub fn named(&self) -> BTreeSet<Reference> {
        self.current.iter().chain(self.template.iter().flatten()).cloned().collect()
    }

    /// Images of the template that have no record on this node.
    pub fn missing(&self, recorded: &BTreeSet<Reference>) -> BTreeSet<Reference> {
        self.template.iter().flatten().filter(|image| !recorded.contains(image)).cloned().collect()
    }
}

/// Image records of this node that the kubelet does not collect.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Protection {
    /// Records with this program's mark.
    pub ours: BTreeSet<Reference>,
    /// Records without the mark.
    pub others: BTreeSet<Reference>,
}

impl Protection {
    /// Every protected name.
    pub fn all(&self) -> BTreeSet<Reference> {
        self.ours.union(&self.others).cloned().collect()
    }
}

/// A change of the protection from the kubelet's image collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProtectionChange {
    /// Protect the image record of this name.
    Protect(Reference),
    /// End a protection by this agent or an earlier one.
    Release(Reference),
}

/// Protects the named images, and releases those that are no longer named. Releases need both pod
/// and template, because the next image of an unreadable DaemonSet is unknown.
pub fn protection_changes(
    own: &OwnImages,
    recorded: &BTreeSet<Reference>,
    protection: &Protection,
) -> Vec<ProtectionChange> {
    let named = own.named();
    let is_known = own.template.is_some() && !own.current.is_empty();
    let protected = protection.all();
    let protect = named.iter().filter(|image| recorded.contains(image) && !protected.contains(image));
    let release = protection.ours.iter().filter(|image| is_known && !named.contains(image));
    protect.cloned().map(ProtectionChange::Protect).chain(release.cloned().map(ProtectionChange::Release)).collect()
}

/// Facts about a missing image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnImageSituation {
    /// The kill switch is on, or the agent is in a dry run.
    pub is_switched_off: bool,
    /// Images may be imported into this node's containerd.
    pub may_import: bool,
    /// A peer provides the image; for a tag, any content of this tag.
    pub has_provider: bool,
    /// The last attempt failed so recently that another one is not due.
    pub is_backing_off: bool,
}

/// Decision about a missing image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnImageStep {
    /// Fetch the image from peers.
    Fetch,
    /// Ask the registry for the tag's digest, and fetch this digest from peers.
    AskRegistry,
    /// Do nothing now.
    Wait(OwnImageWait),
}

/// Why a missing image is not fetched now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnImageWait {
    /// The kill switch, or a dry run.
    SwitchedOff,
    /// This node's containerd must not get imports.
    NoImports,
    /// No peer provides the image yet.
    NoProvider,
    /// The last attempt failed.
    BackingOff,
}

/// Decides about one missing image.
pub fn own_image_step(image: &Reference, situation: OwnImageSituation) -> OwnImageStep {
    let OwnImageSituation { is_switched_off, may_import, has_provider, is_backing_off } = situation;
    match image {
        _ if is_switched_off => OwnImageStep::Wait(OwnImageWait::SwitchedOff),
        _ if !may_import => OwnImageStep::Wait(OwnImageWait::NoImports),
        _ if !has_provider => OwnImageStep::Wait(OwnImageWait::NoProvider),
        _ if is_backing_off => OwnImageStep::Wait(OwnImageWait::BackingOff),
        Reference::Digest(..) => OwnImageStep::Fetch,
        Reference::Tag(..) => OwnImageStep::AskRegistry,
    }
}

/// Mean interval between two reads of the DaemonSet, with so many agents in the cluster.
pub fn read_interval(agents: usize) -> Duration {
    let agents = u32::try_from(agents).unwrap_or(u32::MAX);
    (Duration::from_secs(1) / READS_PER_SECOND * agents).max(MIN_READ_INTERVAL)
}
