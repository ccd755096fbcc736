//! Stalled pulls: ends containerd's silent connections, where the options permit that.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Action, Step, notes};
use crate::decide::cause::waits_for_image;
use crate::decide::container_records::{Subject, Topic};
use crate::decide::policy::RecoveryOptions;
use crate::decide::stalled_connections::{SILENT_SERVER_LIFE, TcpConnection};
use crate::model::{PodRef, PodReportKind};

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
}

impl Step<'_> {
    /// Ends silent connections of containerd while a pod waits longer than a pull may take.
    ///
    /// The kubelet may be pulling for another pod, or for a deleted pod. The kernel shows which
    /// connections are silent, and the pods' Events do not.
    pub(super) fn end_stalled_pulls(&mut self) {
        let RecoveryOptions { dry_run, delete_pods: _, stalled_after, end_stalled_pulls } = self.pods.options.recovery;
        let is_permitted = end_stalled_pulls && !dry_run && self.pods.options.has_connections;
        let Some(after) = stalled_after.filter(|_| is_permitted) else { return };
        let now = self.context.now;
        let is_early = self.pods.stall_watch.next_listing.is_some_and(|at| at > now);
        if self.pods.stall_watch.is_listing || is_early || self.late_pods().is_empty() {
            return;
        }
        let StallWatch { is_listing, next_listing, silent_servers } = &mut self.pods.stall_watch;
        silent_servers.retain(|_, at| now.saturating_duration_since(*at) < SILENT_SERVER_LIFE);
        (*is_listing, *next_listing) = (true, Some(now + LIST_INTERVAL));
        let silent_before = silent_servers.keys().copied().collect();
        self.actions.push(Action::EndConnections { after, silent_before });
    }

    pub(super) fn on_connections_ended(&mut self, ended: &[TcpConnection]) {
        let watch = &mut self.pods.stall_watch;
        watch.is_listing = false;
        watch.silent_servers.extend(ended.iter().map(|connection| (connection.remote, self.context.now)));
        let Some(longest) = ended.first() else { return };
        let note = notes::pull_ended(longest, ended.len());
        for pod in self.late_pods() {
            let topic = Topic::Event(PodReportKind::PullEnded);
            if self.pods.container_records.mark_reported(&pod, &Subject::Pod, topic) {
                self.report(pod, PodReportKind::PullEnded, note.clone());
            }
        }
    }

    /// Opted-in pods that have waited for an image for longer than a pull may take.
    fn late_pods(&self) -> Vec<PodRef> {
        let stalled_after = self.pods.options.recovery.stalled_after;
        let late = self.pods.waiting.iter().filter(|(_, waiting)| {
            waiting.opt_in.is_some()
                && waiting.is_late(stalled_after, self.context.now)
                && (waiting.view.containers.iter().any(waits_for_image)
                    // The image may be here already, and the kubelet waits for its pull
                    // nevertheless.
                    || !waiting.stalled_images.is_empty()
                    || !self.absent_images(&waiting.view).is_empty())
        });
        late.map(|(pod, _)| pod.clone()).collect()
    }
}
