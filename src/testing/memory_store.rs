//! A content store in memory.

mod layer_leases;
mod snapshots;
mod staged_blob;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

use self::layer_leases::LayerLeaseLabels;
use self::staged_blob::{MemoryStagedBlob, StagedBytes};
use crate::decide::disk::Disks;
use crate::oci::{BlobProof, Descriptor, Digest, Repository};
use crate::ports::{
    BlobInfo, BlobMetadata, BlobReader, BlobSink, BlobWriter, Child, ContentEvent, ContentStore, ImageRecord, Pin,
    Snapshots, StagedBlob, StoreError,
};

/// Stores blobs, records and pins in memory. Clones are handles of one store.
#[derive(Clone)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
    changes: Arc<watch::Sender<u64>>,
    events: broadcast::Sender<ContentEvent>,
}

#[derive(Clone, Default)]
struct State {
    blobs: HashMap<Digest, MemoryBlob>,
    images: BTreeMap<String, Descriptor>,
    /// Pins by name.
    pins: HashMap<String, PinState>,
    pins_made: u64,
    writing: HashSet<Digest>,
    /// Pieces of staged blobs that were dropped without a commit.
    staged: HashMap<Digest, StagedBytes>,
    snapshots: snapshots::SnapshotParents,
    runtime: snapshots::Runtime,
    disks: Disks,
    /// Delay between the visible record and the return of `put_image`.
    record_delay: Duration,
}

#[derive(Clone)]
struct MemoryBlob {
    bytes: Bytes,
    sources: BTreeSet<Repository>,
    children: Vec<Child>,
    /// Topmost layer whose snapshots live as long as this blob.
    top: Option<Digest>,
}

