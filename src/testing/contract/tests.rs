//! The contract detects a store that violates it.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::*;
use crate::decide::disk_floor::Disks;
use crate::ports::{BlobReader, Blobs, ImageRecords, Pins, Snapshots, StoreDisks, verify_document};
use crate::testing::MemoryStore;

/// Forwards every call except for one defect.
#[derive(Clone)]
struct UnsoundStore {
    inner: MemoryStore,
    defect: Defect,
    /// Every blob that was ever staged.
    staged: Arc<Mutex<HashSet<Digest>>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Defect {
    /// Added metadata is lost, as in a store that writes no labels.
    Remembering,
    /// A pin does not hold blobs that existed before.
    Pinning,
    /// Records without their target are accepted.
    Targets,
    /// A record is removed whatever its target.
    Removing,
    /// The change counter never moves.
    Counting,
    /// Sources and children are not listed.
    Showing,
    /// A `put` succeeds with any proof.
    Documents,
    /// A `put` of an existing blob loses the metadata.
    Rewriting,
    /// A discarded blob stays.
    Discarding,
    /// The children of a discarded blob are not pinned.
    Orphans,
    /// A staged blob is visible before its commit, as in a store that stages among its blobs.
    Hiding,
    /// The commit of a staged blob succeeds with any proof.
    Proofs,
    /// Writes after the commit succeed, as into a file that is still open.
    Sealing,
    /// Pieces of an earlier attempt are not reported.
    Resuming,
    /// Abandoned pieces stay.
    Abandoning,
    /// Metadata of a staged blob is lost.
    Labels,
    /// A renewal does not move the end of a pin.
    Renewing,
}

impl UnsoundStore {
    fn reported_info(&self, blob: BlobInfo) -> BlobInfo {
        match self.defect {
            Defect::Showing => BlobInfo { sources: Vec::new(), has_children: false, ..blob },
            _ => blob,
        }
    }
}

#[async_trait]
impl Blobs for UnsoundStore {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        let early = self.defect == Defect::Hiding && self.staged.lock().contains(&digest);
        let early = early.then_some(BlobInfo { digest, size: 0, sources: Vec::new(), has_children: false });
        Ok(self.inner.blob(digest).await?.map(|blob| self.reported_info(blob)).or(early))
    }

    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        Ok(self.inner.blobs().await?.into_iter().map(|blob| self.reported_info(blob)).collect())
    }

    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        self.inner.open(digest).await
    }

    async fn put(&self, bytes: Bytes, proof: BlobProof, metadata: &BlobMetadata, pin: &Pin) -> Result<(), StoreError> {
        let exists = self.inner.blob(proof.digest()).await?.is_some();
        match self.defect {
            Defect::Pinning if exists => self.add_metadata(proof.digest(), metadata).await,
            Defect::Rewriting if exists => self.inner.put(bytes, proof, &BlobMetadata::default(), pin).await,
            Defect::Documents if verify_document(&bytes, proof).is_err() => Ok(()),
            _ => self.inner.put(bytes, proof, metadata, pin).await,
        }
    }

    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError> {
        if self.defect == Defect::Pinning && self.inner.blob(digest).await?.is_some() {
            return Err(StoreError::AlreadyExists(digest));
        }
        let inner = self.inner.stage(digest, size, pin).await?;
        self.staged.lock().insert(digest);
        Ok(Arc::new(UnsoundStagedBlob { inner, defect: self.defect, committed: AtomicBool::new(false) }))
    }

    async fn add_metadata(&self, digest: Digest, metadata: &BlobMetadata) -> Result<(), StoreError> {
        if self.defect == Defect::Remembering {
            return self.inner.add_metadata(digest, &BlobMetadata::default()).await;
        }
        self.inner.add_metadata(digest, metadata).await
    }

    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        match self.defect {
            Defect::Discarding => Ok(()),
            Defect::Orphans => self.inner.discard(digest, &Pin("unknown".into())).await,
            _ => self.inner.discard(digest, pin).await,
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        if self.defect == Defect::Counting { watch::channel(0).1 } else { self.inner.changes() }
    }
}

#[async_trait]
impl ImageRecords for UnsoundStore {
    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.inner.images().await
    }

    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        if self.defect == Defect::Targets && self.inner.blob(record.target.digest).await?.is_none() {
            return Ok(());
        }
        self.inner.put_image(record).await
    }

    async fn remove_image(&self, name: &str, target: Digest) -> Result<(), StoreError> {
        let named = self.inner.images().await?.into_iter().find(|record| record.name == name);
        match named {
            Some(record) if self.defect == Defect::Removing => {
                self.inner.remove_image(name, record.target.digest).await
            }
            _ => self.inner.remove_image(name, target).await,
        }
    }

    async fn snapshots(&self, chain_id: Digest) -> Result<Snapshots, StoreError> {
        self.inner.snapshots(chain_id).await
    }
}

