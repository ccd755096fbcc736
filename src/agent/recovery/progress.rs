//! Progress of recoveries, for status, metrics and connected clients. The pod controller also reads
//! whether a recovery has begun to write image records.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crate::decide::plan::FetchPlan;
use crate::model::{PeerId, RecoveredImage};
use crate::oci::{Descriptor, Digest, Reference};
use crate::util::clock;
use parking_lot::Mutex;

/// Progress of one recovery, blob by blob.
#[derive(Debug, Default)]
pub struct Progress(Mutex<ProgressState>);

#[derive(Debug, Default)]
struct ProgressState {
    resolved: Option<(Digest, usize)>,
    /// Number of blobs that were here before.
    present: usize,
    /// `None` until the fetch plan exists.
    blobs: Option<BTreeMap<Digest, BlobProgress>>,
    first_byte: Option<Instant>,
    unpacking: Option<(usize, usize)>,
    is_recorded: bool,
}

/// Progress of one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobProgress {
    /// Size in bytes.
    pub size: u64,
    /// Bytes that have arrived. Decreases when pieces turn out to be wrong.
    pub done: u64,
    /// Peers that sent bytes of the blob.
    pub from: BTreeSet<PeerId>,
}

impl Progress {
    /// The planned blobs by digest; empty before the plan.
    pub fn blobs(&self) -> BTreeMap<Digest, BlobProgress> {
        self.lock().blobs.clone().unwrap_or_default()
    }

    /// The resolved digest and the number of its providers; `None` before the resolution.
    pub fn resolved(&self) -> Option<(Digest, usize)> {
        self.lock().resolved
    }

    /// The number of blobs to fetch and the number of present blobs; `None` before the plan.
    pub fn planned(&self) -> Option<(usize, usize)> {
        let state = self.lock();
        state.blobs.as_ref().map(|blobs| (blobs.len(), state.present))
    }

    pub(in crate::agent) fn first_byte(&self) -> Option<Instant> {
        self.lock().first_byte
    }

    /// The current or last layer being unpacked, counted from 1, and the number of layers. `None`
    /// before the first layer.
    pub fn unpacking(&self) -> Option<(usize, usize)> {
        self.lock().unpacking
    }

    pub(in crate::agent) fn set_unpacking(&self, layer: usize, of: usize) {
        self.lock().unpacking = Some((layer, of));
    }

    /// The whole image is here, and the image records are being written.
    pub(in crate::agent) fn mark_recorded(&self) {
        self.lock().is_recorded = true;
    }

    /// Whether the runtime may have an image record by now.
    pub(in crate::agent) fn is_recorded(&self) -> bool {
        self.lock().is_recorded
    }

    pub(in crate::agent) fn set_resolved(&self, digest: Digest, providers: usize) {
        self.lock().resolved = Some((digest, providers));
    }

    /// Bytes that have arrived, and all bytes to fetch. Saturating, because the manifest's author
    /// chose the sizes.
    pub fn byte_totals(&self) -> (u64, u64) {
        let blobs = self.blobs();
        let sum = |of: fn(&BlobProgress) -> u64| blobs.values().map(of).fold(0, u64::saturating_add);
        (sum(|blob| blob.done), sum(|blob| blob.size))
    }

    pub(in crate::agent) fn set_plan(&self, plan: &FetchPlan) {
        let expected =
            |blob: &Descriptor| (blob.digest, BlobProgress { size: blob.size, done: 0, from: BTreeSet::new() });
        let mut state = self.lock();
        state.present = plan.present.len();
        state.blobs = Some(plan.missing.iter().map(expected).collect());
    }

    fn update(&self, digest: Digest, change: impl FnOnce(&mut BlobProgress)) {
        if let Some(blob) = self.lock().blobs.as_mut().and_then(|blobs| blobs.get_mut(&digest)) {
            change(blob);
        }
    }

    /// Replaces the number of bytes that have arrived, and adds their senders.
    pub(in crate::agent) fn update_blob(&self, digest: Digest, done: u64, from: impl Iterator<Item = PeerId>) {
        if done > 0 {
            self.lock().first_byte.get_or_insert_with(clock::now);
        }
        self.update(digest, |blob| {
            blob.done = done;
            blob.from.extend(from);
        });
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, ProgressState> {
        self.0.lock()
    }
}

/// The recoveries of one agent: the running ones and the latest ended ones. Clones share the state.
#[derive(Clone, Default)]
pub struct RecoveryTracker(Arc<Mutex<Recoveries>>);

#[derive(Default)]
struct Recoveries {
    running: BTreeMap<Reference, Arc<Progress>>,
    ended: VecDeque<(Reference, Result<RecoveredImage, String>)>,
}

/// Ended recoveries that are kept; older ones are in the log.
const MAX_ENDED: usize = 16;

impl RecoveryTracker {
    /// The running recoveries, by reference.
    pub fn running(&self) -> BTreeMap<Reference, Arc<Progress>> {
        self.lock().running.clone()
    }

    /// The latest result for this image; `None` when no result is kept.
    pub fn ended(&self, reference: &Reference) -> Option<Result<RecoveredImage, String>> {
        self.lock().ended.iter().rev().find(|(ended, _)| ended == reference).map(|(_, result)| result.clone())
    }

    /// Whether a recovery, rather than a pull, recently wrote the image record of this name with
    /// this target.
    pub(in crate::agent) fn has_recorded(&self, name: &Reference, target: Digest) -> bool {
        let is_same_image = |reference: &Reference, digest: Digest| {
            digest == target
                && (reference == name || *name == Reference::Digest(reference.repository().clone(), digest))
        };
        let recoveries = self.lock();
        let is_ended = |(reference, result): &(Reference, Result<RecoveredImage, String>)| {
            result.as_ref().is_ok_and(|recovered| is_same_image(reference, recovered.digest))
        };
        let is_recording = |(reference, progress): (&Reference, &Arc<Progress>)| {
            progress.is_recorded() && progress.resolved().is_some_and(|(digest, _)| is_same_image(reference, digest))
        };
        recoveries.ended.iter().any(is_ended) || recoveries.running.iter().any(is_recording)
    }

    pub(in crate::agent) fn begin(&self, reference: &Reference) -> Arc<Progress> {
        let progress = Arc::<Progress>::default();
        self.lock().running.insert(reference.clone(), Arc::clone(&progress));
        progress
    }

    pub(in crate::agent) fn end(&self, reference: &Reference, result: Result<RecoveredImage, String>) {
        let mut recoveries = self.lock();
        recoveries.running.remove(reference);
        if recoveries.ended.len() == MAX_ENDED {
            recoveries.ended.pop_front();
        }
        recoveries.ended.push_back((reference.clone(), result));
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, Recoveries> {
        self.0.lock()
    }
}

/// A size for people, such as 256.0 MiB.
pub fn human_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(3);
    format!("{:.1} {}", bytes as f64 / f64::from(1 << (10 * unit)), units[unit as usize])
}
