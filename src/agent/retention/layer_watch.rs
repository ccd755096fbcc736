//! Reports once that most of a node's images lack layers: a warning in the log, and an Event on the
//! Node.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::control::{ImagesStatus, RetentionStatus};
use crate::decide::layer_notice::{LayerCounts, LayerNotice, LayerReport, event_text};
use crate::metrics::Metrics;
use crate::model::NodeName;
use crate::ports::{NodeReport, NodeReportKind, Nodes};
use crate::util::clock;

/// Attempts for one Event, [`RETRY_DELAY`] apart: an hour, after which the API server would have
/// deleted the Event.
const MAX_TRIES: u32 = 60;

/// Half of this time is random, so that nodes do not write together when the API server returns.
const RETRY_DELAY: Duration = Duration::from_secs(60);

/// Watches the number of images that lack layers.
pub struct LayerWatch {
    /// The node of this agent.
    pub node: NodeName,
    /// Writes the Event.
    pub cluster: Arc<dyn Nodes>,
    /// Counts of the wanted images, which should have all layers.
    pub retained: watch::Receiver<Option<RetentionStatus>>,
    /// The reasons why images are incomplete.
    pub images: watch::Receiver<Option<ImagesStatus>>,
    /// Whether missing layers are fetched.
    pub fetches: bool,
    /// Counter of the Event.
    pub metrics: Metrics,
}

impl LayerWatch {
    /// Runs until stopped. A status arrives every 10 s at most, also without a change.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut notice = LayerNotice::default();
        while let Some(Ok(())) = stop.run_until_cancelled(self.retained.changed()).await {
            let Some(layers) = self.layers() else { continue };
            match notice.observe(layers, clock::now()) {
                None => {}
                Some(LayerReport::Complete(LayerCounts { expected: wanted, lacking })) => {
                    tracing::info!(lacking, wanted, "most wanted images have all layers again");
                }
                Some(LayerReport::Lacking(_)) => {
                    stop.run_until_cancelled(self.report()).await;
                }
            }
        }
        // The sender lives as long as the task that retains layers.
        stop.cancelled().await;
    }

    fn layers(&self) -> Option<LayerCounts> {
        let retained = self.retained.borrow();
        retained
            .as_ref()
            .map(|RetentionStatus { wanted, lacking, .. }| LayerCounts { expected: *wanted, lacking: *lacking })
    }

    /// Writes the log line and the Event. The counts may change during an outage of the API server,
    /// so each attempt has the current counts.
    async fn report(&self) {
        let kind = NodeReportKind::ImagesLackLayers;
        for attempt in 1..=MAX_TRIES {
            let Some(layers) = self.layers().filter(|layers| layers.is_mostly_lacking()) else { return };
            let reasons = self.images.borrow().as_ref().map(|images| images.reasons.clone()).unwrap_or_default();
            let note = event_text(&self.node, layers, &reasons, self.fetches);
            if attempt == 1 {
                tracing::warn!("{note}");
            }
            match self.cluster.report_on_node(&NodeReport { kind, note }).await {
                Ok(()) => return self.metrics.event_written(kind.reason()),
                Err(error) if error.is_retryable() && attempt < MAX_TRIES => {
                    tokio::time::sleep(RETRY_DELAY.mul_f64(0.75 + rand::random::<f64>() / 2.0)).await;
                }
                Err(error) => {
                    return tracing::warn!(reason = kind.reason(), %error, "cannot write the Event on the Node");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