#[async_trait]
impl Pins for UnsoundStore {
    async fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        self.inner.pin(life).await
    }

    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError> {
        match self.defect {
            Defect::Renewing => Ok(()),
            _ => self.inner.renew(pin, life).await,
        }
    }

    async fn release(&self, pin: Pin) -> Result<(), StoreError> {
        self.inner.release(pin).await
    }
}

#[async_trait]
impl StoreDisks for UnsoundStore {
    async fn disks(&self) -> Result<Disks, StoreError> {
        self.inner.disks().await
    }
}

struct UnsoundStagedBlob {
    inner: Arc<dyn StagedBlob>,
    defect: Defect,
    committed: AtomicBool,
}

#[async_trait]
impl StagedBlob for UnsoundStagedBlob {
    fn resumed_ranges(&self) -> Vec<Range<u64>> {
        if self.defect == Defect::Resuming { Vec::new() } else { self.inner.resumed_ranges() }
    }

    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError> {
        if self.defect == Defect::Sealing && self.committed.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.inner.write_at(offset, chunks).await
    }

    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        self.inner.read_at(offset, limit).await
    }

    async fn commit(&self, proof: BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        self.committed.store(true, Ordering::SeqCst);
        let no_metadata = BlobMetadata::default();
        let metadata = if self.defect == Defect::Labels { &no_metadata } else { metadata };
        let committed = self.inner.commit(proof, metadata).await;
        if self.defect == Defect::Proofs { Ok(()) } else { committed }
    }

    async fn abandon(&self) {
        if self.defect != Defect::Abandoning {
            self.inner.abandon().await;
        }
    }
}

#[async_trait]
impl StoreUnderTest for UnsoundStore {
    fn store(&self) -> Arc<dyn ContentStore> {
        Arc::new(self.clone())
    }

    async fn collect(&self) {
        self.inner.collect();
    }

    async fn restart(&mut self, unfinished: UnfinishedWrite) {
        drop(unfinished);
    }
}

#[tokio::test]
async fn the_contract_detects_every_defect() {
    for (defect, checks) in [
        (Defect::Remembering, &["added_metadata_replaces_nothing: ", "metadata_of_a_written_blob_is_listed: "][..]),
        (
            Defect::Pinning,
            &["a_pin_protects_blobs_that_existed_before: ", "a_blob_is_staged_once_and_only_while_absent: "],
        ),
        (
            Defect::Documents,
            &[
                "a_proof_of_another_blob_is_rejected: ",
                "a_blob_of_another_length_is_rejected: ",
                "a_document_over_the_limit_is_rejected: ",
            ],
        ),
        (Defect::Rewriting, &["metadata_of_a_written_blob_is_listed: "]),
        (Defect::Targets, &["a_record_needs_its_target: "]),
        (Defect::Removing, &["a_record_is_removed_only_with_the_right_target: "]),
        (
            Defect::Counting,
            &[
                "changes_are_counted: ",
                "a_record_is_removed_only_with_the_right_target: ",
                "metadata_of_a_staged_blob_is_listed: ",
            ],
        ),
        (Defect::Showing, &["metadata_of_a_written_blob_is_listed: ", "metadata_of_a_staged_blob_is_listed: "]),
        (Defect::Discarding, &["a_discarded_blob_can_be_written_again: "]),
        (Defect::Orphans, &["a_discarded_blob_can_be_written_again: "]),
        (
            Defect::Hiding,
            &[
                "the_list_contains_exactly_the_whole_blobs: ",
                "a_staged_blob_is_invisible_before_the_commit: ",
                "a_pin_protects_blobs_staged_under_the_pin: ",
            ],
        ),
        (
            Defect::Proofs,
            &["a_staged_blob_rejects_the_proof_of_another_blob: ", "an_abandoned_staged_blob_is_not_resumed: "],
        ),
        (Defect::Sealing, &["writes_after_the_commit_are_rejected: "]),
        (Defect::Resuming, &["a_dropped_staged_blob_is_resumed: ", "a_staged_blob_is_resumed_after_a_kill: "]),
        (Defect::Abandoning, &["an_abandoned_staged_blob_is_not_resumed: "]),
        (Defect::Labels, &["metadata_of_a_staged_blob_is_listed: "]),
        (Defect::Renewing, &["a_renewed_pin_protects_earlier_and_later_blobs: ", "a_renewed_pin_expires: "]),
    ] {
        let violations =
            contract_violations(async || UnsoundStore { inner: MemoryStore::new(), defect, staged: Arc::default() })
                .await;
        assert_eq!(violations.len(), checks.len(), "{violations:?}");
        assert!(checks.iter().zip(&violations).all(|(check, line)| line.starts_with(check)), "{violations:?}");
    }
}
