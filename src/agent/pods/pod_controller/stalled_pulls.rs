//! Stalled pulls: ends containerd's silent connections, where the options permit that.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{PodController, WorkResult, now};
use crate::decide::cause::waits_for_image;
use crate::decide::container_records::{Subject, Topic};
use crate::decide::stalled_connections::{SILENT_SERVER_LIFE, TcpConnection, stalled_connections};
use crate::model::{PodRef, PodReportKind};
use crate::ports::{ConnectionsError, PullConnections};

/// Interval between two lists of containerd's connections while pods wait. One list costs some
/// milliseconds of processor time on a busy node.
const LIST_INTERVAL: Duration = Duration::from_secs(10);

/// State of the search for silent connections.
#[derive(Debug, Default)]
pub(super) struct StallWatch {
    is_listing: bool,
    next_listing: Option<Instant>,
    /// Servers whose connections were ended, and when. One round adds 15 at most, and an entry
    /// expires after ten minutes.
    silent_servers: HashMap<SocketAddr, Instant>,
    /// The error that the log has already.
    logged_error: Option<String>,
}

/// Result of one search.
pub(super) struct EndedConnections {
    ended: Vec<TcpConnection>,
    error: Option<ConnectionsError>,
}

impl PodController {
    /// Ends silent connections of containerd while a pod waits longer than a pull may take.
    ///
    /// The kubelet may be pulling for another pod, or for a deleted pod. The kernel shows which
    /// connections are silent, and the pods' Events do not.
    pub(super) fn end_stalled_pulls(&mut self, now: Instant) {
        let Some(after) =
            self.options.stalled_after.filter(|_| self.options.end_stalled_pulls && !self.options.dry_run)
        else {
            return;
        };
        let Some(connections) = self.connections.clone() else { return };
        let is_early = self.stall_watch.next_listing.is_some_and(|at| at > now);
        if self.stall_watch.is_listing || is_early || self.late_pods(now).is_empty() {
            return;
        }
        let servers = &mut self.stall_watch.silent_servers;
        servers.retain(|_, at| now.saturating_duration_since(*at) < SILENT_SERVER_LIFE);
        let silent_before = servers.keys().copied().collect();
        self.stall_watch.is_listing = true;
        self.stall_watch.next_listing = Some(now + LIST_INTERVAL);
        self.work
            .spawn(async move { WorkResult::ConnectionsEnded(end_silent(connections, after, silent_before).await) });
    }

    pub(super) fn on_connections_ended(&mut self, outcome: EndedConnections) {
        let EndedConnections { ended, error } = outcome;
        self.stall_watch.is_listing = false;
        for connection in &ended {
            self.metrics.stalled_connection("ended");
            self.stall_watch.silent_servers.insert(connection.remote, now());
            let (remote, silent_s) = (connection.remote, connection.silent_for.as_secs());
            tracing::warn!(
                %remote, silent_s,
                "containerd's connection was silent and was ended, so that its pull fails"
            );
        }
        if let Some(error) = error {
            self.metrics.stalled_connection("failed");
            let error = error.to_string();
            if self.stall_watch.logged_error.as_ref() != Some(&error) {
                tracing::warn!(
                    error,
                    "a stalled pull cannot be ended; containerd ends it after image_pull_progress_timeout"
                );
                self.stall_watch.logged_error = Some(error);
            }
        }
        let Some(longest) = ended.first() else { return };
        let note = format!(
            "containerd had received nothing from {} for {} s, so the agent ended the connection ({} in all). The pull \
             that used it fails, and the kubelet goes on with this node's later pulls (endStalledPulls).",
            longest.remote,
            longest.silent_for.as_secs(),
            ended.len(),
        );
        for pod in self.late_pods(now()) {
            if self.container_records.mark_reported(&pod, &Subject::Pod, Topic::Event(PodReportKind::PullEnded)) {
                self.spawn_report(pod, PodReportKind::PullEnded, note.clone());
            }
        }
    }

    /// Opted-in pods that have waited for an image for longer than a pull may take.
    fn late_pods(&self, now: Instant) -> Vec<PodRef> {
        let late = self.waiting.iter().filter(|(_, waiting)| {
            waiting.opt_in.is_some()
                && waiting.is_late(self.options.stalled_after, now)
                && (waiting.view.containers.iter().any(waits_for_image)
                    // The image may be here already, and the kubelet waits for its pull
                    // nevertheless.
                    || !waiting.stalled_images.is_empty()
                    || !self.absent_images(&waiting.view).is_empty())
        });
        late.map(|(pod, _)| pod.clone()).collect()
    }
}

async fn end_silent(
    connections: Arc<dyn PullConnections>,
    after: Duration,
    silent_before: BTreeSet<SocketAddr>,
) -> EndedConnections {
    let open_connections = match connections.connections().await {
        Ok(open_connections) => open_connections,
        Err(error) => return EndedConnections { ended: Vec::new(), error: Some(error) },
    };
    let mut outcome = EndedConnections { ended: Vec::new(), error: None };
    for connection in stalled_connections(&open_connections, after, &silent_before) {
        match connections.end(&connection).await {
            Ok(true) => outcome.ended.push(connection),
            // The connection ended by itself meanwhile.
            Ok(false) => {}
            Err(error) => {
                outcome.error = Some(error);
                break;
            }
        }
    }
    outcome
}
