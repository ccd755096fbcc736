//! Layers that are retained where containerd discards them.

use std::collections::BTreeMap;

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::Metrics;
use super::register::{Register, counter, counters, gauge, gauges};
use crate::decide::fill::{FillFailure, FillSource, UnfilledReason};

#[derive(Clone)]
pub(super) struct LayerMetrics {
    bytes: IntGauge,
    images: IntGauge,
    lacking: IntGauge,
    lacking_reasons: IntGaugeVec,
    fetches_from_peers: IntCounterVec,
    fetches_from_registries: IntCounterVec,
    registry_bytes: IntCounter,
}

impl LayerMetrics {
    pub(super) fn new(r: &Register) -> Self {
        Self {
            bytes: gauge(r, "retained_layer_bytes", "Bytes of layers that the agent's leases retain."),
            images: gauge(r, "retained_images", "Images whose layers the agent's leases retain."),
            lacking: gauge(
                r,
                "images_lacking_layers",
                "Images of this node that should retain their layers and lack a layer, so that other nodes cannot fetch \
                 the image from this node.",
            ),
            lacking_reasons: gauges(
                r,
                "images_lacking_layers_by_reason",
                "Images of images_lacking_layers, by the reason why a layer is missing now.",
                "reason",
            ),
            fetches_from_peers: counters(
                r,
                "layer_fetches_from_peers_total",
                "Images whose missing layers were fetched from peers in the background, by outcome.",
                "outcome",
            ),
            fetches_from_registries: counters(
                r,
                "layer_fetches_from_registries_total",
                "Images whose missing layers were fetched from their registry in the background, by outcome.",
                "outcome",
            ),
            registry_bytes: counter(
                r,
                "layer_registry_bytes_total",
                "Bytes of missing layers that were fetched from registries in the background.",
            ),
        }
    }
}

impl Metrics {
    /// Sets the bytes and images that the agent's leases retain, and the images that lack a layer,
    /// in all and by reason.
    pub fn layers_retained(
        &self,
        bytes: u64,
        images: usize,
        lacking: usize,
        reasons: &BTreeMap<UnfilledReason, usize>,
    ) {
        let number = |count| i64::try_from(count).unwrap_or(i64::MAX);
        self.layers.bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        self.layers.images.set(number(images));
        self.layers.lacking.set(number(lacking));
        for reason in UnfilledReason::ALL {
            let count = reasons.get(&reason).copied().unwrap_or_default();
            self.layers.lacking_reasons.with_label_values(&[reason.label()]).set(number(count));
        }
    }

    /// Counts the end of a fetch of one image's missing layers.
    pub fn layer_fetch_ended(&self, source: FillSource, result: Result<(), FillFailure>) {
        let fetches = match source {
            FillSource::Peers => &self.layers.fetches_from_peers,
            FillSource::Registry => &self.layers.fetches_from_registries,
        };
        fetches.with_label_values(&[result.map_or_else(FillFailure::label, |()| "fetched")]).inc();
    }

    /// Counts bytes of a missing layer from a registry.
    pub fn registry_layer_bytes_received(&self, bytes: u64) {
        self.layers.registry_bytes.inc_by(bytes);
    }
}
