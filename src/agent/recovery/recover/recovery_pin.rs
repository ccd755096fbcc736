//! The pin of one recovery, renewed for as long as the recovery runs.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::pin_term::PinTerm;
use crate::oci::Reference;
use crate::ports::{Pin, Pins};
use crate::util::clock::{now, sleep_until};

/// Life of the pin if this agent dies. An agent that starts again within the hour finds the content
/// of the last attempt. On a node without an agent, the collector removes the content after the
/// hour. A failed attempt leaves the pin to expire for the same reason. A recovery that takes
/// longer renews the pin at half life.
pub(super) const PIN_LIFE: Duration = Duration::from_secs(3600);

/// Pins the content of one recovery.
pub(super) struct RecoveryPin {
    store: Arc<dyn Pins>,
    pin: Pin,
    term: Mutex<PinTerm>,
}

impl RecoveryPin {
    pub(super) async fn new(store: Arc<dyn Pins>) -> Result<Self, RecoverError> {
        let now = now();
        let pin = store.pin(PIN_LIFE).await.map_err(RecoverError::store("pinning"))?;
        Ok(Self { store, pin, term: Mutex::new(PinTerm::new(PIN_LIFE, now)) })
    }

    pub(super) fn pin(&self) -> &Pin {
        &self.pin
    }

    /// The time until the pin ends without a renewal.
    pub(super) fn remaining(&self) -> Duration {
        self.term().left(now())
    }

    /// Runs `work` and renews the pin meanwhile. Dropping the future drops `work` too.
    pub(super) async fn renew_during<T>(&self, reference: &Reference, work: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            done = work => done,
            never = self.renew(reference) => match never {},
        }
    }

    async fn renew(&self, reference: &Reference) -> std::convert::Infallible {
        loop {
            let due = self.term().due();
            sleep_until(Some(due)).await;
            let began = now();
            let Err(error) = self.store.renew(&self.pin, PIN_LIFE).await else {
                self.term().record_renewal(began);
                tracing::debug!(%reference, "the pin was renewed");
                continue;
            };
            let left = self.remaining().as_secs();
            if self.term().record_failure(now()) {
                tracing::warn!(%reference, %error, left, "the pin of a recovery cannot be renewed; the agent retries");
            }
        }
    }

    /// Releases the pin. A pin that cannot be released expires.
    pub(super) async fn release(self, reference: &Reference) {
        if let Err(error) = self.store.release(self.pin).await {
            tracing::warn!(%reference, %error, "the pin of a recovery cannot be released; the pin expires by itself");
        }
    }

    fn term(&self) -> MutexGuard<'_, PinTerm> {
        self.term.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;
    use crate::ports::{BlobMetadata, Blobs};
    use crate::testing::MemoryStore;
    use crate::testing::image::write_blob;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A blob under a pin, after a recovery of so many hours during which the store collects.
    async fn blob_after(hours: u32) -> (Arc<MemoryStore>, RecoveryPin, Digest) {
        let store = Arc::new(MemoryStore::new());
        let recovery_pin = RecoveryPin::new(Arc::clone(&store) as _).await.unwrap();
        let (bytes, metadata) = (bytes::Bytes::from_static(b"blob"), BlobMetadata::default());
        let digest = write_blob(&*store, bytes, &metadata, recovery_pin.pin()).await.unwrap();
        let work = async {
            for _ in 0..hours * 60 {
                tokio::time::sleep(HOUR / 60).await;
                store.collect();
            }
        };
        recovery_pin.renew_during(&"r.test/slow:1".parse().unwrap(), work).await;
        (store, recovery_pin, digest)
    }

    #[tokio::test(start_paused = true)]
    async fn a_recovery_of_five_hours_keeps_its_pin_with_half_a_life_left() {
        let (store, recovery_pin, digest) = blob_after(5).await;
        assert!(store.blob(digest).await.unwrap().is_some(), "the pin keeps the blob");
        assert!(recovery_pin.remaining() >= PIN_LIFE / 2, "{:?} left", recovery_pin.remaining());
    }

    #[tokio::test(start_paused = true)]
    async fn the_pin_of_a_recovery_that_was_killed_ends_within_its_life() {
        let (store, recovery_pin, digest) = blob_after(5).await;
        drop(recovery_pin);
        tokio::time::advance(PIN_LIFE).await;
        store.collect();
        assert_eq!((store.blob(digest).await.unwrap(), store.pins()), (None, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_pin_renewal_does_not_stop_the_recovery() {
        let store = Arc::new(MemoryStore::new());
        let recovery_pin = RecoveryPin::new(Arc::clone(&store) as _).await.unwrap();
        store.release(recovery_pin.pin().clone()).await.unwrap();
        let work = async {
            tokio::time::sleep(2 * HOUR).await;
            7
        };
        assert_eq!(recovery_pin.renew_during(&"r.test/slow:1".parse().unwrap(), work).await, 7);
        assert_eq!(recovery_pin.remaining(), Duration::ZERO);
    }
}
