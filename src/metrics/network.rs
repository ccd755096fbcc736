//! The network around the agent: its open ports, its DNS lookups, and the paths to its peers.

use prometheus::{IntCounter, IntCounterVec, IntGauge};

use super::Metrics;
use super::register::{Register, counter, counters, gauge};

#[derive(Clone)]
pub(super) struct NetworkMetrics {
    admin_rejected: IntCounterVec,
    dns_lookups: IntCounterVec,
    udp_blocked: IntGauge,
    clock_skew: IntGauge,
    fetched_over_tcp: IntCounter,
    stalled_connections: IntCounterVec,
}

impl NetworkMetrics {
    pub(super) fn new(r: &Register) -> Self {
        Self {
            admin_rejected: counters(
                r,
                "admin_connections_rejected_total",
                "Connections that the admin port closed at once, by the limit that was reached: address, subnet, all.",
                "reason",
            ),
            dns_lookups: counters(
                r,
                "dns_lookups_total",
                "Lookups of names of first peers, by result: answered, unanswered.",
                "result",
            ),
            udp_blocked: gauge(
                r,
                "udp_blocked",
                "1 while other nodes answer this node over TCP and none over UDP, so that only small images come.",
            ),
            fetched_over_tcp: counter(
                r,
                "fetched_over_tcp_bytes_total",
                "Blob bytes received over the mesh's TCP connections because UDP is blocked; part of fetched_bytes.",
            ),
            clock_skew: gauge(
                r,
                "clock_skew_seconds",
                "Seconds by which this node's clock is certainly ahead of the API server's clock; below zero: behind.",
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
    /// Whether other nodes answer over TCP and none over UDP.
    pub fn udp_blocked(&self, is_blocked: bool) {
        self.network.udp_blocked.set(is_blocked.into());
    }

    /// Sets the difference to the API server's clock.
    pub fn clock_compared(&self, ahead_seconds: i64) {
        self.network.clock_skew.set(ahead_seconds);
    }

    /// Counts bytes of a blob that came over the mesh.
    pub fn fetched_over_tcp(&self, bytes: u64) {
        self.network.fetched_over_tcp.inc_by(bytes);
    }

    /// A silent connection of containerd was `ended`, or the end `failed`.
    pub fn stalled_connection(&self, result: &'static str) {
        self.network.stalled_connections.with_label_values(&[result]).inc();
    }

    /// A name of first peers was resolved, or no DNS server answered.
    pub fn names_looked_up(&self, answered: bool) {
        let result = if answered { "answered" } else { "unanswered" };
        self.network.dns_lookups.with_label_values(&[result]).inc();
    }

    /// The admin port rejected a connection: `address`, `subnet`, `all`.
    pub fn admin_connection_rejected(&self, reason: &'static str) {
        self.network.admin_rejected.with_label_values(&[reason]).inc();
    }
}
