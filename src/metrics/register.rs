//! Constructors that create and register a metric in one step.
//!
//! Names are constants of this program, each used once; any other name panics at the start, in
//! every test.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, collector: C) -> C {
    registry.register(Box::new(collector.clone())).expect("each name is registered once");
    collector
}

fn named(name: &str) -> String {
    format!("lighterman_{name}")
}

pub(super) fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(named(name), help).expect("a constant name"))
}

pub(super) fn counters(registry: &Registry, name: &str, help: &str, label: &str) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(named(name), help), &[label]).expect("a constant name"))
}

pub(super) fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(named(name), help).expect("a constant name"))
}

pub(super) fn gauges(registry: &Registry, name: &str, help: &str, label: &str) -> IntGaugeVec {
    register(registry, IntGaugeVec::new(Opts::new(named(name), help), &[label]).expect("a constant name"))
}

pub(super) fn histogram(registry: &Registry, name: &str, help: &str) -> Histogram {
    // From an image whose layers are all on the node to 10 GiB over a shared 1 Gbit/s link.
    let buckets = vec![0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0];
    let options = HistogramOpts::new(named(name), help).buckets(buckets);
    register(registry, Histogram::with_opts(options).expect("a constant name"))
}
