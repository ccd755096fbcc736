//! Layers that are retained where containerd discards them.

use prometheus::{IntGauge, Registry};

use super::Metrics;
use super::register::gauge;

#[derive(Clone)]
pub(super) struct LayerMetrics {
    bytes: IntGauge,
    images: IntGauge,
    lacking: IntGauge,
}

impl LayerMetrics {
    pub(super) fn new(r: &Registry) -> Self {
        Self {
            bytes: gauge(r, "retained_layer_bytes", "Bytes of layers that the agent's leases hold."),
            images: gauge(r, "retained_images", "Images whose layers the agent's leases hold."),
            lacking: gauge(
                r,
                "images_lacking_layers",
                "Images of this node that are to keep their layers and lack one, so that other nodes cannot fetch them from here.",
            ),
        }
    }
}

impl Metrics {
    /// Bytes and images that the agent's leases hold, and images that lack a layer.
    pub fn layers_retained(&self, bytes: u64, images: usize, lacking: usize) {
        let number = |count| i64::try_from(count).unwrap_or(i64::MAX);
        self.layers.bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        self.layers.images.set(number(images));
        self.layers.lacking.set(number(lacking));
    }
}
