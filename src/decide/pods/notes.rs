//! Texts of Events that name neither a verdict nor the end of a recovery.

use crate::decide::pull_failure::STALLED;
use crate::decide::stalled_connections::TcpConnection;
use crate::oci::Reference;

/// Text of [`crate::model::PodReportKind::RecordRemoved`].
pub(super) fn record_removed(reference: &Reference) -> String {
    format!(
        "{reference} is broken on this node, and no node has the missing content. The agent removed the image record, \
         so the kubelet pulls the image from its registry, which answers."
    )
}

/// Text of [`crate::model::PodReportKind::Stalled`], for an image that is recovered.
pub(super) fn recovered_meanwhile(image: &str) -> String {
    format!("{STALLED} The agent recovers {image} from peers meanwhile: new pods of this node find the image at once.")
}

/// Text of [`crate::model::PodReportKind::PullEnded`], with the longest silent connection.
pub(super) fn pull_ended(longest: &TcpConnection, count: usize) -> String {
    let (remote, silent_s) = (longest.remote, longest.silent_for.as_secs());
    format!(
        "containerd had received nothing from {remote} for {silent_s} s, so the agent ended the connection ({count} in \
         all). The pull that used it fails, and the kubelet goes on with this node's later pulls (endStalledPulls)."
    )
}
