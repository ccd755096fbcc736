//! Follows other clients' changes of containerd's content, and cleans up leftovers.

use std::convert::Infallible;
use std::time::Duration;

use containerd_client::services::v1::SubscribeRequest;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::tonic::Status;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::ContainerdStore;
use super::layer_leases::content_event;
use crate::ports::{ContentEvent, STAGED_BLOB_LIFE, StoreError};
use crate::util::backoff::Backoff;

/// Pauses between connection attempts. A restarted containerd is back in a second; the longest
/// pause makes attempts cheap during an outage.
const RECONNECTION: Backoff = Backoff { first: Duration::from_millis(200), longest: Duration::from_secs(5) };

impl ContainerdStore {
    /// Follows containerd's events until `stop`, across restarts of containerd, and removes the
    /// leftovers of dropped writers.
    pub async fn run(self, stop: CancellationToken) {
        let mut failures = 0_u32;
        loop {
            let mut connected = false;
            let Err(error) = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.follow(&mut connected) => ended,
            };
            if connected {
                failures = 0;
            }
            if failures == 0 {
                tracing::warn!(socket = %self.client.socket().display(), %error, "containerd's events ended; reconnecting");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(RECONNECTION.wait(failures)) => {}
            }
            failures = failures.saturating_add(1);
        }
    }

    /// Returns when the connection is lost. Sets `connected` once containerd has answered.
    async fn follow(&self, connected: &mut bool) -> Result<Infallible, StoreError> {
        let to_store_error = |status: Status| self.client.store_error(&status);
        self.state.introspection.clear().await;
        *self.state.ingest_mode.lock().await = None;
        *self.state.snapshotter.lock().await = None;
        let mut client = EventsClient::new(self.client.channel());
        let subscribing = client.subscribe(self.client.request(SubscribeRequest { filters: self.filters() }));
        tokio::pin!(subscribing);
        // containerd sends nothing, not even headers, before the first event, so a second call
        // tests the connection.
        let early = tokio::select! {
            events = &mut subscribing => Some(events.map_err(to_store_error)?),
            ready = self.ready() => ready.map(|_| None)?,
        };
        *connected = true;
        // Earlier events are lost: the counter makes every caller list everything.
        self.record_change();
        self.publish(ContentEvent::Missed);
        self.sweep().await;
        // At once, and then once per life of a staged blob.
        let mut sweeping = interval(STAGED_BLOB_LIFE);
        sweeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut events = loop {
            if let Some(events) = early {
                break events;
            }
            tokio::select! {
                events = &mut subscribing => break events.map_err(to_store_error)?,
                () = self.state.abandoned.notified() => self.sweep().await,
                _ = sweeping.tick() => self.sweep_old_staging_files().await,
            }
        }
        .into_inner();
        // Only the first event proves the subscription; events before it may be lost.
        self.record_change();
        self.publish(ContentEvent::Missed);
        loop {
            tokio::select! {
                event = events.message() => {
                    let event = event.map_err(to_store_error)?;
                    let event = event.ok_or_else(|| StoreError::Unavailable("containerd ended its events".into()))?;
                    if let Some(event) = content_event(&event) {
                        self.publish(event);
                    }
                    self.record_change();
                }
                () = self.state.abandoned.notified() => self.sweep().await,
                _ = sweeping.tick() => self.sweep_old_staging_files().await,
            }
        }
    }

    /// Events of images and blobs in the containerd namespace. `/content/create` exists from
    /// containerd 2.1 on. The collector sends no event for a removed blob.
    fn filters(&self) -> Vec<String> {
        let namespace = self.client.namespace();
        ["images", "content"].map(|kind| format!("namespace==\"{namespace}\",topic~=\"^/{kind}/\"")).into()
    }

    async fn sweep(&self) {
        if let Err(error) = self.sweep_abandoned().await {
            // The next drop or reconnection retries, and the end of the lease removes the leftover
            // in any case.
            tracing::warn!(%error, "abandoned writes could not be aborted in containerd");
        }
        if let Err(error) = self.sweep_snapshots().await {
            tracing::warn!(%error, "abandoned partial snapshots could not be removed from containerd");
        }
    }

    async fn sweep_old_staging_files(&self) {
        if let Err(error) = self.sweep_staged().await {
            tracing::warn!(%error, "abandoned staging files could not be removed");
        }
    }
}
