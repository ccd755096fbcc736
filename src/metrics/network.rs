//! The network around the agent: its open ports, its name look-ups, and what stands between it and its
//! peers.

use prometheus::{IntCounterVec, Registry};

use super::Metrics;
use super::register::counters;

#[derive(Clone)]
pub(super) struct NetworkMetrics {
    admin_rejected: IntCounterVec,
}

impl NetworkMetrics {
    pub(super) fn new(r: &Registry) -> Self {
        Self {
            admin_rejected: counters(
                r,
                "admin_connections_rejected_total",
                "Connections that the admin port closed at once, by the limit that was reached: address, all.",
                "reason",
            ),
        }
    }
}

impl Metrics {
    /// The admin port rejected a connection: `address`, `all`.
    pub fn admin_connection_rejected(&self, reason: &'static str) {
        self.network.admin_rejected.with_label_values(&[reason]).inc();
    }
}
