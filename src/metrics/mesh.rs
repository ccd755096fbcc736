//! The mesh as this agent sees it: members, announcements, and traffic.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::Metrics;
use super::register::{Register, counter, counters, gauge, gauges};
use crate::model::MeshStatus;

#[derive(Clone)]
pub(super) struct MeshMetrics {
    members: IntGaugeVec,
    behind: IntGauge,
    neighbors: IntGauge,
    over_limit: IntCounter,
    inventory_blobs: IntGauge,
    inventory_bytes: IntGauge,
    announced_items: IntGauge,
    incomplete_images: IntGauge,
    rejected: IntCounterVec,
    bans: IntCounter,
    received_bytes: IntCounter,
    sent_bytes: IntCounter,
}

impl MeshMetrics {
    pub(super) fn new(r: &Register) -> Self {
        Self {
            members: gauges(r, "mesh_members", "Other members of the mesh, by state.", "state"),
            behind: gauge(r, "mesh_members_behind", "Members with announcements that this agent has not received yet."),
            neighbors: gauge(r, "mesh_neighbors", "Members with a gossip connection to this agent."),
            over_limit: counter(
                r,
                "mesh_over_limit_total",
                "Times that this agent accepted no new member because 16384 members are known.",
            ),
            inventory_blobs: gauge(r, "inventory_blobs", "Distinct blobs that other nodes announce."),
            inventory_bytes: gauge(r, "inventory_bytes", "Bytes of memory that the inventory of all peers takes."),
            announced_items: gauge(r, "announced_items", "Blobs and image names that this node announces."),
            incomplete_images: gauge(
                r,
                "incomplete_images",
                "Images of this node that are not announced because blobs of the image are missing here.",
            ),
            rejected: counters(
                r,
                "gossip_rejected_total",
                "Mesh messages that were rejected, above a rate limit or unreadable, by reason. Ignored ones do not count.",
                "reason",
            ),
            bans: counter(
                r,
                "peer_bans_total",
                "Times that a peer was banned for a while; the log names the peer and the fault.",
            ),
            received_bytes: counter(r, "mesh_received_bytes_total", "Bytes received on the mesh's connections."),
            sent_bytes: counter(r, "mesh_sent_bytes_total", "Bytes sent on the mesh's connections."),
        }
    }
}

impl Metrics {
    /// Sets the values of a mesh status.
    pub fn mesh_counted(&self, status: &MeshStatus) {
        let set = |gauge: &IntGauge, value: usize| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        let states = [
            ("alive", status.alive),
            ("suspected", status.suspected),
            ("down", status.down),
            ("banned", status.banned),
        ];
        states.iter().for_each(|(state, members)| set(&self.mesh.members.with_label_values(&[state]), *members));
        set(&self.mesh.behind, status.members.iter().filter(|member| member.behind > 0).count());
        set(&self.mesh.neighbors, status.neighbors);
        let before = self.mesh.over_limit.get();
        self.mesh.over_limit.inc_by(status.over_limit.saturating_sub(before));
        set(&self.mesh.inventory_blobs, status.inventory_blobs);
        set(&self.mesh.inventory_bytes, status.inventory_bytes);
    }

    /// Sets the number of announced items.
    pub fn items_announced(&self, items: usize) {
        self.mesh.announced_items.set(i64::try_from(items).unwrap_or(i64::MAX));
    }

    /// Sets the number of images with missing blobs.
    pub fn images_incomplete(&self, images: usize) {
        self.mesh.incomplete_images.set(i64::try_from(images).unwrap_or(i64::MAX));
    }

    /// Counts a ban.
    pub fn peer_banned(&self) {
        self.mesh.bans.inc();
    }

    /// Counts bytes received over the mesh.
    pub fn mesh_received(&self, bytes: u64) {
        self.mesh.received_bytes.inc_by(bytes);
    }

    /// Counts bytes sent over the mesh.
    pub fn mesh_sent(&self, bytes: u64) {
        self.mesh.sent_bytes.inc_by(bytes);
    }

    /// Counts a mesh message that was rejected or could not be read.
    pub fn gossip_rejected(&self, reason: &'static str) {
        self.mesh.rejected.with_label_values(&[reason]).inc();
    }
}
