//! The door: who asked to be admitted, and what became of it.

use prometheus::{IntCounterVec, Registry};

use super::Metrics;
use super::register::counters;

#[derive(Clone)]
pub(super) struct AdmissionMetrics {
    admissions: IntCounterVec,
    token_reviews: IntCounterVec,
}

impl AdmissionMetrics {
    pub(super) fn new(r: &Registry) -> Self {
        Self {
            admissions: counters(r, "admissions_total", "Decisions on who may join, by result.", "result"),
            token_reviews: counters(
                r,
                "token_reviews_total",
                "First meetings with a peer's token at the door, by what the API server said of it.",
                "result",
            ),
        }
    }
}

impl Metrics {
    /// The API server was to say whether a token is good: `passed`, `refused`, `unanswered`, `over_budget`.
    pub fn token_reviewed(&self, result: &'static str) {
        self.admission.token_reviews.with_label_values(&[result]).inc();
    }

    /// A peer asked to be admitted: `admitted`, `on_grace`, `denied`, `cannot_tell`.
    pub fn admission_decided(&self, result: &'static str) {
        self.admission.admissions.with_label_values(&[result]).inc();
    }
}
