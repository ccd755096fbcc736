//! How far a recovery is, for whoever watches it. Not for decisions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::agent::recovery::recovered_image::RecoveredImage;
use crate::decide::plan::FetchPlan;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Reference};

/// The progress of one recovery, blob by blob.
#[derive(Debug, Default)]
pub struct Progress(Mutex<ProgressState>);

#[derive(Debug, Default)]
struct ProgressState {
    resolved: Option<(Digest, usize)>,
    /// How many of the blobs were here.
    present: usize,
    /// Once it is known what has to come.
    blobs: Option<BTreeMap<Digest, BlobProgress>>,
    first_byte: Option<Instant>,
    unpacking: Option<(usize, usize)>,
    is_recorded: bool,
}

/// How far one blob is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobProgress {
    /// Its size.
    pub size: u64,
    /// Bytes that have come. Falls back by what turned out to be wrong.
    pub done: u64,
    /// Who sent some of it.
    pub from: BTreeSet<PeerId>,
}

impl Progress {
    /// The blobs known so far.
    pub fn blobs(&self) -> BTreeMap<Digest, BlobProgress> {
        self.lock().blobs.clone().unwrap_or_default()
    }

    /// The image's index or manifest and how many peers have it, once that is known.
    pub fn resolved(&self) -> Option<(Digest, usize)> {
        self.lock().resolved
    }

    /// How many blobs have to come and how many were here, once that is known.
    pub fn planned(&self) -> Option<(usize, usize)> {
        let state = self.lock();
        state.blobs.as_ref().map(|blobs| (blobs.len(), state.present))
    }

    /// When the first byte of a config or layer came.
    pub(in crate::agent) fn first_byte(&self) -> Option<Instant> {
        self.lock().first_byte
    }

    /// The layer that is being unpacked, or was last, counted from 1, and how many there are; `None` before the first.
    pub fn unpacking(&self) -> Option<(usize, usize)> {
        self.lock().unpacking
    }

    /// This layer of so many is being unpacked.
    pub(in crate::agent) fn set_unpacking(&self, layer: usize, of: usize) {
        self.lock().unpacking = Some((layer, of));
    }

    /// The image is whole here and is being named.
    pub(in crate::agent) fn mark_recorded(&self) {
        self.lock().is_recorded = true;
    }

    /// Whether the runtime may know the image by now.
    pub(in crate::agent) fn is_recorded(&self) -> bool {
        self.lock().is_recorded
    }

    /// What the reference means, and how many peers have it.
    pub(in crate::agent) fn set_resolved(&self, digest: Digest, providers: usize) {
        self.lock().resolved = Some((digest, providers));
    }

    /// Bytes that have come, and all that have to. Saturating, because sizes come from a manifest that anybody may have written.
    pub fn byte_totals(&self) -> (u64, u64) {
        let blobs = self.blobs();
        let sum = |of: fn(&BlobProgress) -> u64| blobs.values().map(of).fold(0, u64::saturating_add);
        (sum(|blob| blob.done), sum(|blob| blob.size))
    }

    /// These blobs will come.
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

    /// So much of a blob is here, from these.
    pub(in crate::agent) fn update_blob(&self, digest: Digest, done: u64, from: impl Iterator<Item = PeerId>) {
        if done > 0 {
            self.lock().first_byte.get_or_insert_with(Instant::now);
        }
        self.update(digest, |blob| {
            blob.done = done;
            blob.from.extend(from);
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ProgressState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The recoveries of one agent: those under way and the last that ended. Clones share it.
#[derive(Clone, Default)]
pub struct RecoveryTracker(Arc<Mutex<Recoveries>>);

#[derive(Default)]
struct Recoveries {
    running: BTreeMap<Reference, Arc<Progress>>,
    ended: VecDeque<(Reference, Result<RecoveredImage, String>)>,
}

/// Ended recoveries that are remembered; older ones are in the log.
const MAX_ENDED: usize = 16;

impl RecoveryTracker {
    /// The recoveries under way.
    pub fn running(&self) -> BTreeMap<Reference, Arc<Progress>> {
        self.lock().running.clone()
    }

    /// How the latest recovery of this image ended, if it is still remembered.
    pub fn ended(&self, reference: &Reference) -> Option<Result<RecoveredImage, String>> {
        self.lock().ended.iter().rev().find(|(ended, _)| ended == reference).map(|(_, result)| result.clone())
    }

    /// Whether a recovery wrote the image record of this name with this target lately, rather than a pull.
    pub(in crate::agent) fn has_recorded(&self, name: &Reference, target: Digest) -> bool {
        let is_of = |reference: &Reference, root: Digest| {
            root == target && (reference == name || *name == Reference::Digest(reference.repository().clone(), root))
        };
        let recoveries = self.lock();
        let is_ended = |(reference, result): &(Reference, Result<RecoveredImage, String>)| {
            result.as_ref().is_ok_and(|recovered| is_of(reference, recovered.digest))
        };
        let is_recording = |(reference, progress): (&Reference, &Arc<Progress>)| {
            progress.is_recorded() && progress.resolved().is_some_and(|(root, _)| is_of(reference, root))
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

    fn lock(&self) -> std::sync::MutexGuard<'_, Recoveries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
