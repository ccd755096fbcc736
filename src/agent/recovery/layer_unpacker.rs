//! Unpacks the layers of an image during the download, so that a container can start as soon as the
//! image record exists.
//!
//! An optimization, with one exception. The kubelet waits two minutes for a container to be
//! created, and containerd would start a layer that takes longer anew each time. Here such a layer
//! has the time that it needs. A failure is logged, and the runtime unpacks the rest.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use crate::agent::recovery::blob_fetcher::LocalBlob;
use crate::agent::recovery::disk_space::{LayerReservation, NoDiskSpace};
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::disk_floor::OverLimit;
use crate::decide::layer_stack::{LayerStack, NextLayer};
use crate::metrics::Metrics;
use crate::oci::{Digest, Manifest, Reference, RootFs, RootFsError};
use crate::ports::{Blobs, Pin, StoreError, UnpackError, UnpackOutcome, Unpacker};

/// Layers that are unpacked at a time on this node, one of each image. Each unpacking takes a core
/// to decompress, and all write to one disk. With two, one decompresses while the other waits for
/// the disk. Of the four cores of a small node, two are left for the pods.
const MAX_UNPACKING: usize = 2;

/// Longest time between the last blob and the image record. Meanwhile the image's pods wait. On two
/// busy cores containerd unpacked 2 GB in 38 to 73 s (README.md of the benchmarks), which makes 16
/// GB at the slowest, more than images usually have. Unpacking that takes longer hangs.
const UNPACK_TIMEOUT: Duration = Duration::from_secs(600);

/// Unpacks layers on this node.
pub struct LayerUnpacker {
    unpacker: Arc<dyn Unpacker>,
    store: Arc<dyn Blobs>,
    metrics: Metrics,
    permits: Semaphore,
}

/// An image without an image record, whose layers are to be unpacked.
pub(in crate::agent) struct UnnamedImage<'a> {
    pub(in crate::agent) reference: &'a Reference,
    pub(in crate::agent) manifest: &'a Manifest,
    /// Pins the snapshots.
    pub(in crate::agent) pin: &'a Pin,
    /// Receives the position in the layers.
    pub(in crate::agent) progress: &'a Progress,
    /// Disk space for the unpacked layers.
    pub(in crate::agent) reservation: LayerReservation<'a>,
    /// Blobs that are here. Grows during the download.
    pub(in crate::agent) complete_blobs: watch::Receiver<HashSet<Digest>>,
}

/// Why the agent leaves the rest of the layers to the runtime.
#[derive(Debug, thiserror::Error)]
enum UnpackingError {
    #[error(transparent)]
    Unsupported(UnpackError),
    #[error("reading the config: {0}")]
    Config(StoreError),
    #[error("the config is absent, too large or damaged")]
    Unreadable,
    #[error(transparent)]
    RootFs(#[from] RootFsError),
    #[error("layer {number} of {of}, {layer}: {source}")]
    Layer { number: usize, of: usize, layer: Digest, source: UnpackError },
    /// The runtime would have no room either, and would fail at every try.
    #[error("layer {number} of {of}, {layer}: {source}")]
    NoRoom { number: usize, of: usize, layer: Digest, source: OverLimit },
    #[error("keeping the snapshot: {0}")]
    Keep(UnpackError),
    /// The download ended early, with an error of its own.
    #[error("the download ended before all layers were here")]
    Incomplete,
}

impl LayerUnpacker {
    /// Unpacks blobs of `store` through `unpacker`.
    pub fn new(unpacker: Arc<dyn Unpacker>, store: Arc<dyn Blobs>, metrics: Metrics) -> Self {
        Self { unpacker, store, metrics, permits: Semaphore::new(MAX_UNPACKING) }
    }

    /// Runs the download, and unpacks complete layers meanwhile. Returns when both are done, when
    /// the download fails, or when the disk has no room for a layer. After the download, unpacking
    /// may take [`UNPACK_TIMEOUT`], or half of `remaining` if that is shorter. `remaining` is the
    /// time until the pin ends.
    ///
    /// # Errors
    /// Errors of the download, and [`RecoverError`] when the disk has no room for a layer.
    pub(in crate::agent) async fn fetch_and_unpack<T>(
        &self,
        fetching: impl Future<Output = Result<T, RecoverError>>,
        image: UnnamedImage<'_>,
        remaining: impl FnOnce() -> Duration,
    ) -> Result<T, RecoverError> {
        let reference = image.reference;
        let unpacking = self.run(image);
        tokio::pin!(fetching, unpacking);
        let fetched = tokio::select! {
            biased;
            fetched = &mut fetching => fetched?,
            unpacked = &mut unpacking => {
                unpacked?;
                return fetching.await;
            }
        };
        // The pin must outlive the image record's write, so half of the pin's time is left for
        // that.
        let limit = UNPACK_TIMEOUT.min(remaining() / 2);
        match tokio::time::timeout(limit, unpacking).await {
            Ok(unpacked) => unpacked?,
            Err(_) => {
                self.metrics.layer_unpacked("given_up");
                let seconds = limit.as_secs();
                tracing::warn!(%reference, seconds, "unpacking takes too long; the runtime unpacks the rest");
            }
        }
        Ok(fetched)
    }

