//! Unpacks layers like containerd's own client: prepares a snapshot on top of the parent, applies
//! the layer, and commits the snapshot under the layer's chain ID (pkg/rootfs/apply.go; the same
//! services in 1.6, 1.7 and 2). CRI looks for that name when it creates a container, and unpacks
//! missing layers.
//!
//! The pin holds snapshots, partial ones too, until the image's configuration has the label for
//! them. Leftovers of a killed process are removed at the next start, or collected at the end of
//! the pin.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::{ApplyRequest, Info, UpdateRequest};
use containerd_client::tonic::metadata::{Ascii, MetadataValue};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Request, Status};
use containerd_client::types;
use parking_lot::MutexGuard;

use super::client::{MAX_MESSAGE, MESSAGE_DEADLINE, with_deadline};
use super::labels::GC_REF_SNAPSHOT;
use super::snapshotter::{SUPPORTED, Snapshotter};
use super::{ContainerdStore, State};
use crate::oci::{Digest, StackedLayer};
use crate::ports::{Pin, Snapshots, StoreError, UnpackError, UnpackOutcome, Unpacker};

/// Prefix of the agent's active snapshots, followed by a random number, a space and the chain ID.
/// Keys of containerd's own client begin with `extract-` too.
const KEY_PREFIX: &str = "extract-lighterman-";

/// A layer that is being unpacked.
struct Extraction<'a> {
    store: &'a ContainerdStore,
    snapshotter: &'a str,
    lease: MetadataValue<Ascii>,
    key: String,
    /// containerd may have an active snapshot with this key.
    has_leftover: bool,
}

impl Drop for Extraction<'_> {
    fn drop(&mut self) {
        self.store.state.being_extracted().remove(&self.key);
        if self.has_leftover {
            self.store.state.abandoned.notify_one();
        }
    }
}

impl<'a> Extraction<'a> {
    fn begin(
        store: &'a ContainerdStore,
        snapshotter: &'a str,
        chain_id: Digest,
        pin: &Pin,
    ) -> Result<Self, StoreError> {
        let lease = store.state.renewals.lease(pin)?;
        let lease = lease.parse().map_err(|_| StoreError::Other(format!("the pin {} is gone", pin.0)))?;
        let key = format!("{KEY_PREFIX}{:032x} {chain_id}", rand::random::<u128>());
        store.state.being_extracted().insert(key.clone());
        Ok(Self { store, snapshotter, lease, key, has_leftover: true })
    }

    /// A request under the pin's lease.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = self.store.client.request(message);
        request.metadata_mut().insert("containerd-lease", self.lease.clone());
        request
    }

    /// No call has a deadline. A preparation copies files on some snapshotters, a commit counts
    /// files, and the application of a layer takes minutes.
    async fn run(&self, layer: &StackedLayer) -> Result<UnpackOutcome, UnpackError> {
        // Only `blob_error` detects a full disk. Its other results do not fit: `NotFound` means
        // that a snapshot is missing, not the blob.
        let client = &self.store.client;
        let to_unpack_error = |status: Status| match client.blob_error(layer.blob.digest, &status) {
            full @ StoreError::Full(_) => UnpackError::Store(full),
            _ => UnpackError::Store(client.store_error(&status)),
        };
        let mut snapshots = self.store.snapshots();
        let snapshotter = self.snapshotter.to_owned();
        let parent = layer.parent.map(|parent| parent.to_string()).unwrap_or_default();
        let prepare = PrepareSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: self.key.clone(),
            parent,
            labels: HashMap::new(),
        };
        let mounts = snapshots.prepare(self.request(prepare)).await.map_err(to_unpack_error)?.into_inner().mounts;
        let diff = Some(types::Descriptor {
            media_type: layer.blob.media_type.clone(),
            digest: layer.blob.digest.to_string(),
            size: layer.blob.size.cast_signed(),
            annotations: HashMap::new(),
        });
        // Not synced to disk, like CRI's own snapshots by default: commits of blobs would wait for
        // the sync.
        let apply = ApplyRequest { diff, mounts, payloads: HashMap::new(), sync_fs: false };
        let applied =
            DiffClient::new(self.store.client.channel()).apply(self.request(apply)).await.map_err(to_unpack_error)?;
        let actual = applied.into_inner().applied.unwrap_or_default().digest;
        if actual != layer.diff_id.to_string() {
            return Err(UnpackError::DiffIdMismatch { expected: layer.diff_id, actual });
        }
        let commit = CommitSnapshotRequest {
            snapshotter,
            name: layer.chain_id.to_string(),
            key: self.key.clone(),
            labels: HashMap::new(),
        };
        match snapshots.commit(self.request(commit)).await {
            Ok(_) => Ok(UnpackOutcome::Unpacked),
            // CRI committed the snapshot first. The pin holds CRI's snapshot.
            Err(status) if status.code() == Code::AlreadyExists => Ok(UnpackOutcome::AlreadyUnpacked),
            Err(status) => Err(to_unpack_error(status)),
        }
    }
}

impl State {
    fn being_extracted(&self) -> MutexGuard<'_, HashSet<String>> {
        self.extracting.lock()
    }
}

