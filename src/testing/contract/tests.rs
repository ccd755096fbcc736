//! The contract finds out a store that breaks it.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use super::*;
use crate::decide::disk::Disks;
use crate::ports::{BlobReader, Snapshots};
use crate::testing::MemoryStore;

/// Passes everything on but what the test breaks.
#[derive(Clone)]
struct Unsound {
    sound: MemoryStore,
    breaks: Breaks,
    /// Blobs that were ever staged.
    staged: Arc<Mutex<HashSet<Digest>>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Breaks {
    /// What is remembered, as a store that does not write its labels.
    Remembering,
    /// The hold on what was there already.
    Pinning,
    /// The check of a record's target.
    Targets,
    /// The check of what the record that is to be removed points at.
    Removing,
    /// The counter.
    Counting,
    /// What is told of sources and children.
    Showing,
    /// The removal of what is discarded, as where `create` goes on answering that it is there.
    Discarding,
    /// The hold on what the discarded blob kept alive.
    Orphans,
    /// The wait for the commit, as where what is staged lies among the blobs.
    Hiding,
    /// The look at what the proof of the staged is for.
    Proofs,
    /// The end of writing, as where the file is still open after it came to be a blob.
    Sealing,
    /// What was staged before.
    Resuming,
    /// What is to be thrown away of the staged.
    Abandoning,
    /// What is remembered about the staged.
    Labels,
    /// The renewal of pins.
    Renewing,
}

impl Unsound {
    fn shown(&self, blob: BlobInfo) -> BlobInfo {
        match self.breaks {
            Breaks::Showing => BlobInfo { sources: Vec::new(), has_children: false, ..blob },
            _ => blob,
        }
    }
}

#[async_trait]
impl ContentStore for Unsound {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        let early = self.breaks == Breaks::Hiding && self.staged.lock().unwrap().contains(&digest);
        let early = early.then_some(BlobInfo { digest, size: 0, sources: Vec::new(), has_children: false });
        Ok(self.sound.blob(digest).await?.map(|blob| self.shown(blob)).or(early))
    }

    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        Ok(self.sound.blobs().await?.into_iter().map(|blob| self.shown(blob)).collect())
    }

    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        self.sound.open(digest).await
    }

    async fn create(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Box<dyn BlobWriter>, StoreError> {
        if self.breaks == Breaks::Pinning && self.sound.blob(digest).await?.is_some() {
            return Err(StoreError::AlreadyThere(digest));
        }
        self.sound.create(digest, size, pin).await
    }

    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn Staged>, StoreError> {
        if self.breaks == Breaks::Pinning && self.sound.blob(digest).await?.is_some() {
            return Err(StoreError::AlreadyThere(digest));
        }
        let sound = self.sound.stage(digest, size, pin).await?;
        self.staged.lock().unwrap().insert(digest);
        Ok(Arc::new(UnsoundStage { sound, breaks: self.breaks, committed: AtomicBool::new(false) }))
    }

    async fn remember(&self, digest: Digest, remembered: &Remembered) -> Result<(), StoreError> {
        if self.breaks == Breaks::Remembering {
            return self.sound.remember(digest, &Remembered::default()).await;
        }
        self.sound.remember(digest, remembered).await
    }

    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        match self.breaks {
            Breaks::Discarding => Ok(()),
            Breaks::Orphans => self.sound.discard(digest, &Pin("nobody's".into())).await,
            _ => self.sound.discard(digest, pin).await,
        }
    }

    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.sound.images().await
    }

    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        if self.breaks == Breaks::Targets && self.sound.blob(record.target.digest).await?.is_none() {
            return Ok(());
        }
        self.sound.put_image(record).await
    }

    async fn remove_image(&self, name: &str, target: Digest) -> Result<(), StoreError> {
        let named = self.sound.images().await?.into_iter().find(|record| record.name == name);
        match named {
            Some(record) if self.breaks == Breaks::Removing => {
                self.sound.remove_image(name, record.target.digest).await
            }
            _ => self.sound.remove_image(name, target).await,
        }
    }

    async fn snapshots(&self, chain_id: Digest) -> Result<Snapshots, StoreError> {
        self.sound.snapshots(chain_id).await
    }

    async fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        self.sound.pin(life).await
    }

    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError> {
        match self.breaks {
            Breaks::Renewing => Ok(()),
            _ => self.sound.renew(pin, life).await,
        }
    }

    async fn release(&self, pin: Pin) -> Result<(), StoreError> {
        self.sound.release(pin).await
    }

    fn changes(&self) -> watch::Receiver<u64> {
        if self.breaks == Breaks::Counting { watch::channel(0).1 } else { self.sound.changes() }
    }

    async fn disks(&self) -> Result<Disks, StoreError> {
        self.sound.disks().await
    }
}

