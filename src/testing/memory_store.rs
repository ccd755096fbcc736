//! A content store in memory.

mod blob;
mod layer_leases;
mod snapshots;
mod staged_blob;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

use self::blob::{MemoryBlob, MemoryReader};
use self::layer_leases::LayerLeaseLabels;
use self::staged_blob::{MemoryStagedBlob, StagedBytes};
use crate::decide::disk_floor::Disks;
use crate::oci::{BlobProof, Descriptor, Digest};
use crate::ports::{
    BlobInfo, BlobMetadata, BlobReader, Blobs, ContentEvent, ImageRecord, ImageRecords, Pin, Pins, Snapshots,
    StagedBlob, StoreDisks, StoreError, verify_document,
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

    /// Makes a verified blob visible.
    fn commit(&self, digest: Digest, bytes: Bytes, metadata: &BlobMetadata) {
        let size = bytes.len() as u64;
        let mut blob = MemoryBlob { bytes, sources: BTreeSet::new(), children: Vec::new(), top: None };
        blob.add_metadata(metadata);
        self.state().blobs.insert(digest, blob);
        self.record_change();
        self.publish(ContentEvent::Committed { digest, size });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
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

#[async_trait]
impl Blobs for MemoryStore {
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

    async fn put(&self, bytes: Bytes, proof: BlobProof, metadata: &BlobMetadata, pin: &Pin) -> Result<(), StoreError> {
        verify_document(&bytes, proof)?;
        match self.begin(proof.digest(), pin).map(drop) {
            Ok(()) => {
                self.state().writing.remove(&proof.digest());
                self.commit(proof.digest(), bytes, metadata);
                Ok(())
            }
            Err(StoreError::AlreadyExists(digest)) => self.add_metadata(digest, metadata).await,
            Err(error) => Err(error),
        }
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

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

#[async_trait]
impl ImageRecords for MemoryStore {
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
}

#[async_trait]
impl Pins for MemoryStore {
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
}

#[async_trait]
impl StoreDisks for MemoryStore {
    async fn disks(&self) -> Result<Disks, StoreError> {
        Ok(self.state().disks)
    }
}
