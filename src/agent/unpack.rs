//! Unpacking an image's layers while the others are still coming, so that a container can be made as soon as the image has its name.
//!
//! An optimisation, and one more thing besides: the kubelet waits two minutes for a container to be made, and a layer that containerd needs
//! longer for would be begun anew each time. Here it has the time that it needs. Whatever goes wrong is told once and left to the runtime.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use super::bring::Held;
use super::progress::Progress;
use super::recover::RecoverError;
use super::room::{LayerRoom, NoRoom};
use crate::decide::plan::OverLimit;
use crate::decide::unpacking::{Next, Stack};
use crate::metrics::Metrics;
use crate::oci::{Digest, Manifest, Reference, RootFs, RootFsError};
use crate::ports::{ContentStore, Pin, StoreError, UnpackError, Unpacked, Unpacker};

/// Layers that are unpacked at a time on this node, one of each image. Each takes a core, to decompress, and all write to one disk: with two,
/// one goes on while the other waits for the disk, and of the four cores that a small node has, two are left for its pods.
const AT_ONCE: usize = 2;

/// How much longer than its last blob an image may take. Meanwhile it has no name, so its pods wait. On two busy cores containerd unpacked 2 GB in 38 to
/// 73 s (README.md of the benchmarks): that is 16 GB at the slowest, more than images have as a rule. What takes longer hangs rather than works.
const LIMIT: Duration = Duration::from_secs(600);

/// Unpacks layers on this node.
pub struct Unpacking {
    unpacker: Arc<dyn Unpacker>,
    store: Arc<dyn ContentStore>,
    metrics: Metrics,
    slots: Semaphore,
}

/// An image whose layers are to be unpacked.
pub(super) struct Unfinished<'a> {
    /// Its name.
    pub(super) reference: &'a Reference,
    /// What it is made of.
    pub(super) manifest: &'a Manifest,
    /// Holds what is unpacked.
    pub(super) pin: &'a Pin,
    /// Is told how far it is.
    pub(super) progress: &'a Progress,
    /// What it may take.
    pub(super) room: LayerRoom<'a>,
    /// The blobs that are here; grows.
    pub(super) here: watch::Receiver<HashSet<Digest>>,
}

/// Why the rest is left to the runtime.
#[derive(Debug, thiserror::Error)]
enum Ended {
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

impl Unpacking {
    /// Unpacks what comes into `store` through `unpacker`.
    pub fn new(unpacker: Arc<dyn Unpacker>, store: Arc<dyn ContentStore>, metrics: Metrics) -> Self {
        Self { unpacker, store, metrics, slots: Semaphore::new(AT_ONCE) }
    }

    /// Brings the blobs and unpacks the layers among them. Answers when both are done, or when the blobs have not come, or when they are here
    /// and unpacking has failed or takes longer than it may; that is `left` at most, which is what the pin has still to live.
    ///
    /// # Errors
    /// Those of the blobs, and [`RecoverError`] where the disk has no room for a layer.
    pub(super) async fn beside<T>(
        &self,
        bringing: impl Future<Output = Result<T, RecoverError>>,
        image: Unfinished<'_>,
        left: impl FnOnce() -> Duration,
    ) -> Result<T, RecoverError> {
        let reference = image.reference;
        let unpacking = self.run(image);
        tokio::pin!(bringing, unpacking);
        let brought = tokio::select! {
            biased;
            brought = &mut bringing => brought?,
            unpacked = &mut unpacking => {
                unpacked?;
                return bringing.await;
            }
        };
        // What is recorded has to be held until then: half of what is left is for that.
        let limit = LIMIT.min(left() / 2);
        match tokio::time::timeout(limit, unpacking).await {
            Ok(unpacked) => unpacked?,
            Err(_) => {
                self.metrics.layer_unpacked("given_up");
                tracing::warn!(%reference, seconds = limit.as_secs(), "unpacking takes too long, and is left to the runtime");
            }
        }
        Ok(brought)
    }

    /// Fails only where the runtime would fail too, for want of room.
    async fn run(&self, image: Unfinished<'_>) -> Result<(), RecoverError> {
        let reference = image.reference;
        match self.unpack(image).await {
            // An adapter says so once; a recovery that failed says so itself.
            Ok(()) | Err(Ended::Unsuited(UnpackError::Unsuited(_)) | Ended::Incomplete) => {}
            Err(Ended::NoRoom { source, .. }) => {
                self.metrics.layer_unpacked("no_room");
                return Err(RecoverError::NoRoomToUnpack(source));
            }
            Err(Ended::Layer { source: UnpackError::Store(source @ StoreError::Full(_)), .. }) => {
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

    async fn unpack(&self, image: Unfinished<'_>) -> Result<(), Ended> {
        let Unfinished { reference, manifest, pin, progress, room, mut here } = image;
        self.unpacker.suits().await.map_err(Ended::Unsuited)?;
        let config = manifest.config.digest;
        here.wait_for(|here| here.contains(&config)).await.map_err(|_| Ended::Incomplete)?;
        let bytes = match Held::read(&*self.store, config).await.map_err(Ended::Config)? {
            Held::Whole(bytes, _) => bytes,
            Held::Absent | Held::TooLarge(_) | Held::Damaged => return Err(Ended::Unreadable),
        };
        let mut stack = Stack::new(RootFs::parse(&bytes)?.stack(&manifest.layers)?);
        loop {
            here.wait_for(|here| stack.next(here).is_some()).await.map_err(|_| Ended::Incomplete)?;
            let Some(next) = stack.next(&here.borrow()) else { continue };
            match next {
                Next::Whole(None) => return Ok(()),
                Next::Whole(Some(top)) => return self.unpacker.keep(config, top).await.map_err(Ended::Keep),
                Next::Unpack(layer) => {
                    let digest = layer.blob.digest;
                    let _slot = self.slots.acquire().await.expect("nobody closes the semaphore");
                    let (number, of) = stack.position();
                    progress.unpacks(number, of);
                    let failed = |source| Ended::Layer { number, of, layer: digest, source };
                    let size = match self.unpacker.is_unpacked(layer).await.map_err(failed)? {
                        true => 0,
                        false => {
                            room.reserve(std::slice::from_ref(&layer.blob)).await.map_err(|error| match error {
                                NoRoom::OverLimit(source) => Ended::NoRoom { number, of, layer: digest, source },
                                NoRoom::Store(source) => failed(source.into()),
                            })?
                        }
                    };
                    let unpacked = self.unpacker.unpack(layer, pin).await.map_err(failed)?;
                    room.unpacked(size);
                    self.metrics.layer_unpacked(match unpacked {
                        Unpacked::Now => "unpacked",
                        Unpacked::Before => "there",
                    });
                    tracing::debug!(%reference, layer = %digest, number, of, ?unpacked, "a layer is unpacked");
                }
            }
            stack.unpacked();
        }
    }
}
