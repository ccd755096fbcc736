//! A staged blob in memory.

use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::MemoryStore;
use crate::oci::{BlobProof, Digest};
use crate::ports::{BlobMetadata, StagedBlob, StoreError};

/// Pieces that a dropped staged blob leaves.
#[derive(Clone)]
pub(super) struct StagedBytes {
    bytes: Vec<u8>,
    /// Sorted, not adjacent.
    written: Vec<Range<u64>>,
}

impl StagedBytes {
    pub(super) fn of(size: u64) -> Self {
        Self { bytes: vec![0; usize::try_from(size).unwrap_or(usize::MAX)], written: Vec::new() }
    }

    pub(super) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn record(&mut self, range: Range<u64>) {
        self.written.push(range);
        self.written.sort_by_key(|range| range.start);
        self.written.dedup_by(|next, before| {
            let touches = next.start <= before.end;
            if touches {
                before.end = before.end.max(next.end);
            }
            touches
        });
    }
}

pub(super) struct MemoryStagedBlob {
    store: MemoryStore,
    digest: Digest,
    resumed_ranges: Vec<Range<u64>>,
    /// `Err` with the readable bytes after the commit or after `abandon`.
    state: Mutex<Result<StagedBytes, Bytes>>,
}

impl MemoryStagedBlob {
    pub(super) fn new(store: MemoryStore, digest: Digest, staged: StagedBytes) -> Self {
        Self { store, digest, resumed_ranges: staged.written.clone(), state: Mutex::new(Ok(staged)) }
    }

    fn state(&self) -> parking_lot::MutexGuard<'_, Result<StagedBytes, Bytes>> {
        self.state.lock()
    }

    fn closed(&self) -> StoreError {
        StoreError::Other(format!("{} is closed for writing", self.digest))
    }
}

#[async_trait]
impl StagedBlob for MemoryStagedBlob {
    fn resumed_ranges(&self) -> Vec<Range<u64>> {
        self.resumed_ranges.clone()
    }

    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError> {
        let mut state = self.state();
        let staged = state.as_mut().map_err(|_| self.closed())?;
        let end = chunks.iter().fold(offset, |end, chunk| end.saturating_add(chunk.len() as u64));
        if end > staged.size() {
            return Err(StoreError::Other(format!("more than {} bytes for {}", staged.size(), self.digest)));
        }
        let mut at = usize::try_from(offset).expect("within the blob");
        for chunk in chunks {
            staged.bytes[at..at + chunk.len()].copy_from_slice(chunk);
            at += chunk.len();
        }
        if end > offset {
            staged.record(offset..end);
        }
        Ok(())
    }

    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        let state = self.state();
        let bytes = match &*state {
            Ok(staged) => &staged.bytes[..],
            Err(bytes) => &bytes[..],
        };
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let end = begin.saturating_add(limit).min(bytes.len());
        Ok(Bytes::copy_from_slice(&bytes[begin..end]))
    }

    async fn commit(&self, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let mut state = self.state();
        let staged = state.as_ref().map_err(|_| self.closed())?;
        if proof.digest() != self.digest || proof.size() != staged.size() {
            let (proved, size) = (proof.digest(), proof.size());
            return Err(StoreError::Other(format!(
                "the proof is for {size} bytes of {proved}, staged were {} of {}",
                staged.size(),
                self.digest
            )));
        }
        // Detects a caller that wrote other bytes than it hashed.
        let actual = Digest::of(&staged.bytes);
        if actual != self.digest {
            return Err(StoreError::Other(format!("bytes for {} hash to {actual}", self.digest)));
        }
        let bytes = Bytes::from(staged.bytes.clone());
        *state = Err(bytes.clone());
        self.store.commit(self.digest, bytes, metadata);
        Ok(())
    }

    async fn abandon(&self) {
        let mut state = self.state();
        // A committed blob stays.
        if state.is_ok() {
            *state = Err(Bytes::new());
        }
    }
}

impl Drop for MemoryStagedBlob {
    fn drop(&mut self) {
        let mut store = self.store.state();
        store.writing.remove(&self.digest);
        if let Ok(staged) = &*self.state()
            && !staged.written.is_empty()
        {
            store.staged.insert(self.digest, staged.clone());
        }
    }
}
