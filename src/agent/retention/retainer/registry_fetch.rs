//! Fetches one image's missing layers from the image's registry, one after the other, at a limited
//! rate.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::sleep;

use super::missing_layers::MissingLayers;
use crate::agent::recovery::recover::Recoverer;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::decide::byte_bucket::{ByteBucket, CHUNK};
use crate::decide::disk_reservations::Reservation;
use crate::decide::fill::{FillFailure, SecretName};
use crate::metrics::Metrics;
use crate::oci::{Digest, Repository};
use crate::ports::{BlobMetadata, BlobSink, Pin, PullSecret, RegistryFetchError, StagedBlob, StoreError};
use crate::util::clock;

/// Fetches the layers of one image.
pub(super) struct RegistryFetch<'a> {
    recoverer: &'a Recoverer,
    image: &'a MissingLayers,
    pin: &'a Pin,
    reservation: &'a Reservation,
    /// Bytes per second; 0 is no limit.
    rate: u64,
    bucket: ByteBucket,
    metrics: Metrics,
}

impl<'a> RegistryFetch<'a> {
    pub(super) fn new(
        recoverer: &'a Recoverer,
        image: &'a MissingLayers,
        pin: &'a Pin,
        reservation: &'a Reservation,
        rate: u64,
        metrics: Metrics,
    ) -> Self {
        let bucket = ByteBucket::new(rate);
        Self { recoverer, image, pin, reservation, rate, bucket, metrics }
    }

    /// Fetches into the lease. Complete layers stay when a later layer fails.
    ///
    /// # Errors
    /// [`FillFailure`], after a log line.
    pub(super) async fn fetch(mut self, secret_names: BTreeSet<SecretName>) -> Result<(), FillFailure> {
        let MissingLayers { manifest: _, reference, image_digest: _, layers } = self.image;
        let secret_count = secret_names.len();
        let request = RecoveryRequest {
            reference: reference.clone(),
            pull_secrets: secret_names.into_iter().collect(),
            verify_layers: false,
            resolved_digest: None,
        };
        let secrets = self.recoverer.resolver.secrets(&request).await;
        let unread = secrets.len() < secret_count;
        let mut awaited = self.recoverer.blob_fetcher.awaited();
        for (digest, size) in layers {
            awaited.mark_unchanged();
            tokio::select! {
                fetched = self.fetch_layer(reference.repository(), *digest, *size, &secrets) => {
                    fetched.map_err(|error| {
                        tracing::info!(
                            image = %reference, layer = %digest, %error,
                            "the registry did not supply a layer that is missing here"
                        );
                        failure(&error, unread)
                    })?;
                }
                () = wait_until_awaited(&mut awaited, *digest) => {
                    tracing::info!(
                        image = %reference, layer = %digest,
                        "a recovery needs the layer now and fetches it"
                    );
                    return Err(FillFailure::NeededByRecovery);
                }
            }
        }
        Ok(())
    }

    async fn fetch_layer(
        &mut self,
        repository: &Repository,
        digest: Digest,
        size: u64,
        secrets: &[PullSecret],
    ) -> Result<(), RegistryFetchError> {
        let store = &self.recoverer.store;
        let metadata = BlobMetadata { source: Some(repository.clone()), children: Vec::new() };
        let staged = match store.stage(digest, size, self.pin).await {
            Ok(staged) => staged,
            Err(StoreError::AlreadyExists(_)) => return Ok(store.add_metadata(digest, &metadata).await?),
            Err(error) => return Err(error.into()),
        };
        let registry = Arc::clone(&self.recoverer.resolver.registry);
        let mut sink = RateLimitedSink { fetch: self, staged: &*staged, at: 0 };
        let fetched = match registry.fetch_blob(repository, digest, size, secrets, &mut sink).await {
            Ok(proof) => Ok(staged.commit(proof, &metadata).await?),
            Err(error) => Err(error),
        };
        if fetched.is_err() {
            staged.abandon().await;
        }
        fetched
    }

    /// Waits until so many bytes may pass. The rate limit of downloads from peers applies too, if
    /// lower.
    async fn wait_for_rate(&mut self, bytes: u64) {
        let mut remaining = bytes;
        while remaining > 0 {
            let limits = [self.rate, self.recoverer.policy.borrow().budgets.max_download_rate];
            let rate = limits.into_iter().filter(|rate| *rate > 0).min().unwrap_or(0);
            let (now, chunk) = (clock::now(), remaining.min(CHUNK));
            self.bucket.set_rate(rate, now);
            match self.bucket.take(chunk, now) {
                Ok(()) => remaining -= chunk,
                Err(wait) => sleep(wait).await,
            }
        }
    }
}

/// Returns when a recovery waits for this blob. A blob has one writer, and a pod must not wait for
/// a limited rate. The recovery continues the staged blob.
async fn wait_until_awaited(awaited: &mut watch::Receiver<Option<Digest>>, digest: Digest) {
    while awaited.changed().await.is_ok() {
        if *awaited.borrow_and_update() == Some(digest) {
            return;
        }
    }
    std::future::pending().await
}

/// Why the layer was not fetched. `unread`: a secret of the pods could not be read.
fn failure(error: &RegistryFetchError, unread: bool) -> FillFailure {
    match error {
        RegistryFetchError::Denied(_) => FillFailure::Denied { unread },
        RegistryFetchError::Gone(_) => FillFailure::Gone,
        RegistryFetchError::RateLimited { registry: _, retry_after } => FillFailure::RateLimited(*retry_after),
        RegistryFetchError::Down { .. } => FillFailure::Down,
        RegistryFetchError::WrongBytes { .. } => FillFailure::WrongBytes,
        RegistryFetchError::Sink(_) => FillFailure::Local,
    }
}

/// Writes one layer at the limited rate.
struct RateLimitedSink<'a, 'b> {
    fetch: &'a mut RegistryFetch<'b>,
    staged: &'a dyn StagedBlob,
    at: u64,
}

#[async_trait]
impl BlobSink for RateLimitedSink<'_, '_> {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        let bytes = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        self.fetch.wait_for_rate(bytes).await;
        self.staged.write_at(self.at, chunks).await?;
        self.at += bytes;
        self.fetch.reservation.record_written(bytes);
        self.fetch.metrics.registry_layer_bytes_received(bytes);
        Ok(())
    }
}