impl ContainerdStore {
    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.client.channel()).max_decoding_message_size(MAX_MESSAGE)
    }

    async fn supported_snapshotter(&self) -> Result<String, UnpackError> {
        match self.snapshotter().await? {
            Snapshotter::Supported(name) => Ok(name),
            Snapshotter::Unsupported(reason) => Err(UnpackError::Unsupported(reason)),
        }
    }

    async fn has_snapshot(&self, snapshotter: &str, chain_id: Digest) -> Result<bool, StoreError> {
        let stat = StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: chain_id.to_string() };
        match self.client.call(self.snapshots().stat(self.client.request(stat))).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(self.client.store_error(&status)),
        }
    }

    /// Looks in every running snapshotter, not only in CRI's: a RuntimeClass may have its own
    /// snapshotter. Lazily pulling snapshotters commit their snapshots under the chain ID too.
    pub(super) async fn find_snapshots(&self, chain_id: Digest) -> Result<Snapshots, StoreError> {
        let mut snapshotters = Vec::new();
        for plugin in self.snapshotters().await?.iter() {
            if self.has_snapshot(&plugin.id, chain_id).await? {
                snapshotters.push(plugin.id.clone());
            }
        }
        Ok(Snapshots { snapshotters, discards_layers: self.discards_layers().await? })
    }

    async fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<(), StoreError> {
        let remove = RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        match self.client.call(self.snapshots().remove(self.client.request(remove))).await {
            Err(status) if status.code() != Code::NotFound => Err(self.client.store_error(&status)),
            _ => Ok(()),
        }
    }

    /// Removes the agent's partial snapshots without a running unpack call: of dropped calls and of
    /// killed processes.
    pub(super) async fn sweep_snapshots(&self) -> Result<(), StoreError> {
        // Every snapshotter that CRI may ever have used, whether or not CRI answers now.
        for plugin in self.snapshotters().await?.iter().filter(|plugin| SUPPORTED.contains(&&*plugin.id)) {
            for key in self.active_snapshots(&plugin.id).await? {
                let is_extracted = self.state.being_extracted().contains(&key);
                if !is_extracted {
                    self.remove_snapshot(&plugin.id, &key).await?;
                }
            }
        }
        Ok(())
    }

    /// Keys of the agent's active snapshots.
    async fn active_snapshots(&self, snapshotter: &str) -> Result<Vec<String>, StoreError> {
        let to_store_error = |status: Status| self.client.store_error(&status);
        let filters = vec![format!("kind==active,name~=\"^{KEY_PREFIX}\"")];
        let list = ListSnapshotsRequest { snapshotter: snapshotter.to_owned(), filters };
        let mut answers =
            self.client.call(self.snapshots().list(self.client.request(list))).await.map_err(to_store_error)?;
        let mut keys = Vec::new();
        while let Some(answer) = with_deadline(MESSAGE_DEADLINE, answers.message()).await.map_err(to_store_error)? {
            // Compared again, because filters may differ between versions of containerd.
            keys.extend(answer.info.into_iter().map(|info| info.name).filter(|name| name.starts_with(KEY_PREFIX)));
        }
        Ok(keys)
    }
}

#[async_trait]
impl Unpacker for ContainerdStore {
    async fn ensure_supported(&self) -> Result<(), UnpackError> {
        self.supported_snapshotter().await.map(drop)
    }

    async fn is_unpacked(&self, layer: &StackedLayer) -> Result<bool, UnpackError> {
        let snapshotter = self.supported_snapshotter().await?;
        Ok(self.has_snapshot(&snapshotter, layer.chain_id).await?)
    }

    async fn unpack(&self, layer: &StackedLayer, pin: &Pin) -> Result<UnpackOutcome, UnpackError> {
        let snapshotter = self.supported_snapshotter().await?;
        // The pin first, then the lookup: a snapshot that is found then stays. A lease may name a
        // missing snapshot.
        self.add_to_pin(pin, format!("snapshots/{snapshotter}"), layer.chain_id.to_string()).await?;
        if self.has_snapshot(&snapshotter, layer.chain_id).await? {
            return Ok(UnpackOutcome::AlreadyUnpacked);
        }
        let mut extraction = Extraction::begin(self, &snapshotter, layer.chain_id, pin)?;
        let unpacked = extraction.run(layer).await;
        extraction.has_leftover = match &unpacked {
            Ok(UnpackOutcome::Unpacked) => false,
            Ok(UnpackOutcome::AlreadyUnpacked) | Err(_) => {
                let removed = self.remove_snapshot(&snapshotter, &extraction.key).await;
                removed
                    .inspect_err(|error| tracing::debug!(%error, "a partial snapshot is left for the next sweep"))
                    .is_err()
            }
        };
        unpacked
    }

    async fn keep_snapshot(&self, config: Digest, top: Digest) -> Result<(), UnpackError> {
        let key = format!("{GC_REF_SNAPSHOT}{}", self.supported_snapshotter().await?);
        let paths = vec![format!("labels.{key}")];
        let info = Info { digest: config.to_string(), labels: [(key, top.to_string())].into(), ..Info::default() };
        let mut update = UpdateRequest { info: Some(info), update_mask: None };
        update.update_mask.get_or_insert_default().paths = paths;
        let updated = self.client.call(self.client.content().update(self.client.request(update))).await;
        updated.map(|_| ()).map_err(|status| UnpackError::Store(self.client.blob_error(config, &status)))
    }
}
