//! Admission of peers: the number of verdicts and of token reviews.

use prometheus::IntCounterVec;

use super::Metrics;
use super::register::{Register, counters};

#[derive(Clone)]
pub(super) struct AdmissionMetrics {
    admissions: IntCounterVec,
    token_reviews: IntCounterVec,
}

impl AdmissionMetrics {
    pub(super) fn new(r: &Register) -> Self {
        Self {
            admissions: counters(r, "admissions_total", "Verdicts on peers' credentials, by result.", "result"),
            token_reviews: counters(
                r,
                "token_reviews_total",
                "Reviews of new tokens of peers by the API server, by result.",
                "result",
            ),
        }
    }
}

impl Metrics {
    /// Counts a token review by its result: `passed`, `refused`, `unanswered`, `over_budget`.
    pub fn token_reviewed(&self, result: &'static str) {
        self.admission.token_reviews.with_label_values(&[result]).inc();
    }

    /// Counts a verdict on a peer's credential: `admitted`, `on_grace`, `denied`, `cannot_tell`.
    pub fn admission_decided(&self, result: &'static str) {
        self.admission.admissions.with_label_values(&[result]).inc();
    }
}
