//! How far a recovery is, for whoever watches it. Not for decisions.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use super::recover::Recovered;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Reference};
use crate::ports::{BlobSink, BlobWriter, StoreError};

/// The progress of one recovery, blob by blob.
#[derive(Debug, Default)]
pub struct Progress(Mutex<BTreeMap<Digest, BlobProgress>>);

/// How far one blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobProgress {
    /// Its size.
    pub size: u64,
    /// Bytes that have come. Falls back to 0 when a provider failed and the next one begins.
    pub done: u64,
    /// Who sends it, or sent it.
    pub from: Option<PeerId>,
}

impl Progress {
    /// The blobs known so far.
    pub fn blobs(&self) -> BTreeMap<Digest, BlobProgress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// These blobs will come.
    pub(super) fn expect(&self, blobs: &[Descriptor]) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for blob in blobs {
            table.insert(blob.digest, BlobProgress { size: blob.size, done: 0, from: None });
        }
    }

    fn begin(&self, digest: Digest, from: PeerId) {
        self.update(digest, |blob| (blob.done, blob.from) = (0, Some(from)));
    }

    fn update(&self, digest: Digest, change: impl FnOnce(&mut BlobProgress)) {
        if let Some(blob) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&digest) {
            change(blob);
        }
    }
}

/// The recoveries of one agent: those under way and the last that ended. Clones share it.
#[derive(Clone, Default)]
pub struct Board(Arc<Mutex<Recoveries>>);

#[derive(Default)]
struct Recoveries {
    running: BTreeMap<Reference, Arc<Progress>>,
    ended: VecDeque<(Reference, Result<Recovered, String>)>,
}

/// Ended recoveries that are remembered; older ones are in the log.
const REMEMBERED: usize = 16;

impl Board {
    /// The recoveries under way.
    pub fn running(&self) -> BTreeMap<Reference, Arc<Progress>> {
        self.lock().running.clone()
    }

    /// How the latest recovery of this image ended, if it is still remembered.
    pub fn ended(&self, reference: &Reference) -> Option<Result<Recovered, String>> {
        self.lock().ended.iter().rev().find(|(ended, _)| ended == reference).map(|(_, result)| result.clone())
    }

    pub(super) fn begin(&self, reference: &Reference) -> Arc<Progress> {
        let progress = Arc::<Progress>::default();
        self.lock().running.insert(reference.clone(), Arc::clone(&progress));
        progress
    }

    pub(super) fn end(&self, reference: &Reference, result: Result<Recovered, String>) {
        let mut recoveries = self.lock();
        recoveries.running.remove(reference);
        if recoveries.ended.len() == REMEMBERED {
            recoveries.ended.pop_front();
        }
        recoveries.ended.push_back((reference.clone(), result));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Recoveries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes a blob on to its writer and counts it.
pub(super) struct Counted<'a> {
    writer: &'a mut dyn BlobWriter,
    progress: &'a Progress,
    digest: Digest,
}

impl<'a> Counted<'a> {
    /// The blob begins to come from this peer.
    pub(super) fn new(writer: &'a mut dyn BlobWriter, progress: &'a Progress, digest: Digest, from: PeerId) -> Self {
        progress.begin(digest, from);
        Self { writer, progress, digest }
    }
}

#[async_trait]
impl BlobSink for Counted<'_> {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        self.writer.append(chunks).await?;
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        self.progress.update(self.digest, |blob| blob.done += bytes as u64);
        Ok(())
    }
}
