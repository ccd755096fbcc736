//! The memory store passes the contracts that every store passes.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::*;
use crate::ports::{ContentStore, LayerLeases, Unpacker};
use crate::testing::contract::retaining::{LeasingStore, assert_layer_lease_contract};
use crate::testing::contract::unpacking::{UnpackingStore, assert_unpacking_contract};
use crate::testing::contract::{StoreUnderTest, UnfinishedWrite, assert_contract};

struct MemoryStoreUnderTest(MemoryStore);

#[async_trait]
impl StoreUnderTest for MemoryStoreUnderTest {
    fn store(&self) -> Arc<dyn ContentStore> {
        Arc::new(self.0.clone())
    }

    async fn collect(&self) {
        self.0.collect();
    }

    /// The drop leaves the staged pieces, as a kill does.
    async fn restart(&mut self, unfinished: UnfinishedWrite) {
        let unfinished = match unfinished {
            UnfinishedWrite::Staged(staged) => {
                drop(staged);
                None
            }
            written => Some(written),
        };
        self.0 = self.0.restarted();
        drop(unfinished);
    }
}

#[tokio::test]
async fn the_memory_store_passes_the_contract() {
    assert_contract("MemoryStore", async || MemoryStoreUnderTest(MemoryStore::new())).await;
}

impl LeasingStore for MemoryStoreUnderTest {
    fn leases(&self) -> Arc<dyn LayerLeases> {
        Arc::new(self.0.clone())
    }
}

#[tokio::test]
async fn the_memory_store_passes_the_layer_lease_contract() {
    assert_layer_lease_contract("MemoryStore", async || MemoryStoreUnderTest(MemoryStore::new())).await;
}

#[async_trait]
impl UnpackingStore for MemoryStoreUnderTest {
    fn unpacker(&self) -> Arc<dyn Unpacker> {
        Arc::new(self.0.clone())
    }

    async fn unpacked(&self) -> BTreeSet<Digest> {
        self.0.unpacked()
    }

    /// The store unpacks a layer in one step.
    async fn half_unpacked(&self) -> usize {
        0
    }
}

#[tokio::test]
async fn the_memory_store_passes_the_unpacking_contract() {
    assert_unpacking_contract("MemoryStore", async || MemoryStoreUnderTest(MemoryStore::new())).await;
}

#[tokio::test]
async fn bytes_that_differ_from_the_hashed_bytes_are_rejected() {
    let store = MemoryStore::new();
    let pin = store.pin(Duration::from_secs(1)).await.unwrap();
    let digest = Digest::of(b"cargo");
    let mut hasher = crate::oci::Hasher::default();
    hasher.update(b"cargo");
    let proof = hasher.verify(digest, 5).unwrap();
    let staged = store.stage(digest, 5, &pin).await.unwrap();
    staged.write_at(0, &[Bytes::from_static(b"ogrAc")]).await.unwrap();
    assert!(matches!(staged.commit(proof, &BlobMetadata::default()).await, Err(StoreError::Other(_))));
    assert_eq!(store.blob(digest).await.unwrap(), None);
}
