//! Unpacking an image's layers while the others are still coming, so that a container can be made as soon as the image has its name.
//!
//! An optimisation, and one more thing besides: the kubelet waits two minutes for a container to be made, and a layer that containerd needs
//! longer for would be begun anew each time. Here it has the time that it needs. Whatever goes wrong is told once and left to the runtime.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use crate::agent::recovery::blob_fetcher::LocalBlob;
use crate::agent::recovery::disk_space::{LayerReservation, NoDiskSpace};
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::layer_stack::{LayerStack, NextLayer};
use crate::decide::disk::OverLimit;
use crate::metrics::Metrics;
use crate::oci::{Digest, Manifest, Reference, RootFs, RootFsError};
use crate::ports::{ContentStore, Pin, StoreError, UnpackError, UnpackOutcome, Unpacker};

/// Layers that are unpacked at a time on this node, one of each image. Each takes a core, to decompress, and all write to one disk: with two,
/// one goes on while the other waits for the disk, and of the four cores that a small node has, two are left for its pods.
const MAX_UNPACKING: usize = 2;

/// How much longer than its last blob an image may take. Meanwhile it has no name, so its pods wait. On two busy cores containerd unpacked 2 GB in 38 to
/// 73 s (README.md of the benchmarks): that is 16 GB at the slowest, more than images have as a rule. What takes longer hangs rather than works.
const UNPACK_TIMEOUT: Duration = Duration::from_secs(600);

/// Unpacks layers on this node.
pub struct LayerUnpacker {
    unpacker: Arc<dyn Unpacker>,
    store: Arc<dyn ContentStore>,
    metrics: Metrics,
    permits: Semaphore,
}

/// An image whose layers are to be unpacked.
pub(in crate::agent) struct UnnamedImage<'a> {
    /// Its name.
    pub(in crate::agent) reference: &'a Reference,
    /// What it is made of.
    pub(in crate::agent) manifest: &'a Manifest,
    /// Holds what is unpacked.
    pub(in crate::agent) pin: &'a Pin,
    /// Is told how far it is.
    pub(in crate::agent) progress: &'a Progress,
    /// What it may take.
    pub(in crate::agent) reservation: LayerReservation<'a>,
    /// The blobs that are here; grows.
    pub(in crate::agent) complete_blobs: watch::Receiver<HashSet<Digest>>,
}

/// Why the rest is left to the runtime.
#[derive(Debug, thiserror::Error)]
enum UnpackingError {
    #[error(transparent)]
    Unsuited(UnpackError),
    #[error("reading the configuration: {0}")]
    Config(StoreError),
    #[error("the configuration is too large, or not what its digest says")]
    Unreadable,
    #[error(transparent)]
    RootFs(#[from] RootFsError),
    #[error("layer {number} of {of}, {layer}: {source}")]
    Layer { number: usize, of: usize, layer: Digest, source: UnpackError },
    /// The runtime would have no room either, and would fail for ever.
    #[error("layer {number} of {of}, {layer}: {source}")]
    NoRoom { number: usize, of: usize, layer: Digest, source: OverLimit },
    #[error("keeping what was unpacked: {0}")]
    Keep(UnpackError),
    /// The blobs do not come any more. Whoever brings them says why.
    #[error("not all of it has come")]
    Incomplete,
}

impl LayerUnpacker {
    /// Unpacks what comes into `store` through `unpacker`.
    pub fn new(unpacker: Arc<dyn Unpacker>, store: Arc<dyn ContentStore>, metrics: Metrics) -> Self {
        Self { unpacker, store, metrics, permits: Semaphore::new(MAX_UNPACKING) }
    }

    /// Brings the blobs and unpacks the layers among them. Answers when both are done, or when the blobs have not come, or when they are here
    /// and unpacking has failed or takes longer than it may; that is `left` at most, which is what the pin has still to live.
    ///
    /// # Errors
    /// Those of the blobs, and [`RecoverError`] where the disk has no room for a layer.
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
        // What is recorded has to be held until then: half of what is left is for that.
        let limit = UNPACK_TIMEOUT.min(remaining() / 2);
        match tokio::time::timeout(limit, unpacking).await {
            Ok(unpacked) => unpacked?,
            Err(_) => {
                self.metrics.layer_unpacked("given_up");
                tracing::warn!(%reference, seconds = limit.as_secs(), "unpacking takes too long, and is left to the runtime");
            }
        }
        Ok(fetched)
    }

    /// Fails only where the runtime would fail too, for want of room.
    async fn run(&self, image: UnnamedImage<'_>) -> Result<(), RecoverError> {
        let reference = image.reference;
        match self.unpack(image).await {
            // An adapter says so once; a recovery that failed says so itself.
            Ok(()) | Err(UnpackingError::Unsuited(UnpackError::Unsupported(_)) | UnpackingError::Incomplete) => {}
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
                tracing::warn!(%reference, %error, "an image is not unpacked, which is left to the runtime");
            }
        }
        Ok(())
    }

    async fn unpack(&self, image: UnnamedImage<'_>) -> Result<(), UnpackingError> {
        let UnnamedImage { reference, manifest, pin, progress, reservation, mut complete_blobs } = image;
        self.unpacker.ensure_supported().await.map_err(UnpackingError::Unsuited)?;
        let config = manifest.config.digest;
        complete_blobs.wait_for(|here| here.contains(&config)).await.map_err(|_| UnpackingError::Incomplete)?;
        let bytes = match LocalBlob::read(&*self.store, config).await.map_err(UnpackingError::Config)? {
            LocalBlob::Whole(bytes, _) => bytes,
            LocalBlob::Absent | LocalBlob::TooLarge(_) | LocalBlob::Damaged => return Err(UnpackingError::Unreadable),
        };
        let mut stack = LayerStack::new(RootFs::parse(&bytes)?.stack(&manifest.layers)?);
        loop {
            complete_blobs.wait_for(|here| stack.next(here).is_some()).await.map_err(|_| UnpackingError::Incomplete)?;
            let Some(next) = stack.next(&complete_blobs.borrow()) else { continue };
            match next {
                NextLayer::Complete(None) => return Ok(()),
                NextLayer::Complete(Some(top)) => {
                    return self.unpacker.keep_snapshot(config, top).await.map_err(UnpackingError::Keep);
                }
                NextLayer::Unpack(layer) => {
                    let digest = layer.blob.digest;
                    let _permit = self.permits.acquire().await.expect("nobody closes the semaphore");
                    let (number, of) = stack.position();
                    progress.set_unpacking(number, of);
                    let failed = |source| UnpackingError::Layer { number, of, layer: digest, source };
                    let size =
                        match self.unpacker.is_unpacked(layer).await.map_err(failed)? {
                            true => 0,
                            false => reservation.reserve(std::slice::from_ref(&layer.blob)).await.map_err(|error| {
                                match error {
                                    NoDiskSpace::OverLimit(source) => {
                                        UnpackingError::NoRoom { number, of, layer: digest, source }
                                    }
                                    NoDiskSpace::Store(source) => failed(source.into()),
                                }
                            })?,
                        };
                    let unpacked = self.unpacker.unpack(layer, pin).await.map_err(failed)?;
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
