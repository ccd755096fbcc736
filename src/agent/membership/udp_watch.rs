//! Watches whether peers answer over UDP. A firewall that blocks UDP shows in readiness, metric,
//! status and log, and in the Events of pods.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use rand::seq::IndexedRandom;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::control::UdpStatus;
use crate::decide::transport_choice::{MAX_BLOB, MAX_IMAGE};
use crate::decide::udp_path::{UdpPath, UdpProbe};
use crate::metrics::Metrics;
use crate::ports::{MeshSource, Prober};
use crate::util::clock;

/// Probes one other node at a time.
pub struct UdpWatch {
    /// Sends the probes.
    pub prober: Arc<dyn Prober>,
    /// The UDP port on which this agent listens.
    pub transfer_port: u16,
    /// Names the neighbors, which are connected over TCP.
    pub mesh_status: Arc<dyn MeshSource>,
    /// Has the addresses of the neighbors, and the state of UDP.
    pub inventory: PeerInventory,
    /// Addresses of possible agents, for an agent without neighbors.
    pub bootstrap_addresses: watch::Receiver<Vec<SocketAddr>>,
    /// The readiness check: UDP is not blocked.
    pub ready: watch::Sender<bool>,
    /// Metric of blocked UDP.
    pub metrics: Metrics,
}

/// Addresses of another agent: for UDP and for TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ProbeTarget {
    udp: SocketAddr,
    tcp: SocketAddr,
}

impl UdpWatch {
    /// Runs until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut path = UdpPath::new(clock::now(), rand::random());
        loop {
            let due = clock::sleep_until(Some(path.due()));
            if stop.run_until_cancelled(due).await.is_none() {
                return;
            }
            if stop.run_until_cancelled(self.probe_peer(&mut path)).await.is_none() {
                return;
            }
            self.publish(&path);
        }
    }

    async fn probe_peer(&self, path: &mut UdpPath) {
        let targets = self.targets().await;
        let over_udp: Vec<_> = targets.iter().map(|target| target.udp).collect();
        let preferred = path.prefer(&over_udp);
        let chosen = preferred.choose(&mut rand::rng());
        let Some(target) = chosen.and_then(|udp| targets.iter().find(|target| target.udp == *udp)) else {
            return path.record_skipped_probe(clock::now(), rand::random());
        };
        let probe = match self.prober.answers_udp(target.udp).await {
            Ok(true) => UdpProbe::Answered,
            Ok(false) => UdpProbe::Silent { tcp: self.prober.accepts_tcp(target.tcp).await },
            Err(error) => {
                tracing::debug!(address = %target.udp, %error, "cannot be probed");
                return path.record_skipped_probe(clock::now(), rand::random());
            }
        };
        path.record_probe(target.udp, probe, targets.len(), clock::now(), rand::random());
    }

    /// The neighbors, or without any the addresses of the last look-up. Both lists have a few
    /// hundred entries at most.
    async fn targets(&self) -> Vec<ProbeTarget> {
        let members = self.mesh_status.mesh().await.map(|status| status.members).unwrap_or_default();
        let neighbors: BTreeSet<_> =
            members.into_iter().filter(|member| member.neighbor).map(|member| member.peer_id).collect();
        let peers = if neighbors.is_empty() { Vec::new() } else { self.inventory.peers() };
        let mut targets: Vec<_> = peers
            .into_iter()
            .filter(|peer| neighbors.contains(&peer.id.to_string()))
            .map(|peer| ProbeTarget { udp: peer.transfer, tcp: peer.gossip })
            .collect();
        if targets.is_empty() {
            // Gossip's TCP port has the number of the UDP port.
            targets = self
                .bootstrap_addresses
                .borrow()
                .iter()
                .map(|address| ProbeTarget { udp: *address, tcp: *address })
                .collect();
        }
        targets.sort_unstable();
        targets.dedup();
        targets
    }

    fn publish(&self, path: &UdpPath) {
        let status = match path.blocked() {
            None => UdpStatus::default(),
            Some(blocked) => {
                let since = SystemTime::now().checked_sub(blocked.since.elapsed());
                let since = since.and_then(|since| since.duration_since(SystemTime::UNIX_EPOCH).ok());
                UdpStatus {
                    blocked_since: Some(since.unwrap_or_default().as_secs()),
                    port: self.transfer_port,
                    nodes: blocked.nodes,
                }
            }
        };
        let (is_blocked, nodes, port) = (status.blocked_since.is_some(), status.nodes, status.port);
        let was_blocked = self.inventory.udp().replace(status).blocked_since.is_some();
        self.ready.send_replace(!is_blocked);
        self.metrics.udp_blocked(is_blocked);
        match (was_blocked, is_blocked) {
            (false, true) => tracing::warn!(
                port,
                nodes,
                largest_blob = MAX_BLOB,
                largest_image = MAX_IMAGE,
                "other nodes answer over TCP and none over UDP: a firewall blocks UDP, so only small images come from \
                 peers, over TCP"
            ),
            (true, false) => tracing::info!("other nodes answer over UDP again"),
            _ => {}
        }
    }
}
