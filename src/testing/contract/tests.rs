//! The contract finds out a store that breaks it.

use tokio::sync::watch;

use super::*;
use crate::ports::{BlobReader, Room};
use crate::testing::MemoryStore;

/// Passes everything on but what the test breaks.
#[derive(Clone)]
struct Unsound {
    sound: MemoryStore,
    breaks: Breaks,
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
        Ok(self.sound.blob(digest).await?.map(|blob| self.shown(blob)))
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

    async fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        self.sound.pin(life).await
    }

    async fn release(&self, pin: Pin) -> Result<(), StoreError> {
        self.sound.release(pin).await
    }

    fn changes(&self) -> watch::Receiver<u64> {
        if self.breaks == Breaks::Counting { watch::channel(0).1 } else { self.sound.changes() }
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.sound.room().await
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

    async fn restart(&mut self, unfinished: Box<dyn BlobWriter>) {
        drop(unfinished);
    }
}

#[tokio::test]
async fn a_broken_store_is_found_out() {
    for (breaks, checks) in [
        (Breaks::Remembering, &["remembering_adds_and_never_loses: ", "what_is_remembered_can_be_seen: "][..]),
        (Breaks::Pinning, &["a_pin_holds_what_it_found_there: "]),
        (Breaks::Targets, &["a_record_needs_its_target: "]),
        (Breaks::Removing, &["a_record_is_removed_if_it_points_there: "]),
        (Breaks::Counting, &["changes_are_counted: ", "a_record_is_removed_if_it_points_there: "]),
        (Breaks::Showing, &["what_is_remembered_can_be_seen: "]),
        (Breaks::Discarding, &["what_is_discarded_can_be_written_again: "]),
        (Breaks::Orphans, &["what_is_discarded_can_be_written_again: "]),
    ] {
        let broken = broken_promises(async || Unsound { sound: MemoryStore::new(), breaks }).await;
        assert_eq!(broken.len(), checks.len(), "{broken:?}");
        assert!(checks.iter().zip(&broken).all(|(check, line)| line.starts_with(check)), "{broken:?}");
    }
}
