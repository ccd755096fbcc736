//! Choice of the images that keep their layers on a node whose containerd discards layers after
//! unpacking.
//!
//! One lease per image pins the layers. A lease may name a layer that is still being pulled, so an
//! image is accepted as a whole, with the sizes in the manifest. Releases precede leases: after
//! every action the leased layers are within the budget. Not here: reading manifests, and checking
//! opt-in.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use super::fill::FetchFrom;
use crate::oci::Digest;

#[cfg(test)]
mod tests;

/// Life of a lease. An uninstalled agent leaves nothing behind after this time. An agent may be
/// down for half of this time without the loss of a layer.
pub const LEASE_DURATION: Duration = Duration::from_secs(24 * 3600);

/// Time for which a pulled image waits for a pod. The agent sees a pod when the kubelet does, and
/// the kubelet then starts the pull; a minute covers a pod watch that reconnects (its longest pause
/// is 30 s). An image whose namespace could not be read waits until it can.
const POD_WAIT: Duration = Duration::from_secs(60);

/// Time without a new layer after which a pull counts as aborted. containerd's own lease still pins
/// the layers of a pull that continues, and the next layer makes the image a candidate again.
const PULL_IDLE: Duration = Duration::from_secs(10 * 60);

/// Free space, in percent of the disk, below which retained layers are released. The kubelet
/// collects images at 85 % used and checks every 5 min: one percent earlier keeps retained layers
/// from costing a node its images.
const MIN_FREE_PERCENT: u64 = 16;

/// Budget for a disk of unknown size.
const BYTES_OF_UNKNOWN_DISK: u64 = 10 << 30;

/// The images that keep layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RetainLayers {
    /// Images that pods of opted-in namespaces run or ran.
    #[default]
    OptedIn,
    /// Every image.
    All,
    /// No image.
    None,
}

/// Limit of all retained layers of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetainBytes {
    /// Bytes.
    Bytes(u64),
    /// Percent of containerd's file system.
    Percent(u8),
}

/// Options of retention, fixed at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetainOptions {
    /// The images whose layers are retained.
    pub layers: RetainLayers,
    /// Limit of retained layers.
    pub bytes: RetainBytes,
    /// Sources of layers that are missing here.
    pub fetch: FetchFrom,
    /// Bytes per second from registries; 0 is no limit.
    pub fetch_rate: u64,
}

impl RetainBytes {
    /// Bytes on a disk of `total` bytes.
    pub fn limit_on(self, total: Option<u64>) -> u64 {
        match (self, total) {
            (Self::Bytes(bytes), _) => bytes,
            (Self::Percent(percent), Some(total)) => total / 100 * u64::from(percent),
            (Self::Percent(0), None) => 0,
            (Self::Percent(_), None) => BYTES_OF_UNKNOWN_DISK,
        }
    }
}

/// Facts about one image and the pods that name the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RetainFacts {
    /// The time since which an image record leads to the manifest.
    pub recorded: Option<SystemTime>,
    /// A pod of an opted-in namespace names a record of the image.
    pub used: bool,
    /// A pod names a record of the image, and the opt-in of its namespace is unknown.
    pub undecided: bool,
    /// No record, and a pod of an opted-in namespace names an image of the manifest's repository.
    pub expected: bool,
    /// Last time that a pod of an opted-in namespace named the image.
    pub last_use: Option<SystemTime>,
    /// Last arrival of the manifest or a layer. `None` once a record was removed.
    pub last_arrival: Option<SystemTime>,
    /// The manifest's labels keep the layers for containerd: a lease would add nothing.
    pub keeps_layers: bool,
}

/// Why an image is a candidate. A greater interest is retained first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RetainInterest {
    /// The image was pulled for an unknown pod. Such an image never displaces another image.
    Unknown,
    /// A pod used the image, last at this time.
    Idle(SystemTime),
    /// A pod uses the image, or waits for the pull.
    Wanted,
}

/// Interest in an image; `None` when the layers are not retained.
pub fn interest(setting: RetainLayers, facts: &RetainFacts, now: SystemTime) -> Option<RetainInterest> {
    let RetainFacts { recorded, used, undecided, expected, last_use, last_arrival, keeps_layers } = *facts;
    let within = |since: SystemTime, limit| now.duration_since(since).is_ok_and(|passed| passed < limit) || since > now;
    if setting == RetainLayers::None || keeps_layers {
        return None;
    }
    let Some(recorded) = recorded else {
        let is_pulled = last_arrival.is_some_and(|at| within(at, PULL_IDLE));
        let wanted = expected || setting == RetainLayers::All;
        return is_pulled.then_some(if wanted { RetainInterest::Wanted } else { RetainInterest::Unknown });
    };
    match (used || setting == RetainLayers::All, last_use) {
        (true, _) => Some(RetainInterest::Wanted),
        (false, Some(at)) => Some(RetainInterest::Idle(at)),
        (false, None) => (undecided || within(recorded, POD_WAIT)).then_some(RetainInterest::Unknown),
    }
}

