//! `MemoryStore` stores each blob as a `MemoryBlob`. A reader shares the bytes.

use std::collections::BTreeSet;

use async_trait::async_trait;
use bytes::Bytes;

use crate::oci::{Digest, Repository};
use crate::ports::{BlobInfo, BlobMetadata, BlobReader, Child, StoreError};

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