struct UnsoundStage {
    sound: Arc<dyn Staged>,
    breaks: Breaks,
    committed: AtomicBool,
}

#[async_trait]
impl Staged for UnsoundStage {
    fn left(&self) -> Vec<Range<u64>> {
        if self.breaks == Breaks::Resuming { Vec::new() } else { self.sound.left() }
    }

    async fn write_at(&self, offset: u64, chunks: &[Bytes]) -> Result<(), StoreError> {
        if self.breaks == Breaks::Sealing && self.committed.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.sound.write_at(offset, chunks).await
    }

    async fn read_at(&self, offset: u64, most: usize) -> Result<Bytes, StoreError> {
        self.sound.read_at(offset, most).await
    }

    async fn commit(&self, proof: Verified, remembered: &Remembered) -> Result<(), StoreError> {
        self.committed.store(true, Ordering::SeqCst);
        let nothing = Remembered::default();
        let remembered = if self.breaks == Breaks::Labels { &nothing } else { remembered };
        let committed = self.sound.commit(proof, remembered).await;
        if self.breaks == Breaks::Proofs { Ok(()) } else { committed }
    }

    async fn abandon(&self) {
        if self.breaks != Breaks::Abandoning {
            self.sound.abandon().await;
        }
    }
}

#[async_trait]
impl Subject for Unsound {
    fn store(&self) -> Arc<dyn ContentStore> {
        Arc::new(self.clone())
    }

    async fn collect(&self) {
        self.sound.collect();
    }

    async fn restart(&mut self, unfinished: Unfinished) {
        drop(unfinished);
    }
}

#[tokio::test]
async fn a_broken_store_is_found_out() {
    for (breaks, checks) in [
        (Breaks::Remembering, &["remembering_adds_and_never_loses: ", "what_is_remembered_can_be_seen: "][..]),
        (Breaks::Pinning, &["a_pin_holds_what_it_found_there: ", "a_blob_is_staged_once_and_not_when_it_is_there: "]),
        (Breaks::Targets, &["a_record_needs_its_target: "]),
        (Breaks::Removing, &["a_record_is_removed_if_it_points_there: "]),
        (
            Breaks::Counting,
            &[
                "changes_are_counted: ",
                "a_record_is_removed_if_it_points_there: ",
                "what_is_remembered_of_the_staged_can_be_seen: ",
            ],
        ),
        (Breaks::Showing, &["what_is_remembered_can_be_seen: ", "what_is_remembered_of_the_staged_can_be_seen: "]),
        (Breaks::Discarding, &["what_is_discarded_can_be_written_again: "]),
        (Breaks::Orphans, &["what_is_discarded_can_be_written_again: "]),
        (Breaks::Hiding, &["what_is_staged_is_not_there_yet: ", "a_pin_holds_what_was_staged_under_it: "]),
        (Breaks::Proofs, &["what_is_staged_needs_its_own_proof: ", "what_is_abandoned_is_not_taken_up_again: "]),
        (Breaks::Sealing, &["nothing_is_written_after_the_commit: "]),
        (
            Breaks::Resuming,
            &["what_was_staged_and_dropped_is_taken_up_again: ", "what_was_staged_before_a_kill_is_taken_up_again: "],
        ),
        (Breaks::Abandoning, &["what_is_abandoned_is_not_taken_up_again: "]),
        (Breaks::Labels, &["what_is_remembered_of_the_staged_can_be_seen: "]),
        (Breaks::Renewing, &["a_renewed_pin_holds_what_it_held_and_what_comes: ", "a_renewed_pin_ends_by_itself: "]),
    ] {
        let broken =
            broken_promises(async || Unsound { sound: MemoryStore::new(), breaks, staged: Arc::default() }).await;
        assert_eq!(broken.len(), checks.len(), "{broken:?}");
        assert!(checks.iter().zip(&broken).all(|(check, line)| line.starts_with(check)), "{broken:?}");
    }
}
