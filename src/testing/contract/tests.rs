//! The contract finds out a store that breaks it.

use tokio::sync::watch;

use super::*;
use crate::ports::{BlobInfo, BlobReader};
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
    /// The counter.
    Counting,
}

#[async_trait]
impl ContentStore for Unsound {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        self.sound.blob(digest).await
    }

    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        self.sound.blobs().await
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

    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.sound.images().await
    }

    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        if self.breaks == Breaks::Targets && self.sound.blob(record.target.digest).await?.is_none() {
            return Ok(());
        }
        self.sound.put_image(record).await
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

    async fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        self.sound.free_bytes().await
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
    for (breaks, check) in [
        (Breaks::Remembering, "remembering_adds_and_never_loses: "),
        (Breaks::Pinning, "a_pin_holds_what_it_found_there: "),
        (Breaks::Targets, "a_record_needs_its_target: "),
        (Breaks::Counting, "changes_are_counted: "),
    ] {
        let broken = broken_promises(async || Unsound { sound: MemoryStore::new(), breaks }).await;
        assert_eq!(broken.len(), 1, "{broken:?}");
        assert!(broken[0].starts_with(check), "{broken:?}");
    }
}
