//! Text of a failed recovery. The pod's Event and the answer to a manual pull have the same text.

use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::progress::human_bytes;
use crate::agent::recovery::recover_error::RecoverError;
use crate::control::UdpStatus;
use crate::decide::transport_choice::{MAX_BLOB, MAX_IMAGE};
use crate::model::PodReportKind;

/// The cause and the failed nodes, without the last full stop. A remedy or the next step follows.
pub(in crate::agent) fn failure_text(error: &RecoverError, inventory: &PeerInventory) -> String {
    let nodes: Vec<_> = error.failed_peers().into_iter().map(|peer| inventory.node_of(peer)).collect();
    let nodes = if nodes.is_empty() { String::new() } else { format!(". Failed at: {}", nodes.join(", ")) };
    // No transport helps an image that is not recoverable.
    let needs_peers = error.report_kind() != PodReportKind::NotRecoverable;
    let udp = if needs_peers { udp_text(inventory.udp().status()) } else { String::new() };
    format!("{error}{nodes}{udp}")
}

/// Names a firewall that blocks UDP, and the limits of fetches over TCP.
fn udp_text(status: UdpStatus) -> String {
    let UdpStatus { blocked_since, port, nodes } = status;
    blocked_since.map_or_else(String::new, |_| {
        format!(
            ". UDP port {port} is blocked: {nodes} nodes answer this node over TCP and none over UDP, so the peers \
             are not at fault. Open UDP port {port} between all nodes. Until then, TCP serves images with at most \
             {} missing and no layer above {}",
            human_bytes(MAX_IMAGE),
            human_bytes(MAX_BLOB)
        )
    })
}
