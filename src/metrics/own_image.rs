//! Images of the agent's own DaemonSet.

use prometheus::IntGauge;

use super::Metrics;
use super::register::{Register, gauge};

#[derive(Clone)]
pub(super) struct OwnImageMetrics {
    missing: IntGauge,
    protected: IntGauge,
}

impl OwnImageMetrics {
    pub(super) fn new(r: &Register) -> Self {
        Self {
            missing: gauge(
                r,
                "own_images_missing",
                "Images of the agent's DaemonSet that are not on this node, so that the next agent pod must pull.",
            ),
            protected: gauge(
                r,
                "own_images_protected",
                "Images of the agent's DaemonSet that are protected from the kubelet's image GC on this node.",
            ),
        }
    }
}

impl Metrics {
    /// Sets the images of the DaemonSet's template that this node lacks, and the protected images.
    pub fn own_images(&self, missing: usize, protected: usize) {
        let number = |count| i64::try_from(count).unwrap_or(i64::MAX);
        self.own_image.missing.set(number(missing));
        self.own_image.protected.set(number(protected));
    }
}
