//! Compares this node's clock with the API server's. A clock that is too far off sets the metric
//! and the status, and causes one warning in the log and one Event on the node.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::control::ClockStatus;
use crate::decide::clock_skew::{ClockChange, ClockSkew, LEEWAY};
use crate::metrics::Metrics;
use crate::model::NodeName;
use crate::ports::{NodeReport, NodeReportKind, Nodes};
use crate::util::clock;

/// Attempts for one Event, one at each comparison: an hour and a half or more.
const REPORT_TRIES: u32 = 20;

/// Compares the clocks and reports a wrong one.
pub struct ClockWatch {
    /// The API server.
    pub cluster: Arc<dyn Nodes>,
    /// This node.
    pub node: NodeName,
    /// The last comparison; `None` before the first.
    pub status: watch::Sender<Option<ClockStatus>>,
    /// Metric of the difference.
    pub metrics: Metrics,
}

impl ClockWatch {
    /// Runs until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut skew = ClockSkew::new(clock::now(), rand::random());
        let mut pending_report = None;
        loop {
            let due = clock::sleep_until(Some(skew.due()));
            if stop.run_until_cancelled(due).await.is_none() {
                return;
            }
            if stop.run_until_cancelled(self.compare(&mut skew, &mut pending_report)).await.is_none() {
                return;
            }
        }
    }

    /// One comparison. `pending_report` is an Event that was not written yet, with its attempts.
    async fn compare(&self, skew: &mut ClockSkew, pending_report: &mut Option<(NodeReport, u32)>) {
        let sample = match self.cluster.clock().await {
            Ok(sample) => sample,
            Err(error) => {
                tracing::debug!(%error, "cannot read the API server's clock");
                return skew.record_failure(clock::now(), rand::random());
            }
        };
        let change = skew.record_sample(&sample, clock::now(), rand::random());
        self.publish(skew, sample.received);
        match change {
            Some(ClockChange::Skewed(seconds)) => *pending_report = Some((self.report_skew(seconds), 0)),
            Some(ClockChange::Corrected) => {
                *pending_report = None;
                tracing::info!(node = %self.node, "the node's clock is right again");
            }
            None => {}
        }
        if let Some((report, tries)) = pending_report {
            *tries += 1;
            let written = self.cluster.report_on_node(report).await;
            let is_last = *tries == REPORT_TRIES || written.as_ref().is_err_and(|error| !error.is_retryable());
            if let Err(error) = &written {
                tracing::debug!(%error, tries, "the Event about the clock is not written");
            }
            if written.is_ok() || is_last {
                *pending_report = None;
            }
        }
    }

    fn publish(&self, skew: &ClockSkew, received: Duration) {
        let Some((seconds, too_far)) = skew.state() else { return };
        let ahead_seconds = seconds.round() as i64;
        self.metrics.clock_compared(ahead_seconds);
        self.status.send_replace(Some(ClockStatus { ahead_seconds, too_far, measured: received.as_secs() }));
    }

    fn report_skew(&self, seconds: f64) -> NodeReport {
        let side = if seconds > 0.0 { "ahead of" } else { "behind" };
        let (off, leeway) = (seconds.abs().round(), LEEWAY.as_secs());
        tracing::warn!(
            node = %self.node,
            seconds = seconds.round(),
            "the node's clock is {off} s {side} the API server's; agents reject each other's credentials beyond \
             {leeway} s, and no image is fetched then: correct the node's time service"
        );
        let note = format!(
            "The clock of node {} is {off} s {side} the API server's. Agents of lighterman reject each other's \
             credentials when clocks differ by more than {leeway} s. The node then neither fetches nor serves images. \
             Correct the node's time service (NTP).",
            self.node
        );
        NodeReport { kind: NodeReportKind::ClockSkew, note }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemoryCluster;

    const HOUR: Duration = Duration::from_secs(3600);

    struct ClockTestNode {
        cluster: MemoryCluster,
        status: watch::Receiver<Option<ClockStatus>>,
        metrics: Metrics,
        stop: CancellationToken,
    }

    fn start(cluster: MemoryCluster) -> ClockTestNode {
        let (status_in, status) = watch::channel(None);
        let (metrics, stop) = (Metrics::new(), CancellationToken::new());
        let node = "n1".parse().unwrap();
        let watch =
            ClockWatch { cluster: Arc::new(cluster.clone()), node, status: status_in, metrics: metrics.clone() };
        tokio::spawn(watch.run(stop.clone()));
        ClockTestNode { cluster, status, metrics, stop }
    }

    impl ClockTestNode {
        fn skew(&self) -> (i64, bool) {
            let status = self.status.borrow().clone().expect("a comparison");
            (status.ahead_seconds, status.too_far)
        }

        fn has_metric(&self, line: &str) -> bool {
            String::from_utf8(self.metrics.render()).unwrap().lines().any(|have| have == line)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_clock_is_reported_once_on_the_node_and_shown_until_it_is_right() {
        let test_node = start(MemoryCluster::default());
        tokio::time::sleep(HOUR).await;
        assert_eq!((test_node.skew(), test_node.cluster.node_reports().len()), ((0, false), 0));
        test_node.cluster.set_clocks_ahead(90);
        tokio::time::sleep(3 * HOUR).await;
        let (ahead, too_far) = test_node.skew();
        assert!((88..=90).contains(&ahead) && too_far, "{ahead}");
        assert!(test_node.has_metric(&format!("lighterman_clock_skew_seconds {ahead}")));
        let reports = test_node.cluster.node_reports();
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert_eq!(reports[0].kind, NodeReportKind::ClockSkew);
        assert!(reports[0].note.contains("s ahead of the API server's"), "{}", reports[0].note);
        test_node.cluster.set_clocks_ahead(0);
        tokio::time::sleep(HOUR).await;
        assert_eq!(test_node.skew(), (0, false));
        test_node.cluster.set_clocks_ahead(-3600);
        tokio::time::sleep(HOUR).await;
        assert_eq!(test_node.cluster.node_reports().len(), 2);
        test_node.stop.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_cannot_be_compared_keeps_the_last_result() {
        let test_node = start(MemoryCluster::default());
        test_node.cluster.set_unavailable(true);
        tokio::time::sleep(HOUR).await;
        assert_eq!(*test_node.status.borrow(), None);
        test_node.cluster.set_clocks_ahead(-90);
        test_node.cluster.set_unavailable(false);
        tokio::time::sleep(HOUR).await;
        assert!(test_node.skew().1);
        test_node.cluster.set_unavailable(true);
        tokio::time::sleep(HOUR).await;
        assert!(test_node.skew().1);
        test_node.stop.cancel();
    }
}
