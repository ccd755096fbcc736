//! Creates and registers a metric in one step, and keeps the description of every metric for
//! `docs/metrics.md`.
//!
//! Names are constants of this program, each used once; any other name panics at the start, in
//! every test.

use std::cell::RefCell;

use prometheus::core::Collector;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

/// The description of one metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricDescription {
    /// The full name.
    pub name: String,
    /// `counter`, `gauge` or `histogram`, as in Prometheus' text format.
    pub kind: &'static str,
    /// The label, where the metric has one.
    pub label: Option<&'static str>,
    /// The HELP text.
    pub help: &'static str,
}

/// The registry while the metrics are created.
#[derive(Default)]
pub(super) struct Register {
    registry: Registry,
    descriptions: RefCell<Vec<MetricDescription>>,
}

impl Register {
    /// The filled registry, and the descriptions in the order of their creation.
    pub(super) fn into_parts(self) -> (Registry, Vec<MetricDescription>) {
        (self.registry, self.descriptions.into_inner())
    }

    fn add<C: Collector + Clone + 'static>(
        &self,
        kind: &'static str,
        name: &str,
        help: &'static str,
        label: Option<&'static str>,
        collector: C,
    ) -> C {
        self.registry.register(Box::new(collector.clone())).expect("each name is registered once");
        self.descriptions.borrow_mut().push(MetricDescription { name: full(name), kind, label, help });
        collector
    }
}

fn full(name: &str) -> String {
    format!("lighterman_{name}")
}

pub(super) fn counter(register: &Register, name: &str, help: &'static str) -> IntCounter {
    register.add("counter", name, help, None, IntCounter::new(full(name), help).expect("a constant name"))
}

pub(super) fn counters(register: &Register, name: &str, help: &'static str, label: &'static str) -> IntCounterVec {
    let counters = IntCounterVec::new(Opts::new(full(name), help), &[label]).expect("a constant name");
    register.add("counter", name, help, Some(label), counters)
}

pub(super) fn gauge(register: &Register, name: &str, help: &'static str) -> IntGauge {
    register.add("gauge", name, help, None, IntGauge::new(full(name), help).expect("a constant name"))
}

pub(super) fn gauges(register: &Register, name: &str, help: &'static str, label: &'static str) -> IntGaugeVec {
    let gauges = IntGaugeVec::new(Opts::new(full(name), help), &[label]).expect("a constant name");
    register.add("gauge", name, help, Some(label), gauges)
}

pub(super) fn histogram(register: &Register, name: &str, help: &'static str) -> Histogram {
    // From an image whose layers are all on the node to 10 GiB over a shared 1 Gbit/s link.
    let buckets = vec![0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0];
    let options = HistogramOpts::new(full(name), help).buckets(buckets);
    register.add("histogram", name, help, None, Histogram::with_opts(options).expect("a constant name"))
}
