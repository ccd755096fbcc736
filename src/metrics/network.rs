//! The network around the agent: its open ports, its name look-ups, and what stands between it and
//! its peers.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};

use super::Metrics;
use super::register::{counter, counters, gauge};

#[derive(Clone)]
pub(super) struct NetworkMetrics {
    admin_rejected: IntCounterVec,
    name_look_ups: IntCounterVec,
    udp_blocked: IntGauge,
    clock_skew: IntGauge,
    fetched_over_tcp: IntCounter,
    stalled_connections: IntCounterVec,
}

impl NetworkMetrics {
    pub(super) fn new(r: &Registry) -> Self {
        Self {
            admin_rejected: counters(
                r,
                "admin_connections_rejected_total",
                "Connections that the admin port closed at once, by the limit that was reached: address, subnet, all.",
                "reason",
            ),
            name_look_ups: counters(
                r,
                "dns_lookups_total",
                "Times that a name or address of first peers was resolved, by result: answered, unanswered.",
                "result",
            ),
            udp_blocked: gauge(
                r,
                "udp_blocked",
                "1 while other nodes answer this one over TCP and none over UDP, so that only small images are fetched.",
            ),
            fetched_over_tcp: counter(
                r,
                "fetched_over_tcp_bytes_total",
                "Blob bytes received over the mesh's TCP connections because UDP is blocked; part of fetched_bytes.",
            ),
            clock_skew: gauge(
                r,
                "clock_skew_seconds",
                "Seconds that this node's clock is ahead of the API server's for certain; below zero it is behind.",
            ),
            stalled_connections: counters(
                r,
                "stalled_connections_total",
                "Silent connections of containerd that the agent ended or could not end, by result: ended, failed.",
                "result",
            ),
        }
    }
}

impl Metrics {
    /// Other nodes answer over TCP and none over UDP, or UDP is open.
    pub fn udp_blocked(&self, is_blocked: bool) {
        self.network.udp_blocked.set(is_blocked.into());
    }

    /// This node's clock was compared with the API server's.
    pub fn clock_compared(&self, ahead_seconds: i64) {
        self.network.clock_skew.set(ahead_seconds);
    }

    /// Bytes of a blob came over the mesh.
    pub fn fetched_over_tcp(&self, bytes: u64) {
        self.network.fetched_over_tcp.inc_by(bytes);
    }

    /// A silent connection of containerd was `ended`, or that `failed`.
    pub fn stalled_connection(&self, result: &'static str) {
        self.network.stalled_connections.with_label_values(&[result]).inc();
    }

    /// A name of first peers was resolved, or no server answered.
    pub fn names_looked_up(&self, answered: bool) {
        let result = if answered { "answered" } else { "unanswered" };
        self.network.name_look_ups.with_label_values(&[result]).inc();
    }

    /// The admin port rejected a connection: `address`, `subnet`, `all`.
    pub fn admin_connection_rejected(&self, reason: &'static str) {
        self.network.admin_rejected.with_label_values(&[reason]).inc();
    }
}