/// One image that may keep its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainCandidate {
    /// The manifest of this platform.
    pub manifest: Digest,
    /// The layers with their sizes in bytes, each once.
    pub layers: BTreeMap<Digest, u64>,
    /// The interest in the image.
    pub interest: RetainInterest,
    /// Last time that a pod of an opted-in namespace named the image.
    pub last_use: Option<SystemTime>,
}

/// The lease of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLease {
    /// Layers in the lease, with their sizes in bytes.
    pub layers: BTreeMap<Digest, u64>,
    /// When containerd drops the lease.
    pub expires: SystemTime,
    /// The lease records the use of the image. The next agent reads this record.
    pub is_marked_used: bool,
}

/// A step towards the chosen leases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseAction {
    /// Delete the image's lease.
    Release(Digest),
    /// Add these layers to the image's lease, and create the lease if absent.
    Retain(Digest, BTreeSet<Digest>),
    /// Replace the image's lease by a lease with a full life and the last use: containerd cannot
    /// change a lease.
    Renew(Digest),
}

/// Bytes that may be retained now. Below the threshold of free space, retained layers shrink by the
/// missing bytes.
pub fn allowed_bytes(budget: u64, retained: u64, disk: Option<(u64, u64)>) -> u64 {
    let Some((free, total)) = disk else { return budget };
    let floor = min_free(total);
    match free >= floor {
        true => budget,
        false => budget.min(retained.saturating_sub(floor - free)),
    }
}

/// Bytes of a disk that stay free of retained layers.
pub fn min_free(total: u64) -> u64 {
    total / 100 * MIN_FREE_PERCENT
}

/// Bytes of these layers, each digest counted once.
pub fn distinct_bytes<'a>(layers: impl IntoIterator<Item = &'a BTreeMap<Digest, u64>>) -> u64 {
    let distinct: BTreeMap<_, _> = layers.into_iter().flatten().collect();
    distinct.values().fold(0, |sum, size| sum.saturating_add(**size))
}

/// The images to retain within `allowed` bytes: the most wanted first, and among equals the images
/// with a lease. An image that does not fit is omitted as a whole, because no peer can run an image
/// without every layer.
pub fn choose(
    candidates: &[RetainCandidate],
    leases: &BTreeMap<Digest, LayerLease>,
    allowed: u64,
) -> BTreeMap<Digest, BTreeMap<Digest, u64>> {
    let mut ordered: Vec<_> = candidates.iter().collect();
    ordered.sort_by_key(|candidate| {
        (Reverse(candidate.interest), Reverse(leases.contains_key(&candidate.manifest)), candidate.manifest)
    });
    let (mut chosen, mut counted, mut sum) = (BTreeMap::new(), BTreeSet::new(), 0_u64);
    for RetainCandidate { manifest, layers, interest: _, last_use: _ } in ordered {
        let new = layers.iter().filter(|(layer, _)| !counted.contains(*layer));
        let after = new.fold(sum, |sum, (_, size)| sum.saturating_add(*size));
        if after <= allowed {
            sum = after;
            counted.extend(layers.keys().copied());
            chosen.insert(*manifest, layers.clone());
        }
    }
    chosen
}

/// The steps from `leases` to the chosen images, in their order of execution.
pub fn actions(
    candidates: &[RetainCandidate],
    leases: &BTreeMap<Digest, LayerLease>,
    allowed: u64,
    now: SystemTime,
) -> Vec<LeaseAction> {
    let chosen = choose(candidates, leases, allowed);
    let released = leases.keys().filter(|manifest| !chosen.contains_key(*manifest)).copied().map(LeaseAction::Release);
    let mut steps: Vec<_> = released.collect();
    let was_used: BTreeSet<_> = candidates
        .iter()
        .filter(|candidate| candidate.last_use.is_some())
        .map(|candidate| candidate.manifest)
        .collect();
    for (manifest, layers) in chosen {
        let lease = leases.get(&manifest);
        let is_old = |lease: &LayerLease| lease.expires.duration_since(now).unwrap_or_default() < LEASE_DURATION / 2;
        let is_newly_used = |lease: &LayerLease| was_used.contains(&manifest) && !lease.is_marked_used;
        if lease.is_some_and(|lease| is_old(lease) || is_newly_used(lease)) {
            steps.push(LeaseAction::Renew(manifest));
        }
        let is_leased = |layer: &Digest| lease.is_some_and(|lease| lease.layers.contains_key(layer));
        let missing: BTreeSet<_> = layers.into_keys().filter(|layer| !is_leased(layer)).collect();
        if !missing.is_empty() {
            steps.push(LeaseAction::Retain(manifest, missing));
        }
    }
    steps
}