#[derive(Clone, Default)]
struct PinState {
    /// `None` for an end beyond the clock's range.
    until: Option<Instant>,
    blobs: HashSet<Digest>,
    snapshots: HashSet<Digest>,
    /// Labels of a lease on layers. Such a lease holds no content that a layer names.
    labels: Option<LayerLeaseLabels>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::with(State::default())
    }

    /// Delays the return of every later `put_image`; other callers see the record before.
    pub fn set_record_delay(&self, time: Duration) {
        self.state().record_delay = time;
    }

    /// The store after a kill: all content, and no open writer.
    pub fn restarted(&self) -> Self {
        Self::with(State { writing: HashSet::new(), ..self.state().clone() })
    }

    /// Removes content without a live pin and without a record. Collection runs only here, when a
    /// test calls.
    pub fn collect(&self) {
        let mut state = self.state();
        let now = Instant::now();
        state.pins.retain(|_, pin_state| pin_state.until.is_none_or(|until| until > now));
        let mut reachable = HashSet::new();
        let mut unvisited: Vec<Digest> = state.images.values().map(|target| target.digest).collect();
        let (flat, deep): (Vec<_>, Vec<_>) = state.pins.values().partition(|pin_state| pin_state.labels.is_some());
        unvisited.extend(deep.into_iter().flat_map(|pin_state| &pin_state.blobs));
        let layers: HashSet<_> = flat.into_iter().flat_map(|pin_state| pin_state.blobs.iter().copied()).collect();
        while let Some(digest) = unvisited.pop() {
            if let Some(blob) = state.blobs.get(&digest)
                && reachable.insert(digest)
            {
                unvisited.extend(blob.children.iter().map(|child| child.digest));
            }
        }
        state.blobs.retain(|digest, _| reachable.contains(digest) || layers.contains(digest));
        state.collect_snapshots();
        drop(state);
        self.record_change();
    }

    /// Metadata of a blob in the store, with the first of its sources.
    pub fn metadata(&self, digest: Digest) -> Option<BlobMetadata> {
        let state = self.state();
        let blob = state.blobs.get(&digest)?;
        Some(BlobMetadata { source: blob.sources.first().cloned(), children: blob.children.clone() })
    }

    /// Inverts the first byte of a blob, as a failing disk may do.
    pub fn corrupt(&self, digest: Digest) {
        if let Some(blob) = self.state().blobs.get_mut(&digest) {
            let mut bytes = blob.bytes.to_vec();
            bytes.iter_mut().take(1).for_each(|byte| *byte = !*byte);
            blob.bytes = bytes.into();
        }
    }

    /// Removes a blob, but no record, pin or label that names the blob.
    pub fn remove_blob(&self, digest: Digest) {
        self.state().blobs.remove(&digest);
    }

    /// Number of pins that were not released.
    pub fn pins(&self) -> usize {
        self.state().pins.len()
    }

    fn with(state: State) -> Self {
        let events = broadcast::Sender::new(layer_leases::EVENTS_QUEUED);
        Self { state: Arc::new(Mutex::new(state)), changes: Arc::new(watch::Sender::new(0)), events }
    }

    /// Registers the only writer of a blob.
    fn begin(&self, digest: Digest, pin: &Pin) -> Result<MutexGuard<'_, State>, StoreError> {
        let mut state = self.state();
        let unknown_pin = || StoreError::Other(format!("the pin {} is gone", pin.0));
        state.pins.get_mut(&pin.0).ok_or_else(unknown_pin)?.blobs.insert(digest);
        if state.blobs.contains_key(&digest) {
            return Err(StoreError::AlreadyExists(digest));
        }
        if !state.writing.insert(digest) {
            return Err(StoreError::Busy(digest));
        }
        Ok(state)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the state")
    }

    fn record_change(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryBlob {
    fn add_metadata(&mut self, metadata: &BlobMetadata) {
        self.sources.extend(metadata.source.clone());
        for child in &metadata.children {
            if !self.children.contains(child) {
                self.children.push(*child);
            }
        }
    }

    fn info(&self, digest: Digest) -> BlobInfo {
        BlobInfo {
            digest,
            size: self.bytes.len() as u64,
            sources: self.sources.iter().cloned().collect(),
            has_children: !self.children.is_empty(),
        }
    }
}

#[async_trait]
impl ContentStore for MemoryStore {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        Ok(self.state().blobs.get(&digest).map(|blob| blob.info(digest)))
    }

    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        Ok(self.state().blobs.iter().map(|(&digest, blob)| blob.info(digest)).collect())
    }

    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        let state = self.state();
        let blob = state.blobs.get(&digest).ok_or(StoreError::Absent(digest))?;
        Ok(Box::new(MemoryReader(blob.bytes.clone())))
    }

    async fn create(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Box<dyn BlobWriter>, StoreError> {
        drop(self.begin(digest, pin)?);
        Ok(Box::new(MemoryWriter { store: self.clone(), digest, size, bytes: Vec::new() }))
    }

    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError> {
        let mut state = self.begin(digest, pin)?;
        let staged_bytes = state.staged.remove(&digest).filter(|parts| parts.size() == size);
        Ok(Arc::new(MemoryStagedBlob::new(self.clone(), digest, staged_bytes.unwrap_or_else(|| StagedBytes::of(size)))))
    }

    async fn add_metadata(&self, digest: Digest, metadata: &BlobMetadata) -> Result<(), StoreError> {
        self.state().blobs.get_mut(&digest).ok_or(StoreError::Absent(digest))?.add_metadata(metadata);
        Ok(())
    }

    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        let mut state = self.state();
        if let Some(blob) = state.blobs.remove(&digest)
            && let Some(pin_state) = state.pins.get_mut(&pin.0)
        {
            pin_state.blobs.extend(blob.children.iter().map(|child| child.digest));
        }
        drop(state);
        self.record_change();
        Ok(())
    }

    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let record =
            |(name, target): (&String, &Descriptor)| ImageRecord { name: name.clone(), target: target.clone() };
        Ok(self.state().images.iter().map(record).collect())
    }

    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        let delay = {
            let mut state = self.state();
            if !state.blobs.contains_key(&record.target.digest) {
                return Err(StoreError::Absent(record.target.digest));
            }
            state.images.insert(record.name.clone(), record.target.clone());
            state.record_delay
        };
        self.record_change();
        self.publish(ContentEvent::Records);
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        Ok(())
    }

    async fn remove_image(&self, name: &str, target: Digest) -> Result<(), StoreError> {
        let mut state = self.state();
        if state.images.get(name).is_some_and(|named| named.digest == target) {
            state.images.remove(name);
            drop(state);
            self.record_change();
            self.publish(ContentEvent::Records);
        }
        Ok(())
    }

    async fn snapshots(&self, chain_id: Digest) -> Result<Snapshots, StoreError> {
        Ok(self.snapshots_of(chain_id))
    }

    async fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        let mut state = self.state();
        state.pins_made += 1;
        let pin = Pin(format!("pin-{}", state.pins_made));
        let until = Instant::now().checked_add(life);
        state.pins.insert(pin.0.clone(), PinState { until, ..PinState::default() });
        Ok(pin)
    }

    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError> {
        let unknown_pin = || StoreError::Other(format!("the pin {} is gone", pin.0));
        self.state().pins.get_mut(&pin.0).ok_or_else(unknown_pin)?.until = Instant::now().checked_add(life);
        Ok(())
    }

    async fn release(&self, pin: Pin) -> Result<(), StoreError> {
        self.state().pins.remove(&pin.0);
        self.record_change();
        Ok(())
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn disks(&self) -> Result<Disks, StoreError> {
        Ok(self.state().disks)
    }
}

/// Owns the bytes: a collected blob stays readable for its open readers.
struct MemoryReader(Bytes);

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

struct MemoryWriter {
    store: MemoryStore,
    digest: Digest,
    size: u64,
    bytes: Vec<u8>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::{LayerLeases, Unpacker};
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
        let mut writer = store.create(digest, 5, &pin).await.unwrap();
        writer.append(&[Bytes::from_static(b"ogrAc")]).await.unwrap();
        assert!(matches!(writer.commit(proof, &BlobMetadata::default()).await, Err(StoreError::Other(_))));
        assert_eq!(store.blob(digest).await.unwrap(), None);
    }
}
