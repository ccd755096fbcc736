//! A content store that is a node's containerd, of any version from 1.7 on.
//!
//! Everything goes through containerd's own API; only blobs are read from its files, and large ones linked among them, where they can be seen.
//! What the port calls a pin is a lease here, and what it remembers are labels.
//!
//! It unpacks layers too, where the CRI plugin would look for them. Not here: any other runtime than containerd.

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
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_client::services::v1::version_client::VersionClient;
use tokio::sync::{Notify, broadcast, watch as counter};

use crate::decide::disk::Disks;
use crate::oci::Digest;
use crate::ports::{
    BlobInfo, BlobMetadata, BlobReader, BlobWriter, ContentEvent, ContentStore, ImageRecord, Pin, Snapshots,
    StagedBlob, StoreError,
};
pub use adoption::IngestMode;
use client::ContainerdClient;
use introspection::Introspection;
pub use introspection::{ContainerdInfo, IMAGE_VERIFIER_DIR, ImageVerifiers, find_socket};
use lease_renewal::Renewals;
pub use snapshotter::Snapshotter;
use writer::IngestSlot;

/// Which containerd, and what of it is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Its socket.
    pub socket: PathBuf,
    /// The containerd namespace that the kubelet's images are in: `k8s.io`.
    pub containerd_namespace: String,
    /// The root folder of its content store as this process sees it; `None` to take the path that containerd tells. Blobs
    /// whose files are not there are read through the API.
    pub content_root: Option<PathBuf>,
    /// Where the node's root file system is for this process, if it is somewhere: `/` outside a
    /// container, its mount in one. The folders that containerd names are then looked for below it.
    /// `None` where only some of them are mounted, at the paths that they have.
    pub host_root: Option<PathBuf>,
    /// Where blobs are staged when that cannot be in the content store's root; its parent folder exists. Without it, they cannot be then.
    pub staging: Option<PathBuf>,
}

/// The configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// gRPC's libraries take paths as text.
    #[error("the path of containerd's socket, {0:?}, is not UTF-8")]
    Socket(PathBuf),
    /// None of the usual places has one.
    #[error("no containerd socket at {}; --containerd-socket names another place", listed(.0))]
    NoSocket(Vec<PathBuf>),
    /// It travels in a header and in filters.
    #[error("{0:?} cannot be a containerd namespace (letters, digits, and . _ - between them)")]
    Namespace(String),
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A node's containerd. Clones are handles of one store.
///
/// Connects when it is first used, and again whenever the connection is lost. [`ContainerdStore::run`] must be running for
/// [`ContentStore::changes`] to tell what others do, and for what dropped writers leave to be removed soon.
#[derive(Clone)]
pub struct ContainerdStore {
    link: ContainerdClient,
    state: Arc<State>,
}

struct State {
    introspection: Introspection,
    /// How blobs come in, once it was tried.
    ingest_mode: tokio::sync::Mutex<Option<IngestMode>>,
    /// What layers are unpacked into, once it was asked.
    snapshotter: tokio::sync::Mutex<Option<Snapshotter>>,
    /// See [`Config::staging`].
    staging: Option<PathBuf>,
    changes: counter::Sender<u64>,
    /// What the changes are, for receivers that must act at once.
    events: broadcast::Sender<ContentEvent>,
    /// Blobs that are being written through this store.
    writing: Mutex<HashSet<Digest>>,
    /// Leases behind pins that were renewed.
    renewals: Renewals,
    /// Keys of layers that are being unpacked through this store.
    extracting: Mutex<HashSet<String>>,
    /// Held while a write begins and while an abandoned one is aborted, so that no abort hits a write that has just begun.
    begin_lock: tokio::sync::Mutex<()>,
    /// A writer, or an unpacking, was dropped and left something.
    abandoned: Notify,
    /// Held from reading labels until adding some: two callers must not choose the same label for different children.
    label_lock: tokio::sync::Mutex<()>,
}

/// Probes ask every few seconds, and one that waits longer counts as failed anyway.
const READY_DEADLINE: Duration = Duration::from_secs(2);

impl ContainerdStore {
    /// Prepares to use containerd; it need not be there yet.
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
        Ok(Self { link: ContainerdClient::new(socket, &containerd_namespace)?, state: Arc::new(state) })
    }

    /// Whether containerd answers, and its version.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when it does not.
    pub async fn ready(&self) -> Result<String, StoreError> {
        let mut client = VersionClient::new(self.link.channel());
        let answer = self.link.call_within(READY_DEADLINE, client.version(())).await;
        answer.map(|answer| answer.version).map_err(|status| self.link.store_error(&status))
    }

    fn changed(&self) {
        self.state.changes.send_modify(|changes| *changes += 1);
    }
}

#[async_trait]
impl ContentStore for ContainerdStore {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        self.find_blob(digest).await
    }

    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        self.list_blobs().await
    }

    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        self.open_blob(digest).await
    }

    async fn create(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Box<dyn BlobWriter>, StoreError> {
        // By name, so that a renewal during the write carries the blob over.
        self.add_to_pin(pin, "content".into(), digest.to_string()).await?;
        Ok(Box::new(self.begin_checked_write(IngestSlot::take(self, digest)?, size, pin).await?))
    }

    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError> {
        Ok(Arc::new(self.begin_staged(digest, size, pin).await?))
    }

    async fn add_metadata(&self, digest: Digest, remembered: &BlobMetadata) -> Result<(), StoreError> {
        self.add_labels(digest, remembered).await
    }

    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        self.discard_blob(digest, pin).await
    }

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

    async fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        self.create_lease(life).await
    }

    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError> {
        self.replace_lease(pin, life).await
    }

    async fn release(&self, pin: Pin) -> Result<(), StoreError> {
        self.delete_lease(&pin, false).await
    }

    fn changes(&self) -> counter::Receiver<u64> {
        self.state.changes.subscribe()
    }

    async fn disks(&self) -> Result<Disks, StoreError> {
        self.measure_disks().await
    }
}