    /// Fails only when the disk has no room, because the runtime would fail too.
    async fn run(&self, image: UnnamedImage<'_>) -> Result<(), RecoverError> {
        let reference = image.reference;
        match self.unpack(image).await {
            // The adapter logs missing support once, and a failed download returns its own error.
            Ok(()) | Err(UnpackingError::Unsupported(UnpackError::Unsupported(_)) | UnpackingError::Incomplete) => {}
            Err(UnpackingError::NoRoom { source, .. }) => {
                self.metrics.layer_unpacked("no_room");
                return Err(RecoverError::NoRoomToUnpack(source));
            }
            Err(UnpackingError::Layer { source: UnpackError::Store(source @ StoreError::Full(_)), .. }) => {
                self.metrics.layer_unpacked("no_room");
                return Err(RecoverError::Store { doing: "unpacking a layer into containerd's snapshotter", source });
            }
            Err(error) => {
                self.metrics.layer_unpacked("failed");
                tracing::warn!(%reference, %error, "an image is not unpacked here; the runtime unpacks the rest");
            }
        }
        Ok(())
    }

    async fn unpack(&self, image: UnnamedImage<'_>) -> Result<(), UnpackingError> {
        let UnnamedImage { reference, manifest, pin, progress, reservation, mut complete_blobs } = image;
        self.unpacker.ensure_supported().await.map_err(UnpackingError::Unsupported)?;
        let config = manifest.config.digest;
        complete_blobs.wait_for(|complete| complete.contains(&config)).await.map_err(|_| UnpackingError::Incomplete)?;
        let bytes = match LocalBlob::read(&*self.store, config).await.map_err(UnpackingError::Config)? {
            LocalBlob::Whole(bytes, _) => bytes,
            LocalBlob::Absent | LocalBlob::TooLarge(_) | LocalBlob::Damaged => return Err(UnpackingError::Unreadable),
        };
        let mut stack = LayerStack::new(RootFs::parse(&bytes)?.stack(&manifest.layers)?);
        loop {
            complete_blobs
                .wait_for(|complete| stack.next(complete).is_some())
                .await
                .map_err(|_| UnpackingError::Incomplete)?;
            let Some(next) = stack.next(&complete_blobs.borrow()) else { continue };
            match next {
                NextLayer::Complete(None) => return Ok(()),
                NextLayer::Complete(Some(top)) => {
                    return self.unpacker.keep_snapshot(config, top).await.map_err(UnpackingError::Keep);
                }
                NextLayer::Unpack(layer) => {
                    let digest = layer.blob.digest;
                    let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
                    let (number, of) = stack.position();
                    progress.set_unpacking(number, of);
                    let layer_error = |source| UnpackingError::Layer { number, of, layer: digest, source };
                    let size =
                        match self.unpacker.is_unpacked(layer).await.map_err(layer_error)? {
                            true => 0,
                            false => reservation.reserve(std::slice::from_ref(&layer.blob)).await.map_err(|error| {
                                match error {
                                    NoDiskSpace::OverLimit(source) => {
                                        UnpackingError::NoRoom { number, of, layer: digest, source }
                                    }
                                    NoDiskSpace::Store(source) => layer_error(source.into()),
                                }
                            })?,
                        };
                    let unpacked = self.unpacker.unpack(layer, pin).await.map_err(layer_error)?;
                    reservation.record_unpacked(size);
                    self.metrics.layer_unpacked(match unpacked {
                        UnpackOutcome::Unpacked => "unpacked",
                        UnpackOutcome::AlreadyUnpacked => "there",
                    });
                    tracing::debug!(%reference, layer = %digest, number, of, ?unpacked, "a layer is unpacked");
                }
            }
            stack.mark_unpacked();
        }
    }
}
