//! Reports once that most of a node's images lack layers: a warning in the log, and an Event on the
//! Node.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::decide::layer_notice::{LayerNotice, Layers, Notice, note};
use crate::metrics::Metrics;
use crate::model::NodeName;
use crate::ports::{Cluster, ImagesStatus, NodeReport, NodeReportKind, RetainedStatus};

/// Tries of one Event, [`PAUSE`] apart: an hour, after which the API server would have forgotten
/// the Event.
const TRIES: u32 = 60;

/// Half of this time is random, so that nodes do not write together when the API server comes back.
const PAUSE: Duration = Duration::from_secs(60);

/// Watches the numbers of images that lack layers.
pub struct LayerWatch {
    /// The node of this agent.
    pub node: NodeName,
    /// Writes the Event.
    pub cluster: Arc<dyn Cluster>,
    /// Images that are to have all layers.
    pub retained: watch::Receiver<Option<RetainedStatus>>,
    /// The reasons why images are incomplete.
    pub images: watch::Receiver<Option<ImagesStatus>>,
    /// Whether missing layers are fetched.
    pub fetches: bool,
    /// Counts the Event.
    pub metrics: Metrics,
}

impl LayerWatch {
    /// Runs until stopped. The numbers come every 10 s at most, also when they are the same.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut notice = LayerNotice::default();
        while let Some(Ok(())) = stop.run_until_cancelled(self.retained.changed()).await {
            let Some(layers) = self.layers() else { continue };
            match notice.observe(layers, Instant::now().into_std()) {
                None => {}
                Some(Notice::Complete(Layers { wanted, lacking })) => {
                    tracing::info!(lacking, wanted, "most images that are to have all layers have them again");
                }
                Some(Notice::Lacking(_)) => {
                    stop.run_until_cancelled(self.report()).await;
                }
            }
        }
        // The sender lives as long as the task that retains layers.
        stop.cancelled().await;
    }

    fn layers(&self) -> Option<Layers> {
        let retained = self.retained.borrow();
        retained.as_ref().map(|RetainedStatus { wanted, lacking, .. }| Layers { wanted: *wanted, lacking: *lacking })
    }

    /// Writes the log line and the Event. While the API server is away the numbers may change, so
    /// each try has those of the moment.
    async fn report(&self) {
        let kind = NodeReportKind::ImagesLackLayers;
        for attempt in 1..=TRIES {
            let Some(layers) = self.layers().filter(|layers| layers.is_most()) else { return };
            let reasons = self.images.borrow().as_ref().map(|images| images.reasons.clone()).unwrap_or_default();
            let note = note(&self.node, layers, &reasons, self.fetches);
            if attempt == 1 {
                tracing::warn!("{note}");
            }
            match self.cluster.report_on_node(&NodeReport { kind, note }).await {
                Ok(()) => return self.metrics.event_written(kind.reason()),
                Err(error) if error.is_retryable() && attempt < TRIES => {
                    tokio::time::sleep(PAUSE.mul_f64(0.75 + rand::random::<f64>() / 2.0)).await;
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
