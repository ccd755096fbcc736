//! `MemoryStore` stores each blob as a `MemoryBlob`. A reader shares the bytes, and a writer
//! commits a new blob.

use std::collections::BTreeSet;

use async_trait::async_trait;
use bytes::Bytes;

use super::MemoryStore;
use crate::oci::{BlobProof, Digest, Repository};
use crate::ports::{BlobInfo, BlobMetadata, BlobReader, BlobSink, BlobWriter, Child, ContentEvent, StoreError};

#[derive(Clone)]
pub(super) struct MemoryBlob {
    pub(super) bytes: Bytes,
    pub(super) sources: BTreeSet<Repository>,
    pub(super) children: Vec<Child>,
    /// Topmost layer whose snapshots live as long as this blob.
    pub(super) top: Option<Digest>,
}

impl MemoryBlob {
    pub(super) fn add_metadata(&mut self, metadata: &BlobMetadata) {
        self.sources.extend(metadata.source.clone());
        for child in &metadata.children {
            if !self.children.contains(child) {
                self.children.push(*child);
            }
        }
    }

    pub(super) fn info(&self, digest: Digest) -> BlobInfo {
        BlobInfo {
            digest,
            size: self.bytes.len() as u64,
            sources: self.sources.iter().cloned().collect(),
            has_children: !self.children.is_empty(),
        }
    }
}

/// Owns the bytes: a collected blob stays readable for its open readers.
pub(super) struct MemoryReader(pub(super) Bytes);

#[async_trait]
impl BlobReader for MemoryReader {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    async fn read_at(&mut self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        let end = begin.saturating_add(limit).min(self.0.len());
        Ok(self.0.slice(begin..end))
    }
}

pub(super) struct MemoryWriter {
    store: MemoryStore,
    digest: Digest,
    size: u64,
    bytes: Vec<u8>,
}

impl MemoryWriter {
    pub(super) fn new(store: MemoryStore, digest: Digest, size: u64) -> Self {
        Self { store, digest, size, bytes: Vec::new() }
    }
}

#[async_trait]
impl BlobSink for MemoryWriter {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.bytes.extend_from_slice(chunk));
        if self.bytes.len() as u64 > self.size {
            return Err(StoreError::Other(format!("more than {} bytes for {}", self.size, self.digest)));
        }
        Ok(())
    }
}

#[async_trait]
impl BlobWriter for MemoryWriter {
    async fn commit(mut self: Box<Self>, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let written = self.bytes.len() as u64;
        if proof.digest() != self.digest || proof.size() != written {
            let (proved, size) = (proof.digest(), proof.size());
            return Err(StoreError::Other(format!(
                "the proof is for {size} bytes of {proved}, written were {written} of {}",
                self.digest
            )));
        }
        // The caller has hashed the bytes. A second hash detects a caller that wrote other bytes
        // than it hashed.
        let actual = Digest::of(&self.bytes);
        if actual != self.digest {
            return Err(StoreError::Other(format!("bytes for {} hash to {actual}", self.digest)));
        }
        let bytes = std::mem::take(&mut self.bytes).into();
        let mut blob = MemoryBlob { bytes, sources: BTreeSet::new(), children: Vec::new(), top: None };
        blob.add_metadata(metadata);
        self.store.state().blobs.insert(self.digest, blob);
        self.store.record_change();
        self.store.publish(ContentEvent::Committed { digest: self.digest, size: written });
        Ok(())
    }
}

impl Drop for MemoryWriter {
    fn drop(&mut self) {
        self.store.state().writing.remove(&self.digest);
    }
}
