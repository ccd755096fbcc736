//! A node's containerd, from version 1.7 on, as a content store and as an unpacker.
//!
//! Every change goes through containerd's API. Two things use files where they can be seen: reads
//! of blobs, and large new blobs, which are linked among containerd's. A pin is a containerd lease,
//! and metadata are labels. Layers are unpacked to where the CRI plugin looks for them.

mod adoption;
mod client;
mod connections;
mod content;
mod cri;
mod discard;
mod disks;
mod errors;
mod events;
mod image_protection;
mod images;
mod ingest;
mod introspection;
mod labels;
mod layer_leases;
mod lease_renewal;
mod leases;
mod reader;
mod snapshotter;
mod staged_blob;
mod stray;
mod unpack;
mod writer;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use containerd_client::services::v1::version_client::VersionClient;
use parking_lot::Mutex;
use tokio::sync::{Notify, broadcast, watch as counter};

use crate::decide::disk_floor::Disks;
use crate::oci::{BlobProof, Digest};
use crate::ports::{
    BlobInfo, BlobMetadata, BlobReader, Blobs, ContentEvent, ImageRecord, ImageRecords, Pin, Pins, Snapshots,
    StagedBlob, StoreDisks, StoreError,
};
pub use adoption::IngestMode;
use client::ContainerdClient;
use introspection::Introspection;
pub use introspection::{ContainerdInfo, IMAGE_VERIFIER_DIR, ImageVerifiers, find_socket};
use lease_renewal::Renewals;
pub use snapshotter::Snapshotter;

/// Location of containerd, and the agent's use of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Path of containerd's socket.
    pub socket: PathBuf,
    /// The containerd namespace of the kubelet's images: `k8s.io`.
    pub containerd_namespace: String,
    /// Root of the content store as this process sees it; `None` for the path that containerd
    /// reports. Blobs without a visible file are read through the API.
    pub content_root: Option<PathBuf>,
    /// The node's root file system as this process sees it: `/` outside a container, a mount
    /// inside. The folders that containerd reports are resolved below it. `None` when only some of
    /// these folders are mounted, at their own paths.
    pub host_root: Option<PathBuf>,
    /// Folder for staged blobs when the content store's root is not writable; the parent folder
    /// must exist. `None` disables staging in that case.
    pub staging: Option<PathBuf>,
}

/// Error of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The gRPC library requires a UTF-8 path.
    #[error("the path of containerd's socket, {0:?}, is not UTF-8")]
    Socket(PathBuf),
    /// No default path has a socket.
    #[error("no containerd socket at {}; --containerd-socket names another place", listed(.0))]
    NoSocket(Vec<PathBuf>),
    /// The namespace is sent in a header and in filters.
    #[error("{0:?} cannot be a containerd namespace (letters, digits, and . _ - between them)")]
    Namespace(String),
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A node's containerd. Clones are handles of one store.
///
/// Connects on first use, and again after a lost connection. [`ContainerdStore::run`] must run:
/// [`Blobs::changes`] then reports other clients' changes, and leftovers of dropped writers
/// are removed soon.
#[derive(Clone)]
pub struct ContainerdStore {
    client: ContainerdClient,
    state: Arc<State>,
}

struct State {
    introspection: Introspection,
    /// Cached result of the probe; `None` before.
    ingest_mode: tokio::sync::Mutex<Option<IngestMode>>,
    /// Cached snapshotter of CRI; `None` before.
    snapshotter: tokio::sync::Mutex<Option<Snapshotter>>,
    /// See [`Config::staging`].
    staging: Option<PathBuf>,
    changes: counter::Sender<u64>,
    /// The single changes, for receivers that must act at once.
    events: broadcast::Sender<ContentEvent>,
    /// Blobs that are being written through this store.
    writing: Mutex<HashSet<Digest>>,
    /// Leases of renewed pins.
    renewals: Renewals,
    /// Keys of layers that are being unpacked through this store.
    extracting: Mutex<HashSet<String>>,
    /// Held at the start of a write and during an abort, so that no abort hits a new write.
    begin_lock: tokio::sync::Mutex<()>,
    /// Notified when a writer or an unpack call was dropped and left something in containerd.
    abandoned: Notify,
    /// Held from the read of labels to their update: two callers must not use one label for two
    /// children.
    label_lock: tokio::sync::Mutex<()>,
}

/// Readiness probes run every few seconds, and a longer wait counts as a failure anyway.
const READY_DEADLINE: Duration = Duration::from_secs(2);

impl ContainerdStore {
    /// Creates a store; containerd need not run yet.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let Config { socket, containerd_namespace, content_root, host_root, staging } = config;
        let state = State {
            introspection: Introspection::new(content_root, host_root),
            ingest_mode: tokio::sync::Mutex::new(None),
            snapshotter: tokio::sync::Mutex::new(None),
            staging,
            changes: counter::Sender::new(0),
            events: broadcast::Sender::new(layer_leases::EVENTS_QUEUED),
            writing: Mutex::new(HashSet::new()),
            renewals: Renewals::default(),
            extracting: Mutex::new(HashSet::new()),
            begin_lock: tokio::sync::Mutex::new(()),
            abandoned: Notify::new(),
            label_lock: tokio::sync::Mutex::new(()),
        };
        Ok(Self { client: ContainerdClient::new(socket, &containerd_namespace)?, state: Arc::new(state) })
    }

    /// Verifies that containerd answers, and returns containerd's version.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] without an answer.
    pub async fn ready(&self) -> Result<String, StoreError> {
        let mut client = VersionClient::new(self.client.channel());
        let answer = self.client.call_within(READY_DEADLINE, client.version(())).await;
        answer.map(|answer| answer.version).map_err(|status| self.client.store_error(&status))
    }

    fn record_change(&self) {
        self.state.changes.send_modify(|changes| *changes += 1);
    }
}

#[async_trait]
impl Blobs for ContainerdStore {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        self.find_blob(digest).await
    }

    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        self.list_blobs().await
    }

    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        self.open_blob(digest).await
    }

    async fn put(&self, bytes: Bytes, proof: BlobProof, metadata: &BlobMetadata, pin: &Pin) -> Result<(), StoreError> {
        self.send_document(bytes, proof, metadata, pin).await
    }

    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError> {
        Ok(Arc::new(self.begin_staged(digest, size, pin).await?))
    }

    async fn add_metadata(&self, digest: Digest, metadata: &BlobMetadata) -> Result<(), StoreError> {
        self.add_labels(digest, metadata).await
    }

    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        self.discard_blob(digest, pin).await
    }

    fn changes(&self) -> counter::Receiver<u64> {
        self.state.changes.subscribe()
    }
}

#[async_trait]
impl ImageRecords for ContainerdStore {
    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.list_images().await
    }

    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        self.write_image(record).await
    }

    async fn remove_image(&self, name: &str, target: Digest) -> Result<(), StoreError> {
        self.delete_image(name, target).await
    }

    async fn snapshots(&self, chain_id: Digest) -> Result<Snapshots, StoreError> {
        self.find_snapshots(chain_id).await
    }
}

#[async_trait]
impl Pins for ContainerdStore {
    async fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        self.create_lease(life).await
    }

    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError> {
        self.replace_lease(pin, life).await
    }

    async fn release(&self, pin: Pin) -> Result<(), StoreError> {
        self.delete_lease(&pin, false).await
    }
}

#[async_trait]
impl StoreDisks for ContainerdStore {
    async fn disks(&self) -> Result<Disks, StoreError> {
        self.measure_disks().await
    }
}
